"""Electrons through atoms: CBED patterns by multislice, at any position of a field.

abTEM gives the physics: the projected potentials of the whole field (J. Madsen and T. Susi, Open Research Europe 1:24
(2021), doi:10.12688/openreseurope.13015.2; parametrisation of I. Lobato and D. Van Dyck, Acta Cryst. A70, 636 (2014),
doi:10.1107/S205327331401643X). They become transmission functions once; a pattern then needs only a window of them,
a probe and a few Fourier transforms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyfftw  # type: ignore[import-untyped]
import scipy.fft
from abtem import Potential, config
from abtem.antialias import antialias_aperture
from abtem.core.energy import energy2sigma
from ase import Atoms
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.simulate.crystals import CRYSTALS, vibrating
from stemloop.simulate.specimens import MARGIN_A, SAMPLING_A, Sample

Complex = NDArray[np.complex64]

# abTEM measures which transform is fastest, and what is fastest rounds differently from run to run
config.set({"fftw.planning_effort": "FFTW_ESTIMATE"})

#: Window of a pattern [A]; its inverse is the pixel of the diffraction pattern.
WINDOW_A = 32.0
#: Rows and columns of a pattern: +-1 / A.
CBED_PIXELS = 64
#: Aberrations beyond defocus [m]: C12a, C12b, C21a, C21b, C23a, C23b, C30.
Aberrations = tuple[float, ...]
#: Standard deviation of a Gaussian in full widths at half maximum.
FWHM_TO_SIGMA = 1 / (2 * math.sqrt(2 * math.log(2)))


def camera(energy_eV: float) -> Camera:
    """The camera that records the patterns of :class:`Scattering` at ``energy_eV`` [eV]: 64 x 64 pixels of
    wavelength / 32 A, the undiffracted beam at (32, 32)."""
    pixel_rad = wavelength_m(energy_eV) / (WINDOW_A * ANGSTROM_M)
    return Camera((CBED_PIXELS, CBED_PIXELS), pixel_rad, (CBED_PIXELS / 2, CBED_PIXELS / 2))


def phase_error(theta_y: NDArray[Any], theta_x: NDArray[Any], C10_m: float, aberrations: Aberrations) -> NDArray[Any]:
    """Path difference [m] of the probe at the angles ``theta_y``, ``theta_x`` [rad]; chi is 2 pi / lambda times this.

    C10 t^2 / 2 + |C12| t^2 cos 2(p - p12) / 2 + |C21| t^3 cos(p - p21) / 3 + |C23| t^3 cos 3(p - p23) / 3 + C30 t^4 / 4
    with t, p the angle and its azimuth from +x towards +y (see :class:`stemloop.core.instruction.Optics`).
    """
    omega = theta_x + 1j * theta_y
    squared = np.abs(omega) ** 2
    path = C10_m * squared / 2
    if any(aberrations):
        C12, C21, C23 = (complex(a, -b) for a, b in zip(aberrations[0:6:2], aberrations[1:6:2], strict=True))
        path = path + (C12 * omega**2).real / 2 + squared * (C21 * omega).real / 3 + (C23 * omega**3).real / 3
        path = path + aberrations[6] * squared**2 / 4
    return np.asarray(path)


def transmission(atoms: Atoms, energy_eV: float, sampling_A: float, slice_A: float, band_limit: bool = True) -> Complex:
    """Transmission functions (slices, y, x) of ``atoms`` in their periodic cell at ``energy_eV`` [eV].

    ``exp(i sigma V)`` of the infinitely projected potential ``V`` of each slice, held below 2/3 of the Nyquist
    frequency. The cell must be a whole number of ``sampling_A`` wide and of ``slice_A`` thick.
    """
    width, height, thickness = atoms.cell.lengths()
    gpts = tuple(round(extent / sampling_A) for extent in (width, height))
    for extent, points in zip((width, height), gpts, strict=True):
        if abs(extent / sampling_A - points) > 1e-3:
            raise InputError(f"the cell is {extent:g} A wide, no whole number of {sampling_A:g} A; choose one that is.")
    slices = max(1, round(thickness / slice_A))
    periodic = atoms.copy()
    periodic.pbc = True
    potential = Potential(
        periodic,
        gpts=gpts,
        slice_thickness=(thickness / slices,) * slices,
        projection="infinite",
        parametrization="lobato",
    ).build(lazy=False)
    phase = np.ascontiguousarray(np.swapaxes(potential.array, 1, 2)) * np.float32(energy2sigma(energy_eV))
    waves = np.empty(phase.shape, np.complex64)
    np.cos(phase, out=waves.real)
    np.sin(phase, out=waves.imag)
    if band_limit:
        aperture = antialias_aperture(waves.shape[1:], (sampling_A, sampling_A), np).astype(np.float32)
        for wave in waves:
            spectrum = scipy.fft.fft2(wave, workers=1)
            spectrum *= aperture
            wave[:] = scipy.fft.ifft2(spectrum, overwrite_x=True, workers=1)
    return waves


class Scattering:
    """What a specimen does to a focused beam of one energy, ready for any position.

    Parameters
    ----------
    specimen : a :class:`~stemloop.simulate.specimens.Sample` (positions count from its field's corner), or
        :class:`ase.Atoms` in a periodic cell (positions count from the cell's corner, the window wraps around).
    energy_eV : beam energy [eV].
    phonons : (number, seed) of frozen-phonon configurations, or None for atoms at rest. The points of a finite
        source take the configurations in turn.
    source_points : points of the quadrature over a finite source. Points at the corners of a regular polygon of radius
        sqrt(2) sigma have the covariance of the Gaussian from 3 points on.
    sampling_A, window_A, slice_A : real-space grid [A]; the defaults give the camera's grid.
    band_limit : False keeps frequencies above 2/3 Nyquist (for tests of conservation).

    On the default grid (scattering up to 1.3 / A) patterns of the monolayers agree with those of a grid twice as fine
    to better than 1 % (sum of absolute differences below 0.9 / A); ten cells of SrTiO3 differ from the converged
    intensities by about 13 %, while their second-order discs' centres move by 0.03 pixels (rms).
    One object serves one thread: its buffers are reused.
    """

    def __init__(
        self,
        specimen: Sample | Atoms,
        energy_eV: float,
        phonons: tuple[int, int] | None = None,
        *,
        source_points: int = 3,
        sampling_A: float = SAMPLING_A,
        window_A: float = WINDOW_A,
        slice_A: float | None = None,
        band_limit: bool = True,
    ) -> None:
        self.energy_eV = energy_eV
        self.source_points = source_points
        self.sampling_A = sampling_A
        self._wavelength_A = wavelength_m(energy_eV) / ANGSTROM_M
        self._n = round(window_A / sampling_A)
        if isinstance(specimen, Sample):
            self._origin_A, self._wraps = MARGIN_A, False
            atoms, slice_A = specimen.atoms, slice_A or specimen.crystal.slice_A
            vibration_A = specimen.crystal.vibration_A
        else:
            self._origin_A, self._wraps = 0.0, True
            atoms, slice_A = specimen, slice_A or 2.0
            vibration_A = {s: rms for crystal in CRYSTALS.values() for s, rms in crystal.vibration_A.items()}
        thickness = atoms.cell.lengths()[2]
        self.slice_A = thickness / max(1, round(thickness / slice_A))
        self._transmissions = []
        for number in range(phonons[0] if phonons else 1):
            shaken = atoms.copy()
            if phonons:
                shaken.positions = vibrating(atoms, vibration_A, np.random.default_rng([phonons[1], number]))
            self._transmissions.append(transmission(shaken, energy_eV, sampling_A, self.slice_A, band_limit))
        self._k = np.fft.fftfreq(self._n, sampling_A)
        self._band = (
            antialias_aperture((self._n, self._n), (sampling_A, sampling_A), np).astype(np.float32)
            if band_limit
            else np.ones((self._n, self._n), np.float32)
        )
        self._exit_band = self._band / np.float32(self._n**2)  # undoes the transforms' factor
        kept = np.arange(-CBED_PIXELS // 2, CBED_PIXELS // 2) % self._n
        self._kept = np.ix_(kept, kept)
        self._wave = pyfftw.empty_aligned((self._n, self._n), "complex64")
        # estimated plans are the same in every run, measured ones are not; both transforms are unnormalised
        plan = functools.partial(pyfftw.FFTW, self._wave, self._wave, axes=(0, 1), flags=("FFTW_ESTIMATE",), threads=1)
        self._to_specimen, self._to_camera = plan(direction="FFTW_BACKWARD"), plan(direction="FFTW_FORWARD")
        self._probe = functools.lru_cache(maxsize=8)(self._make_probe)
        self._ring = functools.lru_cache(maxsize=8)(self._make_ring)
        self._propagator = functools.lru_cache(maxsize=8)(self._make_propagator)

    @property
    def configurations(self) -> int:
        """Number of frozen-phonon configurations."""
        return len(self._transmissions)

    def cbed(
        self,
        position_m: tuple[float, float],
        semiangle_rad: float,
        C10_m: float = 0.0,
        tilt_rad: tuple[float, float] = (0.0, 0.0),
        source_fwhm_m: float = 0.0,
        aberrations: Aberrations = (),
    ) -> NDArray[np.float32]:
        """The pattern (64, 64) of a probe at ``position_m`` (y, x) [m]: the fraction of the beam in each pixel.

        Parameters
        ----------
        semiangle_rad : convergence semiangle [rad]. C10_m : defocus with ``chi = pi / lambda C10 theta^2`` [m].
        tilt_rad : specimen tilt (y, x) [rad]: the zone axis leans towards +y, +x along the beam.
        source_fwhm_m : full width at half maximum of the Gaussian source at the specimen [m].
        aberrations : those beyond defocus, or none.
        """
        total = np.zeros((CBED_PIXELS, CBED_PIXELS), np.float32)
        for point, configuration in (source := list(self._source(position_m, source_fwhm_m))):
            wave = self.exit_spectrum(point, semiangle_rad, C10_m, tilt_rad, configuration, aberrations)[self._kept]
            total += wave.real**2 + wave.imag**2
        total /= len(source)
        return total

    def ring(
        self,
        position_m: tuple[float, float],
        ring_rad: tuple[float, float],
        semiangle_rad: float,
        C10_m: float = 0.0,
        tilt_rad: tuple[float, float] = (0.0, 0.0),
        source_fwhm_m: float = 0.0,
        aberrations: Aberrations = (),
    ) -> float:
        """The fraction of the beam that arrives between two angles [rad], the inner one included."""
        mask, total = self._ring(ring_rad), 0.0
        for point, configuration in (source := list(self._source(position_m, source_fwhm_m))):
            wave = self.exit_spectrum(point, semiangle_rad, C10_m, tilt_rad, configuration, aberrations)[mask]
            total += float(np.vdot(wave, wave).real)
        return total / len(source)

    @property
    def largest_rad(self) -> float:
        """The largest angle [rad] that the grid holds."""
        return self._wavelength_A / (3 * self.sampling_A)

    def _make_ring(self, ring_rad: tuple[float, float]) -> NDArray[np.bool_]:
        theta = self._wavelength_A * np.hypot(self._k[:, None], self._k)
        return np.asarray((theta >= ring_rad[0]) & (theta < ring_rad[1]))

    def _source(
        self, position_m: tuple[float, float], source_fwhm_m: float
    ) -> Iterator[tuple[tuple[float, float], int]]:
        """The points of the source at the specimen, and the configuration that each one sees."""
        if source_fwhm_m == 0.0:
            yield position_m, 0
            return
        radius = math.sqrt(2) * FWHM_TO_SIGMA * source_fwhm_m
        for i in range(self.source_points):
            angle = 2 * math.pi * (i + 0.25) / self.source_points
            point = (position_m[0] + radius * math.sin(angle), position_m[1] + radius * math.cos(angle))
            yield point, i % self.configurations

    def exit_spectrum(
        self,
        position_m: tuple[float, float],
        semiangle_rad: float,
        C10_m: float = 0.0,
        tilt_rad: tuple[float, float] = (0.0, 0.0),
        configuration: int = 0,
        aberrations: Aberrations = (),
    ) -> Complex:
        """The exit wave in the back focal plane (n, n), zero frequency first, of a coherent probe in one
        configuration. Its squared modulus sums to one where nothing was lost. The array is reused by the next call."""
        half = self._n // 2
        y, x = (p / ANGSTROM_M + self._origin_A for p in position_m)
        row, column = round(y / self.sampling_A) - half, round(x / self.sampling_A) - half
        slices = self._window(self._transmissions[configuration], row, column)
        k = 2j * np.pi * self._k
        shift_y = np.exp(-k * (y - row * self.sampling_A)).astype(np.complex64)
        shift_x = np.exp(-k * (x - column * self.sampling_A)).astype(np.complex64)
        wave, propagator = self._wave, self._propagator(tilt_rad)
        np.multiply(self._probe(semiangle_rad, C10_m, aberrations), shift_y[:, None], out=wave)
        wave *= shift_x
        self._to_specimen.execute()
        for piece in slices[:-1]:
            wave *= piece
            self._to_camera.execute()
            wave *= propagator
            self._to_specimen.execute()
        wave *= slices[-1]
        self._to_camera.execute()
        wave *= self._exit_band
        return wave

    def _window(self, slices: Complex, row: int, column: int) -> Complex:
        height, width = slices.shape[1:]
        rows, columns = slice(row, row + self._n), slice(column, column + self._n)
        if row >= 0 and column >= 0 and rows.stop <= height and columns.stop <= width:
            return slices[:, rows, columns]
        if not self._wraps:
            raise InputError(
                f"the window of {self._n * self.sampling_A:g} A around this position leaves the simulated specimen; "
                f"stay within {MARGIN_A - self._n * self.sampling_A / 2:g} A of the field."
            )
        wrapped = (np.arange(rows.start, rows.stop) % height, np.arange(columns.start, columns.stop) % width)
        return slices[:, wrapped[0][:, None], wrapped[1]]

    def _make_probe(self, semiangle_rad: float, C10_m: float, aberrations: Aberrations) -> Complex:
        """Aperture and aberrations in Fourier space; the edge pixels carry their share, as abTEM's soft aperture."""
        theta = self._wavelength_A * np.hypot(self._k[:, None], self._k)
        pixel = self._wavelength_A * self._k[1]
        if semiangle_rad < pixel:
            raise InputError(f"semiangle_rad {semiangle_rad:g} is below one pixel ({pixel:.2g} rad) of the simulation.")
        amplitude = np.clip((semiangle_rad - theta) / pixel + 0.5, 0.0, 1.0) * self._band
        chi = np.pi / self._wavelength_A * (C10_m / ANGSTROM_M) * theta**2
        if any(aberrations):
            angle = self._wavelength_A * self._k
            path_m = phase_error(angle[:, None], angle[None, :], 0.0, aberrations)
            chi = chi + 2 * np.pi / (self._wavelength_A * ANGSTROM_M) * path_m
        probe = amplitude * np.exp(-1j * chi)
        return np.asarray(probe / np.linalg.norm(probe), np.complex64)

    def _make_propagator(self, tilt_rad: tuple[float, float]) -> Complex:
        k_y, k_x = self._k[:, None], self._k[None, :]
        free = -np.pi * self._wavelength_A * self.slice_A * (k_y**2 + k_x**2)
        lean = 2 * np.pi * self.slice_A * (k_y * math.tan(tilt_rad[0]) + k_x * math.tan(tilt_rad[1]))
        return np.asarray(np.exp(1j * (free + lean)) * self._exit_band, np.complex64)
