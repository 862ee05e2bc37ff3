"""Sum, annular detector and both moments of a 4D-STEM scan: dense, on events, on gap-coded bytes, and peers beside.

256 x 256 scan of 128 x 128 uint16 (2 GiB of plain frames) with 50, 200 and 500 electrons a frame (``counted_data.py``).
All times are CPU-seconds of one core. ``read`` sums the same bytes as 64-bit words: the limit. Each is measured twice,
the read and the kernel alike. From memory: the calls go round over so many copies of the block that they are together
larger than eight times the last cache, and each copy is read once a round; the mean of the best round. Warm: the same
block again and again (what fits into the cache stays there); the best call. ``one_by_one`` is what processors without
AVX-512 VBMI do. LiberTEM (one mask UDF with all
four masks, inline, one thread) and stempy run in the same command in the environment whose Python STEMLOOP_PEERS names;
without it they are left out. Needs about 8 GB. ``python benchmarks/events.py``
writes ``benchmarks/results/events.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import counted_data
import numba
import numpy as np

from stemloop.stream import lanes
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.gaps import GapBlock

RESULTS = Path(__file__).parent / "results" / "events.json"


@numba.njit(cache=True)
def add_up(words):
    total = np.uint64(0)
    for word in words:
        total += word
    return total


def read(array: np.ndarray) -> np.uint64:
    flat = array.reshape(-1).view(np.uint8)
    return add_up(flat[: len(flat) // 8 * 8].view(np.uint64))


def last_cache() -> int:
    """Bytes of the last cache; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=32 << 20)


def best(call, repeats: int) -> float:
    """CPU-seconds of the best call, on one block that may stay in the cache."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def from_memory(call, blocks: list, rounds: int = 7) -> float:
    """CPU-seconds a call, where ``call`` takes each of ``blocks`` in turn: the mean of the best round."""
    call(blocks[0])
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        for block in blocks:
            call(block)
        times.append((time.process_time() - begin) / len(blocks))
    return min(times)


def best_of(call, block) -> float:
    return best(lambda: call(block), 15)


def copies(block, make) -> list:
    """So many copies that all together are larger than eight times the last cache."""
    return [make(block) for _ in range(8 * last_cache() // block.nbytes + 1)]


def one_by_one(time_of, *given) -> float:
    """What ``time_of`` measures without the instructions that take sixty-four electrons at a time."""
    ready, lanes.READY = lanes.READY, False
    try:
        return time_of(*given)
    finally:
        lanes.READY = ready


def peers(folder: Path) -> dict:
    python = os.environ.get("STEMLOOP_PEERS", "")
    if not python:
        return {"left_out": "STEMLOOP_PEERS does not name the Python of an environment with LiberTEM and stempy"}
    done = subprocess.run(
        [python, str(Path(__file__).with_name("peer_events.py")), str(folder)],
        env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr[-400:]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(electrons: int, masks: np.ndarray, dense: bool) -> dict:
    indptr, index = counted_data.events(electrons)
    events = EventBlock(indptr, index, counted_data.SHAPE)
    gaps = GapBlock.of(events)
    wanted = events.dot(masks)
    assert np.array_equal(gaps.dot(masks), wanted)
    row = {
        "electrons": len(events.index),
        "events_MB": events.nbytes / 1e6,
        "gaps_MB": gaps.nbytes / 1e6,
        "events_total_s": best(events.total, 5),
    }
    for name, block, parts, make in (
        ("events", events, ("index", "indptr"), lambda b: EventBlock(b.indptr.copy(), b.index.copy(), b.shape)),
        ("gaps", gaps, ("gaps", "ends"), lambda b: GapBlock(b.ends.copy(), b.gaps.copy(), b.shape)),
    ):
        for way, time_of, given in (("", from_memory, copies(block, make)), ("_warm", best_of, block)):
            row[f"read_{name}{way}_s"] = time_of(
                lambda b, parts=parts: [read(getattr(b, part)) for part in parts], given
            )
            row[f"{name}{way}_s"] = time_of(lambda b: b.dot(masks), given)
            row[f"{name}{way}_over_read"] = row[f"{name}{way}_s"] / row[f"read_{name}{way}_s"]
            row[f"{name}{way}_one_by_one_s"] = one_by_one(time_of, lambda b: b.dot(masks), given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "masks.npy", masks)
        indptr.astype(np.int64).tofile(folder / "indptr.raw")
        index.tofile(folder / "index.raw")
        np.ones(len(index), np.uint8).tofile(folder / "ones.raw")
        if dense:
            frames = events.dense()
            block = DenseBlock(frames)
            assert np.array_equal(block.dot(masks), wanted)
            row |= {
                "read_dense_s": best(lambda: read(frames), 3),
                "dense_s": best(lambda: block.dot(masks), 3),
                "dense_one_by_one_s": one_by_one(best, lambda: block.dot(masks), 3),
                "dense_to_events_s": best(lambda: EventBlock.from_dense(frames), 2),
                "events_to_dense_s": best(events.dense, 2),
            }
            frames.tofile(folder / "dense.raw")
            del frames, block
        row["peers"] = peers(folder)
        if (folder / "libertem.npy").exists():
            # LiberTEM adds in float32
            row["peers"]["libertem_agrees"] = bool(np.allclose(np.load(folder / "libertem.npy"), wanted, rtol=1e-5))
    other = row["peers"]
    for peer, ours, ratio in (
        ("libertem_dense_s", "dense_s", "libertem_dense_over_dense"),
        ("libertem_raw_csr_s", "events_s", "libertem_raw_csr_over_events"),
        ("stempy_adf_and_com_s", "events_s", "stempy_over_events"),
    ):
        if peer in other and ours in row:
            row[ratio] = other[peer] / row[ours]
    return row


def main() -> None:
    ring = m.rings(counted_data.SHAPE, (64.0, 64.0), np.array([20, 60])) == 0
    masks = np.concatenate([m.ramps(counted_data.SHAPE), ring[None].astype(np.int64)])
    result = {
        "what": "sum + annular detector + both moments, 256 x 256 x 128 x 128, CPU-seconds of one core",
        "machine": {
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
            "last_cache_MB": last_cache() / 1e6,
            "avx512_vbmi": lanes.READY,
            "load_at_begin": os.getloadavg()[0],
        },
        "rows": {str(e): measure(e, masks, dense=e == 200) for e in (50, 200, 500)},
    }
    result["machine"]["load_at_end"] = os.getloadavg()[0]
    result["machine"]["shared"] = max(result["machine"]["load_at_begin"], result["machine"]["load_at_end"]) > 1.5
    text = json.dumps(result, indent=1)
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
