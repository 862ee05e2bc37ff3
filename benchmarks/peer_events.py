"""LiberTEM and stempy on the arrays that ``benchmarks/events.py`` wrote: run by it, in an environment of their own.

``python peer_events.py FOLDER`` prints one JSON object: CPU-seconds of the best of several calls after one to warm up.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

SHAPE = (128, 128)


def best(call, repeats):
    call()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def libertem(folder, masks, result):
    import libertem
    import libertem.api as lt
    from libertem.executor.inline import InlineJobExecutor
    from libertem.udf.masks import ApplyMasksUDF

    result["libertem_version"] = libertem.__version__
    # with more than one thread its BLAS threads spin against each other on a busy machine, 10 to 50 times slower
    context = lt.Context(executor=InlineJobExecutor(inline_threads=1))
    udf = ApplyMasksUDF(mask_factories=[lambda m=m: m for m in masks.astype(np.float32)])
    (folder / "events.toml").write_text(
        '[params]\nfiletype = "raw_csr"\nnav_shape = [256, 256]\nsig_shape = [128, 128]\n[raw_csr]\n'
        'indptr_file = "indptr.raw"\nindptr_dtype = "<i8"\nindices_file = "index.raw"\nindices_dtype = "<u2"\n'
        'data_file = "ones.raw"\ndata_dtype = "<u1"\n'
    )
    sparse = context.load("raw_csr", path=str(folder / "events.toml"))
    result["libertem_raw_csr_s"] = best(lambda: context.run_udf(dataset=sparse, udf=udf), 5)
    found = context.run_udf(dataset=sparse, udf=udf)["intensity"].data.reshape(-1, len(masks))
    np.save(folder / "libertem.npy", found.astype(np.float64))
    dense = folder / "dense.raw"
    if dense.exists():
        frames = np.fromfile(dense, np.uint16).reshape(256, 256, *SHAPE)
        data = context.load("memory", data=frames, sig_dims=2)
        result["libertem_dense_s"] = best(lambda: context.run_udf(dataset=data, udf=udf), 2)


def stempy(folder, result):
    import stempy.image as image
    from stempy.io import SparseArray

    ends = np.fromfile(folder / "indptr.raw", np.int64)
    index = np.fromfile(folder / "index.raw", np.uint16).astype(np.uint32)
    data = np.empty((len(ends) - 1, 1), object)
    for f in range(len(ends) - 1):
        data[f, 0] = index[ends[f] : ends[f + 1]]
    array = SparseArray(data, (256, 256), SHAPE)
    result["stempy_adf_s"] = best(lambda: image.create_stem_images(array, [20], [60], center=(64, 64)), 5)
    result["stempy_com_s"] = best(lambda: image.com_sparse(array, version=1), 3)
    result["stempy_adf_and_com_s"] = result["stempy_adf_s"] + result["stempy_com_s"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result: dict = {}
    for name, call in (
        ("libertem", lambda: libertem(folder, np.load(folder / "masks.npy"), result)),
        ("stempy", lambda: stempy(folder, result)),
    ):
        try:
            call()
        except Exception as error:
            result[f"{name}_failed"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result))
