"""One sealed file, every reader of the field: equal pixels and equal calibrations in each of them.

Readers that are not installed are left out with a word; RosettaSciIO and h5py always are.
"""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from stemloop.core.protocols import Batch
from stemloop.core.signal import Axis
from stemloop.store import seal

SCAN = [Axis("y", 6, 1e-10, 0.0, "m"), Axis("x", 8, 2e-10, 1e-9, "m")]
CALIBRATIONS = {
    "cbed": {"pixel_rad": 1e-3, "centre_px": (16.0, 20.0), "scan": {"shape": (6, 8), "axes": SCAN}},
    "haadf": {"pixel_m": 2e-11},
    "eels": {"energy_loss": (100.0, 0.5, 64)},
}
RUN = {
    "id": "r-1",
    "title": "a run",
    "start_time": "2026-11-20T10:00:00+00:00",
    "sample": {"is_simulation": True, "atom_types": "Mo, S", "preparation_date": "2026-11-01T00:00:00+00:00"},
}
LOGS = {"stage_x": {"time": [0.0, 1.5], "value": [1e-9, 2e-9], "unit": "m", "start": "2026-11-20T10:00:00+00:00"}}
RNG = np.random.default_rng(0)
FRAMES = {
    "cbed": RNG.poisson(2.0, (48, 32, 40)).astype(np.uint16),
    "haadf": RNG.random((3, 20, 30)).astype(np.float32),
    "eels": RNG.poisson(9.0, (5, 64)).astype(np.uint32),
}
#: scale, offset and unit of the axes, without that of the frames' numbers
AXES = {
    "cbed": [(1e-10, 0.0, "m"), (2e-10, 1e-9, "m"), (1e-3, -0.016, "rad"), (1e-3, -0.020, "rad")],
    "haadf": [(1.0, 0.0, "1"), (2e-11, 0.0, "m"), (2e-11, 0.0, "m")],
    "eels": [(1.0, 0.0, "1"), (0.5, 100.0, "eV")],
}


def pixels(name):
    return FRAMES[name].reshape(6, 8, 32, 40) if name == "cbed" else FRAMES[name]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("matrix") / "run.h5"
    batches = [Batch(name, 0, frames) for name, frames in FRAMES.items()]
    seal(batches, path, run=RUN, calibrations=CALIBRATIONS, logs=LOGS)
    return str(path)


def check_axes(name, found):
    for (scale, offset, unit), (s, o, u) in zip(AXES[name], found, strict=True):
        assert s == pytest.approx(scale, rel=1e-9) and o == pytest.approx(offset, rel=1e-9, abs=1e-24)
        assert u == unit


@pytest.mark.parametrize("dialect", ["nexus", "emd"])
def test_rosettasciio(path, dialect):
    from rsciio import emd, nexus

    entries = nexus.file_reader(path, nxdata_only=True) if dialect == "nexus" else emd.file_reader(path)
    entries = {entry["metadata"]["General"]["title"]: entry for entry in entries}
    assert set(entries) == set(FRAMES)
    for name, entry in entries.items():
        np.testing.assert_array_equal(np.asarray(entry["data"]), pixels(name))
        check_axes(name, [(axis["scale"], axis["offset"], axis["units"] or "1") for axis in entry["axes"]])


def test_ncempy(path):
    emd = pytest.importorskip("ncempy.io.emd", reason="ncempy is not installed")
    with emd.fileEMD(path, readonly=True) as file:
        groups = {group.name.split("/")[-1]: group for group in file.list_emds}
        assert set(groups) == set(FRAMES)
        for name, group in groups.items():
            data, dims = file.get_emdgroup(group)
            np.testing.assert_array_equal(data, pixels(name))
            check_axes(name, [(d[0][1] - d[0][0], d[0][0], d[2].strip("[]")) for d in dims])


def test_emdfile(path, tmp_path):
    """In a fresh process, since emdfile walks through all modules that are loaded and breaks if that loads others."""
    pytest.importorskip("emdfile", reason="emdfile is not installed")
    code = (
        "import emdfile, json, sys, numpy as np\n"
        "root = emdfile.read(sys.argv[1], tree=True)\n"
        "for name in ('cbed', 'haadf', 'eels'):\n"
        "    array = root.tree(name)\n"
        "    np.save(f'{sys.argv[2]}/{name}.npy', array.data)\n"
        "    axes = [(float(d[1] - d[0]), float(d[0]), u) for d, u in zip(array.dims, array.dim_units)]\n"
        "    open(f'{sys.argv[2]}/{name}.json', 'w').write(json.dumps(axes))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in FRAMES:
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), pixels(name))
        check_axes(name, json.loads((tmp_path / f"{name}.json").read_text()))


def test_pynsid(path):
    hdf_utils = pytest.importorskip("pyNSID.io.hdf_utils", reason="pyNSID is not installed")
    with h5py.File(path) as file:
        mains = {data.parent.name.split("/")[-1]: data for data in hdf_utils.get_all_main(file)}
        for name in FRAMES:
            assert name in mains
            dataset = hdf_utils.read_h5py_dataset(mains[name])
            np.testing.assert_array_equal(np.asarray(dataset), pixels(name))
            axes = [dataset._axes[k] for k in range(len(dataset.shape))]
            check_axes(name, [(a.values[1] - a.values[0], a.values[0], a.units) for a in axes])


def test_h5py_without_plugins(path):
    """In a fresh process that cannot find any plugin, and by the numbers of the dimension scales."""
    code = (
        "import h5py, json, sys, numpy as np\n"
        "with h5py.File(sys.argv[1]) as f:\n"
        "    out = {n: [int(f['entry'][n]['data'][:].sum(dtype='f8')), list(f['entry'][n]['data'].shape)]\n"
        "           for n in ('cbed', 'haadf', 'eels')}\n"
        "assert 'hdf5plugin' not in sys.modules\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], env={"HDF5_PLUGIN_PATH": "/nowhere"}, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    with h5py.File(path) as file:
        for name in FRAMES:
            assert found[name] == [int(pixels(name).sum(dtype="f8")), list(pixels(name).shape)]
            data = file["entry"][name]["data"]
            np.testing.assert_array_equal(data[:], pixels(name))
            scales = [dim[0] for dim in data.dims]
            check_axes(name, [(s[1] - s[0], s[0], s.attrs["units"]) for s in scales])


def test_nxem_validator(path):
    """The validator of pynxtools, which carries the definitions. What the other dialects add is not documented in
    NXem, which NeXus allows; the validator is told so."""
    pytest.importorskip("pynxtools", reason="pynxtools is not installed")
    code = "import sys; from pynxtools.cli import pynx; pynx(['validate', '--ignore-undocumented', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "is valid according to the `NXem` application definition" in said and "ERROR" not in said, said
