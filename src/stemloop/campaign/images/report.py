"""The page of an analysis: the image with everything that was found in it, made to be looked at, printed and mailed."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.campaign import pages
from stemloop.campaign.images.summary import calibration_sentence, kinds_of_defects, length, within
from stemloop.core.durable import write_whole
from stemloop.core.structure import Defect

if TYPE_CHECKING:
    from stemloop.campaign.images.analysis import Analysis

Floats = NDArray[np.float64]

_COLOURS = ("#ffb000", "#3fb6ff", "#ff5fa2", "#7ee081", "#b88cff", "#ff8552", "#4fd6c2", "#d9d9d9")
_MARKS = {
    "vacancy": ("o", "#ff3b30"),
    "dopant": ("D", "#ffd60a"),
    "interstitial": ("P", "#bf5af2"),
    "dislocation": ("$\u22a5$", "#ff3b30"),
    "vortex": ("*", "#ffffff"),
}
_LINES = {"grain-boundary": "#ff9f0a", "domain-wall": "#ffffff", "stacking-fault": "#bf5af2"}
#: Details of defects: what a reader need not see, and (name, its deviation, words).
_SILENT = ("column", "grain", "cells", "closed", "loop", "variants", "brightness", "margin_sigma")
_WORDS = (
    ("ratio", "ratio_sigma", "{} times as bright as others of its site"),
    ("z_score", "", "{} deviations"),
    ("misorientation_deg", "sigma_deg", "turned by {}°"),
    ("type", "", "{}° wall"),
    ("charge", "", "{}"),
    ("angle_deg", "sigma_deg", "directions differ by {}°"),
    ("width_px", "width_sigma_px", "{} px wide"),
    ("length_px", "", "{} px long"),
    ("burgers_cells", "", "Burgers vector {} cells"),
    ("burgers", "", "which is {} px"),
    ("displacement_cells", "", "displaced by {} cells"),
    ("displacement", "", "which is {} px"),
    ("winding", "", "winding number {}"),
    ("sigma_px", "", "known to {} px"),
)
#: The numbers of what happens from frame to frame, in words.
_DYNAMICS = {
    "tracks": "tracks",
    "seen_in_half_of_the_frames": "tracks seen in at least half of the frames",
    "step_px": "typical step from frame to frame (px)",
    "events": "events",
    "reconstructions_in_frames": "frames in which many columns move at once",
}
#: A picture is drawn with at most so many pixels along a side; columns are marked where no more than these are in view.
_MOST_PX, _MOST_MARKS, _MOST_ARROWS, _MOST_ROWS = 1400, 6000, 1600, 40
_MORE_STYLE = """
.fact b { font-size:1.12rem; white-space:normal; overflow-wrap:anywhere }
.facts { grid-template-columns:repeat(auto-fit,minmax(165px,1fr)) }
.verdict { border-left:5px solid var(--line); font-size:1.02rem }
.verdict.good { border-left-color:var(--good) } .verdict.warn { border-left-color:var(--warn) }
.verdict p { color:var(--ink); margin:.2em 0; max-width:none }
section table th { width:auto } thead th { border-bottom:2px solid var(--line); font-size:.84rem }
.swatch { display:inline-block; width:.8em; height:.8em; border-radius:50%; margin-right:.45em; vertical-align:-.05em }
.scroll { overflow-x:auto } .patches { display:flex; flex-wrap:wrap; gap:14px }
.patches figure { width:112px; background:none; font-size:.78rem; color:var(--soft) }
.patches img { border-radius:6px; image-rendering:auto; width:112px; height:112px }
.scroll td { white-space:nowrap; padding-right:18px } .scroll td:last-child { white-space:normal }
.scroll th { white-space:nowrap; padding-right:18px }
ul.plain { margin:.2em 0; padding-left:1.2em; font-size:.92rem; color:var(--soft) }
"""


class Page:
    """A report on the disk: shown by a notebook, opened by its ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<report {self.path}>"

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" style="width:100%;height:900px;border:0" title="report"></iframe>'


def card(analysis: Analysis) -> str:
    """An analysis in a notebook: the marked image and what was found, in a few lines."""
    view = _View(analysis)
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in analysis.sentences()
    )
    return f'<div style="max-width:900px">{view.marked()}<table>{rows}</table></div>'


def write_report(analysis: Analysis) -> Path:
    """Write ``report.html`` into the analysis's folder and return its path. The page holds its own style and pictures,
    asks the network for nothing and runs no script."""
    path = analysis.folder / "report.html"
    write_whole(path, _View(analysis).html())
    return path


