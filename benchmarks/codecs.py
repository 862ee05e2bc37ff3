"""Size and speed of the codecs without loss, beside the Poisson entropy of the data and blosc2.

The data are those of ``benchmarks/events.py``, a quarter of the scan (16384 frames) a block. ``entropy`` is that of
Poisson counts whose mean pattern is known at each of the 256 positions of the cell, ``entropy_mean_pattern`` the cross
entropy of the same counts under the mean of all patterns: what a coder that knows one pattern a block can reach. Sizes
are of whole encoded blocks with headers and models. Speeds are millions of electrons a CPU-second of one core, the best
of several calls.
``python benchmarks/codecs.py`` writes ``benchmarks/results/codecs.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import counted_data
import numpy as np

from stemloop.stream import codec, entropy, intensity
from stemloop.stream.codec import CODECS
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

RESULTS = Path(__file__).parent / "results" / "codecs.json"
FRAMES = 16384


def best(call, repeats: int):
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        answer = call()
        times.append(time.process_time() - begin)
    return answer, min(times)


def measure(electrons: int) -> dict:
    indptr, index = counted_data.events(electrons)
    events = EventBlock(indptr, index, counted_data.SHAPE)[:FRAMES]
    dense = DenseBlock(events.dense())
    number = len(events.index)
    known, mean = counted_data.entropies(electrons)
    row = {
        "electrons": number,
        "entropy_bits": known,
        "entropy_mean_pattern_bits": mean,
        "chosen": codec.choose(events),
    }
    for name, one in CODECS.items():
        if name == "bitplanes":
            continue
        block = dense if name.startswith("bit") else events
        repeats = 2 if block is dense else 9
        one.encode(block[:512])  # compiles
        data, encoding = best(lambda one=one, block=block: one.encode(block), repeats)
        again, decoding = best(lambda one=one, data=data: one.decode(data), repeats)
        assert np.array_equal(again.moments(), events.moments())
        found = codec.parts(data)
        _, single = best(lambda found=found: codec.frame_of(found, FRAMES // 2 + 7), 5)
        bits = 8 * len(data) / number
        row[name] = {
            "bytes": len(data),
            "bits_an_electron": bits,
            "over_entropy": bits / known,
            "over_entropy_mean_pattern": bits / mean,
            "smaller_than_dense": dense.nbytes / len(data),
            "encoded_Me_per_s": number / encoding / 1e6,
            "decoded_Me_per_s": number / decoding / 1e6,
            "one_frame_ms": single * 1e3,
        }
    per_run = entropy.run_frames(events)
    models, fitting = best(lambda: intensity.fit(events), 5)
    (words, ends), encoding = best(lambda: entropy.encode(events, models, per_run), 5)
    sizes = np.diff(events.indptr[entropy.run_edges(FRAMES, per_run)])
    pixels = events.shape[0] * events.shape[1]
    _, decoding = best(lambda: entropy.decode(words, ends, sizes, models, pixels, per_run), 5)
    row["entropy_kernels"] = {
        "models": models.number,
        "fitted_ms": fitting * 1e3,
        "bits_an_electron": 8 * len(words) / number,
        "encoded_Me_per_s": number / encoding / 1e6,
        "decoded_Me_per_s": number / decoding / 1e6,
    }
    return row


def main() -> None:
    result = {
        "machine": {"python": sys.version.split()[0], "cores": os.cpu_count(), "load_at_begin": os.getloadavg()[0]},
        "rows": {str(e): measure(e) for e in (50, 200, 500)},
    }
    result["machine"]["load_at_end"] = os.getloadavg()[0]
    result["machine"]["shared"] = max(result["machine"]["load_at_begin"], result["machine"]["load_at_end"]) > 1.5
    text = json.dumps(result, indent=1)
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
