"""The page that a run leaves behind: one self-contained HTML file, made to be looked at, printed and mailed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from stemloop.campaign import pages
from stemloop.campaign.reasons import STOP_REASONS
from stemloop.core.durable import write_whole

Floats = NDArray[np.float64]


def write_report(directory: Path, summary: Mapping[str, Any], maps: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into ``directory`` and return its path.

    The page holds its own style and pictures, asks the network for nothing, runs no script, follows the reader's dark
    or light mode and can be printed. What is missing is left out.

    Parameters
    ----------
    directory : an existing folder, as a rule the run's own.
    summary : ``specimen``, ``recipe``, ``stop_reason``, ``points``, ``raster_points``, ``dose_fraction`` (0 to 1),
        ``target_sigma`` and ``final_sigma`` (in the property's unit), ``map_rmse`` and ``coverage_2sigma`` (or None),
        ``seconds``, ``seconds_per_stage`` (stage to seconds), ``peak_memory_MB``, ``seed``, ``version``, and whatever
        else; every entry ends in the table.
    maps : ``mean``, ``sigma``, ``truth``, ``reference_map`` (ny, nx), ``extent_m`` (height, width) [m], ``points_m``
        (n, 2) (y, x) [m] in order of measurement, ``values`` and ``value_sigma`` (n,), ``overview`` (H, W) with
        ``overview_extent_m``, ``columns_m`` (k, 2) and ``columns_sublattice`` (k,), ``history`` (a list of
        dictionaries with points, sigma_max, sigma_mean, electrons and, if known, rmse), ``unit`` and ``property``.
        Any may be absent or None. Energies of less than 1 eV are shown in meV.

    Raises
    ------
    StorageError : the file cannot be written.
    """
    page = _Page(dict(summary), {key: value for key, value in maps.items() if value is not None}, Path(directory))
    path = Path(directory) / "report.html"
    write_whole(path, page.html())
    return path