class _View:
    """The page; each method is one part of it and gives HTML, empty if there is nothing to show."""

    def __init__(self, analysis: Analysis) -> None:
        self.a, self.found, self.s = analysis, analysis.found, analysis.summary
        self.pixel_m = analysis.pixel_size.value_m
        self.height, self.width = analysis.found.shape
        self.place = self.found.columns.position
        self.spacing = _spacing(self.place)

    def html(self) -> str:
        parts = [
            self.headline(),
            self.verdict(),
            self.overview(),
            self.denoised(),
            self.overlay(),
            self.lattices(),
            self.polar() or self.displacement(),
            self.strain(),
            self.phases(),
            self.defects(),
            self.stack(),
            self.dynamics(),
            self.library(),
            self.candidates(),
            self.absent(),
            self.provenance(),
        ]
        return pages.whole(f"{self.a.name} · stemloop analyze", parts, _MORE_STYLE)

    # ----------------------------------------------------------------------------------------------------- words

    def headline(self) -> str:
        s, frames = self.s, self.a.shape[0]
        cards = [("", pages.grouped(s["columns"]), "atom columns")]
        if s["precision_px"] is not None:
            cards.append(("", length(s["precision_px"], self.pixel_m), "typical deviation of a place, along an axis"))
        if s["lattices"]:
            one = s["lattices"][0]
            sides = (
                f"{one['a1_nm']:.3f} × {one['a2_nm']:.3f} nm"
                if "a1_nm" in one
                else f"{one['a1_px']:.1f} × {one['a2_px']:.1f} px"
            )
            sites = "site" if len(one["sites"]) == 1 else "sites"
            more = f"; {len(s['lattices'])} lattices in all" if len(s["lattices"]) > 1 else ""
            cards.append(("", sides, f"lattice, {one['angle_deg']:.1f}°, {len(one['sites'])} {sites} a cell{more}"))
        if s["lattices"]:
            kinds = kinds_of_defects(s["defects_of_kind"]) or "none was found"
            cards.append(("", pages.grouped(sum(s["defects_of_kind"].values())), f"defects: {kinds}"))
        if frames > 1:
            good = frames - len(self.a.bad)
            cards.append(("warn" if self.a.bad else "good", f"{good} of {frames}", "frames that could be used"))
        facts = "".join(
            f'<div class="fact {kind}"><b>{html.escape(value)}</b><span>{html.escape(note)}</span></div>'
            for kind, value, note in cards
        )
        rows, columns = self.a.shape[1:]
        what = f"A stack of {frames} frames" if frames > 1 else "An image"
        field = (
            ""
            if self.pixel_m is None
            else f", {pages.number(columns * self.pixel_m * 1e9)} nm × {pages.number(rows * self.pixel_m * 1e9)} nm"
        )
        return (
            '<header><p class="kicker">From image to structure</p>'
            f"<h1>{html.escape(self.a.name)}</h1>"
            f'<p class="lead">{what} of {rows} × {columns} px{field}.</p></header>'
            f'<div class="facts">{facts}</div>'
        )

    def verdict(self) -> str:
        trust = self.a.pixel_size.trust
        kind = {"checked": "good", "refuted": "warn", "doubtful": "warn"}.get(trust, "")
        return (
            f'<section class="verdict {kind}"><h2>Is the scale right?</h2>'
            f"<p>{html.escape(calibration_sentence(self.a))}</p></section>"
        )

    # --------------------------------------------------------------------------------------------------- the image

    def _figure(self, panels: int, bars: bool = False) -> tuple[Figure, list[Any]]:
        """A figure with ``panels`` axes of the image's form, below each other where it is wide."""
        flat = self.width > 2.2 * self.height
        across = 1 if flat or panels == 1 else 2
        down = -(-panels // across)
        width = 10.4 if panels > 1 or self.width >= self.height else 7.0
        each = width / across - (0.9 if bars else 0.15)
        height = down * (each * self.height / self.width + (0.42 if bars else 0.62))
        figure = Figure(figsize=(width, float(np.clip(height, 1.6, 26.0))), layout="constrained")
        axes: Any = figure.subplots(down, across, squeeze=False)
        return figure, list(axes.ravel())

    def _show(self, axis: Any, image: NDArray[Any] | None = None, faint: bool = False) -> None:
        """Draw the image in grey, thinned to what a screen can show."""
        shown = self.a.image if image is None else image
        step = max(1, -(-max(shown.shape) // _MOST_PX))
        if step > 1:
            rows, columns = (side // step * step for side in shown.shape)
            shown = shown[:rows, :columns].reshape(rows // step, step, columns // step, step).mean(axis=(1, 3))
        low, high = np.percentile(shown[np.isfinite(shown)], (0.5, 99.7))
        extent = (-0.5, self.width - 0.5, self.height - 0.5, -0.5)
        axis.imshow(
            shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), extent=extent, alpha=0.45 if faint else 1.0,
            interpolation="nearest" if max(shown.shape) >= 400 else "bicubic",
        )  # fmt: skip
        pages.bare(axis)
        axis.set(xlim=(-0.5, self.width - 0.5), ylim=(self.height - 0.5, -0.5))

    def _scale_bar(self, axis: Any, width: float | None = None) -> None:
        unit_px, unit = (1.0, "px") if self.pixel_m is None else (1e-9 / self.pixel_m, "nm")
        across = self.width if width is None else width
        raw = 0.22 * across / unit_px
        step = 10.0 ** np.floor(np.log10(raw))
        amount = step * max(k for k in (1, 2, 5) if k * step <= raw)
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        x, y = left + 0.035 * (right - left), bottom + 0.05 * (top - bottom)
        axis.plot([x, x + amount * unit_px], [y, y], color="black", lw=5.0, solid_capstyle="butt")
        axis.plot([x, x + amount * unit_px], [y, y], color="white", lw=3.0, solid_capstyle="butt")
        words = axis.annotate(f"{amount:g} {unit}", (x + amount * unit_px / 2, y), (0, 5), textcoords="offset points",
                              ha="center", color="white", fontsize=8.5, fontweight="bold")  # fmt: skip
        words.set_bbox({"facecolor": "black", "alpha": 0.45, "pad": 1.5, "edgecolor": "none"})

    def _kind(self) -> tuple[NDArray[np.int64], list[str]]:
        """What each column is coloured by, and what the colours mean."""
        assigned = self.found.assignment
        if assigned is not None and assigned.grains and (assigned.site >= 0).any():
            most = int(assigned.site.max()) + 1
            names = ["primary site", *(f"site {k + 1}" for k in range(1, most))]
            if most == 2:
                names[1] = "secondary site"
            outside = assigned.site < 0
            return np.where(outside, 7, np.minimum(assigned.site, 6)), names
        kind = self.found.columns.sublattice
        return np.minimum(kind, 6), [f"sublattice {k + 1}" for k in range(int(kind.max(initial=0)) + 1)]

    def _columns(self, axis: Any, inside: NDArray[np.bool_] | None = None, legend: bool = True) -> None:
        kind, names = self._kind()
        chosen = np.ones(len(kind), bool) if inside is None else inside
        n = int(chosen.sum())
        if not n:
            return
        size = float(np.clip(9000 / n, 2.5, 34))
        for k in np.unique(kind[chosen]):
            at = self.place[chosen & (kind == k)]
            name = "no site of a lattice" if k == 7 else names[k] if k < len(names) else f"site {k + 1}"
            axis.scatter(at[:, 1], at[:, 0], s=size, color=_COLOURS[k], linewidths=0, label=f"{name} ({len(at)})")
        if legend:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=8, frameon=False,
                        markerscale=max(1.0, 4 / np.sqrt(size)), borderpad=0.2, handletextpad=0.1)  # fmt: skip

    def _defects(self, axis: Any, numbered: bool = True) -> None:
        for k, one in enumerate(self.found.defects):
            place = np.atleast_2d(one.place)
            if one.kind in _LINES and len(place) > 1:
                axis.plot(place[:, 1], place[:, 0], color="black", lw=3.2, alpha=0.5)
                axis.plot(place[:, 1], place[:, 0], color=_LINES[one.kind], lw=1.7)
            else:
                marker, colour = _MARKS.get(one.kind, ("s", "#ff3b30"))
                hollow = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.5}
                filled = {"color": colour, "edgecolors": "black", "linewidths": 0.6}
                style: dict[str, Any] = hollow if marker in "oD" else filled
                axis.scatter(place[:, 1], place[:, 0], s=70, marker=marker, **style)
            if numbered and k < _MOST_ROWS:
                middle = place[len(place) // 2]
                axis.annotate(str(k + 1), (middle[1], middle[0]), (5, 5), textcoords="offset points", fontsize=7,
                              color="white",
                              bbox={"facecolor": "black", "alpha": 0.55, "pad": 0.8, "edgecolor": "none"},
                              annotation_clip=True)  # fmt: skip

    def marked(self) -> str:
        """The image with its columns."""
        figure, (axis,) = self._figure(1)
        self._show(axis)
        if len(self.place) <= _MOST_MARKS:
            self._columns(axis)
        self._scale_bar(axis)
        return pages.png(figure, f"columns found in {self.a.name}")

    def overview(self) -> str:
        if not len(self.place):
            words = "No atom column was found, so nothing is marked."
            return pages.section("The image", words, self.marked())
        figure, axes = self._figure(2)
        self._show(axes[0])
        self._scale_bar(axes[0])
        axes[0].set_title("the average of the frames" if self.a.shape[0] > 1 else "the image", fontsize=10)
        self._show(axes[1])
        words = "Colours tell the sites of the lattice apart. " if self.s["lattices"] else ""
        if len(self.place) <= _MOST_MARKS:
            self._columns(axes[1])
            axes[1].set_title("atom columns", fontsize=10)
        else:
            side = self._zoom()
            middle = np.array([self.height, self.width]) / 2
            inside = np.asarray((np.abs(self.place - middle) < side / 2).all(axis=1))
            self._columns(axes[1], inside)
            axes[1].set(
                xlim=(middle[1] - side / 2, middle[1] + side / 2), ylim=(middle[0] + side / 2, middle[0] - side / 2)
            )
            self._scale_bar(axes[1], side)
            axes[1].set_title(f"atom columns, the middle {side:.0f} × {side:.0f} px", fontsize=10)
            words += "There are too many columns to mark all: the tables have them. "
        if self.found.defects and len(self.place) <= _MOST_MARKS:
            self._defects(axes[1])
            words += "Numbers are those of the list of defects."
        return pages.section(
            "The image and its atom columns", words.strip(), pages.png(figure, f"image and columns of {self.a.name}")
        )

    def denoised(self) -> str:
        """The image without noise, beside it as it was."""
        if self.a.denoised is None:
            return ""
        figure, axes = self._figure(2)
        few = len(self.place) <= _MOST_MARKS
        side = float(max(self.height, self.width)) if few else self._zoom()
        middle = np.array([self.height, self.width]) / 2 - 0.5
        titles = ("as it was recorded", "without noise")
        for axis, image, title in zip(axes, (None, self.a.denoised), titles, strict=True):
            self._show(axis, image)
            if not few:
                axis.set(
                    xlim=(middle[1] - side / 2, middle[1] + side / 2), ylim=(middle[0] + side / 2, middle[0] - side / 2)
                )
            axis.set_title(title, fontsize=10)
        self._scale_bar(axes[0], min(side, float(self.width)))
        words = (
            "The right one is for the eye only: places, brightness and their deviations are measured in the image as "
            "it was recorded."
        )
        return pages.section("Without noise", words, pages.png(figure, "the image without noise"))

    def overlay(self) -> str:
        """Where a map lies on the image."""
        one = self.a.overlay
        if one is None:
            return ""
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        self._show(left)
        left.plot(one.outline[:, 1], one.outline[:, 0], color="#ffb000", lw=1.6)
        left.set_title("where the map lies", fontsize=10)
        self._scale_bar(left)
        right.imshow(one.chart, cmap="magma", interpolation="nearest")
        pages.bare(right)
        right.set_title("the map", fontsize=10)
        found = one.registration
        sigma = " and ".join(f"{v:.2g}" for v in found.offset_sigma)
        words = (
            f"{one.name}, {one.chart.shape[0]} × {one.chart.shape[1]} px, begins at row {found.offset[0]:.1f} and "
            f"column {found.offset[1]:.1f} of the image (known to {sigma} px). "
            f"The correlation is {found.correlation:.2f}; "
        )
        words += "the place is clear." if found.trusted else "another place fits about as well: do not rely on it."
        return pages.section("The map on the image", words, pages.png(figure, "where the map lies on the image"))

    def _zoom(self) -> float:
        return float(min(self.height, self.width, self.spacing * np.sqrt(1500)))

    # -------------------------------------------------------------------------------------------------- the lattice

    def lattices(self) -> str:
        told = self.s["lattices"]
        if not told:
            return ""
        head = ["", "a₁", "a₂", "angle", "direction of a₁", "columns", "sites: columns (brightness)"]
        rows = []
        for k, one in enumerate(told[:12]):
            names = ("a1", "a2")
            sides = [
                f"{within(one[f'{n}_nm'], one['sigma_px'][i] * one[f'{n}_nm'] / one[f'{n}_px'])} nm"
                if f"{n}_nm" in one
                else f"{within(one[f'{n}_px'], one['sigma_px'][i])} px"
                for i, n in enumerate(names)
            ]
            sites = ", ".join(
                f"({site['place'][0]:.2f}, {site['place'][1]:.2f}): {site['columns']} ({_bright(site['brightness'])})"
                for site in one["sites"]
            )
            rows.append([f"{k + 1}", *sides, f"{one['angle_deg']:.2f}°", f"{one['rotation_deg']:.2f}°",
                         pages.grouped(one["columns"]), sites])  # fmt: skip
        more = f" {len(told) - 12} smaller ones are in summary.json." if len(told) > 12 else ""
        many = "Lattices" if len(told) > 1 else "The lattice"
        words = f"Directions are from +x (right) towards +y (down); places of sites are parts of a₁ and a₂.{more}"
        return pages.section(many, words, _table(head, rows))

    def polar(self) -> str:
        field = self.found.polar
        if field is None or not len(field) or not (field.p_polar > 0.5).any():
            return ""
        figure, axes = self._figure(2)
        self._show(axes[0], faint=True)
        keep = np.flatnonzero(np.isfinite(field.vector).all(axis=1))
        thin = keep[:: -(-len(keep) // _MOST_ARROWS)]
        typical = float(np.median(np.hypot(*field.vector[keep].T))) or 1.0
        drawn = 0.75 * self.spacing / typical
        _arrows(axes[0], field.place[thin], field.vector[thin] * drawn)
        axes[0].set_title(f"polar displacements, drawn {drawn:.0f} times as long", fontsize=10)
        strength = np.clip(np.hypot(*field.vector[keep].T) / (2 * typical), 0, 1)
        colours = _directions(field.vector[keep], strength)
        axes[1].imshow(self._painted(field.place[keep], colours), extent=self._extent(), interpolation="nearest")
        pages.bare(axes[1])
        axes[1].set(xlim=(-0.5, self.width - 0.5), ylim=(self.height - 0.5, -0.5))
        axes[1].set_title("direction (colour) and size (strength)", fontsize=10)
        self._defect_lines(axes[1])
        _wheel(axes[1])
        amount = length(typical, self.pixel_m)
        words = f"Each cell's secondary column against the middle of the primary ones around it; typically {amount}. "
        variants = len(field.direction)
        if variants:
            angles = ", ".join(f"{np.degrees(a):.0f}°" for a in field.direction)
            words += f"{variants} variants, towards {angles} (from +x towards +y). "
        words += (
            "Lines are domain walls, stars are vortices."
            if any(d.kind in ("domain-wall", "vortex") for d in self.found.defects)
            else ""
        )
        return pages.section("Polar displacements", words, pages.png(figure, "polar displacements"))

    def _defect_lines(self, axis: Any) -> None:
        for one in self.found.defects:
            place = np.atleast_2d(one.place)
            if one.kind == "domain-wall":
                axis.plot(place[:, 1], place[:, 0], color="black", lw=1.8)
            elif one.kind == "vortex":
                axis.scatter(place[:, 1], place[:, 0], s=90, marker="*", color="white", edgecolors="black", zorder=4)

    def displacement(self) -> str:
        assigned = self.found.assignment
        if assigned is None:
            return ""
        keep = np.flatnonzero(np.isfinite(assigned.displacement).all(axis=1))
        if len(keep) < 4:
            return ""
        vector = assigned.displacement[keep]
        typical = float(np.median(np.hypot(*vector.T))) or 1e-3
        noise = float(np.median(np.hypot(*assigned.displacement_sigma[keep].T)))
        figure, axes = self._figure(2, bars=True)
        self._show(axes[0], faint=True)
        thin = np.arange(0, len(keep), -(-len(keep) // _MOST_ARROWS))
        drawn = 0.5 * self.spacing / typical
        _arrows(axes[0], self.place[keep][thin], vector[thin] * drawn)
        axes[0].set_title(f"displacements, drawn {drawn:.0f} times as long", fontsize=10)
        unit, factor = ("px", 1.0) if self.pixel_m is None else ("pm", self.pixel_m * 1e12)
        size = np.hypot(*vector.T) * factor
        shown = axes[1].imshow(
            self._painted(self.place[keep], size), extent=self._extent(), cmap="viridis", vmin=0,
            vmax=float(np.percentile(size, 98)), interpolation="nearest",
        )  # fmt: skip
        pages.bare(axes[1])
        axes[1].set_title("size", fontsize=10)
        _bar(figure, shown, axes[1], unit)
        words = (
            "Each column against the place where the columns around it expect it. "
            f"Typically {length(typical, self.pixel_m)}; noise alone would give about "
            f"{length(0.83 * noise, self.pixel_m)}."
        )
        if self.found.polar is not None and len(self.found.polar):
            words += " The cells show no polar displacement that stands out of the noise."
        return pages.section("Displacements from the local lattice", words, pages.png(figure, "displacements"))

    def strain(self) -> str:
        strain = self.found.strain
        if strain is None or not np.isfinite(strain.e_xx).any():
            return ""
        names, factors = ("e_xx (%)", "e_yy (%)", "e_xy (%)", "rotation (mrad)"), np.array([100.0, 100.0, 100.0, 1e3])
        values = np.stack([strain.e_xx, strain.e_yy, strain.e_xy, strain.rotation], axis=1) * factors
        fringes = self.a.fringes
        maps = [[self._painted(self.place[known], v[known]) for v in values.T for known in (np.isfinite(v),)]]
        if fringes is not None:
            maps.append([one * factor for one, factor in zip(fringes.values, factors, strict=True)])
        edges = np.maximum(np.nanpercentile(np.abs(values), 97, axis=0), 1e-9)
        figure, axes = self._strain_panels(len(maps))
        for way, row in enumerate(maps):
            for k, one in enumerate(row):
                axis = axes[way][k]
                shown = axis.imshow(one, extent=self._extent(), cmap="RdBu_r", vmin=-edges[k], vmax=edges[k],
                                    interpolation="nearest")  # fmt: skip
                pages.bare(axis)
                source = "" if len(maps) == 1 else " from columns" if way == 0 else " from fringes"
                axis.set_title(names[k] + source, fontsize=9)
                _bar(figure, shown, axis, "")
        noise = np.nanmedian(strain.sigma, axis=0) * factors
        words = (
            "Against the mean lattice of the grain: x to the right, y down, the rotation clockwise on the screen. "
            f"A value's own deviation is typically {_listed(noise)} from columns"
        )
        if fringes is not None:
            words += (
                f" and {_listed(fringes.sigma * factors)} from fringes (geometric phase analysis of the largest "
                f"lattice, averaged by a Gaussian of {length(fringes.resolution_px, self.pixel_m)})"
            )
        return pages.section("Strain", words + ".", pages.png(figure, "strain maps"))

    def _strain_panels(self, ways: int) -> tuple[Figure, Any]:
        """A figure and its axes [way][component]."""
        flat = self.width > 2.2 * self.height
        across, down = (ways, 4) if flat or ways == 1 else (4, ways)
        if ways == 1 and not flat:
            across, down = 2, 2
        each = 10.4 / across - (0.9 if across < 4 else 0.55)
        figure = Figure(
            figsize=(10.4, float(np.clip(down * (each * self.height / self.width + 0.42), 1.6, 26.0))),
            layout="constrained",
        )
        axes: Any = figure.subplots(down, across, squeeze=False)
        return figure, axes.T if flat and ways > 1 else axes.reshape(ways, 4)

    def phases(self) -> str:
        found = self.found.phases
        told = self.s["phases"]
        if found is None or len(told) < 2:
            return ""
        figure, axes = self._figure(2)
        known = found.label >= 0
        painted = self._painted(self.place[known], found.label[known].astype(float))
        colours = ListedColormap([_COLOURS[k % len(_COLOURS)] for k in range(len(told))])
        for axis, strength, title in zip(axes, (0.3, 1.0), ("over the image", "alone"), strict=True):
            self._show(axis)
            axis.imshow(
                painted, extent=self._extent(), cmap=colours, vmin=-0.5, vmax=len(told) - 0.5, alpha=strength,
                interpolation="nearest",
            )  # fmt: skip
            axis.set_title(title, fontsize=10)
        self._scale_bar(axes[0])
        rows = [
            [_Raw(_swatch(_COLOURS[k % len(_COLOURS)]) + html.escape(one["name"])),
             f"{100 * one['share']:.1f} %", pages.grouped(one["columns"]), one["description"]]
            for k, one in enumerate(told)
        ]  # fmt: skip
        words = "Columns whose surroundings look alike are one phase. It was not told what to look for."
        return pages.section(
            "Phases", words, pages.png(figure, "phases") + _table(["phase", "share", "columns", "what it is"], rows)
        )

    def _extent(self) -> tuple[float, float, float, float]:
        return (-0.5, self.width - 0.5, self.height - 0.5, -0.5)

    def _painted(self, place: Floats, values: NDArray[Any]) -> NDArray[Any]:
        """``values`` (n,) or (n, 3) over the image, each place that of its nearest column; nothing far from all."""
        step = max(1.0, max(self.height, self.width) / 420)
        rows = np.arange(step / 2, self.height, step) - 0.5
        columns = np.arange(step / 2, self.width, step) - 0.5
        grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        reach = 1.1 * _spacing(place)
        distance, nearest = cKDTree(place).query(grid.reshape(-1, 2), distance_upper_bound=reach)
        far = ~np.isfinite(distance)
        out = np.asarray(values, dtype=np.float64)[np.where(far, 0, nearest)]
        if out.ndim == 2:
            out = np.column_stack([out, np.where(far, 0.0, 1.0)])
            return out.reshape(*grid.shape[:2], 4)
        out[far] = np.nan
        return out.reshape(grid.shape[:2])

    def defects(self) -> str:
        if not self.s["lattices"]:
            return ""
        found = self.found.defects
        if not found:
            return pages.section(
                "Defects",
                "None was found: within the crystal's outline every column is where the lattice expects one, and as "
                "bright.",
                "",
            )
        names = self._kind()[1]
        rows = [
            [str(k + 1), one.kind.replace("-", " "), self._where(one), f"{100 * one.p:.3g} %", _details(one, names)]
            for k, one in enumerate(found[:_MOST_ROWS])
        ]
        more = f"The first {_MOST_ROWS} of {len(found)}; all are in summary.json. " if len(found) > _MOST_ROWS else ""
        words = (
            more + "Places are (row, column) in pixels; of a line, its two ends. The chance is that it is there at all."
        )
        return pages.section("Defects", words, _table(["", "kind", "where", "chance", "details"], rows))

    @staticmethod
    def _where(one: Defect) -> str:
        place = np.atleast_2d(one.place)
        ends = place[[0]] if len(place) == 1 else place[[0, -1]]
        return " to ".join(f"({y:.1f}, {x:.1f})" for y, x in ends)

    # ------------------------------------------------------------------------------------------------------- stacks

    def stack(self) -> str:
        if self.a.shape[0] < 2:
            return ""
        body, words = "", ""
        if self.a.registration is not None:
            body, words = self._drift(), self._drift_words()
        if self.a.bad:
            rows = [[str(k), why] for k, why in list(sorted(self.a.bad.items()))[:_MOST_ROWS]]
            more = f" (the first {_MOST_ROWS} of {len(self.a.bad)})" if len(self.a.bad) > _MOST_ROWS else ""
            body += _table([f"frame{more}", "why it was not used"], rows)
        return pages.section("The frames", words, body)

    def _drift_words(self) -> str:
        drift = self.s["drift"]
        sigma = drift["median_sigma_px"]
        told = f"The specimen moved over {drift['span_px'][0]:.1f} px (rows) and {drift['span_px'][1]:.1f} px (columns)"
        if drift["largest_step_px"] is not None:
            told += f"; the largest step between frames is {drift['largest_step_px']:.1f} px"
        if sigma is not None:
            told += f". A shift is known to {sigma:.2g} px"
        if drift["doubtful_frames"]:
            told += (
                f". {drift['doubtful_frames']} frames may lie a lattice vector elsewhere (a chance above 10 %): the "
                "field shows too little that does not repeat"
            )
        return told + "."

    def _drift(self) -> str:
        figure = Figure(figsize=(10.4, 3.4), layout="constrained")
        one, two = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.7, 1]})
        shift, sigma = self.a.registration.shift, self.a.registration.sigma
        k = np.arange(len(shift))
        for axis, name, colour in ((0, "down (rows)", "#2563a8"), (1, "right (columns)", "#c2571a")):
            one.plot(k, shift[:, axis], color=colour, lw=1.4, label=name)
            one.fill_between(k, *(shift[:, axis] + m * sigma[:, axis] for m in (-2, 2)), color=colour, alpha=0.2, lw=0)
        for number, bad in enumerate(sorted(self.a.bad)):
            one.axvline(bad, color="#c02020", lw=0.9, ls=":", label="not used" if number == 0 else None)
        one.set_xlabel("frame", fontsize=9)
        one.set_ylabel("shift (px)", fontsize=9)
        one.legend(frameon=False, fontsize=8.5)
        pages.quiet(one)
        good = np.isfinite(shift).all(axis=1)
        line = shift[good][:, ::-1]
        if len(line) > 1:
            legs = np.stack([line[:-1], line[1:]], axis=1).tolist()
            two.add_collection(LineCollection(legs, array=k[good][1:], cmap="plasma", linewidths=1.0))
        dots = two.scatter(line[:, 0], line[:, 1], c=k[good], cmap="plasma", s=9, linewidths=0)
        two.set_aspect("equal", adjustable="datalim")
        two.invert_yaxis()
        two.set_xlabel("shift right (px)", fontsize=9)
        two.set_ylabel("shift down (px)", fontsize=9)
        _bar(figure, dots, two, "frame")
        pages.quiet(two)
        return pages.png(figure, "drift of the frames")

    def dynamics(self) -> str:
        moved = self.a.motion
        if moved is None:
            return ""
        told = self.s["dynamics"]
        words = f"{pages.grouped(told['tracks'])} tracks of columns and vacant places; "
        words += (
            f"{pages.grouped(told['seen_in_half_of_the_frames'])} of them are seen in at least half of the frames. "
        )
        per = "s" if moved.frame_s else "frame"
        if moved.rates is not None:
            words += (
                "The state of a site is that of each frame alone, so a column that is misjudged counts as a change. "
            )
        rows = [
            [
                _DYNAMICS.get(key, key.replace("_", " ").replace("^2", "²")),
                within(*value) if key.startswith(("rate", "diffusion")) else pages.shown(value),
            ]
            for key, value in told.items()
        ]
        body = self._far(moved, per) + _table(["", ""], rows, plain=True)
        return pages.section("From frame to frame", words.strip(), body)

    def _far(self, moved: Any, per: str) -> str:
        far = moved.displacement
        figure = Figure(figsize=(10.4, 3.0), layout="constrained")
        one, two = figure.subplots(1, 2)
        counts = [0] * self.a.shape[0]
        for k in moved.tracks.frame:
            counts[int(k)] += 1
        seen = np.array(counts, dtype=float)
        seen[seen == 0] = np.nan
        one.plot(np.arange(len(seen)), seen, color="#2563a8", lw=1.3)
        one.set_xlabel("frame", fontsize=9)
        one.set_ylabel("columns and vacant places", fontsize=9)
        pages.quiet(one)
        if far is not None:
            unit, factor = ("px²", 1.0) if self.pixel_m is None else ("pm²", (1e12 * self.pixel_m) ** 2)
            two.errorbar(far.lag_s, far.square * factor, far.sigma * factor, color="#c2571a", lw=1.2, marker="o", ms=3)
            two.axhline(0, color="#b8c0cb", lw=0.8)
            two.set_xlabel(f"time ({'s' if per == 's' else 'frames'})", fontsize=9)
            two.set_ylabel(f"mean squared displacement ({unit})", fontsize=9)
        pages.quiet(two)
        return pages.png(figure, "columns a frame and their mean squared displacement")

    # ---------------------------------------------------------------------------------------------------- the library

    def library(self) -> str:
        one = self.a.remembered
        if one is None:
            return ""
        if one.size == 0:
            return pages.section("Seen before?", "The library was empty; the elements of this image are its first.", "")
        rows = "".join(self._sighting(seen) for seen in one.seen if seen.others)
        new = [f"{seen.what} at ({seen.place[0]:.0f}, {seen.place[1]:.0f})" for seen in one.seen if not seen.others]
        if new:
            rows += f"<p>Not seen in another image: {html.escape(', '.join(new))}.</p>"
        words = (
            f"The library held {pages.grouped(one.size)} elements. Left, an element of this image; then its nearest "
            "likes in other images. The chance is how often noise puts equal surroundings so far apart."
        )
        return pages.section("Seen before?", words, rows)

    @staticmethod
    def _sighting(seen: Any) -> str:
        def tile(patch: NDArray[Any], words: str) -> str:
            shown = picture_png(patch) if patch.size else ""
            return f"<figure>{shown}<figcaption>{html.escape(words)}</figcaption></figure>"

        own = tile(seen.patch, f"{seen.what} at ({seen.place[0]:.0f}, {seen.place[1]:.0f})")
        others = "".join(
            tile(
                other["patch"],
                f"{other['kind']} in {other['file']}, {other['times']} times; chance {100 * other['p_same']:.0f} %",
            )
            for other in seen.others
        )
        return f'<div class="patches">{own}{others}</div>'

    # -------------------------------------------------------------------------------------------------------- the end

    def candidates(self) -> str:
        one = self.found.calibration
        if one is None or not one.candidates:
            return ""
        rows = [
            [f"{match.material}{match.zone_axis}", f"{1e12 * match.pixel_size_m:.3f} pm",
             "" if match.ratio is None else f"{100 * (match.ratio - 1):+.1f} %", f"{100 * match.distortion:.1f} %",
             f"{100 * match.p:.0f} %"]
            for match in one.candidates[:8]
        ]  # fmt: skip
        words = (
            "Known materials whose lattice has this shape, the size of a pixel that each would mean, how far that is "
            "from the stated one, how far the image is distorted then, and how probable it is among those compared. "
            "Name the material if you know it."
        )
        head = ["material and zone axis", "a pixel would be", "against the stated", "distortion", "chance"]
        return pages.section("What the lattice may be", words, _table(head, rows))

    def absent(self) -> str:
        said = [*self.a.notes, *(f"Left out: {part}, because {why}" for part, why in self.a.left_out)]
        if not said:
            return ""
        items = "".join(f"<li>{html.escape(one[:1].upper() + one[1:])}</li>" for one in said)
        return pages.section("What to know of this result", "", f'<ul class="plain">{items}</ul>')

    def provenance(self) -> str:
        s = self.s
        size = s["pixel_size"]
        told = (
            "not known"
            if size["nm"] is None
            else f"{1e3 * size['nm']:.5g} pm, by the {size['source']}; {size['trust']}"
        )
        rows = [
            ["file", s["file"]],
            ["SHA-256", s["sha256"]],
            ["size of a pixel", told],
            ["asked for", ", ".join(f"{k}: {pages.shown(v)}" for k, v in s["parameters"].items() if v is not None)],
            ["files in the folder", ", ".join(s["files"])],
            ["made by", f"stemloop {s['version']}"],
        ]
        return pages.section("Where it comes from", "", _table(["", ""], rows, plain=True))


# -------------------------------------------------------------------------------------------------- small drawing


def _spacing(place: Floats) -> float:
    """Typical distance of a column's nearest neighbour [px]."""
    if len(place) < 2:
        return 10.0
    return float(np.median(np.asarray(cKDTree(place).query(place, k=2)[0])[:, 1]))


def _directions(vector: Floats, strength: Floats) -> Floats:
    """(n, 3) colours: hue is the direction, saturation the strength."""
    hue = (np.arctan2(vector[:, 0], vector[:, 1]) / (2 * np.pi)) % 1.0
    return np.asarray(hsv_to_rgb(np.stack([hue, strength, 1 - 0.12 * strength], axis=1)))


def _arrows(axis: Any, place: Floats, vector: Floats) -> None:
    """Arrows (row, col) whose middles are at ``place``, coloured by direction."""
    colours = _directions(vector, np.ones(len(vector)))
    axis.quiver(
        place[:, 1], place[:, 0], vector[:, 1], vector[:, 0], color=colours, angles="xy", scale_units="xy", scale=1,
        pivot="middle", units="inches", width=0.017, headwidth=4.2, headlength=4.5, edgecolor="black", linewidth=0.25,
    )  # fmt: skip


def _wheel(axis: Any) -> None:
    """The wheel of colours of directions, in a corner."""
    ratio = _ratio(axis)
    side = 0.17 if ratio < 1.5 else 0.4 / ratio
    inset = axis.inset_axes((0.01, 0.02, side, side * ratio))
    y, x = np.mgrid[-1:1:81j, -1:1:81j]
    radius = np.hypot(x, y)
    colours = _directions(np.column_stack([y.ravel(), x.ravel()]), np.clip(radius.ravel(), 0, 1)).reshape(81, 81, 3)
    inset.imshow(np.dstack([colours, np.where(radius <= 1, 1.0, 0.0)]))
    inset.set_axis_off()


def _ratio(axis: Any) -> float:
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    return abs((right - left) / (top - bottom))


def _bar(figure: Figure, shown: Any, axis: Any, words: str) -> None:
    bar: Any = figure.colorbar(shown, ax=axis, shrink=0.85, pad=0.015, fraction=0.05, aspect=22)
    bar.set_label(words, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


class _Raw(str):
    """Text that is HTML already."""


def _bright(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _listed(noise: NDArray[Any]) -> str:
    """Deviations of the three strains [%] and of the rotation [mrad]."""
    return f"{noise[0]:.2g} %, {noise[1]:.2g} %, {noise[2]:.2g} % and {noise[3]:.2g} mrad"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], plain: bool = False) -> str:
    if not rows:
        return ""
    first = "".join(f"<th>{html.escape(word)}</th>" for word in head)
    top = f"<thead><tr>{first}</tr></thead>" if any(head) else ""

    def cell(word: str, column: int) -> str:
        kind = "th" if plain and column == 0 else "td"
        return f"<{kind}>{word if isinstance(word, _Raw) else html.escape(word)}</{kind}>"

    body = "".join("<tr>" + "".join(cell(word, k) for k, word in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _details(one: Defect, sites: Sequence[str]) -> str:
    """What is known of a defect, in words; all of it is in summary.json."""
    rest = {key: value for key, value in one.detail.items() if key not in _SILENT}
    told = []
    if "site" in rest:
        site = rest.pop("site")
        told.append(sites[site] if 0 <= site < len(sites) else f"site {site + 1}")
    if "grains" in rest:
        told.append("between lattices {} and {}".format(*(g + 1 for g in rest.pop("grains"))))
    for key, deviation, words in _WORDS:
        if key in rest:
            value, sigma = rest.pop(key), rest.pop(deviation, None)
            plain = isinstance(value, (int, float)) and np.isfinite(value)
            told.append(words.format(within(value, sigma) if plain else _value(value)))
    told += [f"{key.replace('_', ' ')} {_value(value)}" for key, value in rest.items() if _value(value)]
    return "; ".join(told)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple, np.ndarray)):
        return "(" + ", ".join(_value(item) for item in np.asarray(value).ravel().tolist()[:8]) + ")"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.3g}" if np.isfinite(value) else ""
    return str(value)


def picture_png(patch: NDArray[Any]) -> str:
    """A small grey picture as an image of a page."""
    import io

    from matplotlib.image import imsave

    low, high = np.percentile(patch, (1, 99.5))
    out = io.BytesIO()
    imsave(out, np.clip((patch - low) / max(high - low, 1e-12), 0, 1), cmap="gray", vmin=0, vmax=1, format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'
