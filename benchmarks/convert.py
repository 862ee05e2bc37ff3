"""A DM4 stack of 2 GB to one sealed HDF5 file: ``python benchmarks/convert.py [FOLDER]``.

The stack is written here, tag by tag. The disk's bandwidth is measured before and after each conversion: as many bytes
as the stack has, written in pieces of 4 MB and flushed, as the converted file is. Memory is the child's and parent's
largest resident size without mapped pages of files (``RssAnon``), and with them (``VmHWM``). On a busy machine the
conversion, which computes, stands and waits for a core, and the disk's measure does not: how long is said.
"""

import json
import os
import resource
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from stemloop.store.convert import convert

FRAMES, SIDE = 1000, 1024
RUNS, GOAL_SHARE, GOAL_MB = 5, 0.8, 256


def _tag(name: str, body: bytes, group: bool) -> bytes:
    word = name.encode()
    return struct.pack(">BH", 20 if group else 21, len(word)) + word + struct.pack(">Q", len(body)) + body


def _group(name: str | None, *children: bytes) -> bytes:
    body = struct.pack(">BBQ", 1, 0, len(children)) + b"".join(children)
    return body if name is None else _tag(name, body, True)


def _value(name: str, code: int, value: bytes) -> bytes:
    return _tag(name, b"%%%%" + struct.pack(">QQ", 1, code) + value, False)


def _words(name: str, text: str) -> bytes:
    raw = text.encode("utf-16-le")
    return _tag(name, b"%%%%" + struct.pack(">QQQQ", 3, 20, 4, len(text)) + raw, False)


def write_dm4(path: Path, frames: int, side: int, source: np.ndarray) -> int:
    """A stack of ``frames`` frames of ``side`` x ``side`` u16, made by repeating ``source``; returns its bytes."""

    def dimension(scale: float, units: str) -> bytes:
        number = struct.pack("<f", scale)
        return _group(
            "", _value("Origin", 6, struct.pack("<f", 0.0)), _value("Scale", 6, number), _words("Units", units)
        )

    size = frames * side * side
    lead = b"%%%%" + struct.pack(">QQQQ", 3, 20, 4, size)
    data = struct.pack(">BH", 21, 4) + b"Data" + struct.pack(">Q", len(lead) + 2 * size) + lead
    rest = _group("Calibrations", _group("Dimension", dimension(0.1, "nm"), dimension(0.1, "nm"), dimension(1, "s")))
    shape = _group("Dimensions", *(_value("", 5, struct.pack("<I", n)) for n in (side, side, frames)))
    after = rest + _value("DataType", 5, struct.pack("<I", 10)) + shape + _value("PixelDepth", 5, struct.pack("<I", 2))
    inside = struct.pack(">BBQ", 1, 0, 5)
    image_data = struct.pack(">BH", 20, 9) + b"ImageData"
    image_data += struct.pack(">Q", len(inside) + len(data) + 2 * size + len(after)) + inside + data
    open_entry = struct.pack(">BBQ", 1, 0, 3)
    name = _words("Name", "stack") + _group("ImageTags")
    entry_size = len(open_entry) + len(image_data) + 2 * size + len(after) + len(name)
    entry = struct.pack(">BHQ", 20, 0, entry_size) + open_entry + image_data
    list_open = struct.pack(">BBQ", 1, 0, 1)
    image_list = (
        struct.pack(">BH", 20, 9)
        + b"ImageList"
        + struct.pack(">Q", len(list_open) + len(entry) + 2 * size + len(after) + len(name))
        + list_open
        + entry
    )
    root = struct.pack(">BBQ", 1, 0, 1)
    total = len(root) + len(image_list) + 2 * size + len(after) + len(name)
    with open(path, "wb") as file:
        file.write(struct.pack(">IQI", 4, total, 1) + root + image_list)
        for k in range(frames):
            file.write(np.ascontiguousarray(source[k % len(source)], "<u2"))
        file.write(after + name + bytes(8))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def bandwidth(path: Path, size: int) -> float:
    """MB/s of writing ``size`` bytes that do not compress, and flushing them."""
    piece = np.random.default_rng(1).bytes(4 << 20)
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - begin
    path.unlink()
    return size / taken / 1e6


class Memory:
    """Largest resident size [MB] of this process's children while it runs, without and with mapped files; and how long
    [s] that of their threads that waited longest stood ready to run, but had no core."""

    def __init__(self) -> None:
        self.anonymous = self.resident = self.waited_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                self._one(child)
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    self._one(child)

    def _one(self, child: str) -> None:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(lines["RssAnon"].split()[0]) / 1e3)
            self.resident = max(self.resident, int(lines["VmHWM"].split()[0]) / 1e3)
            for thread in Path(f"/proc/{child}/task").iterdir():
                waited = int((thread / "schedstat").read_text().split()[1]) / 1e9
                self.waited_s = max(self.waited_s, waited)
        except (OSError, KeyError, ValueError):
            pass

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main(where: str | None) -> None:
    rng = np.random.default_rng(0)
    source = rng.poisson(50.0, (16, SIDE, SIDE)).astype("<u2")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        stack = Path(folder, "stack.dm4")
        size = write_dm4(stack, FRAMES, SIDE, source)
        disk, runs = [bandwidth(Path(folder, "disk"), size)], []
        for _ in range(RUNS):
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            load = os.getloadavg()[0]
            begin = time.perf_counter()
            with Memory() as memory:
                made = convert(stack, Path(folder, "out.h5"), overwrite=True)
            taken = time.perf_counter() - begin
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            disk.append(bandwidth(Path(folder, "disk"), size))
            raw, rate = made["raw_bytes"], sum(disk[-2:]) / 2
            runs.append(
                {
                    "seconds": round(taken, 2),
                    "waited_for_a_core_s": round(memory.waited_s, 2),
                    "cpu_s": round(after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime, 2),
                    "raw_MB_s": round(raw / taken / 1e6, 1),
                    "disk_MB_s": round(rate, 1),
                    "share_of_disk": round(raw / taken / 1e6 / rate, 2),
                    "size_ratio": round(raw / made["bytes"], 2),
                    "child_anonymous_MB": round(memory.anonymous),
                    "child_resident_MB": round(memory.resident),
                    "load": round(load, 1),
                }
            )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    results = {
        "what": f"DM4 stack of {FRAMES} frames of {SIDE} x {SIDE} u16 (Poisson, mean 50) to one sealed file",
        "bytes": size,
        "disk_write_MB_s": [round(rate) for rate in disk],
        "benchmark_itself_MB": round(own),
        "goal": {"share_of_disk": GOAL_SHARE, "child_MB": GOAL_MB},
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "runs": runs,
        "met": [sum(run["share_of_disk"] >= GOAL_SHARE for run in runs), len(runs)],
    }
    Path(__file__).with_name("results").joinpath("convert.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
