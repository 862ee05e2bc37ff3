"""The measured part of a model card, as Markdown tables made from the numbers that the training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADING = "## Measured"
_SHOWN = {
    "v_mean": ("stretch, mean [%]", 100.0),
    "v_diff": ("stretch, difference [%]", 100.0),
    "v_xy": ("stretch, shear [%]", 100.0),
    "phi_rad": ("rotation [mrad]", 1e3),
    "thickness_m": ("thickness [nm]", 1e9),
    "tilt_y_rad": ("tilt y [mrad]", 1e3),
    "tilt_x_rad": ("tilt x [mrad]", 1e3),
}


def _errors(title: str, numbers: dict[str, Any], key: str = "all doses") -> list[str]:
    lines = [
        f"### {title}",
        "",
        "| material | quantity | rms error | median sigma | within 2 sigma |",
        "|---|---|---|---|---|",
    ]
    for material, found in numbers.items():
        for name, value in found.get(key, {}).items():
            words, unit = _SHOWN[name]
            shown = (f"{value[k] * unit:.3f}" for k in ("rms error", "median sigma"))
            lines.append(f"| {material} | {words} | {' | '.join(shown)} | {value['within 2 sigma']:.3f} |")
    return [*lines, ""]


def _by_dose(numbers: dict[str, Any]) -> list[str]:
    lines = ["### Share within 2 sigma, by dose", "", "| material | electrons | " + " | ".join(_SHOWN) + " |"]
    lines.append("|---" * (2 + len(_SHOWN)) + "|")
    for material, found in numbers.items():
        for key, values in found.items():
            if key.endswith("electrons"):
                shown = " | ".join(f"{values[name]['within 2 sigma']:.3f}" for name in _SHOWN)
                lines.append(f"| {material} | {key.removesuffix(' electrons')} | {shown} |")
    return [*lines, ""]


def _classes(numbers: dict[str, Any]) -> list[str]:
    lines = ["### Phase, site and novelty on the test set", "", "| material | patterns | what |", "|---|---|---|"]
    for material, found in numbers.items():
        what = ", ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
        lines.append(f"| {material} | {found['patterns']} | {what} |")
    return [*lines, ""]


def _outside(numbers: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "### Outside the trained ranges",
        "",
        "Root mean square error of the mean stretch [%] and of the rotation [mrad], share within 2 sigma of both,",
        "median novelty and share of patterns with a novelty above 3 (the describer adds to it where semiangle, energy",
        "or dose are themselves out of range).",
        "",
        "| outside | material | stretch | within | rotation | within | novelty | above 3 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, table in numbers.items():
        for material, found in table.items():
            if "all doses" not in found:
                continue
            v, phi = found["all doses"]["v_mean"], found["all doses"]["phi_rad"]
            shown = f"{v['rms error'] * 100:.2f} | {v['within 2 sigma']:.2f} | {phi['rms error'] * 1e3:.1f}"
            novel = f"{found['novelty median']:.1f} | {found['novelty above 3']:.2f}"
            lines.append(f"| {name} | {material} | {shown} | {phi['within 2 sigma']:.2f} | {novel} |")
    return [*lines, ""]


def write_measured(card: dict[str, Any], page: Path) -> None:
    """Replace everything after the heading :data:`HEADING` of ``page`` by the tables of ``card``."""
    head = page.read_text().split(HEADING)[0]
    counts = ", ".join(f"{number} {name}" for name, number in card["patterns"].items())
    lines = [HEADING, "", f"Patterns: {counts}. Seed {card['seed']}. Settings: `{card['settings']}`.", ""]
    lines += _errors("The usual beam of each material, 6e5 electrons", card["usual beam, 6e5 electrons"])
    lines += _errors("All trained beams and doses (test set)", card["test"])
    lines += _by_dose(card["test"]) + _classes(card["test"]) + _outside(card["outside"])
    page.write_text(head + "\n".join(lines).rstrip() + "\n")
