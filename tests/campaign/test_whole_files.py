"""Whatever the house replaces, it replaces in one step: where the disk is full the old file stays as it was."""

import os

import numpy as np
import pytest

from stemloop.campaign import reduction, report, site
from stemloop.campaign.images import packed, tables
from stemloop.core.errors import StorageError
from stemloop.instrument.files import write_atomically
from stemloop.store import neighbours

resource = pytest.importorskip("resource", reason="no limits on files here")
BIG = np.random.default_rng(0).random((64, 64))  # does not compress below the limit
LIMIT_BYTES = 2000


def index():
    rng = np.random.default_rng(0)
    vectors = rng.random((200, 8)).astype(np.float32)
    numbers = np.arange(200)
    return neighbours.Index(
        trained=200,
        vectors=vectors,
        entry=numbers.astype("<i8"),
        source=numbers.astype("<i4"),
        centre=vectors[:1],
        start=np.array([0, 200]),
    )


def maps(folder):
    reduction.write(reduction.Reduced({"a": BIG}, {"a": "1"}, {"file": "f", "scan": [64, 64], "frame": [1, 1]}), folder)


WRITERS = {
    "packed.npz": lambda path: packed.write(path, (BIG,)),
    "settings.json": lambda path: site.write_json(path, BIG.tolist()),
    "tokens.json": lambda path: write_atomically(path, BIG.tolist()),
    "library.index": lambda path: neighbours.save(index(), path, "name"),
    "maps.h5": lambda path: maps(path.parent),
    "columns.parquet": lambda path: tables.write(path.parent, "columns", [np.zeros(500, tables.ROW)], 500),
    "columns.csv": lambda path: tables.write(path.parent, "columns", [np.zeros(500, tables.ROW)], 500),
    "report.html": lambda path: report.write_report(path.parent, {"run": "r"}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > LIMIT_BYTES
