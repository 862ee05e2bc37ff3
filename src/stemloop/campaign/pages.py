"""What every page that we write has in common: its frame, style, sections, pictures and words."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, ACCENT, WARM = "#1c2430", "#2563a8", "#c2571a"
STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#1c2430; --soft:#5d6877; --line:#dfe4ea;
  --accent:#2563a8; --good:#1d7a46; --warn:#a8540c; }
@media (prefers-color-scheme: dark) { :root { --page:#12161c; --card:#1a2029; --ink:#e6eaf0; --soft:#9aa6b5;
  --line:#2c3541; --accent:#7db3ee; --good:#63c48d; --warn:#eea25c; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 system-ui,-apple-system,"Segoe UI",
  "DejaVu Sans",sans-serif; -webkit-text-size-adjust:100% }
main { max-width:1100px; margin:0 auto; padding:32px 24px 56px }
header p.kicker { margin:0; color:var(--soft); letter-spacing:.06em; text-transform:uppercase; font-size:.78rem }
h1 { font-size:2rem; line-height:1.2; margin:.1em 0 .3em; letter-spacing:-.01em }
h2 { font-size:1.12rem; margin:0 0 .2em }
.lead { color:var(--soft); margin:0 0 1.3em; max-width:52em }
.lead strong { color:var(--ink); font-weight:600 }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:0 0 20px }
.fact, section { background:var(--card); border:1px solid var(--line); border-radius:10px }
.fact { padding:12px 16px }
.fact b { display:block; font-size:1.2rem; font-weight:650; line-height:1.25; font-variant-numeric:tabular-nums;
  white-space:nowrap }
.fact span { color:var(--soft); font-size:.84rem; display:block; line-height:1.35 }
.good b { color:var(--good) } .warn b { color:var(--warn) }
section { padding:18px 20px; margin:0 0 20px; break-inside:avoid }
section > p { margin:.1em 0 .8em; color:var(--soft); font-size:.92rem; max-width:62em }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(430px,1fr)); gap:20px }
.pair > section { margin:0 } .pair { margin:0 0 20px }
figure { margin:0; background:#fff; border-radius:6px; overflow:hidden }
figure img, figure svg { display:block; width:100%; height:auto }
table { border-collapse:collapse; width:100%; font-size:.9rem }
td, th { text-align:left; padding:5px 10px 5px 0; border-bottom:1px solid var(--line); vertical-align:top }
th { font-weight:500; color:var(--soft); width:34%; white-space:nowrap }
td { font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
tr:last-child > * { border-bottom:0 }
code { font:.86em/1.4 ui-monospace,"DejaVu Sans Mono",Menlo,monospace }
.bar { display:flex; align-items:center; gap:10px; margin:7px 0; font-size:.9rem }
.bar i { display:block; height:14px; border-radius:3px; background:var(--accent); min-width:2px }
.bar.whole i { background:var(--line) }
.bar .track { flex:1 } .bar .name { width:118px; color:var(--soft); flex:none }
.bar .value { flex:none; min-width:92px; text-align:right; font-variant-numeric:tabular-nums }
footer { color:var(--soft); font-size:.85rem }
@media print { :root { color-scheme:light } body { background:#fff; font-size:11pt } main { padding:0; max-width:none }
  .fact, section { border-color:#ccc } .pair { grid-template-columns:1fr 1fr } }
@media (max-width:520px) { .pair { grid-template-columns:1fr } main { padding:20px 12px } }
"""


def whole(title: str, parts: Iterable[str], style: str = "") -> str:
    """The page: ``title`` (a text), ``parts`` (HTML; empty ones are left out), more ``style`` (CSS).

    It holds its own style and pictures, asks the network for nothing, runs no script, follows the reader's dark or
    light mode and can be printed.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, words: str, body: str) -> str:
    """A card of the page: heading, a line of words, and HTML."""
    text = f"<p>{html.escape(words)}</p>" if words else ""
    return f"<section><h2>{html.escape(title)}</h2>{text}{body}</section>"


def png(figure: Figure, words: str) -> str:
    """A figure as HTML with its picture in it; ``words`` for those who do not see it."""
    return _drawn(figure, words, lambda out: FigureCanvasAgg(figure).print_png(out), "image/png")


def svg(figure: Figure, words: str) -> str:
    """As :func:`png`, in lines that can be made larger."""
    return _drawn(
        figure, words, lambda out: figure.savefig(out, format="svg", metadata={"Date": None}), "image/svg+xml"
    )


def _drawn(figure: Figure, words: str, draw: Callable[[io.BytesIO], Any], kind: str) -> str:
    figure.set_dpi(115)
    out = io.BytesIO()
    draw(out)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<figure><img src="data:{kind};base64,{data}" alt="{html.escape(words, quote=True)}"></figure>'


def bare(axis: Any) -> None:
    """An axis of an image: no ticks, a quiet title."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.title.set(fontsize=10.5, color=INK)


def quiet(axis: Any) -> None:
    """An axis of a curve: two thin sides."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b8c0cb")
    axis.tick_params(color="#b8c0cb")


def grouped(value: Any) -> str:
    """A count with its thousands apart."""
    return f"{int(value):,}".replace(",", "\u2009") if isinstance(value, (int, float, np.number)) else str(value)


def number(value: float, digits: int = 3) -> str:
    """A number to ``digits`` significant figures, with a power of ten only where it is far from one.

    >>> number(0.012345), number(1234.5), number(3.2e9)
    ('0.0123', '1234', '3.20 × 10⁹')
    """
    if not np.isfinite(value) or value == 0:
        return f"{value:g}"
    power = int(np.floor(np.log10(abs(value))))
    if -4 < power < 6:
        return f"{value:.{max(digits - 1 - power, 0)}f}"
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10.0**power:.{digits - 1}f} × 10{raised}"


def shown(value: Any) -> str:
    """Any value in words."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(inner) for inner in value) or "none"
    return str(value)
