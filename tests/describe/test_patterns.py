import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stemloop.core.errors import InputError, UnreadableFile
from stemloop.core.protocols import Camera, Describer
from stemloop.core.structure import PHASES
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.describe.patterns import PRIOR_SIGMA, PatternDescriber, canonical
from stemloop.learn.geometry import polar, strain_of
from stemloop.simulate.examples import USUAL, Ranges, examples, vacuum

ELECTRONS = 6e5
#: The beams that the shipped recipes use, on places like those of the training.
USUAL_BEAM = Ranges(usual=1.0, source_m=(0.5e-10, 0.9e-10), C10_m=(-10e-9, 10e-9))
FIELDS, POSITIONS = 5, 12


def camera_of(energy_eV):
    return Camera((64, 64), wavelength_m(energy_eV) / (32 * ANGSTROM_M), (32, 32))


@pytest.fixture(scope="module")
def describer():
    return PatternDescriber()


@pytest.fixture(scope="module")
def seen():
    """For each material: counts (n, 64, 64), stretch labels (n, 4), semiangles, of fields that no set holds."""
    found = {}
    rng = np.random.default_rng(0)
    for material in ("MoS2", "graphene", "SrTiO3"):
        shards = [examples(material, k, 77, USUAL_BEAM, POSITIONS) for k in range(FIELDS)]
        fraction = np.concatenate([s["patterns"] for s in shards]).astype(np.float64) / 1000
        labels = polar(np.concatenate([s["deformation"] for s in shards]))
        semiangle = np.concatenate([s["semiangle_rad"] for s in shards])
        found[material] = (rng.poisson(fraction * ELECTRONS), labels, semiangle)
    return found


def described(describer, material, counts, semiangle, rotation_rad=0.0):
    energy_eV = USUAL[material][0]
    parts = []
    for k in range(len(counts)):
        parts.append(
            describer(counts[k : k + 1], camera_of(energy_eV), energy_eV, semiangle[k], ELECTRONS, rotation_rad)
        )
    return parts


def stacked(parts, name):
    return np.concatenate([getattr(p, name) for p in parts])


def test_it_is_called_as_the_protocol_says():
    ours, socket = (inspect.signature(c.__call__).parameters for c in (PatternDescriber, Describer))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in socket.values()]


def test_strain_is_read_within_its_deviation(describer, seen):
    for material, (counts, labels, semiangle) in seen.items():
        parts = described(describer, material, counts, semiangle)
        named = stacked(parts, "phase").argmax(1)
        assert np.mean(named == PHASES.index(material)) >= 0.95
        error = stacked(parts, "mean")[:, :4] - strain_of(labels, 0.0)
        sigma = stacked(parts, "sigma")[:, :4]
        within = np.abs(error) < 2 * sigma
        # 60 places of 5 fields: the share of 0.95 varies by 0.03 for independent places, by about 0.05 for these
        assert within.mean() > 0.85, material
        assert np.median(sigma[:, :3]) < 0.008, material
        assert np.median(stacked(parts, "novelty")) < 3, material


def test_a_reference_rotation_is_taken_off_and_nothing_else_changes(describer, seen):
    counts, _, semiangle = seen["MoS2"]
    plain = describer(counts[:4], camera_of(80e3), 80e3, semiangle[0], ELECTRONS)
    turned = describer(counts[:4], camera_of(80e3), 80e3, semiangle[0], ELECTRONS, 0.03)
    np.testing.assert_allclose(plain.mean[:, 3] - turned.mean[:, 3], 0.03, atol=2e-3)
    np.testing.assert_allclose(plain.sigma, turned.sigma)


