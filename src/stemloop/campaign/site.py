"""Where code runs: the run folder, the instrument's process, and the way its frames take to the disk.

::

    DIR/settings.json          what the run was asked to do
    DIR/journal.jsonl          what was decided, asked, exposed and found (the truth of the run)
    DIR/frames.log             every frame, durable before it was acknowledged
    DIR/instrument/            the instrument's side: address, spool, audit, ledger, log of its process
    DIR/lock                   held by the one process that works on the run
    DIR/truth/                 written by the twin for scoring; the loop never reads it
    DIR/frames.h5 report.html summary.json result.npz        at the end
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop import __version__
from stemloop.campaign.journal import Journal
from stemloop.campaign.patience import Patience, PatientJournal
from stemloop.campaign.settings import Settings
from stemloop.campaign.stopwatch import Stopwatch
from stemloop.core import instruction as instructions
from stemloop.core.durable import write_whole
from stemloop.core.errors import (
    InputError,
    InstrumentError,
    IntegrityError,
    LeaseError,
    NotAuthorised,
    OutcomeUnknown,
    StemloopError,
    StorageError,
    from_code,
)
from stemloop.core.instruction import Instruction
from stemloop.core.plain import jsonable
from stemloop.core.protocols import Exposure
from stemloop.instrument.client import Client, connect
from stemloop.instrument.files import DirectoryLock
from stemloop.stream.channel import Receiver
from stemloop.stream.landing import LandingLog

#: How long an instrument's process waits for somebody before it blanks the beam and ends.
IDLE_EXIT_S = 60.0
#: How long the lease outlives a loop that was killed.
LEASE_TTL_S = 3.0
CONNECT_PATIENCE_S = 2.0
ANY_PORT = "tcp://127.0.0.1:*"
START_LIMIT_S = 180.0
#: How long the instrument's process may take to blank the beam, hand over its last frames and end.
STOP_LIMIT_S = 20.0


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees all of it or the old file; see :func:`~stemloop.core.plain.jsonable`."""
    write_whole(path, json.dumps(jsonable(content), indent=1, allow_nan=False))


def _new_run() -> dict[str, str]:
    return {"id": os.urandom(8).hex(), "version": __version__}


def _claim(directory: Path) -> DirectoryLock:
    """Keep the run folder for this process alone, until it closes the lock or ends."""
    try:
        return DirectoryLock(directory)
    except StorageError:
        raise InputError(
            f"another process works on the run in {directory}. Stop it or wait for its end; "
            f"then go on with: stemloop resume {directory}"
        ) from None
    except OSError as error:
        raise StorageError(f"the run folder {directory} cannot be written: {error.strerror}.") from None


