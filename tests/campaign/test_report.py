"""The page: complete, self-contained, safe, and there whatever is missing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from stemloop.campaign.report import write_report
from stemloop.core.errors import StorageError

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Collects the text, the links and whatever is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.links, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.wrong == [] and checker.open == []
    assert all(link.startswith("data:") for link in checker.links)
    assert not re.search(r"url\(|@import|https?://", path.read_text(encoding="utf-8").replace("http://www.w3.org", ""))
    assert "script" not in checker.tags
    return checker, " ".join(checker.text)


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    ny, nx, n = 24, 32, 40
    truth = np.outer(np.hanning(ny), np.hanning(nx)) * 0.1
    summary = {
        "specimen": "MoS2 <inclusion> & more",
        "seed": 7,
        "points": n,
        "raster_points": ny * nx,
        "dose_fraction": n / (ny * nx),
        "stop_reason": "uncertainty",
        "target_sigma": 0.005,
        "final_sigma": 0.0049,
        "map_rmse": 0.0031,
        "coverage_2sigma": 0.952,
        "seconds": 12.5,
        "seconds_per_stage": {"measure": 4.0, "describe": 8.5},
        "peak_memory_MB": 321.0,
        "recipe": "strain-energy",
        "version": "0.1.0",
        "note": "<script>alert(1)</script>",
    }
    maps = {
        "mean": truth + rng.normal(0, 0.003, truth.shape),
        "sigma": np.full(truth.shape, 0.003),
        "truth": truth,
        "extent_m": (6e-9, 8e-9),
        "points_m": rng.uniform(0, 6e-9, (n, 2)),
        "values": rng.normal(size=n),
        "value_sigma": np.ones(n),
        "overview": rng.poisson(20, (96, 128)),
        "overview_extent_m": (6e-9, 8e-9),
        "columns_m": rng.uniform(0, 6e-9, (50, 2)),
        "columns_sublattice": np.arange(50) % 2,
        "history": [
            {"points": k, "sigma_max": 0.2 / k, "sigma_mean": 0.1 / k, "electrons": k * 1e5, "rmse": 0.1 / k}
            for k in range(5, 41, 5)
        ],
        "unit": "eV",
        "property": "strain energy",
    }
    return summary, maps


def test_everything_is_told_once_and_nothing_is_loaded(run, tmp_path):
    summary, maps = run
    (tmp_path / "run.h5").write_bytes(b"0" * 5000)
    path = write_report(tmp_path, summary, maps)
    assert path == tmp_path / "report.html"
    checker, text = read(path)
    assert all(key in text for key in summary)
    assert "alert(1)" in text and "<script" not in path.read_text(encoding="utf-8")
    assert "4.90 meV" in text and "3.10 meV" in text  # eV read better in meV here
    assert "run.h5" in text
    assert checker.tags.count("img") == 4
    assert path.stat().st_size < 2e6


def test_missing_truth_overview_and_history_are_left_out(run, tmp_path):
    summary, maps = run
    summary |= {"map_rmse": None, "coverage_2sigma": None}
    maps |= {"truth": None, "overview": None, "history": None}
    checker, text = read(write_report(tmp_path, summary, maps))
    assert checker.tags.count("img") == 1
    assert "not known" in text and "Against the truth" not in text


def test_a_run_that_measured_nothing_still_has_a_page(tmp_path):
    _, text = read(write_report(tmp_path, {"specimen": "none", "stop_reason": "cheese"}, {}))
    assert "cheese" in text


@pytest.mark.parametrize("shape", [(6, 49), (49, 6), (1, 1)])
def test_odd_shapes_and_constant_maps(run, tmp_path, shape):
    summary, maps = run
    flat = np.full(shape, 2.0)
    extent = (shape[0] * 1e-9, shape[1] * 1e-9)
    maps |= {"mean": flat, "sigma": 0 * flat + 0.1, "truth": flat, "reference_map": flat, "extent_m": extent}
    maps |= {"overview": None, "unit": ""}
    checker, _ = read(write_report(tmp_path, summary, maps))
    assert checker.tags.count("img") == 3


def test_nan_in_the_maps_does_not_stop_the_page(run, tmp_path):
    summary, maps = run
    maps["mean"][3, 4] = np.nan
    read(write_report(tmp_path, summary, maps))


def test_a_folder_that_is_not_there_is_said(run, tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(tmp_path / "nowhere", *run)
