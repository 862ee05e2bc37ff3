"""The network that finds columns: geometry of its images and maps, a short training, the exported file."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from stemloop.core.errors import InputError
from stemloop.learn.atomnet import SIDE, Example, Settings, target, turned, turned_target
from stemloop.learn.atomnet_calibrate import REACH, assigned, believed, fitted, join, novelty, stretch, usual
from stemloop.learn.atomnet_image import CELL, MAPS, WIDTH, from_network, normalised, peaks, resampled, to_network


def dots(position, width, shape):
    y, x = np.indices(shape)
    return sum(np.exp(-0.5 * ((y - p[0]) ** 2 + (x - p[1]) ** 2) / width**2) for p in position)


def example(seed):
    """Round dots on noise, at the network's scale."""
    rng = np.random.default_rng(seed)
    position = np.stack(np.meshgrid(*2 * [np.arange(8, SIDE - 6, 14.0)], indexing="ij"), -1).reshape(-1, 2)
    position = position[rng.random(len(position)) < 0.5] + rng.uniform(-2, 2, 2)
    image = 5 * dots(position, WIDTH, (SIDE, SIDE)) + rng.normal(size=(SIDE, SIDE))
    return Example(normalised(image), position, np.zeros(len(position)))


@pytest.mark.parametrize("factor", [0.37, 0.8, 1.0, 1.9])
def test_a_column_moves_with_its_image_to_the_networks_scale(factor):
    place = np.array([[30.3, 41.8]])
    width = WIDTH / factor
    small, exact = resampled(dots(place, width, (90, 101)), factor)
    y, x = np.indices(small.shape)
    mass = small.sum()
    middle = np.array([[(small * y).sum() / mass, (small * x).sum() / mass]])
    # linear interpolation moves a smooth column by far less than a tenth of a pixel
    assert np.abs(middle - to_network(place, exact)).max() < 0.03
    assert np.abs(from_network(to_network(place, exact), exact) - place).max() < 1e-12
    spread = np.sqrt((small * (y - middle[0, 0]) ** 2).sum() / mass)
    assert spread == pytest.approx(WIDTH, rel=0.15)  # averaging widens it a little


def test_grey_levels_are_blind_to_gain_and_offset():
    image = np.random.default_rng(0).normal(size=(70, 90))
    assert np.allclose(normalised(image), normalised(7 * image + 300), atol=1e-4)
    assert not normalised(np.full((64, 64), 5.0)).any()


@pytest.mark.parametrize("turn", range(8))
def test_a_target_turns_with_its_image(turn):
    one = example(1)
    marks = np.zeros((1, SIDE, SIDE))
    index = one.position.round().astype(int)
    marks[0, index[:, 0], index[:, 1]] = np.arange(1, len(index) + 1)
    moved = turned(marks, turn)[0]
    where = np.array([np.argwhere(moved == k)[0] for k in range(1, len(index) + 1)])
    whole = Example(one.image, index.astype(float), one.log_width)
    again = Example(one.image, where.astype(float), one.log_width)
    assert np.allclose(turned_target(target(whole), turn), target(again), atol=1e-6)


def test_the_maxima_of_a_target_are_its_columns():
    one = example(2)
    maps = target(one)[:MAPS]
    maps[0] = np.log(np.clip(maps[0], 1e-4, 0.999) / (1 - np.clip(maps[0], 1e-4, 0.999)))
    found = peaks(maps, 0.3)
    mine, theirs = assigned(found[:, :2], one.position, 1.0)
    assert len(mine) == len(found) == len(one.position)
    assert np.abs(found[mine, :2] - one.position[theirs]).max() < 1e-4


def test_an_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(3)
    for _ in range(20):
        one, other = rng.uniform(0, 12, (7, 2)), rng.uniform(0, 12, (9, 2))
        mine, theirs = assigned(one, other, 3.0)
        squared = ((one[:, None] - other) ** 2).sum(-1)
        assert len(set(mine)) == len(mine) == len(set(theirs))
        assert (squared[mine, theirs] < 9).all()
        rows, cols = optimize.linear_sum_assignment(np.minimum(squared - 9, 0))  # another algorithm
        assert (squared[mine, theirs] - 9).sum() == pytest.approx(np.minimum(squared - 9, 0)[rows, cols].sum())


def test_a_column_that_one_member_misses_has_no_chance_from_it():
    one = example(4)
    maps = target(one)[:MAPS]
    maps[0] = 12 * maps[0] - 6
    blind = maps.copy()
    corner = one.position[0] / CELL
    row, col = corner.astype(int)
    blind[0, max(0, row - 4) : row + 5, max(0, col - 4) : col + 5] = -6
    seen = join(np.stack([maps, maps, blind]))
    mine, theirs = assigned(seen.position, one.position, REACH)
    assert len(mine) == len(one.position)
    first = mine[theirs == 0][0]
    assert seen.chance[first, 2] == 0 and seen.chance[first, 0] > 0.9
    assert (seen.chance[np.delete(mine, np.flatnonzero(theirs == 0))] > 0.9).all()


