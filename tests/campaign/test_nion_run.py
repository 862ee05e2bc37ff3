"""Whole runs inside Nion's acquisition stack, with the same words as on the twin."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("nion.usim_device", reason="the extra nion is not installed")

from campaign.test_run import exposed_positions, run_under_fire, start
from stemloop.campaign import run as runs
from stemloop.campaign.settings import Settings
from stemloop.core.errors import InputError, MissingExtra
from stemloop.store import files


def run(folder, *words):
    process = start("run", *words, "--out", folder)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    return json.loads((folder / "summary.json").read_text())


def test_the_recipe_of_the_demo_runs_unchanged_on_the_twin_inside_nion(tmp_path):
    budget = ("--specimen", "graphene", "--initial", "24", "--batch", "12", "--max-points", "36")
    summary = run(tmp_path / "nion", "strain-energy", "--instrument", "nion:twin", *budget)
    assert summary["instrument"] == "nion:twin" and summary["points"] == 36
    assert summary["compared_with"] == "truth"
    assert summary["map_correlation"] > 0.7  # 36 of 2025 points gave 0.9
    positions = exposed_positions(tmp_path / "nion")
    assert len(positions) == len(set(positions)) == 36


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_with_its_stack_it_goes_on_and_exposes_nothing_twice(tmp_path):
    words = ("--instrument", "nion:twin", "--specimen", "graphene", "--initial", "24", "--batch", "12")
    words = ("run", "strain-energy", *words, "--max-points", "48", "--out", tmp_path / "killed")
    assert run_under_fire(tmp_path / "killed", words, np.random.default_rng(3), kills=3, also_the_instrument=True) >= 1
    positions = exposed_positions(tmp_path / "killed")
    assert len(positions) == len(set(positions)) == 48


def test_nions_simulator_is_mapped_as_far_as_its_physics_goes(tmp_path):
    folder = tmp_path / "usim"
    summary = run(folder, "eels-map", "--instrument", "nion:usim", "--scalarizer", "thickness", "--max-points", "40")
    assert summary["points"] == 40 and summary["unit"] == "mfp"
    assert (folder / "report.html").exists()
    files.verify(folder / "frames.h5")  # an overview and 40 spectra, sealed
    with np.load(folder / "result.npz") as result:
        # the simulator has whole flakes of 30 nm over mean free paths of 100 nm
        flakes = result["values"] / 0.3
        assert np.abs(flakes - np.rint(flakes)).max() < 0.1
        assert 0 < np.rint(flakes).max() < 20
        assert "overview" in result


def test_an_unknown_part_of_nion_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="known: twin, nion:twin, nion:usim, replay:FILE"):
        runs.start(Settings(instrument="nion:tem"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_extra_its_name_is_said_before_anything_is_made(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("stemloop.instrument.nion", "nion."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nion", None)  # as if it were not installed
    with pytest.raises(MissingExtra, match=r"pip install 'stemloop\[nion\]'"):
        runs.start(Settings(instrument="nion:usim"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
