"""The closed loop, as a generator of steps: decide, expose, describe, explain, believe, decide again.

Whatever iterates the generator is the user interface: the command prints a line, a page draws a map, a notebook plots.
Every decision, command, exposure and result goes through the journal, so the very same generator replays a run that
was interrupted and goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.campaign.recipes import Recipe
from stemloop.campaign.settings import Settings
from stemloop.campaign.site import Site
from stemloop.campaign.stopwatch import Stopwatch
from stemloop.core.protocols import Belief, Progress
from stemloop.core.units import electrons
from stemloop.decide import gp
from stemloop.decide.acquire import ACQUISITIONS, initial_design
from stemloop.decide.stop import first_of, max_electrons, max_points, max_seconds, wanted_sigma

#: What the history keeps of each decision.
HISTORY = ("points", "sigma_max", "sigma_mean", "electrons", "seconds", "hyper")

#: Acquisitions that choose all points before the first is measured: the baselines.
FIXED_DESIGNS = ("random", "grid")


@dataclass
class Measurements:
    """All that was measured so far: ``index`` into the candidates, and the journal's ``results`` batch by batch."""

    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    sigma: list[float] = field(default_factory=list)
    descriptors: dict[str, list[Any]] = field(default_factory=dict)
    lost: int = 0

    def add(self, index: list[int], result: dict[str, Any]) -> None:
        """Append one batch; places that gave no usable value (None) count as exposed and teach nothing.

        ``lost`` counts the places whose frames were lost with the instrument."""
        self.index += index
        self.value += [float("nan") if v is None else v for v in result["value"]]
        self.sigma += [float("nan") if s is None else s for s in result["sigma"]]
        self.lost += len(index) if result.get("lost") else 0
        before = len(self.index) - len(index)  # a batch that was lost first has no descriptors to tell their names
        for name in result.get("descriptors") or self.descriptors:
            rows = (result.get("descriptors") or {}).get(name, [None] * len(index))
            self.descriptors.setdefault(name, [None] * before).extend(rows)

    def usable(self, first: int | None = None) -> dict[str, Any]:
        """What can be believed of the ``first`` points: ``index`` (n,), ``value``, ``sigma`` and ``descriptors``."""
        ok = np.flatnonzero(np.isfinite(self.value[:first]) & np.isfinite(self.sigma[:first]))
        descriptors = {name: [rows[i] for i in ok] for name, rows in self.descriptors.items()}
        value, sigma = (np.array(numbers)[ok] for numbers in (self.value, self.sigma))
        return {"index": np.array(self.index, int)[ok], "value": value, "sigma": sigma, "descriptors": descriptors}


@dataclass(frozen=True)
class Step:
    """Where the run stands after a decision. ``mean`` and ``deviation`` over all candidates are the belief."""

    number: int
    stage: str
    progress: Progress
    stop_reason: str | None = None
    replayed: bool = False
    mean: NDArray[np.float64] | None = None
    deviation: NDArray[np.float64] | None = None


