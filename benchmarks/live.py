"""A live 4D-STEM loop: frames -> events -> ZeroMQ -> exact maps, at a detector's rate, on two processes.

A source gives dense 128 x 128 uint16 frames with 200 electrons each (``counted_data.py``) at 87,000 a second by the
clock: frame k is there at k / rate and not before, and a source that falls behind is late, not slower. The sending
process encodes them (codec ``events`` or ``gaps``) and sends them over TCP on loopback; the receiving process folds
sum, annular detector and both moments of each frame. Lost frames come from the ledgers of both ends; the maps are
compared with those of the dense frames, to the last count. The delay of a frame is from the moment at which it is there
to the moment at which it is in the maps, waiting for its block to fill included.

``python benchmarks/live.py [SECONDS]`` writes ``benchmarks/results/live.json``. With STEMLOOP_PEERS (the Python of an
environment with libertem-live) its Merlin simulator and receiver take the same frames afterwards (``peer_live.py``).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import counted_data
import numpy as np

from stemloop.stream import LandingLog, Live, Receiver, Sender, Unkept, cut
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

RESULTS = Path(__file__).parent / "results" / "live.json"
RATE = 87_000
PER_BLOCK = 256
CYCLE = 8192
SHAPE = counted_data.SHAPE


def frames() -> np.ndarray:
    """(CYCLE, 128, 128): what the source gives, over and over."""
    indptr, index = counted_data.events(200, scan=128)
    return EventBlock(indptr, index, SHAPE)[:CYCLE].dense()


def masks() -> np.ndarray:
    ring = m.rings(SHAPE, (64.0, 64.0), np.array([20, 60])) == 0
    return np.concatenate([m.ramps(SHAPE), ring[None].astype(np.int64)])


class Maps:
    """Four numbers of each frame."""

    def init(self, scan, shape):
        return np.zeros((scan[0] * scan[1], 4), np.uint32)

    def step(self, part, block, first):
        part[first : first + block.frames] = block.dot(masks_once)
        return part

    def merge(self, one, other):
        return one + other

    def finish(self, part):
        return {"maps": part}


masks_once = masks()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def source(address: str, codec: str, total: int, answer) -> None:
    """The sending process: ``total`` frames by the clock."""
    dense = frames()
    for name in ("events", "gaps"):
        cut.encoded(DenseBlock(dense[:PER_BLOCK]), "4d", 0, name)
    with Sender(address, "bench", window_bytes=32 << 20) as sender:
        cpu, wire = cpu_s(), 0
        begin = time.monotonic() + 0.2
        for first in range(0, total, PER_BLOCK):
            stop = min(first + PER_BLOCK, total)
            due = begin + stop / RATE
            if (early := due - time.monotonic()) > 0:
                time.sleep(early)
            at = first % CYCLE
            block = cut.encoded(DenseBlock(dense[at : at + stop - first]), "4d", first, codec, {"due": due})
            wire += len(block.payload) + 200
            sender.send(block)
        sender.flush()
        wall = time.monotonic() - begin
        answer.send({"cpu_s": cpu_s() - cpu, "wall_s": wall, "wire_bytes": wire, "ledger": sender.ledger()["4d"]})


def measure(codec: str, seconds: float, durable: bool) -> dict:
    total = int(RATE * seconds) // PER_BLOCK * PER_BLOCK
    dense = frames()
    wanted = DenseBlock(dense).dot(masks_once).astype(np.uint32)
    for name in ("events", "gaps"):  # compile
        cut.block_of(cut.encoded(DenseBlock(dense[:PER_BLOCK]), "4d", 0, name)).dot(masks_once)
    ends: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as name:
        log = LandingLog(Path(name) / "log", "bench", decode=cut.frames_of) if durable else Unkept()

        def watch(block):
            ends.append((time.monotonic() - block.meta["due"], block.n))

        with (
            Live({"maps": Maps()}, (1, total), SHAPE, stream="4d", watch=watch) as live,
            Receiver("tcp://127.0.0.1:*", log, "bench", taps=[live.take]) as receiver,
        ):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=source, args=(receiver.address, codec, total, theirs)
            )
            cpu, load = cpu_s(), os.getloadavg()[0]
            process.start()
            sent = ours.recv()
            live.wait(0, total, 60)
            cpu = cpu_s() - cpu
            process.join()
            maps = live.results()["maps"]["maps"]
            ledger = receiver.ledger()["4d"]
        log.close()
    exact = all(np.array_equal(maps[a : a + CYCLE], wanted[: len(maps[a : a + CYCLE])]) for a in range(0, total, CYCLE))
    delays = np.concatenate([late + np.arange(n)[::-1] / RATE for late, n in ends])
    return {
        "codec": codec,
        "durable": durable,
        "frames": total,
        "frames_per_s": total / sent["wall_s"],
        "MB_per_s_on_the_wire": sent["wire_bytes"] / sent["wall_s"] / 1e6,
        "lost": total - ledger["durable"],
        "missing": ledger["missing"],
        "sender_ledger": sent["ledger"],
        "maps_exact": exact,
        "delay_ms": {str(q): 1e3 * float(np.percentile(delays, q)) for q in (50, 99, 99.9, 100)},
        "sender_cpu_per_wall": sent["cpu_s"] / sent["wall_s"],
        "receiver_cpu_per_wall": cpu / sent["wall_s"],
        "load": [load, os.getloadavg()[0]],
    }


def mib(dense: np.ndarray) -> bytes:
    """Frames as a Merlin writes them, 384 bytes of header each."""
    rows = np.zeros((len(dense), 384 + 2 * SHAPE[0] * SHAPE[1]), np.uint8)
    for number, row in enumerate(rows, 1):
        head = f"MQ1,{number:06d},00384,01,0128,0128,U16,   1x1,01,2026-01-01 00:00:00.000000,0.001,0,0,0,1000000ns,16,"
        row[: len(head)] = np.frombuffer(head.encode(), np.uint8)
    rows[:, 384:] = dense.reshape(len(dense), -1).astype(">u2").view(np.uint8)
    return rows.tobytes()


def peer() -> dict:
    python = os.environ.get("STEMLOOP_PEERS", "")
    if not python:
        return {"left_out": "STEMLOOP_PEERS does not name the Python of an environment with libertem-live"}
    with tempfile.TemporaryDirectory() as name:
        folder, dense = Path(name), np.concatenate([frames()] * 2)
        (folder / "a.mib").write_bytes(mib(dense))
        (folder / "a.hdr").write_text(
            f"HDR,\nFrames in Acquisition (Number):\t{len(dense)}\nFrames per Trigger (Number):\t128\n"
            "Counter Depth (number):\t12\nEnd\t"
        )
        np.save(folder / "masks.npy", masks_once)
        np.save(folder / "expected.npy", DenseBlock(dense).dot(masks_once))
        done = subprocess.run(
            [python, str(Path(__file__).with_name("peer_live.py")), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-400:]}


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    runs = [measure("gaps", seconds, False), measure("events", seconds / 4, False), measure("gaps", seconds / 4, True)]
    result = {
        "what": f"frames of 128 x 128 at {RATE} a second, 200 electrons each, encoded, over loopback TCP, to maps",
        "seconds": [seconds, seconds / 4, seconds / 4],
        "machine": {"python": sys.version.split()[0], "cores": os.cpu_count()},
        "rows": runs,
        "peer": peer(),
    }
    result["machine"]["shared"] = max(max(row["load"]) for row in runs) > 3
    text = json.dumps(result, indent=1)
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
