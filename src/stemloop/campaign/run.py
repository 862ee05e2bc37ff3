"""A run from its start to its report: :func:`start` and :func:`resume` give a :class:`Run` that is iterated."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stemloop import __version__
from stemloop.campaign import documents, keeping, report
from stemloop.campaign.host import KINDS
from stemloop.campaign.journal import Journal
from stemloop.campaign.loop import Experiment, Step
from stemloop.campaign.memory import peak_memory_MB
from stemloop.campaign.recipes import RECIPES, make
from stemloop.campaign.score import TruthFile, score
from stemloop.campaign.settings import Settings
from stemloop.campaign.site import Site, write_json
from stemloop.campaign.stopwatch import Stopwatch
from stemloop.core import instruction as instructions
from stemloop.core.durable import writing
from stemloop.core.errors import InputError, IntegrityError, UnreadableFile
from stemloop.core.record import content_hash
from stemloop.decide.acquire import ACQUISITIONS
from stemloop.energetics.calculators import CALCULATORS
from stemloop.reduce.spectra import SCALARIZERS
from stemloop.store import files
from stemloop.stream.landing import LandingLog


def start(settings: Settings, directory: Path | None = None) -> Run:
    """Begin a run in ``directory`` (made; it must not hold a run already). Names are checked first."""
    _check(settings)
    kind, _, path = settings.instrument.partition(":")
    if kind == "replay":
        if not Path(path).exists():
            raise UnreadableFile(f"{path} does not exist; give the path of a recorded file after replay:.")
        settings = replace(settings, instrument=f"replay:{Path(path).resolve()}")  # found again from any folder
    return Run(Site.create(directory or default_folder(settings), settings))


def default_folder(settings: Settings) -> Path:
    """Where a run goes that was given no folder: ``runs/RECIPE-DATE-TIME``."""
    return Path("runs") / f"{settings.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check(settings: Settings) -> None:
    """Raise InputError for a name that nothing is registered under, before anything is made or started."""
    RECIPES[settings.recipe]
    kind, _, path = settings.instrument.partition(":")
    if settings.instrument in ("twin", "nion:twin"):
        from stemloop.simulate.specimens import SPECIMENS

        SPECIMENS[str(settings.specimen)]
    elif settings.instrument != "nion:usim" and (kind != "replay" or not path):
        raise InputError(f"unknown instrument {settings.instrument!r}; known: {KINDS}.")
    if kind == "nion":
        importlib.import_module("stemloop.instrument.nion")  # says so in a line if the extra is missing
    if settings.acquisition is not None:
        ACQUISITIONS[settings.acquisition]
    if settings.calculator is not None:
        CALCULATORS[settings.calculator]
    if settings.scalarizer is not None:
        SCALARIZERS[settings.scalarizer]


def resume(directory: Path) -> Run:
    """Go on with the run in ``directory``: replay its journal, expose nothing twice, decide the same."""
    _check(Settings.load(Path(directory) / "settings.json"))
    return Run(Site.reopen(directory))


def verify(directory: Path) -> dict[str, Any]:
    """Check the journal, frame log and sealed file of a run byte for byte, and that the log holds the frames of every
    exposure; IntegrityError if one is off. Nothing is changed."""
    directory = Path(directory)
    Settings.load(directory / "settings.json")
    journal = Journal(directory / "journal.jsonl", readonly=True)
    exposures = [r for r in journal.records if r["kind"] == "exposure"]
    frames = _verify_frames(directory / "frames.log", journal, exposures)
    sealed = directory / "frames.h5"
    if sealed.exists():
        files.verify(sealed)
    return {
        "journal records": len(journal.records),
        "exposures": len(exposures),
        "frames": frames,
        "sealed files": int(sealed.exists()),
    }


def _verify_frames(path: Path, journal: Journal, exposures: list[dict[str, Any]]) -> int:
    """Read every frame in the log; how many there are."""
    if not path.exists() and not exposures:
        return 0
    run = journal.find("run", "id") or {"id": None}
    with LandingLog(path, run=run["id"], readonly=True) as log:
        frames = sum(len(batch.frames) for batch in log.batches())
        for record in exposures:
            if not record["lost"]:
                asked = record["calibration"]
                first, stop = asked["first"], asked["first"] + asked["count"]
                if not any(a <= first and stop <= b for a, b in log.index.get(asked["stream"], [])):
                    raise IntegrityError(f"{path} lacks frames of the exposure {record['key']}, which the journal has.")
    return frames


class Run:
    """Iterate it to run the experiment; afterwards ``summary`` and ``report`` are there."""

    def __init__(self, site: Site) -> None:
        self.site, self.settings = site, site.settings
        self.directory = site.directory
        self.watch = Stopwatch()
        self.recipe = make(self.settings.recipe)
        self.experiment = Experiment(site, self.recipe, self.settings, self.watch)
        self.summary: dict[str, Any] = {}
        self.report: Path | None = None
        self._started = time.monotonic()

    def __iter__(self) -> Iterator[Step]:
        with self.site:
            yield from self.experiment.steps()
            self._finish()

    # -------------------------------------------------------------------------------------------------- ending

    def _finish(self) -> None:
        mean, sigma = self._map()
        truth = self._truth()
        with self.watch("score"):
            reference = self.recipe.reference(self.settings)
            self._compare(truth, reference)
        self.summary = self._summarise(mean, sigma, truth, reference)
        with self.watch("seal"):
            self.site.patience(self._seal)
        maps = self._maps(mean, sigma, truth, reference)
        arrays: dict[str, Any] = {k: v for k, v in maps.items() if isinstance(v, np.ndarray)}
        self.site.patience(lambda: self._keep(arrays))
        self.summary["seconds"] = round(time.monotonic() - self._started, 3)
        self.summary["seconds_per_stage"] = {k: round(v, 3) for k, v in self.watch.seconds.items()}
        self.summary["peak_memory_MB"] = round(peak_memory_MB(self.site.host_pid))
        self.site.patience(lambda: documents.write(self.directory))
        self.site.patience(lambda: write_json(self.directory / "summary.json", self.summary))
        self.report = report.write_report(self.directory, self.summary, maps)

    def _keep(self, arrays: dict[str, Any]) -> None:
        """Write ``result.npz``; it appears only when it is whole."""
        mend = f"Nothing that was measured is lost; make room and finish with: stemloop resume {self.directory}"
        with writing(self.directory / "result.npz", mend=mend) as file:
            np.savez_compressed(file, **arrays)

    def _compare(self, truth: np.ndarray | None, reference: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Add to the history how the map agreed with the truth, or with the whole recording, after each decision."""
        known = truth if reference is None else reference[0]
        if known is None:
            return
        for number, past in enumerate(self.experiment.history):
            belief = self.experiment.belief_after(number)
            if belief is not None:
                mean, _ = belief.predict(self.recipe.features)
                past["rmse"] = float(np.sqrt(np.mean((mean - known) ** 2)))
                past["correlation"] = float(np.corrcoef(mean, known)[0, 1])

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.experiment.data.usable()["index"]):
            nothing = np.full(len(self.recipe.candidates_m), np.nan)
            return nothing, nothing
        self.experiment.recall()
        return self.experiment.predict()

    def _truth(self) -> np.ndarray | None:
        path = self.directory / "truth" / "truth.npz"
        if not path.exists():
            return None
        with self.watch("score"):
            return self.recipe.truth(TruthFile(path))

    def _summarise(
        self,
        mean: np.ndarray,
        sigma: np.ndarray,
        truth: np.ndarray | None,
        reference: tuple[np.ndarray, np.ndarray] | None,
    ) -> dict[str, Any]:
        experiment = self.experiment
        full = self.recipe.raster_points * experiment.electrons_per_point
        scored = None if truth is None else score(mean, sigma, truth)
        if reference is not None:
            # what was recorded is a measurement: its own deviation, and the learned noise, belong into the comparison
            noise = float((experiment.history[-1]["hyper"] or [{"noise": 0.0}])[0]["noise"])
            scored = score(mean, np.sqrt(sigma**2 + reference[1] ** 2 + noise**2), reference[0])
        return {
            "recipe": self.settings.recipe,
            "instrument": self.settings.instrument,
            "specimen": self.settings.specimen,
            "seed": self.settings.seed,
            "property": self.recipe.quantity,
            "unit": self.recipe.unit,
            "points": len(experiment.data.index),
            "raster_points": self.recipe.raster_points,
            "dose_fraction": experiment.electrons_spent / full,
            "electrons": experiment.electrons_spent,
            "stop_reason": experiment.stop_reason,
            "target_sigma": experiment.target_sigma,
            "final_sigma": float(np.max(sigma)),
            "map_rmse": None if scored is None else scored.rmse,
            "coverage_2sigma": None if scored is None else scored.coverage_2sigma,
            "compared_with": "truth" if truth is not None else "recording" if reference is not None else None,
            "map_correlation": experiment.history[-1].get("correlation"),
            "settings_sha256": content_hash(self.settings.to_dict()),
            "version": __version__,
            **self.recipe.extras(),
        }

    def _seal(self) -> None:
        calibrations = {
            r["calibration"]["stream"]: r["calibration"]
            for r in self.site.journal.records
            if r["kind"] == "exposure" and not r["lost"]
        }
        run = {"id": self.site.run_id, "settings": self.settings.to_dict(), "summary": self.summary}
        keeping.seal_log(
            self.site.log.path,
            self.directory / "frames.h5",
            run=run,
            calibrations=calibrations,
            positions=self._positions(),
            logs=self._logs(),
            overwrite=True,
        )

    def _logs(self) -> dict[str, dict[str, Any]]:
        """The instrument's state as time series: one value an exposure, at the second of its beginning if that is
        known, else at its number."""
        series: dict[str, dict[str, Any]] = {}
        exposures = [r for r in self.site.journal.records if r["kind"] == "exposure" and not r["lost"]]
        timed = all(record.get("began_s") for record in exposures)
        for number, record in enumerate(exposures):
            for key, value in record["state"].items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    log = series.setdefault(key, {"time": [], "value": []})
                    log["time"].append(record["began_s"] - exposures[0]["began_s"] if timed else number)
                    log["value"].append(value)
        if not timed:
            for log in series.values():
                log["description"] = "the times are numbers of exposures"
        return series

    def _positions(self) -> dict[str, np.ndarray]:
        """Of each stream of points: the position (y, x) [m] of every frame, by sequence number."""
        placed: dict[str, dict[int, Any]] = {}
        for record in self.site.journal.records:
            if record["kind"] == "exposure" and not record["lost"]:
                asked = self.site.journal.find("command", record["key"]) or {}
                where = record["calibration"]
                instruction = instructions.from_dict(asked["instruction"])
                for k, position in enumerate(getattr(instruction, "positions_m", ())):
                    placed.setdefault(where["stream"], {})[where["first"] + k] = position
        filled = {}
        for stream, known in placed.items():
            filled[stream] = np.full((max(known) + 1, 2), np.nan)
            filled[stream][list(known)] = list(known.values())
        return filled

    def _maps(
        self,
        mean: np.ndarray,
        sigma: np.ndarray,
        truth: np.ndarray | None,
        reference: tuple[np.ndarray, np.ndarray] | None,
    ) -> dict[str, Any]:
        recipe, data = self.recipe, self.experiment.data
        assert recipe.grid is not None
        maps: dict[str, Any] = {
            "mean": recipe.paint(mean),
            "sigma": recipe.paint(sigma),
            "truth": None if truth is None else recipe.paint(truth),
            "reference_map": None if reference is None else recipe.paint(reference[0]),
            "extent_m": recipe.grid.extent_m,
            "points_m": recipe.candidates_m[data.index],
            "values": np.array(data.value),
            "value_sigma": np.array(data.sigma),
            "history": self.experiment.history,
            "unit": recipe.unit,
            "property": recipe.quantity,
        }
        if recipe.overview is not None:
            maps["overview"] = recipe.overview.image
            maps["overview_extent_m"] = recipe.overview.extent_m
            if len(recipe.overview.columns):
                maps["columns_m"] = recipe.overview.columns_m
                maps["columns_sublattice"] = recipe.overview.columns.sublattice
        return maps