class _Page:
    """The page of one run; each method is one part of it and returns HTML, empty if there is nothing to show."""

    def __init__(self, summary: dict[str, Any], maps: dict[str, Any], directory: Path) -> None:
        self.summary, self.maps, self.directory = summary, maps, directory
        for name in ("mean", "sigma", "truth", "reference_map", "points_m", "values", "value_sigma", "overview"):
            if name in maps:
                maps[name] = np.asarray(maps[name], dtype=np.float64)
        self.property = str(maps.get("property") or summary.get("property") or "property")
        self.known = str(summary.get("compared_with") or "truth")
        self.scale, self.unit = self._unit()
        self.extent = tuple(float(v) for v in maps.get("extent_m", maps.get("overview_extent_m", (1e-9, 1e-9))))

    def _unit(self) -> tuple[float, str]:
        unit = str(self.maps.get("unit") or self.summary.get("unit") or "")
        if unit == "eV" or unit.startswith("eV/"):
            known = [np.abs(self.maps[k][np.isfinite(self.maps[k])]) for k in ("mean", "truth") if k in self.maps]
            typical = max((float(k.max()) for k in known if k.size), default=0.0)
            if typical < 1:
                return 1e3, "m" + unit
        return 1.0, unit

    def html(self) -> str:
        parts = [self.headline(), self.overview(), self.maps_with_path(), self.truth(), self.learning()]
        parts += [self._pair(self.dose(), self.timings()), self.table(), self.provenance()]
        return pages.whole(f"{self.summary.get('specimen', 'Run')} · stemloop", parts)

    @staticmethod
    def _pair(left: str, right: str) -> str:
        return f'<div class="pair">{left}{right}</div>' if left and right else left + right

    # ------------------------------------------------------------------------------------------------- words

    def _amount(self, value: Any, digits: int = 3) -> str:
        """A value of the property with its unit."""
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            return "not known"
        return f"{pages.number(float(value) * self.scale, digits)} {self.unit}".strip()

    def headline(self) -> str:
        s = self.summary
        reason = str(s.get("stop_reason", "not known"))
        told = STOP_REASONS.get(reason)
        stop = f"{html.escape(told)} (<code>{html.escape(reason)}</code>)" if told else html.escape(reason)
        facts = []
        points, raster = s.get("points"), s.get("raster_points")
        if points is not None:
            of = f"of {pages.grouped(raster)} positions of the full raster" if raster else "positions measured"
            facts.append(("", pages.grouped(points), of))
        if s.get("dose_fraction") is not None:
            facts.append(("", f"{pages.number(100 * float(s['dose_fraction']), 3)} %", "of the full raster's dose"))
        if s.get("final_sigma") is not None:
            target = s.get("target_sigma")
            met = target is not None and float(s["final_sigma"]) <= float(target) * 1.0001
            note = f"deviation at the end; wanted {self._amount(target)}" if target is not None else "final deviation"
            facts.append(
                ("good" if met else "warn" if target is not None else "", self._amount(s["final_sigma"]), note)
            )
        if s.get("map_rmse") is not None:
            facts.append(("", self._amount(s["map_rmse"]), f"rms error of the map against the {self.known}"))
        if s.get("coverage_2sigma") is not None:
            covered = float(s["coverage_2sigma"])
            facts.append(
                ("", f"{100 * covered:.1f} %", f"of the {self.known} within 2 deviations (a normal law: 95.4 %)")
            )
        if s.get("seconds") is not None:
            facts.append(("", _duration(float(s["seconds"])), "from the first command to the map"))
        cards = "".join(
            f'<div class="fact {kind}"><b>{html.escape(value)}</b><span>{html.escape(note)}</span></div>'
            for kind, value, note in facts
        )
        return (
            '<header><p class="kicker">Autonomous experiment</p>'
            f"<h1>{html.escape(str(s.get('specimen', 'Unnamed specimen')))}</h1>"
            f'<p class="lead">Recipe <strong>{html.escape(str(s.get("recipe", "not known")))}</strong>. '
            f"It stopped because <strong>{stop}</strong>.</p></header>"
            f'<div class="facts">{cards}</div>'
        )

    # ----------------------------------------------------------------------------------------------- figures

    def overview(self) -> str:
        m = self.maps
        if "overview" not in m:
            return ""
        extent = tuple(float(v) for v in m.get("overview_extent_m", self.extent))
        figure = Figure(figsize=_size(extent, 1 + ("mean" in m), bar="mean" in m), layout="constrained")
        axes: Any = figure.subplots(1, 1 + ("mean" in m), sharey=True, squeeze=False)[0]
        for axis in axes:
            _picture(axis, m["overview"], extent, "gray", np.nanpercentile(m["overview"], (0.5, 99.7)))
            pages.bare(axis)
            _scale_bar(axis, extent)
        self._columns(axes[0])
        axes[0].set_title("HAADF overview" + (" and atom columns" if "columns_m" in m else ""))
        if "mean" in m:
            limits = _limits(m["mean"] * self.scale)
            shown = _picture(axes[1], m["mean"] * self.scale, self.extent, "viridis", limits, alpha=0.55)
            axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
            axes[1].set_title(f"{_sentence(self.property)} painted on it")
            self._bar(figure, shown, axes[1], _labelled(self.property, self.unit))
        words = f"{pages.grouped(len(m['columns_m']))} columns were found. " if "columns_m" in m else ""
        return pages.section(
            "The specimen", words + "Field of view " + _field(extent) + ".", pages.png(figure, self._say("overview"))
        )

    def _columns(self, axis: Any) -> None:
        if "columns_m" not in self.maps or not len(self.maps["columns_m"]):
            return
        place = np.asarray(self.maps["columns_m"], dtype=np.float64) * 1e9
        kind = np.asarray(self.maps.get("columns_sublattice", np.zeros(len(place)))).astype(int)
        size = float(np.clip(9000 / len(place), 4, 20))
        for k, colour in enumerate(("#ffb000", "#3fb6ff", "#ff5fa2")):
            chosen = kind == k if k < 2 else kind >= 2
            if chosen.any():
                axis.scatter(
                    place[chosen, 1],
                    place[chosen, 0],
                    s=size,
                    color=colour,
                    linewidths=0,
                    label=("brightest", "second", "third")[k],
                )
        if kind.max() > 0:
            axis.legend(
                title="sublattice", loc="upper right", fontsize=8, title_fontsize=8, markerscale=2, framealpha=0.9
            )

    def maps_with_path(self) -> str:
        m = self.maps
        shown: list[str] = [name for name in ("mean", "sigma", "reference_map") if name in m]
        if not shown:
            return ""
        if len(m.get("points_m", ())) > 1:
            shown.append("path")
        titles = {
            "mean": f"{_sentence(self.property)} and positions",
            "sigma": "Deviation (1 sigma)",
            "reference_map": "Reference: full raster",
            "path": "Beam path, first to last",
        }
        rows, across = _arranged(len(shown), self.extent)
        figure = Figure(figsize=_size(self.extent, across, rows), layout="constrained")
        limits = _limits(
            np.concatenate([m[k].ravel() for k in shown if k in ("mean", "reference_map")] or [np.zeros(1)])
        )
        panels: Any = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(panels.ravel(), shown, strict=False):
            if name == "path":
                self._path(figure, axis)
            else:
                wide = _limits(m[name] * self.scale) if name == "sigma" else tuple(self.scale * v for v in limits)
                colours = "cividis" if name == "sigma" else "viridis"
                seen = _picture(axis, m[name] * self.scale, self.extent, colours, wide)
                self._bar(figure, seen, axis, self.unit)
            if name == "mean":
                self._points(axis)
            axis.set_title(titles[name])
            _nanometres(axis)
            axis.label_outer()
        words = "The estimate with the measured positions, and how uncertain it is."
        words += " The path runs from the circle to the square, dark to bright." if "path" in shown else ""
        return pages.section("The map and its deviation", words, pages.png(figure, self._say("map")))

    def _points(self, axis: Any) -> None:
        place = self.maps.get("points_m")
        if place is not None and len(place):
            size = float(np.clip(1800 / len(place), 2, 14))
            axis.scatter(
                place[:, 1] * 1e9, place[:, 0] * 1e9, s=size, facecolors="white", edgecolors="black", linewidths=0.35
            )

    def _path(self, figure: Figure, axis: Any) -> None:
        line = self.maps["points_m"][:, ::-1] * 1e9
        order = np.arange(1, len(line) + 1)
        legs = np.stack([line[:-1], line[1:]], axis=1).tolist()
        axis.add_collection(LineCollection(legs, array=order[1:], cmap="plasma", linewidths=0.8, alpha=0.75))
        size = float(np.clip(1800 / len(line), 3, 14))
        dots = axis.scatter(line[:, 0], line[:, 1], c=order, cmap="plasma", s=size, linewidths=0, zorder=3)
        for end, marker in ((line[0], "o"), (line[-1], "s")):
            axis.scatter(*end, s=48, marker=marker, facecolors="none", edgecolors=pages.INK, linewidths=1.4, zorder=4)
        height, width = (1e9 * v for v in self.extent)
        axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal", facecolor="#f1f3f6")
        self._bar(figure, dots, axis, "order")

    def truth(self) -> str:
        m = self.maps
        if "truth" not in m or "mean" not in m or m["truth"].shape != m["mean"].shape:
            return ""
        error = (m["mean"] - m["truth"]) * self.scale
        flat = self.extent[1] > 3 * self.extent[0]
        width, height = _size(self.extent, 1 if flat else 2, 2 if flat else 1)
        figure = Figure(figsize=(width, height + (2.3 if flat else 0)), layout="constrained")
        panels: Any = figure.subplots(2 if flat else 1, 1 if flat else 2)
        one, two = panels
        edge = max(float(np.nanpercentile(np.abs(error), 99.5)), 1e-12)
        self._bar(
            figure,
            _picture(one, error, self.extent, "RdBu_r", (-edge, edge)),
            one,
            _labelled("map minus truth", self.unit),
        )
        _nanometres(one)
        one.set_title("Error against the truth")
        if "sigma" in m:
            _histogram(two, error / np.maximum(m["sigma"] * self.scale, 1e-30))
        words = "The simulated specimen's truth was never shown to the experiment. "
        words += "Right: the errors in units of the deviation that was claimed; honest deviations follow the line."
        return pages.section(
            "Against the truth",
            words.replace("Right", "Below") if flat else words,
            pages.png(figure, self._say("error")),
        )

    def learning(self) -> str:
        history = self.maps.get("history") or []
        if len(history) < 2:
            return ""
        figure = Figure(figsize=(10.4, 3.7), layout="constrained")
        axis = figure.subplots()
        points = [h["points"] for h in history]
        lines = (
            ("sigma_max", "largest deviation", pages.ACCENT, "-"),
            ("sigma_mean", "mean deviation", pages.ACCENT, "--"),
        )
        for key, label, colour, style in (*lines, ("rmse", f"rms error against the {self.known}", pages.WARM, "-")):
            y = np.array([h.get(key) if h.get(key) is not None else np.nan for h in history], dtype=float) * self.scale
            if np.isfinite(y).any():
                axis.plot(
                    points, y, style, color=colour, lw=1.8, label=label, marker="o", ms=3 if len(points) < 60 else 0
                )
        target = self.summary.get("target_sigma")
        if target:
            axis.axhline(float(target) * self.scale, color="#1d7a46", lw=1.2, ls=":")
            axis.annotate("wanted", (1, float(target) * self.scale), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                          textcoords="offset points", ha="right", color="#1d7a46", fontsize=9)  # fmt: skip
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(_few_minor))
        axis.tick_params(which="minor", labelsize=8)
        axis.set(xlabel="measured positions", ylabel=_labelled("deviation", self.unit))
        axis.grid(True, which="both", color="#e7ebf0", lw=0.6)
        axis.legend(frameon=False, fontsize=9)
        pages.quiet(axis)
        return pages.section("Learning curve", "", pages.svg(figure, self._say("learning curve")))

    # -------------------------------------------------------------------------------------------------- bars

    def dose(self) -> str:
        fraction = self.summary.get("dose_fraction")
        if fraction is None:
            return ""
        share = float(fraction)
        spent = pages.number(100 * share, 3)
        history = self.maps.get("history") or [{}]
        electrons = history[-1].get("electrons")
        words = f"{pages.number(float(electrons), 3)} electrons were given to the specimen." if electrons else ""
        rows = _bar_row("this run", share, f"{spent} %") + _bar_row("full raster", 1.0, "100 %", "whole")
        if 0 < share < 1:
            words += f" A full raster would have taken {pages.number(1 / share, 3)} times as many."
        return f"<section><h2>Dose</h2><p>{html.escape(words.strip())}</p>{rows}</section>"

    def timings(self) -> str:
        stages = self.summary.get("seconds_per_stage")
        if not isinstance(stages, Mapping) or not stages:
            return ""
        total = float(self.summary.get("seconds") or sum(stages.values()))
        longest = max(*(float(v) for v in stages.values()), 1e-12)
        rows = "".join(
            _bar_row(str(name).replace("_", " "), float(value) / longest, _duration(float(value)))
            for name, value in sorted(stages.items(), key=lambda item: -float(item[1]))
        )
        return f"<section><h2>Time</h2><p>{html.escape(_duration(total))} in all, by stage:</p>{rows}</section>"

    # ------------------------------------------------------------------------------------------------ tables

    def table(self) -> str:
        own = {"final_sigma", "target_sigma", "map_rmse"}
        rows = "".join(
            _row(key, self._amount(value) if key in own and value is not None else pages.shown(value))
            for key, value in self.summary.items()
        )
        return f"<section><h2>All values</h2><table><tbody>{rows}</tbody></table></section>"

    def provenance(self) -> str:
        keep = ("version", "seed", "recipe", "recipe_sha256", "hashes", "inputs", "utc")
        found = {key: self.summary[key] for key in keep if self.summary.get(key) is not None}
        rows = "".join(_row(key, pages.shown(value)) for key, value in found.items())
        if self.directory.is_dir():
            files = sorted(p for p in self.directory.iterdir() if p.is_file() and p.name != "report.html")
            listed = ", ".join(f"{p.name} ({_bytes(p.stat().st_size)})" for p in files[:40])
            rows += _row("files in the folder", listed or "this report alone")
        return (
            f"<section><h2>Provenance</h2><table><tbody>{rows}</tbody></table></section>"
            f"<footer>Made by stemloop {html.escape(str(self.summary.get('version', '')))}.</footer>"
        )

    # ------------------------------------------------------------------------------------------------ helpers

    def _bar(self, figure: Figure, shown: Any, axis: Any, words: str) -> None:
        wide = self.extent[1] > 3 * self.extent[0]
        bar: Any = figure.colorbar(shown, ax=axis, shrink=0.8, pad=0.015, fraction=0.05, aspect=9 if wide else 24)
        bar.solids.set_alpha(1)
        bar.set_label(words, fontsize=9)
        bar.locator = MaxNLocator(4 if wide else 6)
        bar.outline.set_visible(False)
        bar.update_ticks()

    def _say(self, what: str) -> str:
        return f"{what} of {self.summary.get('specimen', 'the specimen')}"


