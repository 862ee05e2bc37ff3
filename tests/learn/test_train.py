import sys
from pathlib import Path

import numpy as np
import pytest
from kinematic import examples

from stemloop.core.errors import InputError
from stemloop.core.structure import PHASES

torch = pytest.importorskip("torch", reason="training needs the extra 'ml'")

from stemloop.learn.calibrate import calibrate
from stemloop.learn.evaluate import measured
from stemloop.learn.train import Settings, train

SETTINGS = Settings(epochs=10, exposures=1, batch=64, width=32, threads=1, rate=3e-3)


def nothing(step, steps, parts):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("learn") / "checkpoint.pt"
    return train(examples(640, 0), SETTINGS, path, False, nothing)


def test_a_short_training_reads_strain_better_than_the_prior_and_says_how_well(trained):
    factors = calibrate(trained, examples(400, 1), 0)
    found = measured(trained, examples(400, 2), factors, 1)
    crystal = found["phase"] != PHASES.index("vacuum")
    assert np.mean(found["named"] == found["phase"]) > 0.9
    right = crystal & (found["named"] == found["phase"])
    assert found["error"][right, :3].std() < 0.009  # the labels' own deviation is 0.01
    within = np.abs(found["error"][right, :4]) < 2 * found["sigma"][right, :4]
    # factors from 20 patterns a bin or 100 a phase: coverage of 0.95 within about 0.05
    assert 0.88 < within.mean() < 0.99


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path):
    class Interrupted(Exception):
        pass

    few, settings = examples(128, 3), Settings(epochs=20, exposures=1, batch=64, width=16, threads=1)

    def interrupt(step, steps, parts):
        if step == 20:
            raise Interrupted

    whole = train(few, settings, tmp_path / "whole.pt", False, nothing)
    with pytest.raises(Interrupted):
        train(few, settings, tmp_path / "broken.pt", False, interrupt)
    resumed = train(few, settings, tmp_path / "broken.pt", True, nothing)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    few, path = examples(128, 3), tmp_path / "checkpoint.pt"
    train(few, Settings(epochs=1, exposures=1, batch=64, width=16, threads=1), path, False, nothing)
    with pytest.raises(InputError, match="resume with the same"):
        train(few, Settings(epochs=2, exposures=1, batch=64, width=16, threads=1), path, True, nothing)


def test_the_exported_file_answers_as_the_network(trained, tmp_path):
    pytest.importorskip("onnx")
    import onnxruntime

    from stemloop.learn.examples import exposed
    from stemloop.learn.export import export

    export(trained, {"factors": np.ones((3, 7, 5))}, tmp_path / "net.onnx")
    batch = exposed(examples(16, 5), np.random.default_rng(0))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    answer = session.run(None, {"maps": batch["maps"], "condition": batch["condition"]})
    with torch.no_grad():
        expected = trained(torch.from_numpy(batch["maps"]), torch.from_numpy(batch["condition"]))
    for got, wanted in zip(answer, expected):
        # float32 sums in another order
        np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-3, atol=2e-3)


def test_importing_learn_imports_no_torch():
    import subprocess

    code = "import sys, pkgutil, importlib, stemloop.learn as l\n"
    code += "[importlib.import_module('stemloop.learn.' + m.name) for m in pkgutil.iter_modules(l.__path__)]\n"
    code += "sys.exit('torch' in sys.modules)"
    source = Path(__file__).parents[2] / "src"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)}, check=False).returncode == 0
