"""Write measured figures into reference/results.md, between its marks ``begin NAME`` and ``end NAME``.

    python docs/fill_results.py [RUN_FOLDER ...]

Figures come from ``benchmarks/results/*.json``, from the network's ``cbed.json`` and, where run folders are named,
from their ``summary.json``. What has no figures yet stays as it is. A benchmark that only prints is kept by
``./scripts/bench stream_durable > benchmarks/results/stream_durable.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
CARD = ROOT / "src" / "stemloop" / "describe" / "weights" / "cbed.json"
FIXED = ("grid", "random")


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown; numbers are given three digits."""
    names = [name.strip() for name in head.split("|")]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(word(cell) for cell in row) + " |" for row in rows])


def word(cell: Any) -> str:
    if cell is None:
        return "–"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g} %"


def span(values: list[float | None], show: Callable[[float], Any] = float) -> str | None:
    """The mean, and the smallest and largest in brackets."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = word(show(sum(known) / len(known)))
    return mean if len(known) == 1 else f"{mean} ({word(show(min(known)))} to {word(show(max(known)))})"


# --------------------------------------------------------------------------------------------------- run folders


def meV(value_eV: float | None) -> float | None:
    return None if value_eV is None else 1e3 * value_eV


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of what is known, over the runs that know it."""

    def mean(key: str) -> float | None:
        known = [row[key] for row in rows if row[key] is not None]
        return sum(known) / len(known) if known else None

    means: dict[str, Any] = {key: mean(key) for key in AVERAGED}
    reasons = ", ".join(sorted({row["stop_reason"] for row in rows}))
    full = {row["raster_points"] for row in rows}
    return {
        **means,
        "points": None if means["points"] is None else round(means["points"]),
        "seed": f"mean of {len(rows)}",
        "sampling": rows[0]["sampling"],
        "stop_reason": reasons,
        "raster_points": full.pop() if len(full) == 1 else None,
    }


AVERAGED = ("points", "dose_fraction", "target_sigma", "final_sigma", "map_rmse", "coverage_2sigma", "seconds")
SAMPLINGS = ("uncertainty", "random", "grid")


def sampling(found: dict[str, Any]) -> str:
    head = (
        "sampling | seed | stop reason | points | full raster | dose fraction | wanted deviation [meV] | "
        "largest deviation [meV] | map error (rms) [meV] | coverage of 2 sigma | time [s]"
    )

    def row(run: dict[str, Any]) -> Iterable[Any]:
        energies = (meV(run[key]) for key in ("target_sigma", "final_sigma", "map_rmse"))
        return (
            run["sampling"],
            run["seed"],
            run["stop_reason"],
            run["points"],
            run["raster_points"],
            percent(run["dose_fraction"]),
            *energies,
            percent(run["coverage_2sigma"]),
            run["seconds"],
        )

    parts = []
    for specimen in sorted({run["specimen"] for run in found["rows"]}, key=str.lower):
        rows: list[Iterable[Any]] = []
        of_it = [run for run in found["rows"] if run["specimen"] == specimen]
        for name in sorted({run["sampling"] for run in of_it}, key=SAMPLINGS.index):
            runs = sorted((run for run in of_it if run["sampling"] == name), key=lambda run: run["seed"])
            rows += [row(run) for run in [*runs, mean_row(runs)]]
        parts.append(f"{specimen}:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def latency(found: dict[str, Any]) -> str:
    stages = found["stages_ms_per_point"]
    head = " | ".join(["points", "median [ms a point]", "95 % [ms a point]", *(f"{name} [ms]" for name in stages)])
    return table(head, [(found["points"], found["median_ms_per_point"], found["p95_ms_per_point"], *stages.values())])


def twin(found: dict[str, Any]) -> str:
    head = (
        "specimen | coherent pattern [CPU ms] | abTEM, one position | abTEM, sixteen at once | ratio to one | "
        "to sixteen | share of the transforms' limit | with source and phonons [CPU ms] | difference from abTEM"
    )
    keys = ("twin_cbed_ms", "abtem_cbed_ms", "abtem_batched_cbed_ms", "ratio", "ratio_to_batched", "share_of_the_limit")
    return table(
        head,
        (
            (name, *(s[key] for key in keys), s["twin_counted_source_phonons_ms"], percent(s["difference_R1"]))
            for name, s in found["specimens"].items()
        ),
    )


def energetics(found: dict[str, Any]) -> str:
    head = (
        "material | calculator | supercell | one calculation [CPU s] | off the largest supercell | "
        "nodes for 150 descriptors | largest held-out error [meV] | claimed there [meV] | 10 000 strains [ms]"
    )
    rows = []
    for name, m in found.items():
        if not isinstance(m, dict):
            continue
        s = m["surface"]
        size = next(row for row in m["convergence"] if row["supercell"] == s["supercell"])
        error, claim = max(
            (abs(e), c) for e, c in zip(s["held_out_error_meV"], s["held_out_deviation_meV"], strict=True)
        )
        rows.append(
            (
                name,
                m["calculator"],
                s["supercell"],
                size["cpu_s_a_call"],
                percent(size["off"]),
                s["nodes"],
                error,
                claim,
                s["ms_for_10000_strains"],
            )
        )
    return table(head, rows)


def decision(found: dict[str, Any]) -> str:
    head = "measured points | fit [CPU ms] | map | batch | decision | BoTorch, decision | ratio"
    return table(
        head,
        (
            (
                r["points"],
                *(r["stemloop_cpu_ms"][k] for k in ("fit", "map", "batch", "decision")),
                r["botorch_cpu_ms"]["decision"],
                r["botorch_over_stemloop"],
            )
            for r in found["rows"]
        ),
    )


def coverage(found: dict[str, Any]) -> str:
    head = (
        "fit | noise | wanted deviation | seeds that reached it | points | coverage of 2 sigma | lowest of the seeds | "
        "map error"
    )

    def row(name: str, r: dict[str, Any]) -> Iterable[Any]:
        covered = percent(r.get("coverage")), percent(r.get("lowest"))
        return (name, r["noise"], r["target"], round(r["stopped"]), r.get("points"), *covered, r.get("rmse"))

    return table(head, (row(name, r) for name, rows in found["settings"].items() for r in rows))


def control(found: dict[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), t["median_ms"], t.get("p99_ms", t.get("max_ms")))
        for name, t in found.items()
        if isinstance(t, dict) and "median_ms" in t
    ]
    return table("command | median [ms] | 99 % [ms]", rows)


