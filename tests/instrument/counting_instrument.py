"""An instrument that writes each exposure down outside of any server, and a program that serves it."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from stemloop.core import units
from stemloop.core.instruction import Blank, Image, Optics
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo

CURRENT_A = 1e-10
FIELD_M = (1e-8, 2e-8)
TOKENS = {role: f"{role}-secret-0123456789" for role in ("viewer", "agent", "operator", "engineer")}


class Counting:
    """Answers frames that depend on the key alone; ``sleep_s`` is the beam time. Everything goes to ``path``."""

    def __init__(self, path, sleep_s=0.0):
        self.path = Path(path)
        self.sleep_s = sleep_s
        self.threads = set()
        self.values = {"current_A": CURRENT_A, "blanked": False, "moves": 0}
        self.closed = False

    @property
    def info(self):
        return InstrumentInfo(
            "counting",
            ("image", "diffraction", "blank", "optics", "report"),
            FIELD_M,
            80e3,
            camera=Camera((8, 8), 1e-3, (3.5, 3.5)),
        )

    def note(self, *words):
        with open(self.path, "a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def lines(self, first):
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split() for line in text.splitlines() if line.startswith(first)]

    def state(self):
        return dict(self.values)

    def restore(self, state):
        self.values = dict(state)

    def execute(self, instruction, key):
        self.threads.add(threading.get_ident())
        if isinstance(instruction, Blank):
            self.values["blanked"] = instruction.blanked
            self.note("blank", instruction.blanked)
        if isinstance(instruction, Optics):
            self.values["moves"] += 1
            self.values["current_A"] = instruction.current_A or self.values["current_A"]
        if not instruction.exposes:
            return Exposure(None, 0.0, self.state())
        if self.values["blanked"]:
            raise RuntimeError("the beam is blanked")
        electrons = units.electrons(self.values["current_A"], instruction.dwell_s)
        self.note("expose", key, electrons * instruction.exposed_positions)
        time.sleep(self.sleep_s)
        shape = (1, *instruction.shape) if isinstance(instruction, Image) else (instruction.exposed_positions, 8, 8)
        rng = np.random.default_rng(list(key.encode()))
        self.note("exposed", key)
        return Exposure(rng.integers(0, 4096, shape).astype(np.uint16), electrons, self.state(), {"pixel_rad": 1e-3})

    def close(self):
        self.closed = True


class ListSink:
    """Keeps batches as lines of a file, so that they outlive a killed process."""

    def __init__(self, path):
        self.path = Path(path)
        self.closed = False

    def send(self, batch):
        line = {
            "stream": batch.stream,
            "first": batch.first,
            "count": len(batch.frames),
            "sum": int(batch.frames.sum()),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps({**line, "id": batch.meta["command_id"]}) + "\n")

    def lines(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def close(self):
        self.closed = True


def main(directory, sleep_s, dose_budget, idle_exit_s):
    from stemloop.instrument.server import serve

    serve(
        Counting(Path(directory) / "exposures.txt", float(sleep_s)),
        Path(directory) / "server",
        sink=ListSink(Path(directory) / "frames.txt"),
        dose_budget=float(dose_budget),
        idle_exit_s=float(idle_exit_s),
    )
    print("clean", os.getpid())


if __name__ == "__main__":
    main(*sys.argv[1:])
