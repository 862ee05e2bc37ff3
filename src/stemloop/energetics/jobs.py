"""Calculations in a few worker processes, each on one thread, each calculation once.

A worker is a fresh Python process that speaks JSON lines: a task in, a result out. It inherits nothing from its parent
but the environment (so a parent may be a notebook, a server with threads or a script without a main guard), ends when
its parent does (even in the middle of a calculation), and is killed when a calculation takes too long.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import stemloop
from stemloop.core.errors import CalculationError, StemloopError, from_code
from stemloop.energetics.cache import Cache
from stemloop.energetics.calculators import Result, Task, calculate

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _listen(tasks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)  # the owner is gone, however it went: nobody waits for what is being calculated


def serve() -> None:
    """The worker's life: answer one task a line until the input ends. Whatever an engine prints goes nowhere."""
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    while True:
        try:
            answer: dict[str, Any] = {"result": calculate(Task(**json.loads(tasks.get()))).to_dict()}
        except StemloopError as error:
            answer = {"code": error.code, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Worker:
    def __init__(self) -> None:
        package = str(Path(stemloop.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from stemloop.energetics.jobs import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self.task: int | None = None
        self.deadline = 0.0

    def ask(self, index: int, task: Task, timeout_s: float) -> None:
        assert self.process.stdin is not None
        self.task, self.deadline = index, time.monotonic() + timeout_s
        try:
            self.process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "result" not in answer:
            raise from_code(answer["code"], answer["message"])
        self.task = None
        return Result.from_dict(answer["result"])

    def _ended(self) -> CalculationError:
        return CalculationError(
            f"a calculation's process ended with status {self.process.wait()} (often: out of memory). "
            "Use a smaller supercell or fewer workers."
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue


def _kill(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class Calculations:
    """Carries out tasks: from the cache where they are known, else in worker processes.

    workers : processes at once; 0 calculates in this process (on as many threads as the environment allows).
    timeout_s : the longest that one calculation may take [s].
    Counts: ``calls`` (calculator calls), ``hits`` (answered by the cache), ``cpu_s`` (CPU seconds of the calls).
    """

    def __init__(self, cache: Cache | None = None, workers: int = 2, timeout_s: float = 900.0) -> None:
        self.cache = cache if cache is not None else Cache()
        self.workers = workers
        self.timeout_s = timeout_s
        self.calls = 0
        self.hits = 0
        self.cpu_s = 0.0
        self._pool: list[_Worker] = []
        self.close = weakref.finalize(self, _kill, self._pool)

    def run(self, tasks: Sequence[Task]) -> list[Result]:
        """The results of ``tasks``, in their order; equal tasks are calculated once.

        Raises CalculationError when one does not converge or takes longer than ``timeout_s``; what the others had
        finished by then is in the cache.
        """
        keys = [task.key for task in tasks]
        known: dict[str, Result] = {}
        for key in dict.fromkeys(keys):
            if (result := self.cache.get(key)) is not None:
                known[key] = result
        self.hits += len(known)
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in known}
        known.update(self._calculate(missing))
        return [known[key] for key in keys]

    def _keep(self, key: str, result: Result) -> Result:
        self.calls += 1
        self.cpu_s += result.seconds
        self.cache.put(key, result)
        return replace(result)

    def _calculate(self, missing: dict[str, Task]) -> dict[str, Result]:
        if self.workers == 0:
            return {key: self._keep(key, calculate(task)) for key, task in missing.items()}
        try:
            return self._in_processes(list(missing.items()))
        except BaseException:
            _kill(self._pool)
            raise

    def _in_processes(self, items: list[tuple[str, Task]]) -> dict[str, Result]:
        while len(self._pool) < min(self.workers, len(items)):
            self._pool.append(_Worker())
        found: dict[str, Result] = {}
        waiting = iter(enumerate(items))
        with selectors.DefaultSelector() as selector:
            for worker in self._pool:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
                self._hand_out(worker, waiting)
            while len(found) < len(items):
                busy = [worker for worker in self._pool if worker.task is not None]
                wait = min(worker.deadline for worker in busy) - time.monotonic()
                ready = selector.select(max(wait, 0.0))
                if not ready and wait <= 0:
                    raise CalculationError(
                        f"a calculation took longer than {self.timeout_s:g} s and was ended. "
                        "Use a smaller supercell or a longer timeout_s."
                    )
                for event, _ in ready:
                    worker = event.data
                    key, _ = items[worker.task]
                    found[key] = self._keep(key, worker.answer())
                    self._hand_out(worker, waiting)
        return found

    def _hand_out(self, worker: _Worker, waiting: Any) -> None:
        following = next(waiting, None)
        if following is not None:
            index, (_, task) = following
            worker.ask(index, task, self.timeout_s)
