"""What a person sees in the terminal while a run goes on, and when it has ended."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stemloop.campaign.loop import Step
from stemloop.campaign.reasons import STOP_REASONS
from stemloop.campaign.run import Run


def amount(value: float | None, unit: str) -> str:
    """A value with its unit as one would say it: energies below 1 eV in meV.

    >>> amount(0.0123, "eV/cell"), amount(None, "eV"), amount(1234.5, "counts")
    ('12.3 meV/cell', '-', '1.23e+03 counts')
    """
    if value is None or not np.isfinite(value):
        return "-"
    if unit.startswith("eV") and abs(value) < 1:
        return f"{value * 1e3:.3g} m{unit}"
    return f"{value:.3g} {unit}"


def _time_left(history: list[dict[str, Any]], target: float) -> str:
    """Time until the target, if the deviation goes on falling as a power of the points (the last six decisions)."""
    recent = [h for h in history if h["sigma_max"]][-6:]
    if len(recent) < 3 or recent[-1]["points"] <= recent[0]["points"]:
        return "?"
    slope = np.polyfit(np.log([h["points"] for h in recent]), np.log([h["sigma_max"] for h in recent]), 1)[0]
    if slope > -0.05:
        return "?"
    wanted = recent[-1]["points"] * (target / recent[-1]["sigma_max"]) ** (1 / slope)
    pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["points"] - recent[0]["points"])
    return f"{max(0.0, (wanted - recent[-1]['points']) * pace):.0f} s"


def line(run: Run, step: Step) -> str:
    """One line about where the run stands."""
    if step.stage == "overview":
        seen = run.recipe.overview
        columns = f"{len(seen.columns)} columns found in the overview" if seen is not None else "no overview"
        return f"{columns}; map of {run.recipe.raster_points} places"
    progress, target = step.progress, run.experiment.target_sigma
    full = run.recipe.raster_points * run.experiment.electrons_per_point
    parts = [
        f"{progress.points:4d} points ({progress.points / run.recipe.raster_points:.1%})",
        f"deviation {amount(progress.sigma, run.recipe.unit)} (wanted {amount(target, run.recipe.unit)})",
        f"dose {progress.electrons / full:.1%} of the full raster",
        f"{progress.seconds:.0f} s, left {_time_left(run.experiment.history, target)}",
    ]
    return " | ".join(parts) + (" | replayed" if step.replayed else "")


def show(run: Run) -> int:
    """Run to the end, saying where it stands; return the exit status."""
    console = Console(stderr=False, highlight=False)
    with run.site:  # whatever happens here, the instrument's process ends
        said = f"stemloop {run.settings.recipe} on {run.settings.specimen or run.settings.instrument}"
        console.print(f"{said}\nrun folder {run.directory}", markup=False, soft_wrap=True)
        if console.is_terminal:
            with console.status("looking at the field") as status:
                for step in run:
                    status.update(line(run, step))
        else:
            for step in run:
                print(line(run, step), flush=True)
    console.print(_result(run))
    console.print(f"report  {(run.directory / 'report.html').resolve()}", markup=False, soft_wrap=True)
    return 0


def _result(run: Run) -> Table:
    s, unit = run.summary, run.recipe.unit
    table = Table(show_header=False, box=None)
    table.add_row("stopped", STOP_REASONS.get(s["stop_reason"], s["stop_reason"]))
    table.add_row("points", f"{s['points']} of {s['raster_points']} of the full raster")
    table.add_row("dose", f"{s['dose_fraction']:.2%} of the full raster, overview included")
    table.add_row("deviation", f"{amount(s['final_sigma'], unit)} at most (wanted {amount(s['target_sigma'], unit)})")
    if s["map_rmse"] is not None:
        table.add_row("error", f"{amount(s['map_rmse'], unit)} rms against the {s['compared_with']}")
        share = f"{s['coverage_2sigma']:.1%} of the map within two deviations of the {s['compared_with']}"
        table.add_row("coverage", share)
    table.add_row("time", f"{s['seconds']:.1f} s; {s['peak_memory_MB']} MB")
    return table


def print_names(names: dict[str, list[str]]) -> int:
    """Print registered names by kind."""
    for kind, entries in names.items():
        print(f"{kind}: {', '.join(entries)}")
    return 0


def print_verdict(verdict: dict[str, Any]) -> int:
    """Print what was checked."""
    print("intact: " + ", ".join(f"{value} {name}" for name, value in verdict.items()), file=sys.stdout)
    return 0
