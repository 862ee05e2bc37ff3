"""The network fails in every way that it can: the beam ends blanked, nothing is exposed twice, and who asked hears."""

import json
import threading
import time

import numpy as np
import pytest
from conftest import until
from counting_instrument import CURRENT_A, TOKENS
from proxy import Proxy
from stoppable import LONG, POINT, Line, Stoppable

from stemloop.core import units
from stemloop.core.errors import InstrumentError, OutcomeUnknown
from stemloop.instrument.client import connect
from stemloop.instrument.tokens import TokenFile

EACH = int(np.ceil(units.electrons(CURRENT_A, 1e-3)))


@pytest.fixture
def through():
    """A function that puts a proxy before a server; gives the proxy."""
    made = []

    def start(one):
        made.append(Proxy(int(one.url.rsplit(":", 1)[1])))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


def far(proxy):
    return type("Far", (), {"url": f"ws://127.0.0.1:{proxy.port}"})


def client_of(proxy, **options):
    return connect(f"127.0.0.1:{proxy.port}", TOKENS["agent"], **{"patience_s": 10.0, "ttl_s": 2.0, **options})


def blanked_at_last(one, timeout_s=10):
    until(lambda: one.instrument.values["blanked"], timeout_s)


def test_a_pulled_cable_blanks_the_beam_after_the_time_to_live(served, through):
    """Half-open: both ends keep their sockets and nothing comes through."""
    one = served(grace_s=0.2, heartbeat_s=0.3, idle_exit_s=2.0)
    proxy = through(one)
    agent = Line(far(proxy))
    lease = agent.ask(op="acquire", ttl_s=0.6)
    assert agent.reply(agent.execute("a", lease["fencing"]))["ok"]
    one.instrument.values["blanked"] = False  # by hand; an exposure leaves it blanked
    begun = time.monotonic()
    proxy.stall()
    blanked_at_last(one)
    assert time.monotonic() - begun < 5
    with Line(one) as other:
        assert other.ask(op="acquire")["ok"]


def test_a_pulled_cable_during_a_long_exposure_ends_it(served, through):
    one = served(make=lambda path: Stoppable(path, 0.05), grace_s=0.2, heartbeat_s=0.3, idle_exit_s=2.0)
    proxy = through(one)
    agent = Line(far(proxy))
    agent.execute("a", agent.ask(op="acquire", ttl_s=60)["fencing"], LONG)
    until(lambda: one.instrument.lines("begin"))
    proxy.stall()
    until(lambda: one.instrument.lines("ended"), 10)
    done = int(one.instrument.lines("ended")[0][2])
    assert done < 50
    blanked_at_last(one)
    with Line(one, "viewer") as viewer:
        spent = viewer.ask(op="dose")["dose"]["spent"]
        assert spent == np.ceil(done * units.electrons(CURRENT_A, 1e-3))


def test_a_half_closed_connection_is_a_lost_one(served, through):
    one = served(grace_s=0.2, heartbeat_s=0.3, idle_exit_s=2.0)
    proxy = through(one)
    agent = Line(far(proxy))
    agent.ask(op="acquire", ttl_s=60)
    proxy.half_close()
    blanked_at_last(one)


@pytest.mark.parametrize("after", [0, 1, 3, 40, 150, 400])
def test_a_reply_that_is_cut_off_anywhere_exposes_once(served, through, after):
    one = served(idle_exit_s=2.0)
    proxy = through(one)
    with client_of(proxy, lease=True) as client:
        client.execute(POINT, "a")
        proxy.cut(after)
        exposure = client.execute(POINT, "b")
        assert exposure.frames.shape == (1, 8, 8)
        assert client.dose()["spent"] == 2 * EACH
    assert one.exposures == 2


def test_a_network_that_drops_at_random_moments_exposes_each_id_once(served, through):
    one = served(sleep_s=0.01, grace_s=3.0, idle_exit_s=2.0)
    proxy = through(one)
    done = threading.Event()
    rng = np.random.default_rng(3)

    def shake():
        while not done.wait(rng.uniform(0.02, 0.1)):
            rng.choice([proxy.drop, proxy.half_close, lambda: proxy.cut(int(rng.integers(1, 300)))])()

    shaking = threading.Thread(target=shake)
    with client_of(proxy, lease=True) as client:
        shaking.start()
        try:
            frames = {name: client.execute(POINT, name).frames for name in (f"c{n}" for n in range(25))}
        finally:
            done.set()
            shaking.join()
        for name, seen in frames.items():
            assert np.array_equal(client.execute(POINT, name).frames, seen)
        assert client.dose()["spent"] == 25 * EACH
    keys = [line[1] for line in one.instrument.lines("expose ")]
    assert sorted(keys) == sorted(frames)
    blanked_at_last(one)


def test_who_stays_cut_off_is_told_to_repeat_the_same_id(served, through):
    one = served(grace_s=0.2, heartbeat_s=0.3, idle_exit_s=3.0, sleep_s=0.3)
    proxy = through(one)
    client = client_of(proxy, lease=True, patience_s=0.8)
    cutter = threading.Timer(0.1, proxy.close)
    cutter.start()
    with pytest.raises(InstrumentError, match="same command id, which exposes nothing twice"):
        client.execute(POINT, "a")
    cutter.join()
    client.close()
    blanked_at_last(one)
    with one.connect() as again, again.lease():
        assert again.execute(POINT, "a").frames is not None
    assert one.exposures == 1


def test_kills_of_server_and_network_together_never_expose_twice(tmp_path, spawn):
    """The server is killed at random moments and comes back on another port, behind a proxy that drops."""
    directory = tmp_path / "server"
    rng = np.random.default_rng(11)

    def port():
        until((directory / "address.json").exists)
        return json.loads((directory / "address.json").read_text())["port"]

    directory.mkdir()
    token, _ = TokenFile(directory / "tokens.json").issue("agent")
    processes = [spawn(sleep_s=0.02)]
    proxy = Proxy(port())
    done = threading.Event()

    def harm():
        for _ in range(3):
            if done.wait(rng.uniform(0.1, 0.4)):
                return
            proxy.drop()
            if done.wait(rng.uniform(0.02, 0.1)):
                return
            processes[-1].kill()
            processes[-1].wait()
            (directory / "address.json").unlink(missing_ok=True)
            processes.append(spawn(sleep_s=0.02))
            proxy.retarget(port())

    harming = threading.Thread(target=harm)
    known, unknown = [], []
    with connect(f"127.0.0.1:{proxy.port}", token, patience_s=30, lease=True) as client:
        harming.start()
        try:
            for name in (f"c{number}" for number in range(12)):
                try:
                    client.execute(POINT, name)
                    known.append(name)
                except OutcomeUnknown:
                    unknown.append(name)
        finally:
            done.set()
            harming.join()
    proxy.close()
    lines = (tmp_path / "exposures.txt").read_text().splitlines()
    seen = [line.split()[1] for line in lines if line.startswith("expose ")]
    assert len(seen) == len(set(seen)) and set(known) <= set(seen) <= set(known) | set(unknown) and known
    with connect(directory, role="viewer", patience_s=20) as viewer:
        until(lambda: viewer.state()["blanked"])
        assert viewer.dose()["spent"] == (len(known) + len(unknown)) * EACH
