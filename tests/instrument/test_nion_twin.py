"""The twin as a device inside Nion's own stack, driven through that stack."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("nion.usim_device", reason="the extra nion is not installed")

from instrument.conformance import InstrumentConformance
from stemloop.core.errors import Aborted, InputError, InstrumentError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Field, Image, Optics, Probe, Report, Stage
from stemloop.instrument.nion.adapter import NionInstrument
from stemloop.instrument.nion.device import TWIN
from stemloop.instrument.nion.host import find
from stemloop.instrument.nion.kinds import inside_nion
from stemloop.simulate.twin import Twin

SEED = 3


def new_twin():
    return Twin("graphene", SEED, drifts=False)


@pytest.fixture(scope="module")
def nion():
    instrument = inside_nion(new_twin())
    yield instrument
    instrument.close()


@pytest.fixture
def alone(nion):
    """A twin without Nion, and both at their beginning."""
    twin = new_twin()
    fresh = {f"inside_{name}": value for name, value in twin.state().items()}
    names = set(nion.state())
    nion.restore({**{n: v for n, v in nion.state().items() if n not in fresh}, **fresh, **controls(twin, names)})
    return twin


def controls(twin, names):
    """What Nion's controls say when the twin is in its first state."""
    known = twin.state()
    return {name: known[name] for name in names if name in known}


def some_positions(n, seed=0):
    height, width = new_twin().info.field_m
    return [tuple(p) for p in np.random.default_rng(seed).random((n, 2)) * (height, width)]


def test_it_is_calibrated_as_the_twin_is(nion, alone):
    ours, theirs = nion.info, alone.info
    assert ours.camera.shape == theirs.camera.shape
    assert ours.camera.pixel_rad == pytest.approx(theirs.camera.pixel_rad, rel=1e-12)
    assert ours.camera.centre_px == pytest.approx(theirs.camera.centre_px, rel=1e-12)
    assert ours.field_m == theirs.field_m and ours.energy_eV == theirs.energy_eV
    assert ours.sample == theirs.sample and ours.detectors == theirs.detectors


@pytest.mark.parametrize(
    "asked",
    [
        Diffraction(((4e-9, 5e-9),), 1e-3),
        Image((0.0, 0.0), (9e-9, 9e-9), (90, 80), 2e-6),
        Image((2e-9, 3e-9), (3e-9, 1e-9), (30, 20), 2e-6, rotation_rad=0.4),
        Image((2e-9, 3e-9), (1e-9, 3e-9), (20, 60), 2e-6),
        Image((2e-9, 3e-9), (1e-9, 1e-9), (20, 20), 2e-6, "ABF"),
    ],
)
def test_frames_are_the_twins_own_to_the_last_count(nion, alone, asked):
    through, direct = nion.execute(asked, "a key"), alone.execute(asked, "a key")
    assert through.frames.dtype == direct.frames.dtype
    np.testing.assert_array_equal(through.frames, direct.frames)
    assert through.electrons == pytest.approx(direct.electrons, rel=1e-12)
    for name in ("pixel_rad", "pixel_m", "energy_eV", "semiangle_rad", "dwell_s"):
        assert through.calibration.get(name) == pytest.approx(direct.calibration.get(name))


def test_each_of_many_positions_is_exposed_once_in_order(nion, alone):
    positions = some_positions(12)
    through = nion.execute(Diffraction(tuple(positions), 1e-3), "list")
    for index, position in enumerate(positions):
        key = f"list#{index}" if index else "list"
        own = alone.execute(Diffraction((position,), 1e-3), key)
        np.testing.assert_array_equal(through.frames[index], own.frames[0])
    assert through.state["inside_electrons"] == pytest.approx(12 * own.electrons)
    assert through.state["electrons"] == pytest.approx(12 * own.electrons)


def test_optics_and_stage_reach_the_twin(nion, alone):
    for asked in (
        Optics(semiangle_rad=9e-3),
        Optics(C10_m=-5e-9),
        Optics(C30_m=1e-6),
        Stage(x_m=1e-10),
        Stage(alpha_rad=2e-3),
    ):
        nion.execute(asked, "set")
        alone.execute(asked, "set")
    nion.execute(Optics(C12_m=(2e-9, -1e-9)), "pair")
    alone.execute(Optics(C12_m=(2e-9, 0.0)), "pair")  # Nion sets the two numbers of a pair one after the other
    alone.execute(Optics(C12_m=(2e-9, -1e-9)), "pair")
    for name in ("semiangle_rad", "C10_m", "C12_m", "C30_m", "stage_x_m", "stage_alpha_rad"):
        assert nion.state()[name] == alone.state()[name] == nion.state()[f"inside_{name}"]
    asked = Diffraction(((4e-9, 5e-9),), 1e-3)
    np.testing.assert_array_equal(nion.execute(asked, "after").frames, alone.execute(asked, "after").frames)


def test_a_smaller_turned_field_is_the_twins_own(nion, alone):
    for one in (nion, alone):
        one.execute(Field((5e-9, 4e-9), 0.6), "field")
    for asked in (
        Diffraction(((1e-9, 3e-9),), 1e-3),
        Image((1e-9, 1e-9), (2e-9, 2e-9), (20, 20), 2e-6, rotation_rad=0.2),
    ):
        through, direct = nion.execute(asked, "turned"), alone.execute(asked, "turned")
        np.testing.assert_array_equal(through.frames, direct.frames)
        assert (through.state["probe_y_m"], through.state["probe_x_m"]) == pytest.approx(
            (direct.state["probe_y_m"], direct.state["probe_x_m"]), abs=1e-20
        )


