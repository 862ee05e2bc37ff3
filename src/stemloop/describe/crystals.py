"""Unit cells of the materials that are looked for in images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Atoms = list[tuple[str, float, float, float]]
Zones = dict[str, tuple[int, int, int]]

# Lattice constants [A] at room temperature.
# Elements and GaAs: CRC Handbook of Chemistry and Physics, 97th ed. (2016).
# MoS2, MoSe2: P. G. Bronsema et al., Z. Anorg. Allg. Chem. 540 (1986) 15, doi:10.1002/zaac.19865400904.
# WS2, WSe2: W. J. Schutte et al., J. Solid State Chem. 70 (1987) 207, doi:10.1016/0022-4596(87)90057-0.
# ZnO: U. Ozgur et al., J. Appl. Phys. 98 (2005) 041301, doi:10.1063/1.1992666.
# GaN: I. Vurgaftman and J. R. Meyer, J. Appl. Phys. 94 (2003) 3675, doi:10.1063/1.1600519.
# Rutile: J. K. Burdett et al., J. Am. Chem. Soc. 109 (1987) 3639, doi:10.1021/ja00246a021.
# Perovskites, graphene, hBN: as usually quoted, cubic or pseudo-cubic means but for PbTiO3 and BaTiO3; good to 0.3 %.
# LaMnO3 is the one with excess oxygen, as films have it (stoichiometric bulk: 3.94).
_PEROVSKITES = {
    "SrTiO3": (3.905, 3.905), "LaCoO3": (3.825, 3.825), "LaAlO3": (3.790, 3.790), "SrRuO3": (3.930, 3.930),
    "LaMnO3": (3.880, 3.880), "BiFeO3": (3.960, 3.960), "PbTiO3": (3.904, 4.152), "BaTiO3": (3.994, 4.038),
}  # fmt: skip
_CATIONS = {
    "SrTiO3": ("Sr", "Ti"), "LaCoO3": ("La", "Co"), "LaAlO3": ("La", "Al"), "SrRuO3": ("Sr", "Ru"),
    "LaMnO3": ("La", "Mn"), "BiFeO3": ("Bi", "Fe"), "PbTiO3": ("Pb", "Ti"), "BaTiO3": ("Ba", "Ti"),
}  # fmt: skip
_FCC = {
    "Au": 4.0782, "Pt": 3.9242, "Al": 4.0495, "Cu": 3.6149, "Ni": 3.5240, "Pd": 3.8907, "Ag": 4.0853, "Ir": 3.8390,
}  # fmt: skip
_BCC = {"Fe": 2.8665, "W": 3.1652, "Cr": 2.8848, "Mo": 3.1470}
_DIAMOND = {"Si": (5.4310, "Si", "Si"), "Ge": (5.6574, "Ge", "Ge"), "GaAs": (5.6533, "Ga", "As")}
_WURTZITE = {"ZnO": (3.2498, 5.2066, "Zn", "O"), "GaN": (3.189, 5.185, "Ga", "N")}
_SHEETS = {
    "MoS2": (3.1602, "Mo", "S"), "WS2": (3.1532, "W", "S"), "WSe2": (3.282, "W", "Se"), "MoSe2": (3.289, "Mo", "Se"),
}  # fmt: skip
_HONEYCOMBS = {"graphene": (2.461, "C", "C"), "hBN": (2.504, "B", "N")}
_RUTILE = {"TiO2": (4.594, 2.959, 0.305, "Ti")}
_CUBIC_ZONES = ((0, 0, 1), (1, 1, 0), (1, 1, 1))


def _cubic(a: float) -> Floats:
    return a * np.eye(3)


def _hexagonal(a: float, c: float) -> Floats:
    return np.array([[a, 0, 0], [-a / 2, a * np.sqrt(3) / 2, 0], [0, 0, c]])


def structures() -> list[tuple[str, Floats, Atoms, Zones]]:
    """(material, cell, atoms, zone axes by name) of everything in the tables."""
    cubic = {f"[{u}{v}{w}]": (u, v, w) for u, v, w in _CUBIC_ZONES}
    tetragonal = {"[001]": (0, 0, 1), "[100]": (1, 0, 0), "[110]": (1, 1, 0)}
    out: list[tuple[str, Floats, Atoms, Zones]] = []
    for name, (a, c) in _PEROVSKITES.items():
        large, small = _CATIONS[name]
        oxygen = [("O", 0.5, 0.5, 0.0), ("O", 0.5, 0.0, 0.5), ("O", 0.0, 0.5, 0.5)]
        atoms = [(large, 0.0, 0.0, 0.0), (small, 0.5, 0.5, 0.5), *oxygen]
        out.append((name, np.diag([a, a, c]), atoms, cubic if a == c else tetragonal))
    half = [(0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)]
    out += [(name, _cubic(a), [(name, *p) for p in half], cubic) for name, a in _FCC.items()]
    out += [(name, _cubic(a), [(name, 0, 0, 0), (name, 0.5, 0.5, 0.5)], cubic) for name, a in _BCC.items()]
    for name, (a, one, two) in _DIAMOND.items():
        atoms = [(one, *p) for p in half] + [(two, p[0] + 0.25, p[1] + 0.25, p[2] + 0.25) for p in half]
        out.append((name, _cubic(a), atoms, cubic))
    for name, (a, c, one, two) in _WURTZITE.items():
        atoms = [
            (one, 1 / 3, 2 / 3, 0.0),
            (one, 2 / 3, 1 / 3, 0.5),
            (two, 1 / 3, 2 / 3, 0.38),
            (two, 2 / 3, 1 / 3, 0.88),
        ]
        zones = {"[0001]": (0, 0, 1), "[11-20]": (1, 1, 0), "[10-10]": (2, 1, 0)}
        out.append((name, _hexagonal(a, c), atoms, zones))
    for name, (a, metal, other) in _SHEETS.items():
        atoms = [(metal, 0.0, 0.0, 0.5), (other, 1 / 3, 2 / 3, 0.4), (other, 1 / 3, 2 / 3, 0.6)]
        out.append((name, _hexagonal(a, 15.0), atoms, {"[0001]": (0, 0, 1)}))
    for name, (a, one, two) in _HONEYCOMBS.items():
        atoms = [(one, 0.0, 0.0, 0.0), (two, 1 / 3, 2 / 3, 0.0)]
        out.append((name, _hexagonal(a, 10.0), atoms, {"[0001]": (0, 0, 1)}))
    for name, (a, c, u, metal) in _RUTILE.items():
        oxygen = [("O", u, u, 0.0), ("O", -u, -u, 0.0), ("O", 0.5 + u, 0.5 - u, 0.5), ("O", 0.5 - u, 0.5 + u, 0.5)]
        atoms = [(metal, 0.0, 0.0, 0.0), (metal, 0.5, 0.5, 0.5), *oxygen]
        zones = {"[001]": (0, 0, 1), "[100]": (1, 0, 0), "[110]": (1, 1, 0), "[111]": (1, 1, 1)}
        out.append((name, np.diag([a, a, c]), atoms, zones))
    return out
