"""A run as event-model documents: what Bluesky's tools read (start, descriptor, event, stream_resource, ... stop).

The documents are derived from the run's journal alone. So they can be had live (:func:`follow`), at the end
(``documents.jsonl`` in the run folder) or years later (:func:`documents`), and are the same each time: their uids are
named after the run's id, their times are the journal's. The documents of an unfinished run are the first documents of
the finished one.

========== ============================================ ==================================================
stream     an event is                                  its data
========== ============================================ ==================================================
overview   the overview image                           ``electrons``; ``frame`` in ``frames.h5``
primary    one measured position                        ``y``, ``x`` [m], ``electrons``, ``value``, ``sigma``
                                                        (null where the frame taught nothing), descriptors;
                                                        ``frame`` in ``frames.h5``
lost       a position that died with its exposure       ``y``, ``x`` [m], ``electrons``
decision   one decision of the loop                     ``points``, ``sigma_max``, ``electrons``, ``chosen`` ...
========== ============================================ ==================================================

Schemas: https://github.com/bluesky/event-model. ``frames.h5`` is written when the run ends.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stemloop.campaign.journal import Journal
from stemloop.campaign.recipes import RECIPES
from stemloop.campaign.settings import Settings
from stemloop.core.durable import write_whole
from stemloop.core.errors import InputError
from stemloop.core.instruction import from_dict
from stemloop.core.structure import QUANTITIES
from stemloop.reduce.spectra import SCALARIZERS

#: The file with all documents of a run, one ``{"name": ..., "doc": ...}`` a line.
FILE = "documents.jsonl"

Document = tuple[str, dict[str, Any]]

_DEVICE = "microscope"
_OVERVIEW = "overview"
_DECISION: dict[str, tuple[str, str]] = {
    "points": ("integer", ""),
    "electrons": ("number", "electrons"),
    "seconds": ("number", "s"),
    "sigma_max": ("number", "value"),
    "sigma_mean": ("number", "value"),
    "stop": ("string", ""),
}


class Documents:
    """Turns a journal's records, in their order, into documents. Pure: the same records give the same documents."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._frames_uri = (Path(folder).resolve() / "frames.h5").as_uri()
        self._settings = settings
        self._unit = _unit(settings)
        self._run = ""
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._descriptors: dict[str, str] = {}
        self._events: dict[str, int] = {}
        self._datasets: dict[tuple[str, str], tuple[str, int]] = {}

    def feed(self, record: dict[str, Any]) -> Iterator[Document]:
        """The documents that this record brings."""
        self._known[record["kind"], record["key"]] = record
        kind, key = record["kind"], record["key"]
        if kind == "run":
            yield self._start(record)
        elif kind == "exposure" and key == _OVERVIEW and not record["lost"]:
            yield from self._overview(record)
        elif kind == "result":
            yield from self._measured(record)
        elif kind == "decision":
            yield from self._decided(record)
            if record["stop"]:
                yield self._stop(record)

    # ----------------------------------------------------------------------------------------------------- the run

    def _uid(self, *words: object) -> str:
        return str(uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, f"stemloop:{self._run}"), ":".join(map(str, words))))

    def _start(self, record: dict[str, Any]) -> Document:
        self._run = record["id"]
        chosen = {name: value for name, value in self._settings.to_dict().items() if value is not None}
        return "start", {
            "uid": self._uid("start"),
            "time": _when(record),
            "plan_name": f"stemloop {self._settings.recipe}",
            "plan_type": "adaptive",
            "detectors": ["frame"],
            "motors": ["y", "x"],
            "hints": {"dimensions": [[["y", "x"], "primary"]]},
            "stemloop": {
                "version": record.get("version", ""),
                "run": self._run,
                "settings": chosen,
                "unit": self._unit,
            },
            **({"sample": {"name": self._settings.specimen}} if self._settings.specimen else {}),
        }

    def _stop(self, record: dict[str, Any]) -> Document:
        return "stop", {
            "uid": self._uid("stop"),
            "run_start": self._uid("start"),
            "time": _when(record),
            "exit_status": "success",
            "reason": record["stop"],
            "num_events": dict(self._events),
        }

    # -------------------------------------------------------------------------------------------------- the events

    def _overview(self, record: dict[str, Any]) -> Iterator[Document]:
        keys = {"electrons": _key("number", "electrons")}
        yield from self._described("overview", record, keys)
        yield self._event("overview", {"electrons": (record["electrons"], _when(record))})
        yield from self._frames("overview", record, 1)

    def _measured(self, result: dict[str, Any]) -> Iterator[Document]:
        name = f"batch-{result['key']}"
        exposure, command = self._known["exposure", name], self._known["command", name]
        positions = list(getattr(from_dict(command["instruction"]), "positions_m", ()))
        share = exposure["electrons"] / max(1, len(positions))
        asked_s, found_s = _when(exposure), _when(result)
        keys = {"y": _key("number", "m"), "x": _key("number", "m"), "electrons": _key("number", "electrons")}
        stream = "lost" if exposure["lost"] else "primary"
        described = {} if exposure["lost"] else (result.get("descriptors") or {})
        if stream == "primary":
            keys |= {"value": _key("number", self._unit), "sigma": _key("number", self._unit)}
            for field, rows in described.items():
                columns = len(rows[0]) if isinstance(rows[0], list) else 0
                keys[f"descriptor_{field}"] = _key("array" if columns else "number", "", [columns] if columns else [])
                if columns == len(QUANTITIES):
                    keys[f"descriptor_{field}"]["quantities"] = list(QUANTITIES)
        yield from self._described(stream, exposure, keys)
        for i, (y, x) in enumerate(positions):
            data: dict[str, tuple[Any, float]] = {"y": (y, asked_s), "x": (x, asked_s), "electrons": (share, asked_s)}
            if stream == "primary":
                data |= {"value": (result["value"][i], found_s), "sigma": (result["sigma"][i], found_s)}
                data |= {f"descriptor_{field}": (rows[i], found_s) for field, rows in described.items()}
            yield self._event(stream, data)
        if stream == "primary":
            yield from self._frames("primary", exposure, len(positions))

    def _decided(self, record: dict[str, Any]) -> Iterator[Document]:
        keys = {name: _key(kind, self._unit if unit == "value" else unit) for name, (kind, unit) in _DECISION.items()}
        keys["chosen"] = _key("array", "", [None])
        if "decision" not in self._descriptors:
            yield self._descriptor("decision", record, keys, {})
        data = {name: (record[name], _when(record)) for name in (*_DECISION, "chosen")}
        yield self._event("decision", {**data, "stop": (record["stop"] or "", _when(record))})

    def _described(self, stream: str, exposure: dict[str, Any], keys: dict[str, Any]) -> Iterator[Document]:
        """The descriptor of a stream and the resource of its frames, before its first event."""
        if stream in self._descriptors:
            return
        shaped, calibration = exposure.get("frames"), dict(exposure.get("calibration") or {})
        if shaped is not None:
            keys["frame"] = {
                **_key("array", "counts", [1, *shaped["shape"]]),
                "dtype_numpy": shaped["dtype"],
                "external": "STREAM:",
            }
        for name in ("stream", "first", "count", "positions_m"):
            calibration.pop(name, None)
        yield self._descriptor(stream, exposure, keys, calibration)
        if shaped is None:
            return
        dataset, _ = self._dataset(exposure)
        yield (
            "stream_resource",
            {
                "uid": self._uid("resource", stream),
                "run_start": self._uid("start"),
                "data_key": "frame",
                "mimetype": "application/x-hdf5",
                "uri": self._frames_uri,
                "parameters": {"dataset": dataset, "swmr": False, "chunk_shape": [1, *shaped["shape"]]},
            },
        )

    def _descriptor(
        self, stream: str, record: dict[str, Any], keys: dict[str, Any], setting: dict[str, Any]
    ) -> Document:
        self._descriptors[stream], self._events[stream] = self._uid("descriptor", stream), 0
        for key in keys.values():
            key["object_name"] = _DEVICE
        settings = {name: value for name, value in setting.items() if _kind(value) is not None}
        return "descriptor", {
            "uid": self._descriptors[stream],
            "run_start": self._uid("start"),
            "time": _when(record),
            "name": stream,
            "data_keys": keys,
            "object_keys": {_DEVICE: list(keys)},
            "configuration": {
                _DEVICE: {
                    "data": settings,
                    "timestamps": dict.fromkeys(settings, _when(record)),
                    "data_keys": {name: _key(*_kind(value)) for name, value in settings.items()},  # type: ignore[misc]
                }
            },
            "hints": {_DEVICE: {"fields": [name for name in ("value", "sigma_max") if name in keys]}},
        }

    def _event(self, stream: str, data: dict[str, tuple[Any, float]]) -> Document:
        self._events[stream] += 1
        number = self._events[stream]
        return "event", {
            "uid": self._uid("event", stream, number),
            "descriptor": self._descriptors[stream],
            "seq_num": number,
            "time": max(when for _, when in data.values()),
            "data": {name: _finite(value) for name, (value, _) in data.items()},
            "timestamps": {name: when for name, (_, when) in data.items()},
            "filled": {},
        }

    def _frames(self, stream: str, exposure: dict[str, Any], count: int) -> Iterator[Document]:
        """Which rows of ``frames.h5`` the last ``count`` events are."""
        if exposure.get("frames") is None:
            return
        dataset, row = self._dataset(exposure)
        self._datasets[_shape(exposure)] = (dataset, row + count)
        last = self._events[stream]
        yield (
            "stream_datum",
            {
                "uid": self._uid("datum", stream, last),
                "stream_resource": self._uid("resource", stream),
                "descriptor": self._descriptors[stream],
                "indices": {"start": row, "stop": row + count},
                "seq_nums": {"start": last - count + 1, "stop": last + 1},
            },
        )

    def _dataset(self, exposure: dict[str, Any]) -> tuple[str, int]:
        """Where ``frames.h5`` has the frames of this stream, type and shape, and how many rows are there already."""
        known = _shape(exposure)
        if known not in self._datasets:
            count = sum(1 for stream, _ in self._datasets if stream == known[0])
            name = known[0] if not count else f"{count + 1}_{known[0]}"
            self._datasets[known] = (f"entry/{name}/data", 0)
        return self._datasets[known]


