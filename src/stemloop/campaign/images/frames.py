"""The frames of an analysis, each on its own: in this process, in processes here, on Dask, or in an array of Slurm.

A folder holds what a frame needs (``job.json``) and takes what becomes of it (``frames/000012.npz``, or
``frames/000012.bad`` with the reason), so that any process that sees the folder can do any frame, a frame that is done
is never done again, and one that fails takes nobody along.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import selectors
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import stemloop
from stemloop.campaign.images import packed
from stemloop.campaign.images.one_image import Understood, Wanted, understand
from stemloop.core.durable import write_whole
from stemloop.core.errors import InputError, IntegrityError, MissingExtra, StemloopError, from_code
from stemloop.core.protocols import PixelSize
from stemloop.store.stack import Stack, open_stack

#: Called with the number of a frame that is done.
Tell = Callable[[int], None]
EXECUTORS = ("local", "dask", "slurm")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
#: A frame that takes longer [s] is given up.
FRAME_SECONDS = 1800.0


@dataclass(frozen=True)
class Job:
    """What a frame needs: where the stack is, and what is asked. ``frame_s``: the longest that a frame may take [s]."""

    path: str
    which: int | str | None
    pixel_size: PixelSize
    wanted: Wanted
    memory_MB: float = 2048.0
    frame_s: float = FRAME_SECONDS

    def write(self, folder: Path) -> None:
        """Leave it in ``folder`` for others."""
        (folder / "frames").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "job.json", json.dumps(asdict(self), indent=1) + "\n")


@functools.lru_cache(maxsize=4)
def _job(folder: str, changed: int) -> Job:
    told = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    told["pixel_size"], told["wanted"] = PixelSize(**told["pixel_size"]), Wanted(**told["wanted"])
    return Job(**told)


def job(folder: Path) -> Job:
    """The job in ``folder``."""
    try:
        return _job(str(folder), (folder / "job.json").stat().st_mtime_ns)
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{folder} holds no analysis that was begun; start it with: stemloop analyze FILE.") from None


@functools.lru_cache(maxsize=1)
def _opened(path: str, which: int | str | None, memory_MB: float) -> Stack:
    return open_stack(path, which, memory_MB=memory_MB)


# -------------------------------------------------------------------------------------------------------- one frame


def result_of(folder: Path, k: int) -> Path:
    """Where the result of frame ``k`` is, or will be."""
    return folder / "frames" / f"{k:06d}.npz"


def _reason_of(folder: Path, k: int) -> Path:
    return result_of(folder, k).with_suffix(".bad")


def done(folder: Path, k: int) -> bool:
    """Whether frame ``k`` has a result or a reason why not."""
    return result_of(folder, k).exists() or _reason_of(folder, k).exists()


def load(folder: Path, k: int) -> Understood:
    """The result of frame ``k``; the error that it ended with is raised."""
    reason = bad(folder, k)
    if reason is not None:
        raise from_code(reason["code"], reason["message"])
    if not result_of(folder, k).exists():
        raise InputError(f"frame {k} is not analysed yet; run the same command again to go on.")
    found = packed.read(result_of(folder, k))
    if not isinstance(found, Understood):
        raise IntegrityError(f"{result_of(folder, k)} is no result of a frame; remove it and run again.")
    return found


def bad(folder: Path, k: int) -> dict[str, str] | None:
    """``code`` and ``message`` of the error that frame ``k`` ended with, None if it did not."""
    try:
        told = json.loads(_reason_of(folder, k).read_text(encoding="utf-8"))
        return {"code": str(told["code"]), "message": str(told["message"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return {"code": "integrity", "message": f"{_reason_of(folder, k).name} is damaged."}


def give_up(folder: Path, k: int, code: str, message: str) -> None:
    """Note why frame ``k`` has no result."""
    write_whole(_reason_of(folder, k), json.dumps({"code": code, "message": message}) + "\n")


def analyse(folder: Path, k: int) -> None:
    """Analyse frame ``k`` of the job in ``folder`` and leave its result, or its reason, there."""
    if done(folder, k):
        return
    asked = job(folder)
    try:
        image = _opened(asked.path, asked.which, asked.memory_MB)[k]
        found = understand(image, asked.pixel_size, asked.wanted)
    except StemloopError as error:
        give_up(folder, k, error.code, str(error))
    except MemoryError:
        give_up(folder, k, "input", "the frame needs more memory than there is; cut it into parts, or bin it.")
    except Exception as error:
        give_up(folder, k, "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    else:
        packed.write(result_of(folder, k), found)


# ----------------------------------------------------------------------------------------------------------- places


def here(folder: Path, numbers: Sequence[int], tell: Tell) -> None:
    """All of ``numbers`` one after the other in this process."""
    for k in numbers:
        analyse(folder, k)
        tell(k)


def _environment() -> dict[str, str]:
    package = str(Path(stemloop.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": path}


def serve(folder: str) -> None:
    """A worker's life: the number of a frame in, the same number out when it is done, until the input ends (however
    its owner went: then it ends at once, in the middle of a frame if need be)."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(int(line))
        os._exit(0)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    threading.Thread(target=listen, daemon=True).start()
    while True:
        k = asked.get()
        analyse(Path(folder), k)
        answers.write(f"{k}\n")
        answers.flush()


