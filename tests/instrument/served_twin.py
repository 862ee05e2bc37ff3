"""A twin behind its server, in a thread of this process, for the tests of the gateways."""

import threading
from contextlib import contextmanager

from conftest import until

from stemloop.instrument.audit import verify_audit
from stemloop.instrument.server import serve
from stemloop.simulate.twin import Twin

TOKENS = {role: f"{role}-secret-0123456789" for role in ("viewer", "agent", "operator")}


class Spying:
    """An instrument that counts what reaches it."""

    def __init__(self, instrument):
        self._instrument, self.asked = instrument, []

    def __getattr__(self, name):
        return getattr(self._instrument, name)

    def execute(self, instruction, key):
        self.asked.append((instruction, key))
        return self._instrument.execute(instruction, key)

    @property
    def exposures(self):
        return [asked for asked, _ in self.asked if asked.exposes]


class Served:
    def __init__(self, folder, instrument):
        self.folder, self.instrument = folder, instrument

    def audit(self):
        return verify_audit(self.folder / "audit.jsonl").lines


@contextmanager
def served_twin(folder, **options):
    instrument = Spying(Twin("MoS2", 0))
    limits = {
        "field_m": [1e-8, 1e-8],
        "stage": {"x_m": [-2e-10, 2e-10], "y_m": [-2e-10, 2e-10], "alpha_rad": [-0.02, 0.02]},
    }
    settings = {"tokens": TOKENS, "idle_exit_s": 0.5, "grace_s": 0.3, "limits": limits, **options}
    thread = threading.Thread(target=serve, args=(instrument, folder), kwargs=settings, daemon=True)
    thread.start()
    until((folder / "address.json").exists)
    yield Served(folder, instrument)
    thread.join(30)
    assert not thread.is_alive()