def test_the_line_makes_chances_into_frequencies():
    rng = np.random.default_rng(5)
    logit = rng.normal(0, 2, 20000)
    true = rng.random(20000) < 1 / (1 + np.exp(-(0.5 * logit - 1)))
    chance = (1 / (1 + np.exp(-logit)))[:, None]
    slope, offset = fitted(chance, true, np.ones(20000))
    assert slope == pytest.approx(0.5, abs=0.05) and offset == pytest.approx(-1, abs=0.1)
    p = believed(chance, slope, offset)
    for low in (0.1, 0.4, 0.7):
        near = (p > low) & (p < low + 0.1)
        assert true[near].mean() == pytest.approx(p[near].mean(), abs=0.05)  # about 1000 draws each


def test_what_is_far_from_the_training_set_is_novel():
    rng = np.random.default_rng(6)
    mix = rng.normal(size=(40, 40))
    known = usual(rng.normal(size=(600, 40)) @ mix, rng.normal(size=(600, 40)) @ mix)
    again = [novelty(f, known) for f in rng.normal(size=(300, 40)) @ mix]
    assert np.mean(np.array(again) < 3) > 0.97
    assert novelty(6 * rng.normal(size=40) @ mix, known) > 3


def test_stretched_deviations_hold_two_thirds():
    rng = np.random.default_rng(8)
    pulls = [1.7 * rng.normal(size=(n, 2)) for n in rng.integers(3, 200, 80)]
    assert stretch(pulls) == pytest.approx(1.7, rel=0.03)  # some 8,000 normal pulls of 1.7 deviations
    assert stretch([]) == 1.0


SETTINGS = Settings(members=2, channels=(6, 8, 8), shared=0, epochs=10, batch=4, rate=1e-2)


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("torch", reason="training needs the extra 'ml'")
    from stemloop.learn.atomnet import train

    losses = []
    members = train([example(k) for k in range(16)], SETTINGS, lambda m, i, n, value: losses.append(value))
    return members, losses


def test_a_short_training_learns(trained):
    _, losses = trained
    steps = len(losses) // 2
    for losses_of_member in (losses[:steps], losses[steps:]):
        assert np.mean(losses_of_member[-4:]) < 0.5 * np.mean(losses_of_member[:4])


def test_training_again_gives_the_same_weights_to_the_last_bit(trained):
    import torch

    from stemloop.learn.atomnet import train

    again = train([example(k) for k in range(16)], SETTINGS, lambda *_: None)
    for one, other in zip(trained[0], again, strict=True):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_an_interrupted_training_ends_with_the_same_bits(trained, tmp_path):
    import torch

    from stemloop.learn.atomnet import finished, train

    examples = [example(k) for k in range(16)]
    settings = replace(SETTINGS, shared=2, epochs=2)
    whole = train(examples, settings, lambda *_: None, tmp_path)
    assert finished(settings, tmp_path)
    (tmp_path / "member-1.pt").unlink()
    assert not finished(settings, tmp_path)
    stages = set()
    again = train(examples, settings, lambda member, *_: stages.add(member), tmp_path)
    assert stages == {1}  # only what was missing is taught
    for one, other in zip(whole, again, strict=True):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(128, 128), (64, 136)])
def test_the_exported_file_answers_as_the_network(trained, tmp_path, shape):
    torch, onnxruntime = pytest.importorskip("torch"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from stemloop.learn.atomnet import ensemble
    from stemloop.learn.atomnet_export import export

    network = ensemble(trained[0])
    export(network, {"line": [1.0, 0.0]}, tmp_path / "atoms.onnx")
    image = np.random.default_rng(7).normal(size=(1, 1, *shape)).astype(np.float32)
    with torch.no_grad():
        maps, features = network(torch.from_numpy(image))
    session = onnxruntime.InferenceSession(str(tmp_path / "atoms.onnx"), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"images": image})
    assert theirs[0].shape == (1, 2, MAPS, shape[0] // CELL, shape[1] // CELL)
    assert np.abs(theirs[0] - maps.numpy()).max() < 1e-3  # float32, another order of sums
    assert np.abs(theirs[1] - features.numpy()).max() < 1e-3


def test_too_few_examples_are_refused():
    pytest.importorskip("torch")
    from stemloop.learn.atomnet import train

    with pytest.raises(InputError, match="do not fill one batch"):
        train([example(0)], SETTINGS, lambda *_: None)
