"""Physical constants and the electron optics that needs nothing but arithmetic. SI unless a name says otherwise."""

from __future__ import annotations

import math

ELEMENTARY_CHARGE_C = 1.602176634e-19
PLANCK_J_S = 6.62607015e-34
SPEED_OF_LIGHT_M_S = 299792458.0
ELECTRON_MASS_KG = 9.1093837139e-31

ANGSTROM_M = 1e-10


def wavelength_m(energy_eV: float) -> float:
    """Relativistic electron wavelength [m] at the kinetic energy ``energy_eV`` [eV, > 0].

    lambda = h / sqrt(2 m e V (1 + e V / (2 m c^2))); L. Reimer and H. Kohl, *Transmission Electron Microscopy*
    (2008), doi:10.1007/978-0-387-40093-8.

    >>> round(wavelength_m(80e3) * 1e12, 3)
    4.176
    """
    kinetic_J = ELEMENTARY_CHARGE_C * energy_eV
    rest_J = ELECTRON_MASS_KG * SPEED_OF_LIGHT_M_S**2
    return PLANCK_J_S / math.sqrt(2 * ELECTRON_MASS_KG * kinetic_J * (1 + kinetic_J / (2 * rest_J)))


def probe_fwhm_m(energy_eV: float, semiangle_rad: float, source_fwhm_m: float = 0.0) -> float:
    """Full width at half maximum [m] of a focused, aberration-free probe with a Gaussian source added in quadrature.

    The Airy disc of a round aperture has FWHM = 0.5145 lambda / alpha (its intensity (2 J1(u)/u)^2 falls to one half
    at u = 1.61634, and u = 2 pi alpha r / lambda).

    >>> round(probe_fwhm_m(80e3, 0.030) * 1e12, 1)
    71.6
    """
    airy = 2 * 1.616339948 / (2 * math.pi) * wavelength_m(energy_eV) / semiangle_rad
    return math.hypot(airy, source_fwhm_m)


def electrons(current_A: float, dwell_s: float) -> float:
    """Mean number of electrons that arrive in ``dwell_s`` [s] at ``current_A`` [A].

    >>> round(electrons(100e-12, 1e-3))
    624151
    """
    return current_A * dwell_s / ELEMENTARY_CHARGE_C
