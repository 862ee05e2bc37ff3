"""How long does one decision take? Fit, map of 4,096 candidates, batch of 8, beside BoTorch on the same data.

CPU milliseconds of one thread, median of repeats, in one process. BoTorch fits its SingleTaskGP with the known noise,
gives the posterior of all candidates and the best *single* candidate by posterior deviation: less work than ours, which
chooses eight. Run: ``python benchmarks/decision.py``; JSON to stdout and benchmarks/results/decision.json.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stemloop.decide.acquire import ACQUISITIONS, initial_design
from stemloop.decide.gp import fit

FIELD_M = (10e-9, 10e-9)
AXIS = np.linspace(0.0, FIELD_M[0], 64)
CANDIDATES = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), axis=-1).reshape(-1, 2)
BATCH, NOISE = 8, 0.1
FLOPS = 50e9  # double precision, one core of about 3 GHz with 16 operations a cycle


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time [ms] of ``work``, after one call to warm up."""
    work()
    spent = []
    for _ in range(repeats):
        begin = time.process_time_ns()
        work()
        spent.append(time.process_time_ns() - begin)
    return float(np.median(spent)) * 1e-6


def data(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``n`` noisy values of a bump on waves, as an experiment would have them."""
    rng = np.random.default_rng(n)
    positions = CANDIDATES[initial_design(CANDIDATES, n, (0.0, 0.0), rng)]
    y, x = positions.T / 1e-9
    field = np.exp(-((y - 6) ** 2 + (x - 4) ** 2) / 4) + 0.2 * np.sin(y) * np.cos(x)
    return positions, field + NOISE * rng.normal(size=n), np.full(n, NOISE)


def stemloop_ms(n: int) -> dict[str, float]:
    positions, values, sigmas = data(n)
    start = fit(positions[:-BATCH], values[:-BATCH], sigmas[:-BATCH], field_m=FIELD_M).hyperparameters
    rng = np.random.default_rng(0)

    def learned():
        return fit(positions, values, sigmas, field_m=FIELD_M, start=start)

    def mapped():
        belief = learned()
        belief.predict(CANDIDATES)
        return belief

    def decided():
        return ACQUISITIONS["uncertainty"](mapped(), CANDIDATES, BATCH, (0.0, 0.0), rng)

    one, two, three = (cpu_ms(work, 25) for work in (learned, mapped, decided))
    # the arithmetic that cannot be left out: 4,096 columns through a triangular factor and one exponential each
    floor = len(CANDIDATES) * n * (n + 20) / FLOPS * 1e3
    return {"fit": one, "map": two - one, "batch": three - two, "decision": three, "arithmetic_floor": floor}


def botorch_ms(n: int) -> dict[str, float] | str:
    try:
        import torch
        from botorch.acquisition import PosteriorStandardDeviation
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood
    except ImportError as error:
        return f"not installed: {error.name}"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    positions, values, sigmas = data(n)
    scale = FIELD_M[0]
    x = torch.tensor(positions / scale)
    y = torch.tensor((values - values.mean()) / values.std())[:, None]
    variance = torch.tensor((sigmas / values.std()) ** 2)[:, None]
    candidates = torch.tensor(CANDIDATES / scale)
    first = SingleTaskGP(x[:-BATCH], y[:-BATCH], variance[:-BATCH], outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(first.likelihood, first))
    start = first.state_dict()

    def learned():
        model = SingleTaskGP(x, y, variance, outcome_transform=None)
        model.load_state_dict(start, strict=False)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model

    def mapped():
        model = learned()
        with torch.no_grad():
            # one candidate a batch: the diagonal alone, not a 4,096 x 4,096 covariance
            posterior = model.posterior(candidates[:, None, :])
            _ = posterior.mean, posterior.variance
        return model

    def decided():
        model = mapped()
        with torch.no_grad():
            return PosteriorStandardDeviation(model)(candidates[:, None, :]).argmax()

    one, two, three = (cpu_ms(work, 5) for work in (learned, mapped, decided))
    return {"fit": one, "map": two - one, "acquisition_of_one": three - two, "decision": three}


def main() -> None:
    rows = []
    for n in (20, 50, 100, 200):
        ours, theirs = stemloop_ms(n), botorch_ms(n)
        row = {"points": n, "stemloop_cpu_ms": ours, "botorch_cpu_ms": theirs}
        if isinstance(theirs, dict):
            row["botorch_over_stemloop"] = theirs["decision"] / ours["decision"]
        row["stemloop_over_floor"] = ours["decision"] / ours["arithmetic_floor"]
        rows.append(row)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("torch", "botorch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    result = {"candidates": len(CANDIDATES), "batch": BATCH, "threads": 1, "versions": versions, "rows": rows}
    text = json.dumps(result, indent=1)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "decision.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
