"""The training of the network that finds columns as one command: small here, the same steps."""

import json

import numpy as np
import pytest

from stemloop.campaign import atom_training
from stemloop.describe.network import AtomNetwork
from stemloop.simulate.scenes import KINDS, scene


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of what a short training wrote, and the words that started it."""
    for needed in ("torch", "onnx"):
        pytest.importorskip(needed, reason="training needs the extra 'ml'")
    folder = tmp_path_factory.mktemp("trained")
    words = ["--examples", "16", "--epochs", "1", "--members", "2", "--seed", "5", "--data", str(folder / "stages")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CALIBRATION", 8), ("SURVEY", 1), ("TEST", 1)):
            patch.setattr(atom_training, name, value)
        assert atom_training.main([*words, "--out", str(folder / "one")]) == 0
        assert atom_training.main([*words, "--out", str(folder / "two"), "--resume"]) == 0
    return folder


def test_the_command_writes_a_network_that_answers(written):
    network = AtomNetwork(written / "one" / "atoms.onnx")
    made = scene(np.random.default_rng(6), 40.0, "lattice")
    found = network.find(made.image, made.pixel_pm * 1e-3)
    assert found.chance.shape == (len(found.columns), 2)
    card = json.loads((written / "one" / "atoms.json").read_text())
    assert set(KINDS) <= set(card["test"])
    assert card["settings"]["seed"] == 5 and card["stretch"] > 0


def test_resumed_it_writes_the_same_file_to_the_last_bit(written):
    one, two = ((written / name / "atoms.onnx").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_example_depends_on_its_number_alone():
    one, other = (atom_training.example(3, 0, 7) for _ in range(2))
    assert one[1] == other[1] and (one[0].image == other[0].image).all()
    assert (one[0].position == other[0].position).all()