# ------------------------------------------------------------------------------------------------- small drawing


def _size(extent: Sequence[float], across: int, down: int = 1, bar: bool = True) -> tuple[float, float]:
    """Figure size [inch] that lets ``across`` x ``down`` pictures of this extent fill the page's width."""
    width = 10.4 if across > 1 or extent[1] > extent[0] else 6.5
    each = width / across - (0.95 if bar else 0.2)
    return width, float(np.clip(down * (each * extent[0] / extent[1] + 0.75), 1.5, 12.0))


def _arranged(count: int, extent: Sequence[float]) -> tuple[int, int]:
    """Rows and columns: strips lie below each other, everything else side by side."""
    if extent[1] > 3 * extent[0]:
        return count, 1
    return (2, 2) if count == 4 else (1, count)


def _picture(
    axis: Any, image: Floats, extent: Sequence[float], colours: str, limits: Sequence[float], alpha: float = 1.0
) -> Any:
    height, width = (1e9 * float(v) for v in extent)
    return axis.imshow(
        image, cmap=colours, vmin=limits[0], vmax=limits[1], extent=(0, width, height, 0), alpha=alpha,
        interpolation="nearest" if alpha == 1 else "bilinear", aspect="equal",
    )  # fmt: skip


def _limits(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5 * abs(low) - 1e-12, low + 0.5 * abs(low) + 1e-12)


