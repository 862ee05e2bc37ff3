"""What a run does when its disk takes nothing more: it says so once, waits, and goes on by itself."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stemloop.campaign.journal import Journal
from stemloop.core.errors import StorageError

Answer = TypeVar("Answer")

_PROBE_BYTES = 1 << 20
_PAUSE_S = 0.25
#: How long something may fail on a disk that has room before its error is believed; frames that were turned away are
#: sent again after some seconds of silence.
_IN_VAIN_S = 45.0
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

log = logging.getLogger("stemloop")


class Patience:
    """Repeats what failed with a :class:`StorageError` for as long as ``folder`` is full or read-only.

    Nothing that was acknowledged is touched meanwhile: frames wait at the instrument's side, which exposes nothing
    more. Any other reason (no permission, no folder) is raised at once.
    """

    def __init__(self, folder: Path, pause_s: float = _PAUSE_S, in_vain_s: float = _IN_VAIN_S) -> None:
        self._probe = Path(folder) / f".room.{os.getpid()}"
        self._pause_s, self._in_vain_s = pause_s, in_vain_s

    def __call__(self, do: Callable[[], Answer]) -> Answer:
        """What ``do`` returns, at last."""
        said, room_since = False, 0.0
        while True:
            try:
                answer = do()
            except StorageError as error:
                why = self._refusal()
                passing = why is not None and why.errno in _PASSING
                room_since = room_since or time.monotonic()
                if not passing and (why is not None or time.monotonic() - room_since > self._in_vain_s):
                    raise
                if not said:
                    self._say(why.strerror if why else str(error).rstrip("."))
                    said = True
                if passing:
                    self._wait()
                    room_since = time.monotonic()
                time.sleep(self._pause_s)
            else:
                if said:
                    log.warning("There is room again; the run goes on.")
                return answer

    def _say(self, why: str | None) -> None:
        log.warning(
            "The run waits: %s. Everything that was acknowledged is kept, and nothing more is exposed. "
            "It goes on by itself when %s can be written.",
            why,
            self._probe.parent,
        )

    def _wait(self) -> None:
        while self._refusal() is not None:
            time.sleep(self._pause_s)

    def _refusal(self) -> OSError | None:
        """Why the folder takes no bytes now; None if it takes some."""
        try:
            with open(self._probe, "wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error
        finally:
            with contextlib.suppress(OSError):
                self._probe.unlink()
        return None


class PatientJournal(Journal):
    """A journal that waits for room instead of failing."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def append(self, kind: str, key: str, /, **content: Any) -> dict[str, Any]:
        return self._patience(lambda: super(PatientJournal, self).append(kind, key, **content))
