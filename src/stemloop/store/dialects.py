"""One HDF5 file in five dialects, by attributes and hard links alone; there is one copy of the bytes.

NeXus (``/entry``, an NXentry by the application definition NXem, with one NXdata a stream and NXlogs of the state),
EMD 1.0 of emdfile and py4DSTEM (``emd_group_type`` ``root`` and ``array``; two-element ``dim0`` ...), NCEM's EMD 0.2
(``/ncem``, ``emd_group_type`` 1, ``dim1`` ...) and NSID of pyNSID (seven attributes and dimension scales).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from stemloop.core.errors import InputError
from stemloop.core.signal import Axis

_NSID_VERSION = "0.0.7.2"
_DATA_TYPES = {1: "LINE_PLOT", 2: "SPECTRAL_IMAGE", 3: "IMAGE_STACK", 4: "IMAGE_4D"}
_SPATIAL = ("m", "nm", "um", "pm", "Å", "A")
_RECIPROCAL = ("rad", "mrad", "1/nm", "1/m", "1/A", "1/Å")
_ENERGY = ("eV", "keV")


def begin(file: h5py.File, run: Mapping[str, Any]) -> None:
    """The root, the entry and what is known of the run."""
    file.attrs.update(NX_class="NXroot", default="entry", creator="stemloop")
    file.attrs.update(emd_group_type="file", version_major=1, version_minor=0)
    file.attrs.update(authoring_program="stemloop", authoring_user="", UUID=str(run.get("id", "")))
    entry = file.create_group("entry")
    entry.attrs.update(NX_class="NXentry", emd_group_type="root", python_class="Root")
    entry["definition"] = "NXem"
    entry["title"] = str(run.get("title", ""))
    entry["start_time"] = str(run.get("start_time") or time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    entry["run"] = json.dumps(run, sort_keys=True)
    sample = run.get("sample")
    if isinstance(sample, Mapping):
        group = entry.create_group("sampleID")
        group.attrs["NX_class"] = "NXsample"
        for key in ("is_simulation", "preparation_date", "atom_types", "name"):
            if isinstance(sample.get(key), (str, bool)):
                group[key] = sample[key]
    entry.create_group("frames").attrs["NX_class"] = "NXcollection"
    file.create_group("ncem")


def log(file: h5py.File, name: str, record: Mapping[str, Any]) -> None:
    """A time series of the state or of a sensor as an NXlog: ``time`` [s] after ``start``, ``value``, ``unit``."""
    times, values = np.asarray(record["time"], np.float64), np.asarray(record["value"], np.float64)
    if times.ndim != 1 or len(times) != len(values):
        raise InputError(f"the log {name!r} has {times.shape} times and {values.shape} values; give one value a time.")
    instrument = file["entry"].require_group("instrument")
    instrument.attrs["NX_class"] = "NXinstrument"
    group = instrument.create_group(name)
    group.attrs["NX_class"] = "NXlog"
    group["time"], group["value"] = times, values
    group["time"].attrs["units"] = "s"
    if record.get("start"):
        group["time"].attrs["start"] = str(record["start"])
    if record.get("unit"):
        group["value"].attrs["units"] = str(record["unit"])
    if record.get("description"):
        group["description"] = str(record["description"])


def describe(file: h5py.File, name: str, data: h5py.Dataset, axes: list[Axis], run: Mapping[str, Any]) -> None:
    """Make ``data``, with one axis a dimension, a thing that each dialect knows."""
    group = data.parent
    group.attrs.update(NX_class="NXdata", signal="data", emd_group_type="array", python_class="Array")
    group["title"] = name
    group.attrs["axes"] = [axis.name for axis in axes]
    simulated = isinstance(run.get("sample"), Mapping) and run["sample"].get("is_simulation") is True
    data.attrs.update(
        units="counts",
        long_name=name,
        title=name,
        quantity="intensity",
        main_data_name=name,
        pyNSID_version=_NSID_VERSION,
        data_type=_data_type(axes),
        modality="STEM",
        source="simulation" if simulated else "electron microscope",
    )
    ncem = file["ncem"].create_group(name)
    ncem.attrs["emd_group_type"] = 1
    ncem["data"] = data
    for i, axis in enumerate(axes):
        unit = axis.unit or "1"  # pyNSID takes no empty one
        values = group.create_dataset(axis.name, data=axis.values)
        values.attrs.update(units=unit, name=axis.name, long_name=axis.name, quantity=axis.name)
        values.attrs["dimension_type"] = _dimension_type(axis)
        values.make_scale(axis.name)
        data.dims[i].attach_scale(values)
        data.dims[i].label = axis.name
        group.attrs[f"{axis.name}_indices"] = i
        ncem[f"dim{i + 1}"] = values
        ends = group.create_dataset(f"dim{i}", data=axis.offset + axis.scale * np.arange(2.0))
        ends.attrs.update(name=axis.name, units=unit)


def _data_type(axes: list[Axis]) -> str:
    if axes[-1].name == "energy_loss":
        return "SPECTRAL_IMAGE" if len(axes) > 1 else "SPECTRUM"
    return _DATA_TYPES.get(len(axes), "UNKNOWN")


def _dimension_type(axis: Axis) -> str:
    for units, kind in ((_SPATIAL, "SPATIAL"), (_RECIPROCAL, "RECIPROCAL"), (_ENERGY, "SPECTRAL")):
        if axis.unit in units:
            return kind
    return "TEMPORAL" if axis.name == "frame" else "SPATIAL" if axis.unit == "px" else "UNKNOWN"
