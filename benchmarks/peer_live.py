"""LiberTEM-live on the same machine: its own Merlin simulator sends the frames of ``live.py`` (a scan of 128 x 128,
cached in memory, as fast as it goes) to its own receiver, which computes sum, both moments and an annular detector (one
mask UDF, pipelined executor with one worker), then the sum alone. Called by ``live.py`` with the folder that holds
``a.hdr``, ``a.mib``, ``masks.npy`` and ``expected.npy``; the last line of its output is JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def rate(connection_words: dict, context, udf, expected) -> dict:
    best = None
    for _ in range(3):
        with context.make_connection("merlin").open(**connection_words) as connection:
            acquisition = context.make_acquisition(conn=connection, nav_shape=(128, 128))
            begin = time.perf_counter()
            found = context.run_udf(dataset=acquisition, udf=udf)
            wall = time.perf_counter() - begin
        values = np.asarray(next(iter(found.values())).data)
        best = wall if best is None else min(best, wall)
    return {
        "frames_per_s": 16384 / best,
        "s": best,
        "equal": bool(np.allclose(values.reshape(16384, -1), expected, rtol=1e-5)),
    }


def main() -> None:
    from libertem.udf.masks import ApplyMasksUDF
    from libertem.udf.sumsigudf import SumSigUDF
    from libertem_live.api import LiveContext

    folder = Path(sys.argv[1])
    masks, expected = np.load(folder / "masks.npy").astype(np.float32), np.load(folder / "expected.npy")
    ports = [free_port() for _ in range(3)]
    tool = os.path.join(os.path.dirname(sys.executable), "libertem-live-mib-sim")
    words = ["--data-port", str(ports[0]), "--control-port", str(ports[1]), "--trigger-port", str(ports[2])]
    simulator = subprocess.Popen(
        [tool, str(folder / "a.hdr"), "--nav-shape", "128", "128", "--host", "127.0.0.1", "--cached", "MEM", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    connection = {"api_host": "127.0.0.1", "api_port": ports[1], "data_host": "127.0.0.1", "data_port": ports[0]}
    try:
        for _ in range(120):
            try:
                socket.create_connection(("127.0.0.1", ports[1]), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        context = LiveContext.make_with("pipelined", cpus=1)
        try:
            factories = [(lambda k=k: masks[k]) for k in range(len(masks))]
            result = {
                "masks": rate(connection, context, ApplyMasksUDF(mask_factories=factories), expected),
                "sum": rate(connection, context, SumSigUDF(), expected[:, :1]),
            }
        finally:
            context.close()
    finally:
        simulator.terminate()
        simulator.wait(20)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