class _Worker:
    """A process that analyses frames of a folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        code = "import sys; from stemloop.campaign.images.frames import serve; serve(sys.argv[1])"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(),
            start_new_session=True,
        )

    def does(self, k: int, seconds: float) -> str:
        """Do frame ``k``; why it could not, empty if it did."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{k}\n")
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return f"it took longer than {seconds:g} s and was given up."
        return "" if self._process.stdout.readline().strip() == str(k) else self._end()

    def _end(self) -> str:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"its process ended with {how} (often: out of memory)."

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Crew:
    """Processes of this machine that share frames; each is looked after by a thread."""

    def __init__(self, folder: Path, numbers: Sequence[int], tell: Tell) -> None:
        self._folder, self._tell, self._seconds = folder, tell, job(folder).frame_s
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for k in numbers:
            self._waiting.put(k)
        self._stop, self._said = threading.Event(), threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self._broken: list[BaseException] = []

    def work(self, place: int) -> None:
        """Do what waits, until nothing does."""
        try:
            while not self._stop.is_set():
                k = self._waiting.get_nowait()
                self._do(place, k)
                with self._said:
                    self._tell(k)
        except queue.Empty:
            return
        except BaseException as error:
            self._broken.append(error)
            self._stop.set()

    def _do(self, place: int, k: int) -> None:
        why = ""
        for _ in range(2):
            if place not in self._workers:
                self._workers[place] = _Worker(self._folder)
            why = self._workers[place].does(k, self._seconds)
            if not why or self._stop.is_set():
                return
            self._workers.pop(place).kill()
        if not done(self._folder, k):
            give_up(self._folder, k, "error", why)

    def run(self, workers: int) -> None:
        """Do everything with so many processes."""
        threads = [threading.Thread(target=self.work, args=(place,)) for place in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self._stop.set()
            for worker in list(self._workers.values()):
                worker.kill()
            for thread in threads:
                thread.join()
        if self._broken:
            raise self._broken[0]


def local(folder: Path, numbers: Sequence[int], tell: Tell, workers: int) -> None:
    """``numbers`` in ``workers`` processes of this machine, each on one thread. A process that dies or hangs is
    replaced; the frame that it was at is tried once more, and then given up."""
    _Crew(folder, numbers, tell).run(min(workers, max(1, len(numbers))))


def on_dask(folder: Path, numbers: Sequence[int], tell: Tell, workers: int, scheduler: str | None = None) -> None:
    """``numbers`` as tasks of Dask: on the cluster of ``scheduler`` (an address such as ``tcp://host:8786``; its
    workers must see the folder and the file under the same names), or on ``workers`` processes here."""
    try:
        import distributed
    except ImportError:
        raise MissingExtra("Dask is not installed: pip install 'stemloop[dask]'.") from None
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            os.environ.update({name: os.environ.get(name, "1") for name in _ONE_THREAD})
            cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
            )
            scheduler = stack.enter_context(cluster)
        client = stack.enter_context(distributed.Client(scheduler))
        where = str(folder.absolute())
        tasks = {client.submit(_task, where, k, key=(where, k), pure=False, retries=1): k for k in numbers}
        for task in distributed.as_completed(list(tasks)):
            k = tasks[task]
            if task.status != "finished" and not done(folder, k):
                give_up(folder, k, "error", f"its worker was lost ({type(task.exception()).__name__}).")
            tell(k)


