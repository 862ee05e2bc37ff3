"""Energy-loss spectra to one number each: the counts of a core-loss edge above its background.

R. F. Egerton, *Electron Energy-Loss Spectroscopy in the Electron Microscope* (2011),
doi:10.1007/978-1-4419-9583-4, chapter 4.4 (background subtraction and its error).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Scalarizer
from stemloop.core.registry import Registry

Array = NDArray[np.float64]

SCALARIZERS: Registry[Scalarizer] = Registry("scalarizer")

#: Weak normal prior (mean, deviation) of the background's exponent, which lies between about 2 and 6 (Egerton 4.4.1).
#: It speaks only where a spectrum has so few counts that it cannot say its exponent itself.
EXPONENT = (4.0, 2.0)
#: Channels over which a detector's point spread may correlate neighbouring noise.
SPREAD_CHANNELS = 4


def energy_axis(calibration: dict[str, Any], size: int) -> Array:
    """Energy loss [eV] (size,) of the channels, from ``calibration["energy_loss"] = (offset, scale, size)`` [eV]."""
    try:
        offset, scale, channels = calibration["energy_loss"]
    except (KeyError, TypeError, ValueError):
        raise InputError('spectra need calibration["energy_loss"] = (offset, scale, size) in eV.') from None
    if int(channels) != size:
        raise InputError(
            f"the energy axis has {channels} channels and the spectra {size}: give the axis they came with."
        )
    if not (np.isfinite(offset) and np.isfinite(scale) and scale > 0):
        raise InputError(f"the energy axis needs a finite offset and a scale above zero; got {offset!r}, {scale!r} eV.")
    return np.asarray(offset + scale * np.arange(size), dtype=np.float64)


@dataclass(frozen=True)
class PowerLaw:
    """Backgrounds ``A E^-r`` of ``n`` spectra, each as its total in the fit window and its exponent.

    total : (n,) counts in the fit window, > 0. exponent : (n,) r. log_energy : (k,) log E of the fit window.
    ``total`` and ``exponent`` are uncorrelated, with variances ``dispersion * total`` and ``exponent_variance``
    (n,) * ``dispersion``.
    """

    total: Array
    exponent: Array
    exponent_variance: Array
    log_energy: Array

    @classmethod
    def fit(cls, counts: Array, energy_eV: Array) -> PowerLaw:
        """Fit (n, k) ``counts`` at ``energy_eV`` (k,) by maximum (quasi-)likelihood for Poisson noise.

        With the total given, the counts are multinomial over ``p(E) ~ E^-r``, whose log likelihood is concave in r:
        Newton's method on ``sum (y - b) log E = 0`` finds it. No logarithm of a count is taken, so zeros and negative
        counts (of a subtracted dark reference) do no harm.
        """
        log_energy = np.log(energy_eV)
        t = log_energy - log_energy.mean()
        middle, width = EXPONENT
        total = np.maximum(counts.sum(axis=1), 0.5)
        moment = counts @ t
        r = np.full(len(counts), middle)
        for _ in range(30):
            p = np.exp(-r[:, None] * t)
            p /= p.sum(axis=1, keepdims=True)
            mean = p @ t
            information = total * (p @ t**2 - mean**2) + width**-2
            step = np.clip((total * mean - moment - (r - middle) / width**2) / information, -2.0, 2.0)
            r = np.clip(r + step, 0.0, 12.0)
            if np.abs(step).max(initial=0.0) < 1e-10:
                break
        return cls(total, r, 1.0 / information, log_energy)

    def at(self, energy_eV: Array) -> Array:
        """The background (n, m) [counts] at ``energy_eV`` (m,)."""
        t = self.log_energy - self.log_energy.mean()
        norm = np.exp(-self.exponent[:, None] * t).sum(axis=1, keepdims=True)
        return (
            self.total[:, None] / norm * np.exp(-self.exponent[:, None] * (np.log(energy_eV) - self.log_energy.mean()))
        )

    def integral(self, energy_eV: Array) -> tuple[Array, Array]:
        """Sum over ``energy_eV`` (m,) and its variance a unit of dispersion, (n,) each.

        ``var = B^2/total + (dB/dr)^2 var(r)`` with ``dB/dr = -sum b (log E - <log E>)`` and ``<>`` the mean over the
        fitted window; Egerton's ``h`` is ``1 + var / B`` (4.4.4).
        """
        inside = self.at(np.exp(self.log_energy))
        centre = inside @ self.log_energy / self.total
        b = self.at(energy_eV)
        total = b.sum(axis=1)
        slope = b @ np.log(energy_eV) - total * centre
        return total, total**2 / self.total + slope**2 * self.exponent_variance


def dispersion(counts: Array, model: Array) -> float:
    """Variance of summed counts over that of a counting detector, from residuals (n, k) about a fitted ``model``.

    1 for single electrons. A recorded detector has a gain, a readout noise and a point spread that correlates
    neighbours; the three together are the long-run variance of the residuals ``(y - b)/sqrt(b)``: their
    autocovariances up to :data:`SPREAD_CHANNELS`, pooled over the spectra, with the weights of W. K. Newey and
    K. D. West, Econometrica 55 (1987) 703, doi:10.2307/1913610. Two fitted parameters a spectrum are allowed for.
    """
    n, k = counts.shape
    residual = (counts - model) / np.sqrt(np.maximum(model, 1.0))
    power = float(np.vdot(residual, residual))
    for lag in range(1, SPREAD_CHANNELS + 1):
        weight = 1.0 - lag / (SPREAD_CHANNELS + 1)
        power += 2.0 * weight * float(np.vdot(residual[:, lag:], residual[:, :-lag]))
    return max(power / (n * (k - 2)), 0.0)


@dataclass(frozen=True)
class EdgeIntegral:
    """Counts of one core-loss edge: the sum over ``edge_eV`` to ``edge_eV + width_eV`` less a power-law background.

    background_eV : (from, to) [eV], the window before the edge in which ``A E^-r`` is fitted.

    Called with spectra (n, channels) and a calibration with ``energy_loss`` (offset, scale, size) [eV] it returns the
    counts (n,) and their 1-sigma deviation (n,)::

        sigma^2 = dispersion * (gross + var(background))

    (Egerton 4.4.4), so the doubt of the extrapolated background is part of it. ``dispersion`` is 1 where the
    calibration says ``counting: True`` (each count is one electron); else it is found by :func:`dispersion` from all
    spectra of the call together.
    """

    edge_eV: float
    width_eV: float
    background_eV: tuple[float, float]
    unit: str = "counts"

    def __post_init__(self) -> None:
        low, high = self.background_eV
        if not (0 < low < high <= self.edge_eV and self.width_eV > 0):
            raise InputError(
                f"an edge integral needs 0 < background from < to <= edge and a width above zero [eV]; got {self}."
            )

    def __call__(self, frames: NDArray[Any], calibration: dict[str, Any]) -> tuple[Array, Array]:
        spectra = np.asarray(frames, dtype=np.float64)
        if spectra.ndim != 2:
            raise InputError(f"spectra have the shape (n, channels); got {spectra.shape}.")
        if bad := np.flatnonzero(~np.isfinite(spectra).all(axis=1)).tolist():
            raise InputError(
                f"spectra {bad[:8]} hold values that are not finite: leave them out or measure them again."
            )
        energy = energy_axis(calibration, spectra.shape[1])
        before = self._window(energy, *self.background_eV, channels=8)
        edge = self._window(energy, self.edge_eV, self.edge_eV + self.width_eV, channels=1)
        if len(spectra) == 0:
            return np.empty(0), np.empty(0)
        background = PowerLaw.fit(spectra[:, before], energy[before])
        under, under_variance = background.integral(energy[edge])
        gross = spectra[:, edge].sum(axis=1)
        scale = 1.0
        if not calibration.get("counting", False):
            scale = dispersion(spectra[:, before], background.at(energy[before]))
        # a window without a count still has the Poisson doubt of what the background foretells there, or of one count
        counted = np.maximum(np.maximum(gross, under), 1.0)
        return gross - under, np.sqrt(scale * (counted + under_variance))

    @staticmethod
    def _window(energy: Array, low: float, high: float, *, channels: int) -> slice:
        step = energy[1] - energy[0] if len(energy) > 1 else 0.0
        first, last = np.searchsorted(energy, (low, high))
        if energy[0] > low or energy[-1] + step < high or last - first < channels:
            raise InputError(
                f"the window {low:g}-{high:g} eV needs at least {channels} channels inside the spectrum, which covers "
                f"{energy[0]:g}-{energy[-1]:g} eV in steps of {step:g} eV."
            )
        return slice(int(first), int(last))


@dataclass(frozen=True)
class RelativeThickness:
    """Thickness in inelastic mean free paths, ``t / lambda = ln(I_t / I_0)``, from a low-loss spectrum.

    ``I_0`` are the counts within ``zero_loss_eV`` of no loss, ``I_t`` those from there to the end of the spectrum
    (T. Malis et al., J. Electron Microsc. Tech. 8, 193 (1988), doi:10.1002/jemt.1060080206). With independent Poisson
    counts ``sigma^2 = 1 / I_0 - 1 / I_t``; ``floor`` is added in quadrature for where the two peaks were parted.

    >>> spectrum = np.array([[0.0, 100.0, 0.0, 71.8281828, 100.0]])
    >>> value, _ = RelativeThickness(zero_loss_eV=5.0)(spectrum, {"energy_loss": (-10.0, 10.0, 5)})
    >>> value.round(6).tolist()
    [1.0]
    """

    zero_loss_eV: float = 5.0
    floor: float = 2e-3
    unit: str = "mfp"

    def __call__(self, frames: NDArray[Any], calibration: dict[str, Any]) -> tuple[Array, Array]:
        spectra = np.asarray(frames, dtype=np.float64)
        energy = energy_axis(calibration, spectra.shape[-1])
        first, last = np.searchsorted(energy, (-self.zero_loss_eV, self.zero_loss_eV))
        if energy[0] > -self.zero_loss_eV or last >= len(energy) or first == last:
            raise InputError(
                f"the thickness needs the loss of +-{self.zero_loss_eV:g} eV and beyond; the spectrum covers "
                f"{energy[0]:g}-{energy[-1]:g} eV."
            )
        unscattered = np.maximum(spectra[:, first:last].sum(axis=1), 1.0)
        all_of_it = np.maximum(spectra[:, first:].sum(axis=1), unscattered)
        return np.log(all_of_it / unscattered), np.sqrt(1 / unscattered - 1 / all_of_it + self.floor**2)


SCALARIZERS.register("Ti-L23")(EdgeIntegral(edge_eV=454.0, width_eV=16.0, background_eV=(405.0, 450.0)))
SCALARIZERS.register("O-K")(EdgeIntegral(edge_eV=528.0, width_eV=30.0, background_eV=(485.0, 524.0)))
SCALARIZERS.register("thickness")(RelativeThickness())