class Experiment:
    """One run: a recipe on a site, with its settings. Iterate :meth:`steps`; afterwards the results stand here."""

    def __init__(self, site: Site, recipe: Recipe, settings: Settings, watch: Stopwatch) -> None:
        self.site, self.recipe, self.settings, self.watch = site, recipe, settings, watch
        self.data = Measurements()
        self.history: list[dict[str, Any]] = []
        self.stop_reason: str | None = None
        self.belief: Belief | None = None
        self._hyper: list[gp.Hyperparameters] | None = None
        self._started = time.monotonic()
        self._seconds_before = 0.0

    # ------------------------------------------------------------------------------------------------ settings

    @property
    def target_sigma(self) -> float:
        """The wanted largest deviation, in the unit of the recipe; infinite until a relative one can be known."""
        wanted = self.settings.target_sigma or self.recipe.target_sigma
        if wanted is not None:
            return wanted
        believed = [past["points"] for past in self.history if past["hyper"] is not None]
        first = self.data.usable(believed[0] if believed else None)["value"]
        return float(self.recipe.target_share * np.ptp(first)) if len(first) else float("inf")

    @property
    def electrons_per_point(self) -> float:
        return electrons(self.recipe.current_A, self.recipe.dwell_s)

    @property
    def electrons_spent(self) -> float:
        return sum(r["electrons"] for r in self.site.journal.records if r["kind"] == "exposure")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _affordable(self, wanted: int) -> int:
        """How many of ``wanted`` points the budgets still pay for."""
        points = len(self.data.index)
        limits = [wanted, len(self.recipe.candidates_m) - points]
        if self.settings.max_points is not None:
            limits.append(self.settings.max_points - points)
        if self.settings.max_electrons is not None:
            limits.append(int((self.settings.max_electrons - self.electrons_spent) / self.electrons_per_point))
        return max(0, min(limits))

    # ---------------------------------------------------------------------------------------------------- loop

    def steps(self) -> Iterator[Step]:
        """Run the experiment to its end, one step a batch."""
        self.recipe.prepare(self.site, self.settings, self.watch)
        yield Step(0, "overview", Progress(0, float("inf"), self.electrons_spent, self._seconds()))
        number = 0
        while True:
            key = str(number)
            replayed = self.site.journal.find("decision", key) is not None
            decision = self.site.journal.once("decision", key, partial(self._decide, number))
            self._adopt(decision)
            yield self._step(number, decision, replayed)
            if decision["stop"]:
                self.stop_reason = decision["stop"]
                return
            self._measure(key, decision)
            number += 1

    def _adopt(self, decision: dict[str, Any]) -> None:
        self._hyper = _hyperparameters(decision["hyper"]) if decision["hyper"] else None
        self._seconds_before = max(self._seconds_before, decision["seconds"] - (time.monotonic() - self._started))
        self.history.append({key: decision[key] for key in HISTORY})

    def _step(self, number: int, decision: dict[str, Any], replayed: bool) -> Step:
        sigma = float("inf") if decision["sigma_max"] is None else decision["sigma_max"]
        progress = Progress(decision["points"], sigma, decision["electrons"], decision["seconds"])
        mean, deviation = (None, None) if self.belief is None else self.predict()
        return Step(number, "measure", progress, decision["stop"], replayed, mean, deviation)

    # ------------------------------------------------------------------------------------------------ decision

    def believe(self) -> Any:
        """Fit the belief to all usable measurements, from the last hyperparameters."""
        found = self.data.usable()
        self.belief = self.recipe.believe(found, found["index"], self._hyper)
        return self.belief

    def recall(self) -> None:
        """Bring back the belief of the last decision, also when that decision was replayed from the journal."""
        if self.belief is None:
            self.belief = self.belief_after(len(self.history) - 1)

    def belief_after(self, number: int) -> Belief | None:
        """The belief at decision ``number``, from the measurements and hyperparameters of that time; None if there
        was none yet."""
        past = self.history[number]
        if past["hyper"] is None:
            return None
        found = self.data.usable(past["points"])
        return self.recipe.recall(found, found["index"], _hyperparameters(past["hyper"]))

    def predict(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and 1-sigma deviation of the property at all candidates."""
        assert self.belief is not None
        return self.belief.predict(self.recipe.features)

    def _decide(self, number: int) -> dict[str, Any]:
        with self.watch("decide"):
            rng = np.random.default_rng([self.settings.seed, number])
            fixed = self.settings.acquisition in FIXED_DESIGNS
            decision: dict[str, Any] = {
                "points": len(self.data.index),
                "electrons": self.electrons_spent,
                "seconds": self._seconds(),
                "sigma_max": None,
                "sigma_mean": None,
                "hyper": None,
                "stop": None,
                "chosen": [],
            }
            if self.data.lost == len(self.data.index):  # also when all that was begun died with the instrument
                decision["chosen"] = self._first(fixed, rng)
                decision["stop"] = None if decision["chosen"] else self._exhausted()
                return decision
            if not len(self.data.usable()["index"]):
                decision["stop"] = "no-usable-measurement"
                return decision
            belief = self.believe()
            _, sigma = self.predict()
            decision["sigma_max"], decision["sigma_mean"] = float(sigma.max()), float(sigma.mean())
            known = belief.hyperparameters
            decision["hyper"] = [h.to_dict() for h in (known if isinstance(known, tuple) else (known,))]
            progress = Progress(decision["points"], decision["sigma_max"], decision["electrons"], decision["seconds"])
            decision["stop"] = self._stop_rule()(progress) or ("points" if fixed else None)
            if not decision["stop"]:
                decision["chosen"] = self._next(belief, rng)
                decision["stop"] = None if decision["chosen"] else self._exhausted()
            return decision

    def _stop_rule(self) -> Any:
        rules = [wanted_sigma(self.target_sigma)]
        if self.settings.max_points is not None:
            rules.append(max_points(self.settings.max_points))
        if self.settings.max_electrons is not None:
            rules.append(max_electrons(self.settings.max_electrons))
        if self.settings.max_seconds is not None:
            rules.append(max_seconds(self.settings.max_seconds))
        return first_of(*rules)

    def _exhausted(self) -> str:
        points = len(self.data.index)
        if points >= len(self.recipe.candidates_m):
            return "all-measured"
        return "points" if self.settings.max_points is not None and points >= self.settings.max_points else "dose"

    def _free(self) -> NDArray[np.intp]:
        """Candidates that were never exposed."""
        return np.setdiff1d(np.arange(len(self.recipe.candidates_m)), self.data.index)

    def _first(self, fixed: bool, rng: np.random.Generator) -> list[int]:
        free = self._free()
        wanted = (self.settings.max_points or len(free)) if fixed else (self.settings.initial or self.recipe.initial)
        n = self._affordable(wanted)
        if n == 0:
            return []
        if fixed:
            choose = ACQUISITIONS[str(self.settings.acquisition)]
            picked = choose(None, self.recipe.features[free], n, (0.0, 0.0), rng)
        else:
            picked = initial_design(self.recipe.features[free], n, (0.0, 0.0), rng)
        return [int(i) for i in free[picked]]

    def _next(self, belief: Any, rng: np.random.Generator) -> list[int]:
        free = self._free()
        n = self._affordable(self.settings.batch or self.recipe.batch)
        if n == 0 or len(free) == 0:
            return []
        choose = ACQUISITIONS[self.settings.acquisition or self.recipe.acquisition]
        last = self.recipe.features[self.data.index[-1]]
        picked = choose(belief, self.recipe.features[free], n, (float(last[0]), float(last[1])), rng)
        return [int(i) for i in free[picked]]

    # --------------------------------------------------------------------------------------------- measurement

    def _measure(self, key: str, decision: dict[str, Any]) -> None:
        index = decision["chosen"]
        instruction = self.recipe.instruction(self.recipe.candidates_m[index])
        frames, exposure = self.site.expose(instruction, f"batch-{key}", self.watch)
        known = self.site.journal.find("result", key)
        if known is None:
            nothing: dict[str, Any] = {"value": [None] * len(index), "sigma": [None] * len(index), "lost": True}
            found = nothing if frames is None else self.recipe.interpret(frames, exposure, self.watch)
            known = self.site.journal.append("result", key, **found)
        elif frames is not None:
            self.recipe.replay(known)
        self.data.add(index, known)


def _hyperparameters(wire: list[dict[str, Any]]) -> list[gp.Hyperparameters]:
    return [gp.Hyperparameters.from_dict(h) for h in wire]
