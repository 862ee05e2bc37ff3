import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from counting_instrument import TOKENS, Counting, ListSink

from stemloop.instrument import server
from stemloop.instrument.client import connect

HERE = Path(__file__).parent


class Served:
    """A server in a thread of this process, and what the test knows of it."""

    def __init__(self, directory, sleep_s=0.0, instrument=None, **options):
        self.directory = directory / "server"
        self.instrument = instrument or Counting(directory / "exposures.txt", sleep_s)
        self.sink = ListSink(directory / "frames.txt")
        options = {"tokens": TOKENS, "idle_exit_s": 0.4, "grace_s": 0.3, "sink": self.sink, **options}
        self.error = None
        self.thread = threading.Thread(target=self._serve, args=(options,), daemon=True)
        self.thread.start()

    def _serve(self, options):
        try:
            server.serve(self.instrument, self.directory, **options)
        except BaseException as error:
            self.error = error
            logging.getLogger("served").exception("the server ended")

    def connect(self, role="agent", **options):
        return connect(self.directory, TOKENS[role], role, **{"patience_s": 10.0, **options})

    @property
    def url(self):
        until((self.directory / "address.json").exists)
        address = json.loads((self.directory / "address.json").read_text())
        return f"{address['scheme']}://{address['host']}:{address['port']}"

    @property
    def exposures(self):
        return len(self.instrument.lines("expose "))

    def wait(self):
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def served(tmp_path):
    """A function that starts a server in a thread; all are awaited at the end (they leave when nobody is there)."""
    started = []

    def start(**options):
        made = options.pop("make", None)
        if made:
            options["instrument"] = made(tmp_path / "exposures.txt")
        started.append(Served(tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.wait()


@pytest.fixture
def spawn(tmp_path):
    """A function that starts a server in a process of its own; all are killed at the end."""
    started = []

    def start(sleep_s=0.0, dose_budget=1e9, idle_exit_s=20.0):
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")}
        command = [sys.executable, str(HERE / "counting_instrument.py"), tmp_path, sleep_s, dose_budget, idle_exit_s]
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def until(condition, timeout_s=20.0):
    """Wait for a condition; fail if it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