def stream(found: dict[str, Any]) -> str:
    head = (
        "frames a batch (64 × 64, uint16) | frames/s | MB/s | from send to durable [ms] | one append on this disk [ms]"
    )
    keys = ("frames_per_batch", "frames_per_s", "MB_per_s", "send_to_wait_ms_median")
    return table(head, ((*(r[k] for k in keys), found["append_fdatasync_ms"]) for r in found["rates"]))


STACKS = {
    "still": "one still image of the whole dose",
    "true_shifts_and_lines": "the average by the true shifts of frames and lines",
    "true_shifts": "by the true shifts of frames",
    "found": "by the shifts that were found",
}


def stacks(found: dict[str, Any]) -> str:
    def row(way: str, words: str) -> list[Any]:
        one = found["over_bound"][way]
        both = [f"{y:.3f}, {x:.3f}" for y, x in (one["site_0"], one["site_1"])]
        return [words, *both, f"{one['all']:.3f} ± {one['by_chance']:.3f}", f"{one['deviations']:.3f}"]

    ways = table(
        "columns of | error over the bound, bright (y, x) | weak (y, x) | all | deviations over the bound",
        (row(way, words) for way, words in STACKS.items()),
    )
    cases = table(
        "seed | frames named bad | worst shift [px] | rms y, x [px] | register [CPU s] | average [CPU s] | all columns",
        (
            [
                case["seed"],
                ", ".join(case["outliers"]),
                case["worst_px"],
                ", ".join(word(v) for v in case["rms_px"]),
                case["register_cpu_s"],
                case["average_cpu_s"],
                f"{case['over_bound']['found']['all']:.3f} ± {case['over_bound']['found']['by_chance']:.3f}",
            ]
            for case in found["cases"]
        ),
    )
    return f"{ways}\n\n{cases}"


