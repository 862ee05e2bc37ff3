"""From one image to everything that is known of it: columns, lattices, strain, phases, polarisation, defects.

Each step stands for itself: one that fails leaves its reason and takes only what rests on it along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, StemloopError
from stemloop.core.protocols import PixelSize
from stemloop.core.structure import Assignment, Columns, Defect
from stemloop.describe import find_columns
from stemloop.describe.defects import find_defects
from stemloop.describe.finding.scale import WIDEST
from stemloop.describe.lattices import assign
from stemloop.describe.materials import Calibration, check_pixel_size
from stemloop.describe.phases import Phases, phases
from stemloop.describe.polar import Polar, polar, vortices, walls
from stemloop.describe.strain import Strain, strain_of

T = TypeVar("T")

FINDERS = ("classical", "network")
#: A larger share of pixels at the brightest value is called saturated.
_SATURATED = 1e-3


@dataclass(frozen=True)
class Wanted:
    """What is asked of an image.

    finder : ``classical`` or ``network``. material : name of a candidate, or None to search all of them.
    """

    finder: str = "classical"
    material: str | None = None


@dataclass(frozen=True)
class Understood:
    """What is known of one image. What could not be had is None or empty, and ``left_out`` says why.

    shape : (rows, columns). notes : what a reader of the result must know of the image. left_out : (part, reason) of
    each step that gave nothing.
    """

    shape: tuple[int, int]
    columns: Columns
    assignment: Assignment | None = None
    calibration: Calibration | None = None
    strain: Strain | None = None
    phases: Phases | None = None
    polar: Polar | None = None
    defects: tuple[Defect, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


class _Steps:
    """Carries out the steps and keeps what went wrong."""

    def __init__(self) -> None:
        self.left_out: list[tuple[str, str]] = []

    def __call__(self, part: str, step: Callable[[], T], *needs: Any) -> T | None:
        if any(need is None for need in needs):
            return None
        try:
            return step()
        except StemloopError as error:
            self.left_out.append((part, str(error)))
        except (ArithmeticError, LookupError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())[:160]
            self.left_out.append((part, f"this step failed on this image ({type(error).__name__}: {said})."))
        return None


def finder(name: str) -> Callable[..., Columns]:
    """The column finder of that name."""
    if name == "classical":
        return find_columns
    if name == "network":
        from stemloop.describe import network

        return network.find_columns
    raise InputError(f"no column finder is called {name!r}; known: {', '.join(FINDERS)}.")


def understand(
    image: NDArray[Any], pixel_size: PixelSize, wanted: Wanted, variance: NDArray[Any] | None = None
) -> Understood:
    """Everything that is known of ``image`` (rows, columns), whose noise has the ``variance`` (rows, columns), if that
    is known; the network does not ask for it.

    Raises
    ------
    InputError : no columns can be looked for in it (not finite, constant, too small); nothing is known then.
    """
    pixels = np.asarray(image)
    nanometres = None if pixel_size.value_m is None else 1e9 * pixel_size.value_m
    if wanted.finder == "classical":
        columns = find_columns(pixels, nanometres, variance=variance)
    else:
        columns = finder(wanted.finder)(pixels, nanometres)
    shape = (int(pixels.shape[0]), int(pixels.shape[1]))
    notes = _notes(pixels)
    if len(columns) == 0:
        nothing = (
            f"no atom column was found: nothing of up to {WIDEST:g} px (1 sigma) stands out in the image; "
            "where columns are wider, take the mean of 2 x 2 pixels or more first."
        )
        return Understood(shape, columns, notes=(*notes, nothing))
    steps = _Steps()
    assignment = steps("lattices", lambda: assign(columns, shape))
    grains = assignment if assignment is not None and assignment.grains else None
    if assignment is not None and grains is None:
        notes.append("the columns form no lattice; strain, phases and defects of a lattice are not looked for.")
    calibration = steps("calibration", lambda: _calibrated(grains, pixel_size, wanted.material), grains)
    strain = steps("strain", lambda: strain_of(columns, _there(grains)), grains)
    classes = steps("phases", lambda: phases(columns, _there(grains)), grains)
    vectors = steps("polarisation", lambda: polar(columns, _there(grains)), grains)
    found: list[Defect] = []
    found += steps("defects", lambda: find_defects(columns, _there(grains), shape), grains) or ()
    found += steps("domain walls", lambda: walls(_there(vectors)), vectors) or ()
    found += steps("vortices", lambda: vortices(_there(vectors)), vectors) or ()
    return Understood(
        shape,
        columns,
        assignment,
        calibration,
        strain,
        classes,
        vectors,
        tuple(found),
        tuple(notes),
        tuple(steps.left_out),
    )


def _there(value: T | None) -> T:
    assert value is not None
    return value


def _calibrated(assignment: Assignment | None, pixel_size: PixelSize, material: str | None) -> Calibration:
    return check_pixel_size(_there(assignment), pixel_size, None if material is None else [material])


def _notes(pixels: NDArray[Any]) -> list[str]:
    """What the pixels themselves tell of the image."""
    top = pixels.max()
    share = float(np.count_nonzero(pixels == top)) / pixels.size
    if share > _SATURATED and top > pixels.min():
        return [
            f"{100 * share:.2g} % of the pixels have the highest value: the image is saturated, and the brightness and "
            "places of its brightest columns are less certain than their deviations say."
        ]
    return []