def _shape(exposure: dict[str, Any]) -> tuple[str, str]:
    return exposure["calibration"]["stream"], json.dumps(exposure["frames"], sort_keys=True)


def _when(record: dict[str, Any]) -> float:
    return float(record.get("at_s", 0.0))


def _finite(value: Any) -> Any:
    """Numbers that JSON does not know become null."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(dtype: str, units: str, shape: list[int | None] | None = None) -> dict[str, Any]:
    return {"source": "stemloop", "dtype": dtype, "shape": shape or [], "units": units}


def _kind(value: Any) -> tuple[str, str, list[int | None]] | None:
    """(dtype, units, shape) of a calibration's value; None for what a document cannot describe."""
    if isinstance(value, bool):
        return "boolean", "", []
    if isinstance(value, str):
        return "string", "", []
    if isinstance(value, (int, float)):
        return "number", "", []
    if isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
        return "array", "", [len(value)]
    return None


def _unit(settings: Settings) -> str:
    if settings.recipe == "eels-map":
        return SCALARIZERS[settings.scalarizer or "Ti-L23"].unit
    return RECIPES[settings.recipe].unit


def documents(run_folder: str | Path) -> Iterator[Document]:
    """All documents of a run, finished or not, from its journal: ``(name, document)`` in the order of events.

    Raises
    ------
    InputError, IntegrityError
        If the folder holds no run, or its journal is damaged.
    """
    maker, journal = _open(Path(run_folder))
    for record in journal.records:
        yield from maker.feed(record)