def columns(found: dict[str, Any]) -> str:
    rows = []
    cases: dict[tuple[int, float, float], list[dict[str, Any]]] = {}
    for case in found["cases"]:
        cases.setdefault((case["size"], case["dose_per_A2"], case["pixel_pm"]), []).append(case)
    for (size, dose, pixel_pm), group in cases.items():
        for who in ("stemloop", "atomap"):
            known = [case[who] for case in group if who in case]
            if known:
                many = {key: [one.get(key) for one in known] for key in known[0] | known[-1]}
                rows.append(
                    [
                        size,
                        f"{dose:.0e}",
                        pixel_pm,
                        who,
                        span(many["precision"], percent_number),
                        span(many["recall"], percent_number),
                        span(many["rmse_A_over_bound"]),
                        span(many["rmse_B_over_bound"]),
                        span(many.get("within_one_sigma", []), percent_number),
                        span(many["vacancies_filled"], percent_number),
                        span(many["cpu_s"]),
                        span(many["memory_MB"]),
                    ]
                )
    head = (
        "size [px] | dose [e/A^2] | pixel [pm] | program | precision [%] | recall [%] | error of A over the bound "
        "| of B | within 1 sigma [%] | vacancies filled [%] | processor [s] | memory [MB]"
    )
    hours = [
        f"{who}: {found[key]:.2g} hours"
        for who in ("stemloop", "atomap")
        if (key := f"{who}_cpu_hours_of_1000_frames_of_2048") in found
    ]
    return table(head, rows) + "\n\nA thousand frames of 2048 x 2048, on one processor: " + ", ".join(hours) + "."


def percent_number(share: float) -> float:
    return 100 * share


def network(card: dict[str, Any]) -> str:
    quantities = ("v_mean", "v_diff", "v_xy", "phi_rad")
    parts = []
    for title in ("test", "usual beam, 6e5 electrons"):
        rows = [
            (
                name,
                m["patterns"],
                percent(m["phase right"]),
                *(m["all doses"][q]["rms error"] for q in quantities),
                percent(min(m["all doses"][q]["within 2 sigma"] for q in quantities)),
            )
            for name, m in card.get(title, {}).items()
            if "all doses" in m
        ]
        head = (
            "material | patterns | phase right | e_mean (rms error) | e_diff | e_xy | rotation [rad] | "
            "within 2 sigma (worst of the four)"
        )
        parts.append(f"{title.capitalize()}:\n\n{table(head, rows)}")
    outside = [
        (where, name, percent(m["novelty above 3"]), m["novelty median"])
        for where, found in card.get("outside", {}).items()
        for name, m in found.items()
    ]
    parts.append(
        "Outside the trained ranges:\n\n" + table("where | material | novelty above 3 | median novelty", outside)
    )
    return "\n\n".join(parts)


def structures(found: dict[str, Any]) -> str:
    doses = list(found["film"])
    rows: list[list[Any]] = []
    film = [found["film"][dose] for dose in doses]
    rows.append(["LaCoO3 on SrTiO3: sites right", *(f"{f['sites_right']} of {f['columns']}" for f in film)])
    rows.append(["its phases right", *(f"{f['phases_right']} of {f['columns']}" for f in film)])
    rows.append(["its vacancies found", *(f"{f['vacancies_found']} of {f['vacancies']}" for f in film)])
    names = {
        "closure": "flux closure: four walls of 90°, one vortex",
        "vortex": "its vortex alone",
        "stripes": "stripes: three walls of 180°, no vortex",
        "array": "a vortex and four antivortices",
    }
    for key, name in names.items():
        rows.append([name, *(found["domains"][dose][key] for dose in doses)])
    lines = [found["dislocations"][dose] for dose in doses]
    rows.append(["Burgers vectors right", *(f"{d['right']} of {d['of']}" for d in lines)])
    rows.append(["cores off, median (largest) [cells]",
                 *(f"{d['core_off_cells_median']:.2f} ({d['core_off_cells_max']:.2f})" for d in lines)])  # fmt: skip
    head = ["planted in images of 15 pm pixels", *(f"{float(dose):.0e} e/Å²" for dose in doses)]
    return table(" | ".join(head), rows)


BENCHMARKS: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "sampling": (RESULTS / "sampling.json", sampling),
    "latency": (RESULTS / "latency.json", latency),
    "network": (CARD, network),
    "twin": (RESULTS / "twin.json", twin),
    "energetics": (RESULTS / "energetics.json", energetics),
    "decision": (RESULTS / "decision.json", decision),
    "coverage": (RESULTS / "belief_coverage.json", coverage),
    "columns": (RESULTS / "columns.json", columns),
    "stacks": (RESULTS / "stacks.json", stacks),
    "control": (RESULTS / "control.json", control),
    "structures": (RESULTS / "structures.json", structures),
    "stream": (RESULTS / "stream_durable.json", stream),
}


def put(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    found, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for {name}.")
    return found


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (source, show) in BENCHMARKS.items():
        if source.exists():
            page = put(page, name, show(json.loads(source.read_text())))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