def _task(folder: str, k: int) -> int:
    analyse(Path(folder), k)
    return k


# ------------------------------------------------------------------------------------------------------------ Slurm


def part_of(folder: Path, number: int, parts: int, count: int) -> list[int]:
    """The frames that are not done yet of part ``number`` of ``parts`` of a stack of ``count`` frames."""
    return [k for k in range(number, count, parts) if not done(folder, k)]


def array_script(folder: Path, parts: int, count: int, options: Sequence[str] = ()) -> str:
    """A script for ``sbatch``: an array of ``parts`` tasks, each on one core, that share the frames of ``folder``.
    ``options`` are more of its words, such as ``--time=01:00:00``."""
    more = "".join(f"#SBATCH {word}\n" for word in options)
    threads = "".join(f"export {name}=1\n" for name in _ONE_THREAD)
    command = shlex.join([sys.executable, "-m", "stemloop.cli", "analyze", "--worker", str(folder.absolute())])
    package = shlex.quote(str(Path(stemloop.__file__).resolve().parents[1]))
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name=stemloop-analyze\n#SBATCH --array=0-{parts - 1}\n#SBATCH --ntasks=1\n"
        f"#SBATCH --cpus-per-task=1\n#SBATCH --output={folder.absolute()}/slurm-%a.log\n{more}"
        f'{threads}export PYTHONPATH={package}"${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        f"exec {command} --part $SLURM_ARRAY_TASK_ID/{parts} --frames {count}\n"
    )


def on_slurm(
    folder: Path, numbers: Sequence[int], tell: Tell, workers: int, count: int, options: Sequence[str] = ()
) -> None:
    """``numbers`` in an array of ``workers`` tasks of Slurm, waited for. The folder and the file must be on a disk that
    the nodes share. A frame that is not done when its task has ended is given up."""
    if shutil.which("sbatch") is None:
        raise InputError("there is no Slurm here (no sbatch); use --executor local or dask.")
    script = folder / "slurm.sh"
    write_whole(script, array_script(folder, min(workers, len(numbers)), count, options))
    sent = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise InputError(f"Slurm refused the job: {' '.join(sent.stderr.split())[:200]}")
    number = sent.stdout.strip().split(";")[0]
    left = set(numbers)
    try:
        for over in _until_over(number):
            for k in sorted(k for k in left if done(folder, k)):
                left.discard(k)
                tell(k)
            if not left:
                return
            if over:
                break
    except BaseException:
        subprocess.run(["scancel", number], capture_output=True, check=False)
        raise
    for k in sorted(left):
        give_up(folder, k, "error", f"its task of Slurm job {number} ended without it; see {folder}/slurm-*.log.")
        tell(k)


def _until_over(number: str, every_s: float = 1.0) -> Iterator[bool]:
    """Whether a job has left Slurm's queue, asked now and then; True comes last, once, a little after it left."""
    while True:
        listed = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True, check=False)
        if not listed.stdout.strip():
            time.sleep(2 * every_s)  # a shared disk may show the last files late
            yield True
            return
        yield False
        time.sleep(every_s)
