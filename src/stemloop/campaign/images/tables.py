"""Atom columns as tables, and in the forms that AtomAI, atomap and ASE take."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.campaign.images import parquet
from stemloop.campaign.images.one_image import Understood
from stemloop.core.durable import write_whole, writing
from stemloop.core.errors import InputError
from stemloop.core.structure import Columns

#: One row of a table: names and numpy types, in order. Lengths are in pixels but for ``x_nm`` and ``y_nm``.
ROW = np.dtype(
    [
        ("frame", "<i8"),
        *((name, "<f8") for name in ("row", "col", "sigma_row", "sigma_col", "x_nm", "y_nm")),
        *((name, "<f8") for name in ("amplitude", "width", "background", "p_present")),
        *((name, "<i8") for name in ("sublattice", "grain", "cell_i", "cell_j", "site")),
        *((name, "<f8") for name in ("p_site", "ideal_row", "ideal_col", "displacement_row", "displacement_col")),
        *((name, "<f8") for name in ("sigma_displacement_row", "sigma_displacement_col")),
        ("boundary", "?"),
        *((name, "<f8") for name in ("e_xx", "e_yy", "e_xy", "rotation_rad")),
        ("phase", "<i8"),
        ("track", "<i8"),
    ]
)
#: A larger table is not written as text.
MOST_ROWS_AS_TEXT = 2_000_000


def table(
    found: Understood, pixel_m: float | None, frame: int = 0, track: NDArray[np.int64] | None = None
) -> NDArray[Any]:
    """(n,) structured array of :data:`ROW`: everything that is known of each column. What is not known is NaN, or -1
    where it is a number of something. ``pandas.DataFrame`` takes it as it is."""
    columns, n = found.columns, len(found.columns)
    rows = np.zeros(n, ROW)
    for name in ROW.names or ():
        rows[name] = np.nan if ROW[name].kind == "f" else False if ROW[name].kind == "b" else -1
    plain = columns.table()
    for name in plain.dtype.names or ():
        rows[name] = plain[name]
    rows["frame"] = frame
    if pixel_m is not None:
        rows["y_nm"], rows["x_nm"] = 1e9 * pixel_m * columns.position.T
    if (assigned := found.assignment) is not None and len(assigned) == n:
        rows["grain"], rows["site"], rows["boundary"] = assigned.grain, assigned.site, assigned.boundary
        rows["cell_i"], rows["cell_j"] = assigned.cell.T
        if assigned.p_site.size:
            rows["p_site"] = np.where(assigned.site >= 0, assigned.p_site.max(axis=1, initial=0.0), 0.0)
        for pair, values in (
            (("ideal_row", "ideal_col"), assigned.ideal),
            (("displacement_row", "displacement_col"), assigned.displacement),
            (("sigma_displacement_row", "sigma_displacement_col"), assigned.displacement_sigma),
        ):
            rows[pair[0]], rows[pair[1]] = values.T
    if found.strain is not None:
        for name, values in zip(("e_xx", "e_yy", "e_xy", "rotation_rad"), strain_arrays(found.strain), strict=True):
            rows[name] = values
    if found.phases is not None:
        rows["phase"] = found.phases.label
    if track is not None:
        rows["track"] = track
    return rows


def strain_arrays(strain: Any) -> tuple[NDArray[np.float64], ...]:
    """e_xx, e_yy, e_xy and the rotation [rad], each (n,)."""
    return strain.e_xx, strain.e_yy, strain.e_xy, strain.rotation


def write(folder: Path, name: str, parts: Iterable[NDArray[Any]], rows: int) -> list[str]:
    """Write ``name.parquet``, and ``name.csv`` where ``rows`` are not too many, from tables; what was written."""
    text = rows <= MOST_ROWS_AS_TEXT
    with contextlib.ExitStack() as files:
        binary_table = parquet.Table(files.enter_context(writing(folder / f"{name}.parquet")), ROW)
        lines = files.enter_context(writing(folder / f"{name}.csv")) if text else None
        if lines:
            lines.write((",".join(ROW.names or ()) + "\n").encode())
        for part in parts:
            binary_table.add(part)
            if lines:
                lines.writelines(line.encode() for line in _lines(part))
        binary_table.close()
    return [f"{name}.parquet", *([f"{name}.csv"] if text else [])]


def _lines(rows: NDArray[Any]) -> Iterable[str]:
    texts = []
    for name in ROW.names or ():
        kind = ROW[name].kind
        values = rows[name].tolist()
        if kind == "f":
            texts.append(["" if math.isnan(value) else f"{value:.9g}" for value in values])
        else:
            texts.append([str(int(value)) for value in values])
    return (",".join(row) + "\n" for row in zip(*texts, strict=True))


# ------------------------------------------------------------------------------------------------- for other programs


def to_atomai(frames: dict[int, Columns]) -> dict[int, NDArray[np.float64]]:
    """AtomAI's coordinates: frame number to (n, 3) of row, column [px] and class (here the sublattice)."""
    return {k: np.column_stack([c.position, c.sublattice.astype(float)]) for k, c in frames.items()}


