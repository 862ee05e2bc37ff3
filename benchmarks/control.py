"""What the guard costs: a guarded command's round trip beside an unguarded echo on the same kind of socket.

All servers run in child processes on loopback and are asked in turns, a block each, so that they share the machine's
moods. Run ``python benchmarks/control.py``; JSON goes to standard output and to ``benchmarks/results/control.json``.

``echo`` is the same uvicorn with the same WebSocket settings and the same client code, without any check; it answers
in the event loop. ``echo_thread`` answers from a second thread, as whoever keeps an instrument in a thread of its own
must. ``report`` passes token, lease, fencing number, limits and the audit log. ``pyro`` and ``pyro_msgpack`` are Pyro5
with its default serializer and with msgpack, one thread, no check at all.

``exposure`` is a CBED pattern of 128 x 128 uint16: it adds the dose reservation, the hash of the frames and three
fdatasync calls (the intent; then result and audit line side by side); ``fdatasync_three`` is what three cost on this
disk one after another. ``takeover`` is the time from an operator's takeover, sent while a program's long exposure runs,
to the refusal of its next command.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.sync.client import connect as open_websocket

from stemloop.core import units
from stemloop.core.instruction import Diffraction, Report
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.instrument import wire

SHAPE = (128, 128)
FIELD_M = (1e-8, 1e-8)
STATE = {"current_A": 1e-12, "blanked": True}
RESULTS = Path(__file__).parent / "results" / "control.json"


class Ready:
    """An instrument whose frame is there at once: what is measured is the way to it and back."""

    info = InstrumentInfo(
        "ready", ("diffraction", "blank", "report"), FIELD_M, 80e3, camera=Camera(SHAPE, 1e-3, (63.5, 63.5))
    )
    frame = np.random.default_rng(0).poisson(10, (1, *SHAPE)).astype(np.uint16)

    prompt = frozenset({"blank", "report"})

    def state(self):
        return dict(STATE)

    def restore(self, state):
        pass

    def execute(self, instruction, key):
        if not instruction.exposes:
            return Exposure(None, 0.0, self.state())
        return Exposure(self.frame, units.electrons(STATE["current_A"], instruction.dwell_s), self.state())

    def close(self):
        pass


class Slow(Ready):
    """Its exposures take two seconds and cannot be ended."""

    def execute(self, instruction, key):
        if instruction.exposes:
            time.sleep(2.0)
        return super().execute(instruction, key)


def guarded(directory: str, slow: bool = False) -> None:
    from stemloop.instrument.server import serve

    serve(Slow() if slow else Ready(), directory, idle_exit_s=60.0)


def unguarded(port: int) -> None:
    """The same server without any check: a small answer to a small message, a frame to a message that asks for it."""
    from stemloop.instrument.hand import Hand

    app, hand = FastAPI(), Hand()

    def answer(message: dict) -> bytes:
        frames = Ready.frame if message["data"] == "frame" else None
        return wire.encode({"n": message["n"], "ok": True, "frames": frames, "state": STATE})

    @app.websocket("/control")
    async def control(connection: WebSocket) -> None:
        await connection.accept()
        try:
            while True:
                message = wire.decode((await connection.receive())["bytes"])
                if message["op"] != "thread":
                    await connection.send_bytes(answer(message))
                    continue
                loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
                hand.post(lambda m=message, d=done, loop=loop: loop.call_soon_threadsafe(d.set_result, answer(m)))
                await connection.send_bytes(await done)
        except (WebSocketDisconnect, KeyError):
            pass

    uvicorn.run(app, port=port, log_config=None, access_log=False, ws_per_message_deflate=False, loop="asyncio")


def pyro(port: int) -> None:
    import Pyro5.api

    @Pyro5.api.expose
    class Echo:
        def execute(self, message):
            return {"n": message["n"], "ok": True, "frames": None, "state": STATE}

    daemon = Pyro5.api.Daemon(port=port)
    daemon.register(Echo, "echo")
    daemon.requestLoop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def child(target: Callable[..., None], *args: object) -> Iterator[int]:
    """A child process; gives its process id."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.terminate()
        process.join()


