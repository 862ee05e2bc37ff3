"""Results kept by content: one small JSON file each, safe with several processes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from stemloop.core.errors import StorageError
from stemloop.core.record import content_hash
from stemloop.energetics.calculators import Result


def default_place() -> Path:
    """``$STEMLOOP_CACHE`` if set, else ``~/.cache/stemloop/energies``."""
    chosen = os.environ.get("STEMLOOP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "stemloop" / "energies"


class Cache:
    """A folder of results by their task's key.

    A file is written beside its place and renamed, so a reader sees all of it or none; two processes that write the
    same key write the same content. An entry that is broken (cut short, edited, of another form) counts as absent:
    it is calculated again and replaced.
    """

    def __init__(self, place: str | Path | None = None) -> None:
        self.place = Path(place) if place is not None else default_place()

    def path(self, key: str) -> Path:
        """Where the result of ``key`` is kept."""
        return self.place / key[:2] / f"{key}.json"

    def get(self, key: str) -> Result | None:
        """The result kept under ``key``, or None."""
        try:
            entry = json.loads(self.path(key).read_text())
            if entry["key"] != key or entry["sha256"] != content_hash(entry["result"]):
                return None
            return Result.from_dict(entry["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, result: Result) -> None:
        """Keep ``result`` under ``key``; raises StorageError when the place cannot be written."""
        plain = result.to_dict()
        text = json.dumps({"key": key, "sha256": content_hash(plain), "result": plain})
        target = self.path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{key[:8]}-")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                os.replace(beside, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(beside)
                raise
        except OSError as error:
            raise StorageError(
                f"cannot keep energies in {self.place}: {error.strerror or error}. "
                "Set STEMLOOP_CACHE to a folder that can be written."
            ) from error