def test_a_refusal_of_the_twin_arrives_as_it_was_and_nothing_has_changed(nion, alone):
    before = nion.state()
    with pytest.raises(LimitError, match="semiangle"):
        nion.execute(Optics(C10_m=1e-9, semiangle_rad=1.0), "too much")
    after = nion.state()
    assert {k: v for k, v in after.items() if "clock" not in k} == {k: v for k, v in before.items() if "clock" not in k}
    with pytest.raises(LimitError, match="outside the field"):
        nion.execute(Diffraction(((4e-9, 5e-9), (4e-9, 50e-9)), 1e-3), "too far")
    assert nion.state()["exposed_positions"] == before["exposed_positions"]


def test_state_goes_round(nion, alone):
    nion.execute(Optics(C10_m=2e-9), "one")
    nion.execute(Probe((1e-9, 2e-9)), "two")
    state = nion.state()
    nion.execute(Optics(C10_m=0.0), "three")
    nion.execute(Probe((3e-9, 3e-9)), "four")
    nion.restore(state)
    assert nion.state() == nion.execute(Report(), "five").state == state
    with pytest.raises(InputError, match="no state of"):
        nion.restore({"C10_m": 0.0})


def test_a_blanked_beam_exposes_nothing(nion, alone):
    nion.execute(Blank(True), "off")
    with pytest.raises(InstrumentError, match="blanked"):
        nion.execute(Diffraction(((4e-9, 5e-9),), 1e-3), "dark")
    nion.execute(Blank(False), "on")
    assert nion.state()["blanked"] == 0 and nion.state()["inside_exposed_positions"] == 0


def test_a_live_view_gives_no_stale_frame(nion, alone):
    camera = find(TWIN).camera
    for index, position in enumerate(some_positions(10, seed=1)):
        camera.start_playing()
        camera.get_next_xdatas_to_finish(10)  # the live view looks at the last position
        asked = Diffraction((position,), 1e-3)
        frames = nion.execute(asked, f"live {index}").frames
        assert not camera.is_playing
        np.testing.assert_array_equal(frames, alone.execute(asked, f"live {index}").frames)


def test_a_frame_that_began_before_the_command_is_no_frame(nion, alone):
    slow = NionInstrument(find(TWIN), nion._setup.__class__(**{**vars(nion._setup), "slack_s": -3600.0}))
    with pytest.raises(InstrumentError, match="before the command; it is not used"):
        slow.execute(Diffraction(((4e-9, 5e-9),), 1e-3), "early")


def test_abort_ends_the_exposure_blanks_and_never_hands_out_the_frame_before(nion, alone):
    begun = threading.Event()
    nion.progress = lambda done, of: begun.set() if done == 3 else None
    helper = threading.Thread(target=lambda: (begun.wait(10), nion.abort()))
    helper.start()
    try:
        with pytest.raises(Aborted) as told:
            nion.execute(Diffraction(tuple(some_positions(500)), 1e-3), "long")
    finally:
        nion.progress = None
        helper.join()
    assert 3 <= told.value.exposed < 500
    assert nion.state()["exposed_positions"] == told.value.exposed
    assert nion.state()["blanked"] == 1
    nion.execute(Blank(False), "on")
    assert len(nion.execute(Diffraction(tuple(some_positions(2)), 1e-3), "next").frames) == 2


def test_abort_ends_an_image(nion, alone):
    asked = Image((0.0, 0.0), (9e-9, 9e-9), (64, 64), 1e-3)  # four seconds of beam
    timer = threading.Timer(0.3, nion.abort)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Aborted):
        nion.execute(asked, "long image")
    timer.join()
    assert time.monotonic() - began < 3.5 and nion.state()["blanked"] == 1
    nion.execute(Blank(False), "on")
    small = Image((1e-9, 1e-9), (1e-9, 1e-9), (8, 8), 2e-6)
    assert nion.execute(small, "again").frames.shape == (1, 8, 8)


def test_one_process_holds_one_stack(nion):
    with pytest.raises(InstrumentError, match="one process holds one instrument"):
        inside_nion(new_twin())


def test_an_instrument_that_cannot_image_is_no_device():
    class Blind:
        info = type(new_twin().info)("blind", ("report",), (1e-9, 1e-9), 60e3)

    with pytest.raises(InputError, match="cannot image and diffract"):
        inside_nion(Blind())


def test_the_process_ends_and_leaves_no_thread():
    program = (
        "import threading\n"
        "from stemloop.instrument.nion.kinds import inside_nion\n"
        "from stemloop.simulate.twin import Twin\n"
        "for _ in range(2):\n"
        "    nion = inside_nion(Twin('graphene', 1))\n"
        "    nion.close(); nion.close()\n"
        "print([t.name for t in threading.enumerate()])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "['MainThread']\n", done.stderr


class TestConformance(InstrumentConformance):
    @pytest.fixture
    def instrument(self, nion, alone):
        return nion
