"""The adaptive loop as plans of Bluesky, so that a RunEngine runs it.

:func:`adaptive_plan` wraps a whole run: recipe, journal, run folder and report are those of ``stemloop run``, and the
RunEngine paces it step by step. :func:`adaptive_scan` borrows only the decision: it measures with whatever detectors
and axes the RunEngine has, ours or another facility's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.campaign.loop import Step
from stemloop.campaign.run import Run
from stemloop.core.errors import InputError, MissingExtra
from stemloop.core.protocols import Progress
from stemloop.decide import gp
from stemloop.decide.acquire import ACQUISITIONS, initial_design
from stemloop.decide.stop import first_of, max_points, wanted_sigma
from stemloop.instrument.gateways.bluesky import Deed

try:
    from bluesky import plan_stubs as stubs
except ImportError as error:
    raise MissingExtra("the plans need bluesky: pip install 'stemloop[bluesky]'.") from error

Plan = Generator[Any, Any, Any]

#: From an event's reading (name to value) to a number and its 1-sigma deviation.
Signal = Callable[[Mapping[str, Any]], tuple[float, float]]


class _Readings:
    """A Readable of plain values."""

    parent = None

    def __init__(self, name: str, keys: dict[str, tuple[str, str]]) -> None:
        self.name, self._keys = name, keys
        self.values: dict[str, Any] = {}
        self.hints = {"fields": [name for name in ("value", "sigma_max") if name in keys]}

    def read(self) -> dict[str, Any]:
        return {name: {"value": self.values[name], "timestamp": time.time()} for name in self._keys}

    def describe(self) -> dict[str, Any]:
        return {
            name: {"source": "stemloop", "dtype": dtype, "shape": [], "units": unit}
            for name, (dtype, unit) in self._keys.items()
        }

    def read_configuration(self) -> dict[str, Any]:
        return {}

    def describe_configuration(self) -> dict[str, Any]:
        return {}


class _Loop(_Readings):
    """A run whose next step is taken by a trigger. A trigger that is said again before :meth:`expect` takes none."""

    def __init__(self, run: Run) -> None:
        keys = {"points": ("integer", ""), "sigma_max": ("number", ""), "electrons": ("number", "electrons"),
                "seconds": ("number", "s"), "stop": ("string", "")}  # fmt: skip
        super().__init__("decision", keys)
        self.step: Step | None = None
        self.over = False
        self._steps = iter(run)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adaptive loop")
        self._deed: Deed | None = None

    def expect(self) -> None:
        """From now on a trigger takes the next step."""
        self._deed = None

    def trigger(self) -> Deed:
        """Decide and measure once."""
        if self._deed is None:
            self._deed = Deed(self._thread.submit(self._advance))
        return self._deed

    def _advance(self) -> None:
        self.step = next(self._steps, None)
        self.over = self.step is None
        if self.step is not None:
            progress = self.step.progress
            known = float(progress.sigma) if np.isfinite(progress.sigma) else -1.0
            self.values = {"points": progress.points, "sigma_max": known, "electrons": progress.electrons,
                           "seconds": progress.seconds, "stop": self.step.stop_reason or ""}  # fmt: skip

    def close(self) -> None:
        """Wait for a step under way and end the run where it is; it can be resumed."""
        ended: Future[None] = self._thread.submit(self._steps.close)  # type: ignore[attr-defined]
        ended.result()
        self._thread.shutdown()


def adaptive_plan(run: Run, md: Mapping[str, Any] | None = None) -> Plan:
    """A whole run (of :func:`stemloop.campaign.run.start` or :func:`~stemloop.campaign.run.resume`) as a plan.

    The stream ``primary`` has an event for each measured position (``y``, ``x`` [m], ``value``, ``sigma``; NaN where
    the frames taught nothing), ``decision`` one for each decision (``sigma_max`` is -1 before there is a belief). A
    pause takes effect between two steps, and never measures twice; a plan that is aborted leaves a run folder that can
    be resumed. Returns the run's summary.
    """
    loop = _Loop(run)
    unit, told = run.recipe.unit, 0
    point = _Readings("measured", {"y": ("number", "m"), "x": ("number", "m"),
                                   "value": ("number", unit), "sigma": ("number", unit)})  # fmt: skip
    try:
        yield from stubs.open_run(
            {
                "plan_name": "adaptive_plan",
                "stemloop": {"run": run.site.run_id, "settings": _known(run.settings.to_dict())},
                "hints": {"dimensions": [[["y", "x"], "primary"]]},
                **(md or {}),
            }
        )
        while not loop.over:
            loop.expect()
            yield from stubs.checkpoint()
            yield from stubs.trigger(loop, wait=True)
            data, places = run.experiment.data, run.recipe.candidates_m
            for told in range(told, len(data.index)):  # noqa: B020  goes on where the last step ended
                y, x = places[data.index[told]]
                point.values = {"y": float(y), "x": float(x), "value": data.value[told], "sigma": data.sigma[told]}
                yield from _event([point], "primary")
            told = len(data.index)
            if loop.step is not None and not loop.over and loop.step.stage == "measure":
                yield from _event([loop], "decision")
        yield from stubs.close_run(reason=str(run.experiment.stop_reason))
    finally:
        loop.close()
    return run.summary


def _event(devices: Sequence[Any], stream: str) -> Plan:
    """One event of what is at hand; nothing is triggered."""
    yield from stubs.checkpoint()
    yield from stubs.create(stream)
    for device in devices:
        yield from stubs.read(device)
    yield from stubs.save()


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def counts(key: str) -> Signal:
    """The signal ``key`` as a number of counts, with the deviation of a Poisson process.

    >>> counts("haadf_sum")({"haadf_sum": 400.0})
    (400.0, 20.0)
    """

    def signal(reading: Mapping[str, Any]) -> tuple[float, float]:
        value = float(reading[key])
        return value, max(value, 1.0) ** 0.5

    return signal


def adaptive_scan(
    detectors: Sequence[Any],
    y: Any,
    x: Any,
    candidates: NDArray[np.float64],
    signal: Signal,
    *,
    target_sigma: float,
    points: int,
    initial: int = 12,
    batch: int = 4,
    acquisition: str = "uncertainty",
    seed: int = 0,
    md: Mapping[str, Any] | None = None,
) -> Plan:
    """Measure a map of ``signal`` where it is least known, with a Gaussian process, on any devices of Bluesky.

    Parameters
    ----------
    detectors : devices to trigger and read at each place.
    y, x : axes (Movable), in the unit of the candidates.
    candidates : (n, 2) places (y, x) that may be measured; the map is wanted on them.
    signal : from an event's reading to a value and its deviation, such as :func:`counts`.
    target_sigma : stop when the map's largest deviation is below this. points : or after this many.
    initial, batch : points of the first design and of each later decision.
    acquisition : a name of ``stemloop list acquisitions``. seed : of every random choice.

    Returns
    -------
    dict
        ``mean`` and ``sigma`` (n,) of the map, ``index`` of the measured candidates, ``value``, ``stop``.
    """
    places = np.asarray(candidates, np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not 0 < initial <= len(places):
        raise InputError(f"candidates must be (n, 2) with n of at least initial = {initial}; got {places.shape}.")
    choose, stop = ACQUISITIONS[acquisition], first_of(wanted_sigma(target_sigma), max_points(points))
    field = tuple(float(span) for span in np.ptp(places, axis=0) + 1e-12)
    index: list[int] = []
    measured: list[tuple[float, float]] = []
    yield from stubs.open_run(
        {
            "plan_name": "adaptive_scan",
            "detectors": [device.name for device in detectors],
            "motors": [y.name, x.name],
            "hints": {"dimensions": [([y.name, x.name], "primary")]},
            **(md or {}),
        }
    )
    chosen = [
        int(i) for i in initial_design(places, min(initial, points), (0.0, 0.0), np.random.default_rng([seed, 0]))
    ]
    believed: gp.GaussianProcess | None = None
    while True:
        for i in chosen:
            yield from stubs.checkpoint()
            yield from stubs.mv(y, float(places[i, 0]), x, float(places[i, 1]))
            reading = yield from stubs.trigger_and_read([*detectors, y, x])
            measured.append(signal({name: entry["value"] for name, entry in reading.items()}))
            index.append(i)
        value, deviation = np.array(measured).T
        start = None if believed is None else believed.hyperparameters
        believed = gp.fit(places[index], value, deviation, field_m=(field[0], field[1]), start=start)
        mean, sigma = believed.predict(places)
        reason = stop(Progress(len(index), float(sigma.max()), 0.0, 0.0))
        free = np.setdiff1d(np.arange(len(places)), index)
        if reason is None and not len(free):
            reason = "all-measured"
        if reason is not None:
            break
        rng, last = np.random.default_rng([seed, len(index)]), places[index[-1]]
        wanted = min(batch, len(free), points - len(index))
        chosen = [int(i) for i in free[choose(believed, places[free], wanted, (float(last[0]), float(last[1])), rng)]]
    yield from stubs.close_run(reason=reason)
    return {"mean": mean, "sigma": sigma, "index": index, "value": value, "stop": reason}