def follow(run_folder: str | Path, poll_s: float = 0.2, still: Callable[[], bool] = lambda: True) -> Iterator[Document]:
    """The documents of a run while it goes on: each when the record behind it is on the disk. Ends after the stop
    document, or when ``still`` answers no."""
    maker, journal = _open(Path(run_folder))
    known = 0
    while True:
        going = still()
        for record in journal.records[known:]:
            for name, doc in maker.feed(record):
                yield name, doc
                if name == "stop":
                    return
        known = len(journal.records)
        if not going:
            return
        time.sleep(poll_s)
        journal = Journal(Path(run_folder) / "journal.jsonl", readonly=True)


def _open(folder: Path) -> tuple[Documents, Journal]:
    settings = Settings.load(folder / "settings.json")
    if not (folder / "journal.jsonl").exists():
        raise InputError(f"{folder} has no journal yet: nothing was done in this run.")
    return Documents(folder, settings), Journal(folder / "journal.jsonl", readonly=True)


def line(name: str, doc: dict[str, Any]) -> str:
    """A document as a line of JSON; keys in their order, so that the same documents are the same bytes."""
    return json.dumps({"name": name, "doc": doc}, separators=(",", ":"), allow_nan=False)


def write(run_folder: str | Path) -> dict[str, int]:
    """Write ``documents.jsonl`` (whole or not at all) and say how many documents of each name it has."""
    count: dict[str, int] = {}
    lines = []
    for name, doc in documents(run_folder):
        count[name] = count.get(name, 0) + 1
        lines.append(line(name, doc) + "\n")
    write_whole(Path(run_folder) / FILE, "".join(lines))
    return count
