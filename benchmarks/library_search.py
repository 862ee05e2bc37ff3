"""Does the library find a planted defect in other images first, and how long does a search among 10^6 entries take?

Images of several materials are counted at random orientation, pixel size (8 to 28 pm), background and dose. In each,
one defect of every kind is planted. From image to fingerprints only what the program finds is used: the columns and
vacant places of ``find_columns``; a planted defect that is neither (the middle of a split column, of a pair of
vacancies, a dislocation core) gets an entry at its true place, give or take 0.04 spacings. Then every planted defect
is looked up without its own image. It is found first if the nearest entry of all lies at a planted defect of the same
kind and material (within half a spacing). The library holds the columns and defects of all images, first alone, then
among 10^6 entries: the perfect columns again and again, each with the noise of an image of its own.

Run: python benchmarks/library_search.py [--entries N] [--images N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from stemloop.describe.atoms import find_columns
from stemloop.describe.fingerprints import DIMENSION, fingerprints, scatter
from stemloop.simulate.pictures import PLANES, counted, mean_image
from stemloop.simulate.planted import KINDS, planted
from stemloop.store.library import Element, Library

#: Material, kinds that make sense in it.
MATERIALS = {
    "SrTiO3[001]": KINDS,
    "LaCoO3[001]": KINDS,
    "MoS2": KINDS,
    "GaAs[110]": tuple(k for k in KINDS if k != "antisite-1"),  # Ga and As differ by an eighth
}
#: Doses [e/A^2] between which an image's is drawn, and its share of the images.
DOSES = {"1e4 to 1e5": (1e4, 1e5), "3e3": (3e3, 3e3), "1e3": (1e3, 1e3)}
SIDE = 28  # of an image, in spacings


def image_of(material, kinds, doses, rng):
    """Elements of one random image, and for each the planted kind it lies at ('' for none)."""
    plane = PLANES[material]
    pixel_pm = rng.uniform(8, 28)
    unit = np.sqrt(abs(np.linalg.det(plane.vectors_pm)) / len(plane.basis)) / pixel_pm
    dose = np.exp(rng.uniform(*np.log(doses)))
    made = planted(plane, (int(SIDE * unit),) * 2, pixel_pm, rng.uniform(0, 2 * np.pi), kinds, rng)
    image = counted(mean_image(made.layout, dose, background=rng.uniform(0.05, 0.25)), rng)
    columns = find_columns(image)
    places = np.concatenate([columns.position, columns.vacant])
    queries = {}
    for kind, place in made.place.items():
        away = np.hypot(*(places - place).T)
        if away.min() < 0.25 * unit:
            queries[kind] = int(away.argmin())
        else:
            queries[kind] = len(places)
            places = np.concatenate([places, place[None] + rng.normal(0, 0.04 * unit, (1, 2))])
    at = np.full(len(places), "", dtype="<U16")
    for kind, place in made.place.items():
        at[np.hypot(*(places - place).T) < 0.5 * unit] = kind
    vectors = fingerprints(image, columns, places)
    spread = scatter(vectors[: len(columns)], columns.sublattice)
    inside = np.isfinite(vectors).all(axis=1)
    elements = [
        Element(vectors[i], at[i] or "column", tuple(places[i]), material, scatter=spread)
        for i in np.flatnonzero(inside)
    ]
    asked = [vectors[i] for i in queries.values() if inside[i]]
    return elements, list(zip([k for k, i in queries.items() if inside[i]], asked, strict=True)), spread


def ask(library, images, exact):
    """Right answers and questions by dose, by kind, and what was found instead."""
    right, asked, wrong = Counter(), Counter(), Counter()
    for number, (material, dose, _, queries, spread) in enumerate(images):
        for kind, vector in queries:
            (best,) = library.search(vector, 1, scatter=spread, exact=exact, without_source=f"{number:064x}")
            good = (best.entry.kind, best.entry.phase) == (kind, material)
            for name in (dose, (dose, kind), (dose, material)):
                asked[name] += 1
                right[name] += good
            if not good:
                wrong[f"{dose}: {material} {kind} -> {best.entry.phase} {best.entry.kind}"] += 1
    return {name: [right[name], asked[name]] for name in asked}, wrong


def told(counts):
    return {" ".join(name) if isinstance(name, tuple) else name: pair for name, pair in counts.items()}


def times(library, queries):
    """Wall and CPU milliseconds of one search each (median and 99th percentile), and recall of the nearest one."""
    found = {"nearest": [], "search": []}
    cpu, search_cpu, hits = [], [], 0
    for query in queries:
        start, begun = time.perf_counter(), time.thread_time()
        entry, _ = library.nearest(query, 10)
        found["nearest"].append(time.perf_counter() - start)
        cpu.append(time.thread_time() - begun)
        start, begun = time.perf_counter(), time.thread_time()
        library.search(query, 10)
        found["search"].append(time.perf_counter() - start)
        search_cpu.append(time.thread_time() - begun)
        hits += entry[0] == library.nearest(query, 1, exact=True)[0][0]
    start = time.perf_counter()
    library.nearest(queries[0], 10, exact=True)
    quantiles = {
        name: {"median_ms": 1e3 * float(np.median(v)), "p99_ms": 1e3 * float(np.percentile(v, 99))}
        for name, v in (*found.items(), ("nearest_cpu", cpu), ("search_cpu", search_cpu))
    }
    return {
        **quantiles,
        "load": os.getloadavg()[0],
        "exact_ms": 1e3 * (time.perf_counter() - start),
        "recall_at_1": hits / len(queries),
    }


def crowd(library, images, entries, rng):
    """Fill up with perfect columns, each with its image's noise anew."""
    pool = np.array([e.vector for _, _, es, _, _ in images for e in es if e.kind == "column"])
    spread = np.concatenate([[e.scatter for e in es if e.kind == "column"] for _, _, es, _, _ in images])
    number = 0
    while len(library) < entries:
        some = rng.integers(0, len(pool), min(20_000, entries - len(library)))
        vectors = pool[some] + 0.7 * spread[some, None] * rng.normal(size=(len(some), DIMENSION))
        crowd = [
            Element(v, "column", (float(i), 0.0), "more", scatter=float(s))
            for i, (v, s) in enumerate(zip(vectors.astype(np.float32), spread[some], strict=True))
        ]
        library.add(crowd, f"more-{number}", f"{10**6 + number:064x}")
        number += 1


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--entries", type=int, default=1_000_000)
    words.add_argument("--images", type=int, default=6, help="of each material at high dose; half as many at low ones")
    words.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "library_search.json")
    given = words.parse_args()
    rng = np.random.default_rng(0)
    images = []
    for dose, span in DOSES.items():
        for material, kinds in MATERIALS.items():
            for _ in range(given.images if span[0] >= 1e4 else max(1, given.images // 2)):
                images.append((material, dose, *image_of(material, kinds, span, rng)))
    result = {"entries": given.entries, "images": len(images), "machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as folder, Library(Path(folder) / "bench.library") as library:
        for number, (_, _, elements, _, _) in enumerate(images):
            library.add(elements, f"image-{number}", f"{number:064x}")
        counts, wrong = ask(library, images, exact=True)
        result["alone"] = {"entries": len(library), "found_first": told(counts), "wrong": dict(wrong)}
        print(json.dumps(result["alone"], indent=1), flush=True)
        start = time.perf_counter()
        crowd(library, images, given.entries, rng)
        result["adding_us_an_entry"] = 1e6 * (time.perf_counter() - start) / given.entries
        start = time.perf_counter()
        library.nearest(np.zeros(DIMENSION))
        result["index_s"] = time.perf_counter() - start
        counts, wrong = ask(library, images, exact=False)
        result["crowded"] = {"entries": len(library), "found_first": told(counts), "wrong": dict(wrong)}
        queries = [vector for *_, queries, _ in images for _, vector in queries]
        columns = [e.vector for _, _, es, _, _ in images for e in es[:: len(es) // 3 or 1]]
        shifted = [v + 0.5 * rng.normal(size=DIMENSION).astype(np.float32) for v in (*queries, *columns)]
        result["time"] = times(library, [shifted[i] for i in rng.permutation(len(shifted))[:300]])
        start = time.perf_counter()
        with Library(library.path) as again:
            again.nearest(np.zeros(DIMENSION))
        result["opening_s"] = time.perf_counter() - start
        result["bytes_an_entry"] = (library.path.stat().st_size + library.index_path.stat().st_size) / given.entries
    print(json.dumps(result, indent=1))
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
