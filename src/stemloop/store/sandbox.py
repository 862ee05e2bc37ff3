"""A child process that may die: foreign files are parsed there, and HDF5 is written there.

Parsers of vendor formats hang, eat the memory and crash on broken files, and the HDF5 library takes its process with
it when the disk is full. So both run in a fresh interpreter with limits on CPU time, memory and file size, which is
killed when its time is over. Arguments go in and results come out as JSON; arrays as ``.npy`` files in a folder that
is removed afterwards (never pickles).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stemloop.core.errors import StemloopError, from_code

_LENGTHS = struct.Struct("<IQ")
_MOST_SAID = 64 << 20


class ChildDied(Exception):
    """The child left no answer; ``why`` is ``time``, ``memory`` or how it died."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A private folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="stemloop-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def call(
    function: str,
    arguments: dict[str, Any],
    folder: Path,
    *,
    timeout_s: float,
    memory_MB: float,
    feed: Iterable[bytes] = (),
    grow: bool = False,
    alive: Callable[[], bool] | None = None,
) -> Any:
    """What ``function`` (``module:name``) answers to ``arguments`` (and ``folder``) in a child process.

    ``feed`` is written to its standard input. Files that it writes are limited to ``memory_MB`` unless ``grow``.
    ``alive`` is asked several times a second; the child is killed, as if its time were over, when it says no.
    Errors of the house are raised as themselves; any other is a :class:`ChildDied`.
    """
    job = {"function": function, "arguments": arguments, "cpu_s": timeout_s, "memory_MB": memory_MB, "grow": grow}
    child = _start(folder, job, subprocess.DEVNULL)
    late, over = threading.Event(), threading.Event()

    def stop() -> None:
        late.set()
        _kill(child)

    def watch() -> None:
        while alive is not None and not over.wait(0.2):
            if not alive():
                return stop()

    clock = threading.Timer(timeout_s, stop)
    clock.start()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            for part in feed:
                child.stdin.write(part)
        child.wait()
    finally:
        clock.cancel()
        over.set()
        _kill(child)
        watcher.join()
    return _answer(folder, child.returncode, late.is_set())


def _start(folder: Path, job: dict[str, Any], stdout: int) -> subprocess.Popen[bytes]:
    (folder / "job.json").write_text(json.dumps(job))
    paths = os.pathsep.join(path for path in sys.path if path)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "stemloop.store.sandbox", str(folder)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **one_thread, "PYTHONPATH": paths},
        start_new_session=True,
    )


class Conversation:
    """A child that answers questions one after the other, with bytes, so that large data pass in small pieces.

    ``function`` (``module:name``) is called once with ``arguments`` and gives what answers: a callable that takes a
    question (keywords) and returns (what JSON can say, bytes). The child is killed when an answer takes longer than
    ``timeout_s``; its CPU time is limited to as much for each answer.
    """

    def __init__(self, function: str, arguments: dict[str, Any], *, timeout_s: float, memory_MB: float) -> None:
        self._timeout_s = timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="stemloop-"))
        job = {"function": function, "arguments": arguments, "cpu_s": timeout_s, "memory_MB": memory_MB, "grow": False}
        self._child = _start(self._folder, {**job, "talk": True}, subprocess.PIPE)
        self._late = threading.Event()

    def ask(self, most_bytes: int = 0, **question: Any) -> tuple[Any, bytes]:
        """The answer to a question; one of more than ``most_bytes`` bytes is not taken."""
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        clock = threading.Timer(self._timeout_s, self._stop)
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(question).encode() + b"\n")
                child.stdin.flush()
            lengths = child.stdout.read(_LENGTHS.size)
            if len(lengths) == _LENGTHS.size:
                said, size = _LENGTHS.unpack(lengths)
                if said > _MOST_SAID or size > most_bytes:
                    self.close()
                    raise ChildDied("it answered more than it was asked for")
                word, payload = child.stdout.read(said), child.stdout.read(size)
                if len(word) == said and len(payload) == size:
                    return json.loads(word), payload
        finally:
            clock.cancel()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
            _kill(child)
            return _answer(self._folder, child.returncode, self._late.is_set()), b""
        finally:
            self.close()

    def _stop(self) -> None:
        self._late.set()
        _kill(self._child)

    def close(self) -> None:
        """End the child. Closing twice is harmless."""
        _kill(self._child)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _answer(folder: Path, status: int, late: bool) -> Any:
    try:
        answer = json.loads((folder / "answer.json").read_text())
    except (OSError, ValueError):
        if late or status == -signal.SIGXCPU:
            raise ChildDied("time") from None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise ChildDied(how) from None
    if "error" not in answer:
        return answer["value"]
    if answer["error"] in ("memory", "other"):
        raise ChildDied("memory" if answer["error"] == "memory" else answer["message"])
    raise from_code(answer["error"], answer["message"])


# ------------------------------------------------------------------------------------------------- in the child


def _limit(cpu_s: float, memory_MB: float, grow: bool, talk: bool = False) -> None:
    """Cap this process: CPU seconds, address space beyond what it has now, size of files, no core dump."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    room = pages * resource.getpagesize() + int(memory_MB * 1e6)
    seconds = int(cpu_s) + 2
    wanted = {
        resource.RLIMIT_CPU: (seconds, resource.RLIM_INFINITY if talk else seconds + 1),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (room, room),
    }
    if not grow:
        wanted[resource.RLIMIT_FSIZE] = (int(memory_MB * 1e6), int(memory_MB * 1e6))
    for what, limit in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is there already
            resource.setrlimit(what, limit)


def _die_with_the_parent() -> None:
    """On Linux: be killed when the parent is (prctl PR_SET_PDEATHSIG), so that no reader is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _talk(out: int, answers: Callable[..., tuple[Any, Any]], cpu_s: float) -> None:
    """Answer the questions on standard input until there are no more."""
    with open(out, "wb") as pipe:
        for line in sys.stdin.buffer:
            used = resource.getrusage(resource.RUSAGE_SELF)
            with contextlib.suppress(ValueError, OSError):
                _, hard = resource.getrlimit(resource.RLIMIT_CPU)
                resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + cpu_s) + 2, hard))
            said, payload = answers(**json.loads(line))
            word = json.dumps(said).encode()
            pipe.write(_LENGTHS.pack(len(word), len(payload)) + word)
            pipe.write(payload)
            pipe.flush()


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    module, name = job["function"].split(":")
    answer: dict[str, Any]
    talk = os.dup(1) if job.get("talk") else -1
    if talk >= 0:  # what a library prints is no answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        if talk < 0:  # one that talks ends with its questions, and may be asked by another thread than began it
            _die_with_the_parent()
        function = getattr(importlib.import_module(module), name)
        _limit(job["cpu_s"], job["memory_MB"], job["grow"], talk >= 0)
        value = function(folder=folder, **job["arguments"])
        if talk >= 0:
            _talk(talk, value, job["cpu_s"])
            value = None
        answer = {"value": value}
    except StemloopError as error:
        answer = {"error": error.code, "message": str(error)}
    except MemoryError:
        answer = {"error": "memory", "message": ""}
    except Exception as error:
        answer = {"error": "other", "message": _first_line(error)}
    (folder / "answer.part").write_text(json.dumps(answer))
    os.replace(folder / "answer.part", folder / "answer.json")
    os._exit(0)  # a library that crashes while it is taken down has no say any more


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
