"""How many diffraction patterns a second the shipped network describes, beside torch eager on the same weights.

    python benchmarks/inference.py [--patterns 2048] [--threads 2]

Prints JSON and writes it to benchmarks/results/inference.json. The whole way is timed: counts to descriptors, with the
maps made on the way; the network alone is timed too, in ONNX Runtime and, where torch is installed, in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stemloop.core.protocols import Camera
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.describe.patterns import PatternDescriber
from stemloop.learn.features import condition, disc_maps
from stemloop.simulate.examples import vacuum

ENERGY_EV, SEMIANGLE_RAD, ELECTRONS = 80e3, 7e-3, 6e5
TARGET = 2000.0


def timed(work: Callable[[], object], patterns: int, repeats: int = 5) -> dict[str, float]:
    """Best wall time of ``repeats``, and the CPU time of that one, per pattern."""
    work()
    best = (float("inf"), 0.0)
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return {"patterns_per_s": round(patterns / best[0], 1), "cpu_us_per_pattern": round(best[1] / patterns * 1e6, 1)}


def torch_module(describer: PatternDescriber):
    """The network in torch with the weights of the shipped file, or None where torch or onnx is missing."""
    try:
        import onnx
        import torch

        from stemloop.learn.network import build
    except ImportError:
        return None
    stored = {
        i.name.removesuffix(".half"): onnx.numpy_helper.to_array(i).astype(np.float32)
        for i in onnx.load(str(describer.path)).graph.initializer
    }
    network = build(int(describer.card["settings"]["width"]))
    wanted = network.state_dict()
    network.load_state_dict({k: torch.from_numpy(stored[k].copy()) if k in stored else v for k, v in wanted.items()})
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    n = given.patterns
    counts = np.random.default_rng(0).poisson(
        np.broadcast_to(vacuum(SEMIANGLE_RAD, ENERGY_EV) * ELECTRONS, (n, 64, 64))
    )
    counts = counts.astype(np.uint16)
    camera = Camera((64, 64), wavelength_m(ENERGY_EV) / (32 * ANGSTROM_M), (32, 32))
    describer = PatternDescriber(threads=given.threads)
    result: dict[str, object] = {
        "patterns": n,
        "threads": given.threads,
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before": os.getloadavg()[0],
    }
    whole = timed(lambda: describer(counts, camera, ENERGY_EV, SEMIANGLE_RAD, ELECTRONS), n)
    result["counts to descriptors"] = {**whole, "of_target": round(whole["patterns_per_s"] / TARGET, 2)}

    wavelength_A = wavelength_m(ENERGY_EV) / ANGSTROM_M
    radius = np.full(64, SEMIANGLE_RAD / wavelength_A * 32)
    maps = disc_maps(counts[:64].astype(np.float32), radius, np.full(64, ELECTRONS))
    known = condition(radius, np.full(64, ELECTRONS), np.full(64, wavelength_A))
    session = describer._session
    onnx_alone = timed(lambda: session.run(None, {"maps": maps, "condition": known}), 64, 20)
    result["network alone, ONNX Runtime, 1 thread"] = onnx_alone
    network = torch_module(describer)
    if network is not None:
        import torch

        torch.set_num_threads(1)
        inputs = torch.from_numpy(maps), torch.from_numpy(known)
        with torch.no_grad():
            eager = timed(lambda: network(*inputs), 64, 20)
            answer = session.run(None, {"maps": maps, "condition": known})
            apart = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(answer, network(*inputs), strict=True))
        result["network alone, torch eager, 1 thread"] = eager
        result["ONNX Runtime over torch"] = round(onnx_alone["patterns_per_s"] / eager["patterns_per_s"], 2)
        result["largest difference of an output"] = apart
    text = json.dumps(result, indent=1)
    out = Path(__file__).parent / "results" / "inference.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