def reach(open_: Callable[[], object]) -> object:
    end = time.monotonic() + 60
    while True:
        try:
            return open_()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def cpu_s(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Timed:
    """Calls of one kind: their times, and the CPU time of the server."""

    def __init__(self, call: Callable[[int], object], pid: int) -> None:
        self.call, self.pid, self.number = call, pid, 0
        self.times: list[np.ndarray] = []
        self.cpu_s = 0.0

    def block(self, count: int, keep: bool = True) -> None:
        times, before = np.empty(count), cpu_s(self.pid)
        for at in range(count):
            self.number += 1
            begin = time.perf_counter()
            self.call(self.number)
            times[at] = (time.perf_counter() - begin) * 1e3
        if keep:
            self.times.append(times)
            self.cpu_s += cpu_s(self.pid) - before

    def result(self) -> dict[str, float]:
        times = np.concatenate(self.times)
        return {
            "median_ms": float(np.median(times)),
            "p99_ms": float(np.percentile(times, 99)),
            "best_block_median_ms": float(min(np.median(block) for block in self.times)),
            "server_cpu_ms": 1e3 * self.cpu_s / len(times),
            "count": len(times),
        }


def websocket(url: str) -> object:
    return open_websocket(url, compression=None, proxy=None, max_size=None).__enter__()


class Spoken:
    """The same few lines speak to every WebSocket server: what is compared are the servers."""

    def __init__(self, url: str) -> None:
        self.socket = reach(lambda: websocket(url))

    def ask(self, **message: object) -> dict:
        self.socket.send(wire.encode(message))
        while "event" in (reply := wire.decode(self.socket.recv())):
            pass
        if not reply.get("ok"):
            raise RuntimeError(reply)
        return reply


def guarded_line(directory: str, role: str = "agent") -> tuple[Spoken, int]:
    reach((Path(directory) / "address.json").read_text)
    address = json.loads((Path(directory) / "address.json").read_text())
    line = Spoken(f"ws://127.0.0.1:{address['port']}/control")
    token = json.loads((Path(directory) / "local.json").read_text())[role]
    line.ask(n=0, op="hello", token=token)
    return line, address["pid"]


def measure_round_trips(directory: str, blocks: int, size: int) -> dict[str, dict[str, float]]:
    echo_port, pyro_port = free_port(), free_port()
    report = wire.instruction_to_message(Report())
    point = wire.instruction_to_message(Diffraction(((5e-9, 5e-9),), 1e-3))
    with child(unguarded, echo_port) as echo_pid, child(pyro, pyro_port) as pyro_pid, child(guarded, directory):
        echo = Spoken(f"ws://127.0.0.1:{echo_port}/control")
        line, guard_pid = guarded_line(directory)
        fencing = line.ask(n=0, op="acquire", ttl_s=600)["fencing"]

        def message(n: int, name: str, instruction: dict, op: str = "execute", data: str = "inline") -> dict:
            return {"n": n, "op": op, "id": name, "fencing": fencing, "instruction": instruction, "data": data}

        timed = {
            "echo": Timed(lambda n: echo.ask(**message(n, f"r{n}", report)), echo_pid),
            "report": Timed(lambda n: line.ask(**message(n, f"r{n}", report)), guard_pid),
            "echo_thread": Timed(lambda n: echo.ask(**message(n, f"r{n}", report, op="thread")), echo_pid),
            **pyro_calls(pyro_port, pyro_pid, message, report),
        }
        for block in range(blocks + 1):
            for one in timed.values():
                one.block(size, keep=block > 0)
        slow = {
            "echo_frame": Timed(lambda n: echo.ask(**message(n, "x", point, data="frame")), echo_pid),
            "exposure": Timed(lambda n: line.ask(**message(n, f"e{n}", point)), guard_pid),
            "repeated_exposure": Timed(lambda n: line.ask(**message(n, f"e{n % 100 + 1}", point)), guard_pid),
        }
        for _ in range(4):
            for one in slow.values():
                one.block(100)
        return {name: one.result() for name, one in {**timed, **slow}.items()}


def pyro_calls(port: int, pid: int, message: Callable[..., dict], report: dict) -> dict[str, Timed]:
    try:
        import Pyro5.api
    except ImportError:
        return {}
    calls = {}
    for name, serializer in (("pyro", "serpent"), ("pyro_msgpack", "msgpack")):
        proxy = Pyro5.api.Proxy(f"PYRO:echo@127.0.0.1:{port}")
        proxy._pyroSerializer = serializer
        reach(proxy._pyroBind)
        calls[name] = Timed(lambda n, proxy=proxy: proxy.execute(message(n, f"r{n}", report)), pid)
    return calls


def measure_takeover(directory: str, count: int) -> dict[str, float]:
    """From the takeover to the refusal of the next command, both sent while an exposure runs that cannot be ended."""
    point = wire.instruction_to_message(Diffraction(((5e-9, 5e-9),), 1e-3))
    times = []
    with child(guarded, directory, True):
        for number in range(count):
            agent, _ = guarded_line(directory)
            operator, _ = guarded_line(directory, "operator")
            fencing = agent.ask(n=1, op="acquire", ttl_s=60)["fencing"]
            command = {"n": 2, "op": "execute", "id": f"long{number}", "fencing": fencing, "instruction": point}
            agent.socket.send(wire.encode(command))
            time.sleep(0.3)
            begin = time.perf_counter()
            operator.ask(n=1, op="takeover", ttl_s=60)
            agent.socket.send(wire.encode({**command, "n": 3, "id": f"next{number}"}))
            while (reply := wire.decode(agent.socket.recv())).get("n") != 3:
                pass
            times.append((time.perf_counter() - begin) * 1e3)
            assert reply["code"] == "lease", reply
            operator.ask(n=2, op="release")
            time.sleep(2.0)
            agent.socket.close()
            operator.socket.close()
    return {"median_ms": float(np.median(times)), "max_ms": float(max(times)), "count": count}


def measure_disk(directory: str, count: int) -> dict[str, float]:
    """Three appends with fdatasync, of the sizes that an exposure writes: the physical limit of its promise."""
    descriptor = os.open(Path(directory) / "probe", os.O_RDWR | os.O_CREAT)
    parts = [b"i" * 250, b"r" * (Ready.frame.nbytes + 400), b"a" * 700]
    times = np.empty(count)
    for number in range(count):
        begin = time.perf_counter()
        for data in parts:
            os.write(descriptor, data)
            os.fdatasync(descriptor)
        times[number] = (time.perf_counter() - begin) * 1e3
    os.close(descriptor)
    return {"median_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99)), "count": count}


def main(blocks: int = 20, size: int = 200) -> None:
    directory = tempfile.mkdtemp(dir=os.environ.get("STEMLOOP_BENCH_DIR"))
    try:
        results = {
            **measure_round_trips(f"{directory}/a", blocks, size),
            "takeover": measure_takeover(f"{directory}/b", 10),
            "fdatasync_three": measure_disk(directory, 200),
        }
    finally:
        shutil.rmtree(directory)
    median = {name: result["median_ms"] for name, result in results.items()}
    best = {name: result.get("best_block_median_ms", 0.0) for name, result in results.items()}
    summary = {
        **results,
        "guarded_over_echo": median["report"] / median["echo"],
        "guarded_over_echo_best_blocks": best["report"] / best["echo"],
        "guarded_over_echo_thread": median["report"] / median["echo_thread"],
        "exposure_over_fdatasync_three": median["exposure"] / median["fdatasync_three"],
        "machine": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "note": "shared with other work while this ran: see load",
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    json.dump(summary, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