def to_atomap(columns: Columns) -> list[NDArray[np.float64]]:
    """atomap's positions: for each sublattice, the brightest first, (n, 2) of (x, y) [px].
    ``atomap.api.Sublattice(positions, image)`` takes one."""
    return [columns.position[columns.sublattice == k][:, ::-1] for k in np.unique(columns.sublattice)]


def to_ase(found: Understood, pixel_m: float | None) -> Any:
    """The columns as flat ``ase.Atoms`` [angstrom]: x to the right, y up (so that it looks like the image), z = 0.

    Every column is an ``X``. The sublattice is the tag; amplitude, p_present and site are arrays. An
    :class:`InputError` where the size of a pixel is not known.
    """
    from ase import Atoms

    if pixel_m is None:
        raise InputError("the size of a pixel is not known, so there are no angstroms; give pixel_size_nm.")
    columns, step = found.columns, pixel_m * 1e10
    height, width = found.shape
    place = np.zeros((len(columns), 3))
    place[:, 0], place[:, 1] = columns.position[:, 1] * step, (height - 1 - columns.position[:, 0]) * step
    site = np.full(len(columns), -1) if found.assignment is None else found.assignment.site
    cell = [width * step, height * step, 10.0]
    atoms = Atoms(["X"] * len(columns), place, cell=cell, pbc=False, tags=columns.sublattice)
    atoms.set_array("amplitude", columns.amplitude)
    atoms.set_array("site", site.astype(int))
    if len(columns.p_present) == len(columns):
        atoms.set_array("p_present", columns.p_present)
    return atoms


def export(folder: Path, found: Understood, pixel_m: float | None) -> list[str]:
    """Write ``atoms_atomap.npz`` and, where the size of a pixel is known, ``atoms.extxyz``; what was written."""
    out = io.BytesIO()
    np.savez(out, **{f"sublattice_{k}": xy for k, xy in enumerate(to_atomap(found.columns))})  # type: ignore[arg-type]
    write_whole(folder / "atoms_atomap.npz", out.getvalue())
    written = ["atoms_atomap.npz"]
    if pixel_m is not None and len(found.columns):
        from ase.io import write as write_atoms

        text = io.StringIO()
        write_atoms(text, to_ase(found, pixel_m), format="extxyz")
        write_whole(folder / "atoms.extxyz", text.getvalue())
        written.append("atoms.extxyz")
    return written


def export_atomai(folder: Path, frames: Iterable[tuple[int, Columns]]) -> list[str]:
    """Write ``atoms_atomai.npz``: an entry a frame, named by its number; what was written."""
    out = io.BytesIO()
    coordinates = {str(k): to_atomai({k: columns})[k] for k, columns in frames}
    np.savez(out, **coordinates)  # type: ignore[arg-type]
    write_whole(folder / "atoms_atomai.npz", out.getvalue())
    return ["atoms_atomai.npz"]
