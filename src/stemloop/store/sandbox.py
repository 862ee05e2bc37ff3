"""A child process that may die: foreign files are parsed there, and HDF5 is written there.

Parsers of vendor formats hang, eat the memory and crash on broken files, and the HDF5 library takes its process with
it when the disk is full. So both run in a fresh interpreter with limits on CPU time, memory and file size, which is
killed when its time is over. Arguments go in and results come out as JSON; arrays as ``.npy`` files in a folder that
is removed afterwards (never pickles).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stemloop.core.errors import StemloopError, from_code


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
) -> Any:
    """What ``function`` (``module:name``) answers to ``arguments`` (and ``folder``) in a child process.

    ``feed`` is written to its standard input. Files that it writes are limited to ``memory_MB`` unless ``grow``.
    Errors of the house are raised as themselves; any other is a :class:`ChildDied`.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    job = {"function": function, "arguments": arguments, "cpu_s": timeout_s, "memory_MB": memory_MB, "grow": grow}
    (folder / "job.json").write_text(json.dumps(job))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "stemloop.store.sandbox", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **one_thread, "PYTHONPATH": paths},
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(child)

    clock = threading.Timer(timeout_s, stop)
    clock.start()
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            for part in feed:
                child.stdin.write(part)
        child.wait()
    finally:
        clock.cancel()
        _kill(child)
    return _answer(folder, child.returncode, late.is_set())


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


def _limit(cpu_s: float, memory_MB: float, grow: bool) -> None:
    """Cap this process: CPU seconds, address space beyond what it has now, size of files, no core dump."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    room = pages * resource.getpagesize() + int(memory_MB * 1e6)
    seconds = int(cpu_s) + 2
    wanted = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (room, room),
    }
    if not grow:
        wanted[resource.RLIMIT_FSIZE] = (int(memory_MB * 1e6), int(memory_MB * 1e6))
    for what, limit in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is there already
            resource.setrlimit(what, limit)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    module, name = job["function"].split(":")
    answer: dict[str, Any]
    try:
        function = getattr(importlib.import_module(module), name)
        _limit(job["cpu_s"], job["memory_MB"], job["grow"])
        answer = {"value": function(folder=folder, **job["arguments"])}
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
