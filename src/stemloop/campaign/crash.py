"""How many acknowledged frames are lost when a writer dies: counted, not promised.

A writer, a child process, writes frames that can be told apart and says through a pipe which of them it holds for
stored, each time after the container's own commit step. Then it is killed (SIGKILL) at a random moment, or the power
is cut: its disk is an ext4 file system on a loop device, the device's backing file is copied while the writer stands
still, and the copy is mounted, so that everything the kernel had not yet handed to the device is gone. What is left is
opened and every frame is compared with what was written.

The same is done to HDF5 by h5py with ``flush`` after each write, and to zarr if it is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import StemloopError
from stemloop.core.protocols import Batch
from stemloop.stream.landing import LandingLog

SHAPE = (64, 64)
GROUP = 64
_BASE = np.random.default_rng(7).poisson(3.0, SHAPE).astype(np.uint16) + np.uint16(1)
_ACK = struct.Struct("<QQ")
_PIPE_BYTES = 1 << 20
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of <linux/fcntl.h>
_MOST_FRAMES = 1 << 14
_DISK_BYTES = 192 << 20
_FIRST_ACK_S = 60.0

Ack = Callable[[int, int], None]


def frame(number: int) -> NDArray[np.uint16]:
    """(64, 64): frame ``number``, which carries its number in every pixel (modulo 2^16) and in two of its own."""
    made = np.roll(_BASE, number * 7919 % _BASE.size) + np.uint16(number * 40503 & 0xFFFF)
    made[0, :2] = number & 0xFFFF, number >> 16
    return made


def _group(first: int, n: int) -> NDArray[np.uint16]:
    return np.stack([frame(first + k) for k in range(n)])


@dataclass(frozen=True)
class Container:
    """``write(path, ack)`` writes up to 2^14 frames and waits; ``read(path)`` gives (number, frame or None) of all that
    the container offers. ``resumes``: ``write`` goes on with what an earlier, killed one left."""

    name: str
    write: Callable[[Path, Ack], None]
    read: Callable[[Path], Iterator[tuple[int, NDArray[Any] | None]]]
    resumes: bool = False


# ------------------------------------------------------------------------------------------------- the containers


def _write_log(path: Path, ack: Ack) -> None:
    """Groups of one to four batches of one to 64 frames."""
    log = LandingLog(path, "crash", reserve_bytes=4 << 20)
    spans = log.index.get("cbed", [])
    first = spans[-1][1] if spans else 0
    rng = random.Random(first)
    last = first + _MOST_FRAMES
    while first < last:
        batches, begin = [], first
        for _ in range(rng.randint(1, 4)):
            n = rng.randint(1, GROUP)
            batches.append(Batch("cbed", first, _group(first, n)))
            first += n
        log.append_many(batches)
        ack(begin, first)
    signal.pause()


def _read_log(path: Path) -> Iterator[tuple[int, NDArray[Any] | None]]:
    with LandingLog(path, readonly=True) as log:
        for batch in log.batches():
            yield from enumerate(batch.frames, batch.first)


def _write_h5py(path: Path, ack: Ack) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (0, *SHAPE), "u2", chunks=(GROUP, *SHAPE), maxshape=(None, *SHAPE))
        for first in range(0, _MOST_FRAMES, GROUP):
            data.resize(first + GROUP, 0)
            data[first:] = _group(first, GROUP)
            file.flush()
            ack(first, first + GROUP)
        signal.pause()


def _read_h5py(path: Path) -> Iterator[tuple[int, NDArray[Any] | None]]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        data = file["data"]
        for first in range(0, len(data), GROUP):
            yield from enumerate(data[first : first + GROUP], first)


def _write_zarr(path: Path, ack: Ack) -> None:
    import zarr

    shape = (_MOST_FRAMES, *SHAPE)
    data: Any = zarr.create_array(path, shape=shape, dtype="u2", chunks=(GROUP, *SHAPE))
    for first in range(0, _MOST_FRAMES, GROUP):
        data[first : first + GROUP] = _group(first, GROUP)
        ack(first, first + GROUP)
    signal.pause()


def _read_zarr(path: Path) -> Iterator[tuple[int, NDArray[Any] | None]]:
    import zarr

    data: Any = zarr.open_array(path, mode="r")
    for first in range(0, _MOST_FRAMES, GROUP):
        group = np.asarray(data[first : first + GROUP])
        if not group.any():  # a chunk that is not there
            return
        yield from enumerate(group, first)


LOG = Container("stemloop", _write_log, _read_log, resumes=True)
PEERS = (Container("h5py, flush", _write_h5py, _read_h5py), Container("zarr", _write_zarr, _read_zarr))


def peers() -> tuple[Container, ...]:
    """What to compare with, as far as it is installed."""
    return tuple(peer for peer in PEERS if peer.name != "zarr" or importlib.util.find_spec("zarr"))


# ------------------------------------------------------------------------------------------------------ one life


@dataclass
class Tally:
    """The count over many crashes. ``unopened``: crashes after which nothing could be opened; ``wrong``: frames
    that were served without an error and are not what was written."""

    crashes: int = 0
    acknowledged: int = 0
    lost: int = 0
    wrong: int = 0
    unopened: int = 0
    crashes_with_loss: int = 0

    def add(self, acknowledged: set[int], good: set[int], wrong: int, opened: bool) -> None:
        lost = len(acknowledged - good)
        self.crashes += 1
        self.acknowledged += len(acknowledged)
        self.lost += lost
        self.wrong += wrong
        self.unopened += not opened
        self.crashes_with_loss += lost > 0


class _Life:
    """A writer in a child process and what it has acknowledged so far."""

    def __init__(self, container: Container, path: Path) -> None:
        self.acknowledged: set[int] = set()
        self._said = b""
        self._pipe, told = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(told, _SET_PIPE_SIZE, _PIPE_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            _live(container, path, told)
        os.close(told)
        os.set_blocking(self._pipe, False)

    def run(self, seconds: float) -> None:
        """Let it write for ``seconds`` after its first acknowledgement."""
        end = time.monotonic() + _FIRST_ACK_S
        while not self.acknowledged and time.monotonic() < end and self._listen(0.05):
            pass
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._listen(left):
            pass

    def _listen(self, seconds: float) -> bool:
        """Take what it says within ``seconds``; False when it has ended."""
        if select.select([self._pipe], [], [], seconds)[0]:
            said = os.read(self._pipe, _PIPE_BYTES)
            self._said += said
            whole = len(self._said) // _ACK.size * _ACK.size
            for first, stop in _ACK.iter_unpack(self._said[:whole]):
                self.acknowledged.update(range(first, stop))
            self._said = self._said[whole:]
            return bool(said)
        return True

    def stop(self) -> None:
        """Have it stand still, at once."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)
        while self._listen(0.0) and select.select([self._pipe], [], [], 0.0)[0]:
            pass

    def kill(self) -> None:
        """End it, and take the rest of what it said."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while self._listen(1.0):
            pass
        os.close(self._pipe)


def _live(container: Container, path: Path, told: int) -> None:
    status = 1
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        container.write(path, lambda first, stop: _say(told, first, stop))
        status = 0
    os._exit(status)


def _say(told: int, first: int, stop: int) -> None:
    os.write(told, _ACK.pack(first, stop))


def survey(container: Container, path: Path) -> tuple[set[int], int, bool]:
    """(numbers that are there and right, how many are wrong, whether it could be opened), looked at by a child
    process, since a broken container can crash its library."""
    answer, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        found = _look(container, path)
        with open(told, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(told)
    with open(answer) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    good, wrong, opened = json.loads(text) if text else ([], 0, False)
    return {number for first, stop in good for number in range(first, stop)}, wrong, opened


def _look(container: Container, path: Path) -> tuple[list[list[int]], int, bool]:
    good: list[list[int]] = []
    wrong, opened = 0, False
    with contextlib.suppress(Exception):  # what cannot be opened or read on has no more to offer
        for number, found in container.read(path):
            opened = True
            if found is None:
                continue
            if np.array_equal(found, frame(number)):
                if good and good[-1][1] == number:
                    good[-1][1] += 1
                else:
                    good.append([number, number + 1])
            elif np.any(found):  # zeros in a place that was never written are no data
                wrong += 1
    return good, wrong, opened


# --------------------------------------------------------------------------------------------------- the crashes


def kills(container: Container, folder: Path, n: int, rng: random.Random, most_s: float = 0.12) -> Tally:
    """Kill a writer ``n`` times at random moments. A container that resumes goes on with the same file until it has
    more than 32 MB, so that recovery is tried as well."""
    tally = Tally()
    path, known = folder / "log", set[int]()
    for _ in range(n):
        if not container.resumes or (path.exists() and _size(path) > 32 << 20):
            _remove(path)
            known = set()
        life = _Life(container, path)
        life.run(rng.uniform(0.0, most_s))
        life.kill()
        known |= life.acknowledged
        tally.add(known, *survey(container, path))
    _remove(path)
    return tally


def why_no_cuts() -> str:
    """Why power cuts cannot be tried here; empty if they can."""
    if os.geteuid() != 0:
        return "power cuts need root (to mount an ext4 file system on a loop device)"
    for command in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(command) is None:
            return f"power cuts need the command {command}"
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(StemloopError, OSError):
        disk = Disk(Path(name))
        disk.close()
        return ""
    return "this system does not mount file systems on loop devices"


class Disk:
    """An ext4 file system on a loop device, mounted at ``place``."""

    def __init__(self, folder: Path) -> None:
        self.image, self.place = folder / "disk.img", folder / "disk"
        self._template = folder / "template.img"
        self.place.mkdir()
        with open(self._template, "wb") as file:
            file.truncate(_DISK_BYTES)
        _run("mkfs.ext4", "-q", "-F", str(self._template))
        self.fresh()

    def fresh(self) -> None:
        """An empty file system."""
        self.close()
        _run("cp", "--sparse=always", str(self._template), str(self.image))
        self._mount()

    def cut(self, life: _Life) -> None:
        """Cut the power: go on with what the device holds at this moment."""
        copy = self.image.with_name("copy.img")
        life.stop()
        _run("cp", "--sparse=always", str(self.image), str(copy))
        life.kill()
        self.close()
        os.replace(copy, self.image)
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop,noatime", str(self.image), str(self.place))

    def close(self) -> None:
        if os.path.ismount(self.place):
            _run("umount", str(self.place))


def cuts(container: Container, folder: Path, n: int, rng: random.Random, most_s: float = 0.5) -> Tally:
    """Cut the power ``n`` times at random moments; needs :func:`why_no_cuts` to be empty."""
    tally = Tally()
    disk = Disk(folder)
    try:
        for _ in range(n):
            disk.fresh()
            path = disk.place / "log"
            life = _Life(container, path)
            life.run(rng.uniform(0.0, most_s))
            disk.cut(life)
            tally.add(life.acknowledged, *survey(container, path))
    finally:
        disk.close()
    return tally


@dataclass
class Outcome:
    """Tallies by container, and why something was not done."""

    kills: dict[str, Tally] = field(default_factory=dict)
    cuts: dict[str, Tally] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Acknowledged frames that stemloop's own log lost, and wrong ones that it served."""
        own = [tallies[LOG.name] for tallies in (self.kills, self.cuts) if LOG.name in tallies]
        return sum(tally.lost + tally.wrong for tally in own)