def test_one_by_one_is_as_in_a_batch_and_in_threads(describer, seen):
    counts, _, semiangle = seen["graphene"]
    camera = camera_of(60e3)
    whole = describer(counts[:9], camera, 60e3, semiangle[0], ELECTRONS)
    threads = PatternDescriber(threads=2, batch=4)(counts[:9], camera, 60e3, semiangle[0], ELECTRONS)
    single = [describer(counts[k : k + 1], camera, 60e3, semiangle[0], ELECTRONS) for k in range(9)]
    for name in ("mean", "sigma", "phase", "site", "novelty"):
        # float32 sums in another order
        np.testing.assert_allclose(stacked(single, name), getattr(whole, name), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(getattr(threads, name), getattr(whole, name), rtol=1e-3, atol=1e-4)


def test_vacuum_is_vacuum_and_keeps_the_prior(describer):
    rng = np.random.default_rng(1)
    counts = rng.poisson(np.repeat(vacuum(7e-3, 80e3)[None], 20, axis=0) * ELECTRONS)
    answer = describer(counts, camera_of(80e3), 80e3, 7e-3, ELECTRONS)
    assert (answer.phase.argmax(1) == PHASES.index("vacuum")).all()
    np.testing.assert_array_equal(answer.sigma, np.tile(PRIOR_SIGMA, (20, 1)))


def test_no_patterns_give_no_descriptors(describer):
    assert len(describer(np.empty((0, 64, 64)), camera_of(80e3), 80e3, 7e-3, ELECTRONS)) == 0


def test_what_the_network_never_saw_is_novel(describer, seen):
    counts, _, semiangle = seen["MoS2"]
    rng, camera = np.random.default_rng(2), camera_of(80e3)
    usual = np.median(stacked(described(describer, "MoS2", counts, semiangle), "novelty"))
    shuffled = rng.permuted(counts.reshape(len(counts), -1), axis=1).reshape(counts.shape)
    wrong = Camera((64, 64), camera.pixel_rad * 1.25, (32, 32))
    shifted = Camera((64, 64), camera.pixel_rad, (29, 32))
    answers = {
        "shuffled pixels": describer(shuffled, camera, 80e3, 7e-3, ELECTRONS),
        "camera length 25 % off": describer(counts, wrong, 80e3, 7e-3, ELECTRONS),
        "centre 3 pixels off": describer(counts, shifted, 80e3, 7e-3, ELECTRONS),
        "semiangle out of range": describer(counts, camera, 80e3, 20e-3, ELECTRONS),
        "dose out of range": describer(counts, camera, 80e3, 7e-3, 1e9),
    }
    for name, answer in answers.items():
        assert np.median(answer.novelty) > max(3, 1.5 * usual), name


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (np.full((1, 64, 64), np.nan), "NaN"),
        (np.full((1, 64, 64), -1.0), "negative"),
        (np.zeros((1, 32, 64)), "shape"),
        (np.zeros((1, 64, 64), dtype=complex), "counts"),
    ],
)
def test_patterns_that_are_no_counts_are_refused(describer, patterns, words):
    with pytest.raises(InputError, match=words):
        describer(patterns, camera_of(80e3), 80e3, 7e-3, ELECTRONS)


@pytest.mark.parametrize(("name", "at"), [("energy_eV", 0), ("semiangle_rad", 1), ("electrons", 2)])
def test_a_beam_that_is_none_is_refused(describer, name, at):
    beam = [80e3, 7e-3, ELECTRONS]
    beam[at] = float("nan")
    with pytest.raises(InputError, match=name):
        describer(np.zeros((1, 64, 64)), camera_of(80e3), *beam)


def test_a_file_that_is_no_network_is_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    for path in (tmp_path / "broken.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(UnreadableFile, match="scripts/train cbed"):
            PatternDescriber(path)


def test_the_canonical_grid_is_taken_as_it_is():
    counts = np.random.default_rng(3).integers(0, 9, (2, 64, 64))
    same, turn = canonical(counts, camera_of(80e3), 80e3, 0.05)
    np.testing.assert_array_equal(same, counts)
    assert turn == 0.0


def test_resampling_keeps_counts_and_their_centre():
    y, x = np.mgrid[:256, :256]
    blob = 1e4 * np.exp(-((y - 120.3) ** 2 + (x - 140.8) ** 2) / (2 * 12.0**2))
    fine = Camera((256, 256), camera_of(80e3).pixel_rad / 4, (128.0, 128.0))
    for rotation in (0.0, 0.9):
        moved, turn = canonical(blob[None], fine, 80e3, rotation)
        assert turn == rotation
        assert moved.sum() == pytest.approx(blob.sum(), rel=1e-5)
        rows, columns = np.mgrid[:64, :64]
        at = np.array([(moved[0] * columns).sum(), (moved[0] * rows).sum()]) / moved.sum() - 32
        c, s = np.cos(-rotation), np.sin(-rotation)
        expected = np.array([[c, -s], [s, c]]) @ np.array([140.8 - 128, 120.3 - 128]) / 4
        # nearest parts of a fifth of a pixel, averaged over a wide blob
        np.testing.assert_allclose(at, expected, atol=0.02)


def test_describing_imports_no_torch():
    code = "import sys; from stemloop.describe.patterns import PatternDescriber; PatternDescriber(); "
    code += "sys.exit('torch' in sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, check=False)
    assert run.returncode == 0
