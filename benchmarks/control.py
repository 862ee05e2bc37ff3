"""What the guard costs: a guarded command's round trip beside an unguarded echo on the same kind of socket.

Both servers are uvicorn with the same WebSocket settings in child processes on loopback; both answer msgpack. Run
``python benchmarks/control.py``; JSON goes to the standard output and to ``benchmarks/results/control.json``.

``report`` and ``state`` pass token, lease, fencing number, limits and the audit log. ``exposure`` is a CBED pattern
of 128 x 128 uint16: it adds the dose reservation, the hash of the frames and two fdatasync calls (intent and result),
whose own time on this disk is measured as ``fdatasync_pair``. Only exposing commands pay for fdatasync.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from websockets.sync.client import connect as open_websocket

from stemloop.core import units
from stemloop.core.instruction import Diffraction, Report
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.instrument import wire
from stemloop.instrument.client import connect

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


def guarded(directory: str) -> None:
    from stemloop.instrument.server import serve

    serve(Ready(), directory, idle_exit_s=30.0)


def unguarded(port: int) -> None:
    """The same server without any check: a small answer to a small message, a frame to a message that asks for it."""
    app = FastAPI()

    @app.websocket("/control")
    async def control(connection: WebSocket) -> None:
        await connection.accept()
        try:
            while True:
                message = wire.decode((await connection.receive())["bytes"])
                frames = Ready.frame if message["data"] == "frame" else None
                await connection.send_bytes(wire.encode({"n": message["n"], "frames": frames, "state": STATE}))
        except (WebSocketDisconnect, KeyError):
            pass

    uvicorn.run(app, port=port, log_config=None, access_log=False, ws_per_message_deflate=False, loop="asyncio")


def milliseconds(call: Callable[[int], object], count: int, warm_up: int = 50) -> dict[str, float]:
    for number in range(warm_up):
        call(-1 - number)
    times = np.empty(count)
    for number in range(count):
        begin = time.perf_counter()
        call(number)
        times[number] = (time.perf_counter() - begin) * 1e3
    return {"median_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99)), "count": count}


def measure_guarded(directory: str, count: int) -> dict[str, dict[str, float]]:
    process = multiprocessing.get_context("spawn").Process(target=guarded, args=(directory,))
    process.start()
    report, point = Report(), Diffraction(((5e-9, 5e-9),), 1e-3)
    with connect(Path(directory), lease=True, patience_s=60) as client:
        results = {
            "report": milliseconds(lambda n: client.execute(report, f"r{n}"), count),
            "state": milliseconds(lambda n: client.state(), count),
            "exposure": milliseconds(lambda n: client.execute(point, f"e{n}"), count // 5),
            "repeated_exposure": milliseconds(lambda n: client.execute(point, f"e{abs(n) % 100}"), count // 5),
        }
    process.terminate()
    process.join()
    return results


def measure_echo(count: int) -> dict[str, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=unguarded, args=(port,))
    process.start()
    connection = None
    while connection is None:
        try:
            address = f"ws://127.0.0.1:{port}/control"
            connection = open_websocket(address, compression=None, proxy=None, max_size=None).__enter__()
        except OSError:
            time.sleep(0.05)
    instruction = wire.instruction_to_message(Report())

    def ask(number: int, data: str) -> object:
        message = {"n": number, "op": "execute", "id": "x", "fencing": 1, "instruction": instruction, "data": data}
        connection.send(wire.encode(message))
        return wire.decode(connection.recv())

    results = {
        "echo": milliseconds(lambda n: ask(n, "inline"), count),
        "echo_frame": milliseconds(lambda n: ask(n, "frame"), count // 5),
    }
    connection.close()
    process.terminate()
    process.join()
    return results


def measure_disk(directory: str, count: int) -> dict[str, float]:
    """Two appends with fdatasync, of the sizes that an exposure writes: the physical limit of its promise."""
    descriptor = os.open(Path(directory) / "probe", os.O_RDWR | os.O_CREAT)
    intent, result = b"i" * 250, b"r" * (Ready.frame.nbytes + 400)

    def pair(_: int) -> None:
        for data in (intent, result):
            os.write(descriptor, data)
            os.fdatasync(descriptor)

    times = milliseconds(pair, count)
    os.close(descriptor)
    return times


def main(count: int = 3000) -> None:
    directory = tempfile.mkdtemp(dir=os.environ.get("STEMLOOP_BENCH_DIR"))
    try:
        results = {
            **measure_echo(count),
            **measure_guarded(directory, count),
            "fdatasync_pair": measure_disk(directory, count // 5),
        }
    finally:
        shutil.rmtree(directory)
    ratio = results["report"]["median_ms"] / results["echo"]["median_ms"]
    summary = {
        **results,
        "guard_adds_ms": results["report"]["median_ms"] - results["echo"]["median_ms"],
        "guarded_over_echo": ratio,
        "exposure_over_fdatasync_pair": results["exposure"]["median_ms"] / results["fdatasync_pair"]["median_ms"],
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    json.dump(summary, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
