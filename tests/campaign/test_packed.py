"""Results on the disk: what is read is what was written, and equal values are equal bytes."""

import io

import numpy as np
import pytest

from stemloop.campaign.images import packed, parquet
from stemloop.core.errors import InputError, IntegrityError
from stemloop.core.structure import Columns, Defect, Grain


def columns(n=3):
    rng = np.random.default_rng(0)
    return Columns(rng.random((n, 2)), rng.random((n, 2)), rng.random(n), rng.random(n), np.arange(n))


def test_dataclasses_come_back_as_they_were(tmp_path):
    value = (
        columns(),
        {"k": [1, 2.5, None, float("nan")], 7: ("a", True)},
        Defect("vacancy", np.array([[1.0, 2.0]]), 0.5, {"burgers": np.array([1.0, 0.0]), "site": np.int64(3)}),
        Grain(np.eye(2), np.eye(2), np.zeros(2), np.zeros((1, 2)), np.ones(1), np.ones(1)),
    )
    packed.write(tmp_path / "a.npz", value)
    found = packed.read(tmp_path / "a.npz")
    assert found[0].table().tobytes() == value[0].table().tobytes()
    assert found[1]["k"][:3] == [1, 2.5, None] and np.isnan(found[1]["k"][3]) and found[1][7] == ("a", True)
    assert isinstance(found[2], Defect) and found[2].detail["site"] == 3
    assert isinstance(found[3], Grain)
    packed.write(tmp_path / "b.npz", found)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    packed.write(tmp_path / "a.npz", columns())
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError):
        packed.read(tmp_path / "a.npz")
    tree = b'{"class": "subprocess:Popen", "fields": {"args": ["true"]}}'
    np.savez(tmp_path / "b.npz", tree=np.frombuffer(tree, np.uint8))
    with pytest.raises(IntegrityError):
        packed.read(tmp_path / "b.npz")
    with pytest.raises(TypeError):
        packed.write(tmp_path / "c.npz", object())


ROW = np.dtype([("frame", "<i8"), ("x", "<f8"), ("edge", "?"), ("narrow", "<i4"), ("single", "<f4")])


def rows(n, seed):
    rng = np.random.default_rng(seed)
    table = np.zeros(n, ROW)
    table["frame"], table["x"], table["edge"] = rng.integers(-9, 9, n), rng.normal(size=n), rng.random(n) < 0.5
    table["narrow"], table["single"] = rng.integers(0, 9, n), rng.random(n)
    if n:
        table["x"][0] = np.nan
    return table


@pytest.mark.parametrize("sizes", [[], [1], [7, 0, 1000], [3] * 40])
def test_parquet_tables_are_read_by_another_program(sizes):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out, parts = io.BytesIO(), [rows(n, k) for k, n in enumerate(sizes)]
    table = parquet.Table(out, ROW)
    for part in parts:
        table.add(part)
    table.close()
    found = pyarrow.read_table(io.BytesIO(out.getvalue()))
    whole = np.concatenate([np.zeros(0, ROW), *parts])
    assert found.num_rows == len(whole) and found.column_names == list(ROW.names)
    for name in ROW.names:
        np.testing.assert_array_equal(found[name].to_numpy(), whole[name])


def test_a_parquet_table_has_numbers_only():
    with pytest.raises(InputError):
        parquet.Table(io.BytesIO(), np.dtype([("word", "U3")]))
