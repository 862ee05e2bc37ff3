"""Frames per second from a sender over loopback to a durable log: ``python benchmarks/stream_durable.py [FOLDER]``."""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stemloop.core.protocols import Batch
from stemloop.stream import LandingLog, Receiver, Sender


def rate(folder: Path, per_batch: int, seconds: float = 4.0) -> dict[str, float]:
    """Frames/s of 64x64 u16 frames, every one of them durable and acknowledged at the end of the time measured."""
    frames = np.random.default_rng(0).poisson(2.0, (per_batch, 64, 64)).astype(np.uint16)
    log = LandingLog(folder / f"{per_batch}.flog", "bench")
    with Receiver("tcp://127.0.0.1:*", log, "bench") as receiver:
        sender = Sender(receiver.address, "bench")
        begin, cpu, first = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            sender.send(Batch("cbed", first, frames))
            first += per_batch
        sender.flush()
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        latency = []
        for _ in range(30):
            t = time.perf_counter()
            sender.send(Batch("cbed", first, frames))
            receiver.wait("cbed", first, per_batch)
            latency.append(time.perf_counter() - t)
            first += per_batch
        sender.close()
        ledger = receiver.ledger()["cbed"]
    log.close()
    assert ledger["missing"] == [] and ledger["durable"] == first
    return {
        "frames_per_batch": per_batch,
        "frames_per_s": round((first - 30 * per_batch) / wall),
        "MB_per_s": round((first - 30 * per_batch) * 8192 / wall / 1e6, 1),
        "cpu_s_per_wall_s": round(cpu / wall, 2),
        "send_to_wait_ms_median": round(1e3 * float(np.median(latency)), 2),
        "duplicates": ledger["duplicates"],
    }


def fdatasync_ms(folder: Path) -> float:
    """Median time [ms] of an append of 64 kB with fdatasync: the floor of one acknowledgement on this disk."""
    log = LandingLog(folder / "floor.flog")
    times = []
    for first in range(0, 400, 8):
        t = time.perf_counter()
        log.append(Batch("s", first, np.ones((8, 64, 64), np.uint16)))
        times.append(time.perf_counter() - t)
    log.close()
    return round(1e3 * float(np.median(times)), 2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        found = {"append_fdatasync_ms": fdatasync_ms(Path(name)), "rates": [rate(Path(name), n) for n in (8, 256)]}
    print(json.dumps(found, indent=1))
