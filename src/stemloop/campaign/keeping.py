"""Landing logs and sealed files as files: sealed, verified, described, repaired.

A log is sealed by a child process that reads it itself; in between, no frame is touched by the process that called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, IntegrityError
from stemloop.core.protocols import Block, Encoded
from stemloop.core.spans import Span
from stemloop.store import files, pipelines, sealing
from stemloop.store.readers import look
from stemloop.store.sealed import Sealed
from stemloop.stream.landing import LandingLog


def decode(block: Encoded) -> NDArray[Any]:
    """The frames (n, ...) of a block of any codec of the house."""
    dtype = np.dtype(block.dtype)
    if block.codec in pipelines.KNOWN:
        return pipelines.unpack(block.payload, (block.n, *block.shape), dtype, block.codec)
    return _block(block).dense().astype(dtype, copy=False)


def _block(block: Encoded) -> Block:
    """What is in a block of a codec of ``stream``."""
    from stemloop.stream import codec  # compiled kernels: loaded only where a block needs them

    found = codec.decode(block.payload)
    if (found.frames, *found.shape) != (block.n, *block.shape):
        raise IntegrityError(
            f"a block of stream {block.stream!r} holds {found.frames} frames of {found.shape}, not {block.n} of "
            f"{block.shape}."
        )
    return found


def pack(block: Encoded, rows: int) -> bytes | None:
    """The deflated chunk of ``rows`` frames of a block of electron events, without making the frames; None for any
    other block."""
    if block.codec in pipelines.KNOWN:
        return None
    from stemloop.stream.deflated import deflated
    from stemloop.stream.events import EventBlock
    from stemloop.stream.gaps import GapBlock

    found = _block(block)
    return deflated(EventBlock.of(found), block.dtype, rows) if isinstance(found, EventBlock | GapBlock) else None


def seal_log(
    log: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    calibrations: Mapping[str, Mapping[str, Any]] | None = None,
    positions: Mapping[str, NDArray[np.float64]] | None = None,
    logs: Mapping[str, Mapping[str, Any]] | None = None,
    profile: str = "portable",
    overwrite: bool = False,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Seal the landing log ``log``; the rest as :func:`stemloop.store.files.seal`. What was declared lost in the log
    is declared lost in the file. A damaged log is an :class:`IntegrityError`: repair it first."""
    look(Path(log))
    known = files.known(run, calibrations, positions, logs, profile=profile)
    arguments = {"log": os.path.abspath(log)}
    function = "stemloop.campaign.keeping:write"
    return files.seal_in_child(function, arguments, path, known, overwrite=overwrite, timeout_s=timeout_s)


def write(path: str, log: str, folder: Path) -> dict[str, dict[str, Any]]:
    """In the child: write the sealed file ``path`` from ``log`` and from what standard input tells."""
    known = files.read_known(sys.stdin.buffer)
    with LandingLog(log, readonly=True) as source:
        lost = {stream: list(account.lost) for stream, account in source.ledger().items() if account.lost}
        known = replace(known, lost=lost, run={"id": source.run, **known.run})
        return sealing.write(path, source, known, decode, pack)


# ----------------------------------------------------------------------------------------- either kind of file


@dataclass(frozen=True)
class Report:
    """What a log or a sealed file is. ``streams``: for each stream or dataset its facts. ``flaws``: a line a damaged
    place. ``facts``: of the file as a whole."""

    kind: str
    facts: dict[str, Any]
    streams: dict[str, dict[str, Any]]
    flaws: list[str]


def _is_log(path: Path) -> bool:
    look(path)
    with open(path, "rb") as file:
        return file.read(8) == b"STEMLOG\n"


def examine(path: Path) -> Report:
    """Look at every byte of a landing log or of a sealed file."""
    return _examine_log(path) if _is_log(path) else _examine_sealed(path)


def _examine_log(path: Path) -> Report:
    with LandingLog(path, readonly=True) as log:
        flaws = []
        for damage in log.damage:
            what = "an unfinished record, never acknowledged" if damage.torn else "a damaged record"
            flaws.append(f"bytes {damage.offset} to {damage.offset + damage.length - 1}: {what}")
        streams: dict[str, dict[str, Any]] = {}
        for head, size in log.heads():
            facts = streams.setdefault(head.stream, {"blocks": 0, "bytes": 0, "codec": "", "dtype": "", "shape": ()})
            facts["blocks"] += 1
            facts["bytes"] += size
            facts.update(codec=head.codec, dtype=head.dtype, shape=list(head.shape))
        for stream, account in log.ledger().items():
            streams.setdefault(stream, {}).update(account.counts, balanced=account.balanced)
        facts = {"run": log.run, "bytes": path.stat().st_size, "closed": log.closed_cleanly}
        return Report("landing log", facts, streams, flaws)


def _examine_sealed(path: Path) -> Report:
    with Sealed(path) as file:
        story = file.chart.story
        streams = {
            entry.name: {
                "frames": len(entry.stored),
                "bytes": int(entry.chunks["size"].sum()),
                "codec": entry.codec,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "missing": sum(stop - first for first, stop in entry.missing),
                "declared lost": sum(stop - first for first, stop in story["lost"].get(entry.stream, [])),
            }
            for entry in file.chart.sets
        }
        facts = {
            "run": story["run"].get("id", ""),
            "bytes": path.stat().st_size,
            "profile": story["profile"],
            "sha256": file.chart.sha256,
        }
        return Report("sealed file", facts, streams, [str(flaw) for flaw in file.flaws()])


def verify(path: Path) -> Report:
    """:func:`examine`, and an :class:`IntegrityError` that names the place if a byte is not what was written."""
    report = examine(path)
    if report.flaws:
        more = f" (and {len(report.flaws) - 1} more places)" if len(report.flaws) > 1 else ""
        raise IntegrityError(
            f"{path}: {report.flaws[0]}{more}. Save what is good with: stemloop file repair {path} OUT"
        )
    return report


def repair(path: Path, out: Path, *, overwrite: bool = False) -> dict[str, list[Span]]:
    """Copy everything that fits its checksum into ``out``, and declare the rest lost there; ``path`` stays as it is.

    Returns for each stream the ranges that were given up.
    """
    if out.exists() and (not overwrite or out.samefile(path)):
        raise InputError(f"{out} is there already; choose another name.")
    if not _is_log(path):
        lost: dict[str, list[Span]] = files.repair(path, out, overwrite=overwrite)["lost"]
        return lost
    out.unlink(missing_ok=True)
    with LandingLog(path, readonly=True) as log, LandingLog(out, log.run) as made:
        for block in log.blocks(skip_corrupt=True):
            made.append(block)
        lost = {}
        for stream, account in log.ledger().items():
            for first, stop in account.lost:
                made.declare_lost(stream, first, stop, "declared lost before")
            lost[stream] = list(account.unaccounted)
            for first, stop in account.unaccounted:
                made.declare_lost(stream, first, stop, f"damaged in {path.name}")
    return {stream: spans for stream, spans in lost.items() if spans}


def missing(spans: Sequence[Span]) -> str:
    """Ranges in words, such as ``16-23, 40``."""
    return ", ".join(f"{first}" if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in spans)