class Site:
    """An open run: folder, journal, instrument and frames. Use it as a context manager."""

    def __init__(self, directory: Path, settings: Settings, lock: DirectoryLock) -> None:
        self.directory, self.settings = Path(directory), settings
        self._host: subprocess.Popen[bytes] | None = None
        with contextlib.ExitStack() as opened:  # undone, last first, if the rest cannot be opened
            opened.callback(lock.close)
            self.patience = Patience(self.directory)
            self.journal: Journal = PatientJournal(self.directory / "journal.jsonl", self.patience)
            opened.callback(self.journal.close)
            self.run_id = self.journal.once("run", "id", _new_run)["id"]
            self.log = LandingLog(self.directory / "frames.log", run=self.run_id)
            opened.callback(self.log.close)
            self.receiver = self._receive()
            opened.callback(self.receiver.close)
            opened.callback(self._stop_host)
            self.scope = self._connect()
            self._opened = opened.pop_all()

    # ------------------------------------------------------------------------------------------------- opening

    @classmethod
    def create(cls, directory: Path, settings: Settings) -> Site:
        """Make a new run folder (it must not hold a run already) and open it."""
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = _claim(directory)
            if (directory / "settings.json").exists():
                lock.close()
                raise InputError(
                    f"{directory} already holds a run. Continue it with: stemloop resume {directory}; "
                    "or name another folder."
                )
            (directory / "instrument").mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"the output folder {directory} cannot be written: {error.strerror}.") from None
        write_json(directory / "settings.json", settings.to_dict())
        return cls(directory, settings, lock)

    @classmethod
    def reopen(cls, directory: Path) -> Site:
        """Open the run in ``directory`` to go on with it; InputError if another process is at it."""
        directory = Path(directory)
        settings = Settings.load(directory / "settings.json")
        lock = _claim(directory)
        (directory / "instrument").mkdir(exist_ok=True)
        return cls(directory, settings, lock)

    def _receive(self) -> Receiver:
        """Listen for frames at the address of the last time, which the instrument's process still knows."""
        place = self.directory / "stream.json"
        try:
            known = str(json.loads(place.read_text())["address"]) if place.exists() else ANY_PORT
            receiver = Receiver(known, self.log, self.run_id)
        except (InputError, ValueError, KeyError, TypeError):  # the port is taken, or the file is damaged
            self._stop_host()
            receiver = Receiver(ANY_PORT, self.log, self.run_id)
        write_json(place, {"address": receiver.address})
        return receiver

    def _connect(self) -> Client:
        """Reach the instrument that still runs, or start it; wait until the lease of an earlier life has ended."""
        if not (self._folder / "address.json").exists():
            self._start_host()
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if self._host is not None and not (self._folder / "address.json").exists():
                self._raise_if_host_failed()
                if time.monotonic() > deadline:
                    raise InstrumentError(f"the instrument did not start; see {self._folder / 'log.txt'}.")
                time.sleep(0.02)
                continue
            try:
                return connect(self._folder, lease=True, ttl_s=LEASE_TTL_S, patience_s=CONNECT_PATIENCE_S)
            except LeaseError:
                if self._host is not None or time.monotonic() > deadline:
                    raise
            except (InstrumentError, NotAuthorised):
                self._raise_if_host_failed()
                if self._host is None:
                    self._start_host()
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    @property
    def _folder(self) -> Path:
        return self.directory / "instrument"

    def _start_host(self) -> None:
        for name in ("address.json", "failed.json"):
            (self._folder / name).unlink(missing_ok=True)
        config = {**self.settings.to_dict(), "frames": self.receiver.address, "run": self.run_id}
        write_json(self._folder / "config.json", config)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            with open(self._folder / "log.txt", "ab") as log:
                self._host = subprocess.Popen(
                    [sys.executable, "-m", "stemloop.campaign.host", str(self._folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise StorageError(f"the instrument cannot be started in {self._folder}: {error.strerror}.") from None

    def _raise_if_host_failed(self) -> None:
        ended = self._host is not None and self._host.poll() is not None
        failed = self._folder / "failed.json"
        if failed.exists():
            wire = json.loads(failed.read_text())
            raise from_code(wire["code"], wire["message"])
        if ended:
            raise InstrumentError(f"the instrument's process ended at its start; see {self._folder / 'log.txt'}.")

    @property
    def host_pid(self) -> int | None:
        """Process id of the instrument's process, if its address is known."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads((self._folder / "address.json").read_text())["pid"])
        return None

    def _stop_host(self) -> None:
        """End the instrument's process: the one started here, or one of an earlier life that still serves."""
        if self._host is not None:
            self._host.terminate()
            try:
                self._host.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._host.kill()
                self._host.wait()
            return
        pid, deadline = self.host_pid, time.monotonic() + STOP_LIMIT_S
        if pid is None or not self._served():  # the process id of a server that is gone may be anybody's by now
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while self._served():
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    def _served(self) -> bool:
        """Whether an instrument's process holds its folder."""
        try:
            DirectoryLock(self._folder).close()
        except StorageError:
            return True
        return False

    # ------------------------------------------------------------------------------------------------- working

    def expose(
        self, instruction: Instruction, command_id: str, watch: Stopwatch
    ) -> tuple[NDArray[Any] | None, dict[str, Any]]:
        """Carry out an exposing instruction exactly once in the life of the run; return its durable frames and the
        journal's record of the exposure. Frames of an exposure whose outcome nobody knows are None: it counts as
        exposed and is not repeated."""
        wire = instructions.to_dict(instruction)
        asked = self.journal.once("command", command_id, lambda: {"instruction": wire})
        if instructions.from_dict(asked["instruction"]) != instruction:
            raise IntegrityError(f"the journal holds another command under {command_id}; the run was changed.")
        record = self.journal.find("exposure", command_id)
        if record is not None:
            return (None if record["lost"] else self._frames(record["calibration"])), record
        try:
            with watch("expose"):
                exposure = self.patience(lambda: self.scope.execute(instruction, command_id, data="stream"))
        except OutcomeUnknown:
            charged = self._charged()
            return None, self.journal.append("exposure", command_id, electrons=charged, lost=True)
        with watch("land"):
            frames = self._frames(exposure.calibration)
        shaped = {"shape": list(frames.shape[1:]), "dtype": frames.dtype.str}
        exposed = self._exposed(instruction, exposure)
        return frames, self.journal.append("exposure", command_id, lost=False, frames=shaped, **exposed)

    def _charged(self) -> float:
        """What the instrument's ledger charged for an exposure that was lost: all that no other exposure explains."""
        known = sum(r["electrons"] for r in self.journal.records if r["kind"] == "exposure")
        return max(0.0, float(self.scope.dose()["spent"]) - known)

    def _frames(self, calibration: dict[str, Any]) -> NDArray[Any]:
        stream, first, count = calibration["stream"], calibration["first"], calibration["count"]
        return np.asarray(self.patience(lambda: self.receiver.wait(stream, first, count, timeout_s=60.0)))

    @staticmethod
    def _exposed(instruction: Instruction, exposure: Exposure) -> dict[str, Any]:
        spent = exposure.electrons * instruction.exposed_positions
        return {"electrons": spent, "state": exposure.state, "calibration": exposure.calibration}

    def command(self, instruction: Instruction, command_id: str) -> None:
        """Carry out an instruction that exposes nothing, once in the life of the instrument."""
        self.patience(lambda: self.scope.execute(instruction, command_id))

    # ------------------------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """Give the lease back, stop the instrument's process and close the files. Closing twice is harmless."""
        with self._opened, contextlib.suppress(StemloopError, OSError):
            self.scope.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