def _nanometres(axis: Any) -> None:
    axis.set_xlabel("x (nm)", fontsize=9)
    axis.set_ylabel("y (nm)", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.locator_params(nbins=6)
    axis.title.set(fontsize=10.5, color=pages.INK)


def _scale_bar(axis: Any, extent: Sequence[float]) -> None:
    height, width = (1e9 * float(v) for v in extent)
    raw = 0.25 * width
    step = 10 ** np.floor(np.log10(raw))
    length = float(step * max(k for k in (1, 2, 5) if k * step <= raw))
    x, y = 0.04 * width, height - 0.05 * max(height, 0.3 * width)
    axis.plot([x, x + length], [y, y], color="black", lw=5.5, solid_capstyle="butt")
    axis.plot([x, x + length], [y, y], color="white", lw=3.2, solid_capstyle="butt")
    text = axis.annotate(f"{length:g} nm", (x + length / 2, y), (0, 5), textcoords="offset points", ha="center",
                         color="white", fontsize=9, fontweight="bold")  # fmt: skip
    text.set_bbox({"facecolor": "black", "alpha": 0.45, "pad": 1.5, "edgecolor": "none"})


def _histogram(axis: Any, pulls: Floats) -> None:
    known = pulls[np.isfinite(pulls)]
    edges = np.linspace(-4.5, 4.5, 46)
    axis.hist(known.clip(-4.5, 4.5), edges, density=True, color="#a9c6e6", edgecolor="white", linewidth=0.4)
    axis.plot(edges, np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi), color=pages.INK, lw=1.4, label="normal law")
    inside = float(np.mean(np.abs(known) < 2)) if known.size else float("nan")
    axis.set_title(f"Standardised errors: {100 * inside:.1f} % within 2", fontsize=10.5, color=pages.INK)
    axis.set_xlabel("error / deviation", fontsize=9)
    axis.set_yticks([])
    axis.set_xlim(-4.5, 4.5)
    axis.legend(frameon=False, fontsize=9)
    pages.quiet(axis)
    axis.spines["left"].set_visible(False)


def _few_minor(value: float, _: int) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


# --------------------------------------------------------------------------------------------------- small words


def _bar_row(name: str, share: float, value: str, kind: str = "") -> str:
    percent = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<div class="bar {kind}"><span class="name">{html.escape(name)}</span><span class="track">'
        f'<i style="width:{percent:.2f}%"></i></span><span class="value">{html.escape(value)}</span></div>'
    )


def _row(key: str, value: str) -> str:
    return f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(value)}</td></tr>"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _labelled(name: str, unit: str) -> str:
    return f"{name} ({unit})" if name and unit else name or unit


def _duration(seconds: float) -> str:
    if seconds >= 120:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1000 else f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _field(extent: Sequence[float]) -> str:
    return f"{pages.number(1e9 * extent[1])} nm × {pages.number(1e9 * extent[0])} nm"
