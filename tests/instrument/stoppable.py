"""An instrument that can be ended early and tells how far it is, and words for tests that speak to a server."""

import threading
import time

from counting_instrument import TOKENS, Counting
from websockets.sync.client import connect as raw_connect

from stemloop.core.errors import Aborted
from stemloop.core.instruction import Diffraction
from stemloop.core.protocols import Exposure
from stemloop.instrument import wire

POINT = Diffraction(((1e-9, 1e-9),), 1e-3)
LONG = Diffraction(((1e-9, 1e-9),) * 50, 1e-3)


class Stoppable(Counting):
    """Looks at every position whether it is to end; a position takes ``step_s``."""

    def __init__(self, path, step_s=0.0):
        super().__init__(path)
        self.step_s = step_s
        self.progress = None
        self.asked_to_end = threading.Event()

    def abort(self):
        self.note("abort")
        self.asked_to_end.set()

    def execute(self, instruction, key):
        if not instruction.exposes:
            return super().execute(instruction, key)
        of = instruction.exposed_positions
        self.note("begin", key)
        try:
            for done in range(of):
                if self.asked_to_end.is_set():
                    self.values["blanked"] = True
                    self.note("ended", key, done)
                    raise Aborted(f"ended after {done} of {of} positions.", done)
                time.sleep(self.step_s)
                if self.progress is not None:
                    self.progress(done + 1, of)
        finally:
            self.asked_to_end.clear()
        exposure = super().execute(instruction, key)
        return Exposure(exposure.frames, exposure.electrons, self.state(), exposure.calibration)


class Line:
    """A connection of its own: sends and receives messages one by one, and keeps the events."""

    def __init__(self, served, role="agent", path="control", **options):
        self.events, self.replies = [], {}
        self.number = 0
        self.socket = raw_connect(f"{served.url}/{path}", compression=None, proxy=None, max_size=None, **options)
        if role:
            assert self.ask(op="hello", token=TOKENS[role])["ok"]

    def send(self, **message):
        self.number += 1
        self.socket.send(wire.encode({"n": self.number, **message}))
        return self.number

    def execute(self, name, fencing, instruction=POINT, **more):
        asked = wire.instruction_to_message(instruction)
        return self.send(op="execute", id=name, fencing=fencing, instruction=asked, **more)

    def reply(self, number, timeout=20):
        while number not in self.replies:
            self._receive(timeout)
        return self.replies.pop(number)

    def _receive(self, timeout):
        message = wire.decode(self.socket.recv(timeout))
        if "event" in message:
            self.events.append(message)
        else:
            self.replies[message["n"]] = message

    def ask(self, **message):
        return self.reply(self.send(**message))

    def event(self, name, timeout=20):
        """The next event of that name."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            self._receive(timeout)

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