def crash(n_kills: int, n_cuts: int, *, seed: int = 0, folder: Path | None = None, share: float = 0.1) -> Outcome:
    """Kill the landing log's writer ``n_kills`` times and cut its power ``n_cuts`` times; the peers ``share`` of it.

    ``folder`` is where the writers that are killed write (default: the system's folder of temporary files). The disks
    whose power is cut live in memory if there is ``/dev/shm``.
    """
    outcome = Outcome()
    containers = (LOG, *peers()) if share > 0 else (LOG,)
    if share > 0 and len(containers) == 2:
        outcome.skipped.append("zarr is not installed; it is left out")
    why = why_no_cuts() if n_cuts else ""
    if why:
        outcome.skipped.append(why)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    for container in containers:
        part = 1.0 if container is LOG else share
        rng = random.Random(seed)
        if n_kills:
            with tempfile.TemporaryDirectory(dir=folder, prefix="stemloop-crash-") as name:
                outcome.kills[container.name] = kills(container, Path(name), max(1, round(part * n_kills)), rng)
        if n_cuts and not why:
            with tempfile.TemporaryDirectory(dir=memory, prefix="stemloop-crash-") as name:
                outcome.cuts[container.name] = cuts(container, Path(name), max(1, round(part * n_cuts)), rng)
    return outcome


def _size(path: Path) -> int:
    return path.stat().st_size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StemloopError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[:200]}")
