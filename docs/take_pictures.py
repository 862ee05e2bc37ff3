"""Make docs/images/analysis.png: a simulated ferroelectric, `stemloop analyze`, and the top of its report.

python docs/take_pictures.py            (needs a Chromium that takes screenshots without a window)
"""

import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import stemloop
from stemloop.simulate.pictures import Layout, counted, layout, mean_image

SHAPE, PIXEL_PM, SHIFT_PM = (320, 400), 18.0, 17.0
PICTURE = Path(__file__).parent / "images" / "analysis.png"
WINDOW = (820, 1290)


def two_domains() -> Layout:
    """BaTiO3 whose secondary columns are displaced upwards left of a wall and downwards right of it, with a secondary
    column missing and two columns of other elements."""
    whole = layout("BaTiO3[100]", SHAPE, PIXEL_PM, math.radians(3.0), margin=-30.0)
    position, weight = whole.position.copy(), whole.weight.copy()
    right = position[:, 1] - 0.25 * position[:, 0] > 160
    second = whole.site == 1
    position[second, 0] += np.where(right, 1, -1)[second] * SHIFT_PM / PIXEL_PM

    def nearest(site: int, place: tuple[float, float]) -> int:
        off = np.hypot(*(whole.position - place).T)
        return int(np.argmin(np.where(whole.site == site, off, np.inf)))

    weight[nearest(0, (97, 290))] *= 1.5
    weight[nearest(1, (232, 95))] *= 2.0
    left = np.delete(np.arange(len(weight)), nearest(1, (244, 316)))
    return replace(whole, position=position, weight=weight).take(left)


def main() -> None:
    image = counted(mean_image(two_domains(), dose=6e3), np.random.default_rng(3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "two_domains.npy", image)
        stemloop.analyze(
            folder / "two_domains.npy", pixel_size_nm=PIXEL_PM / 1e3, material="BaTiO3", out=folder / "result"
        )
        words = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={PICTURE}"]
        words += [f"--window-size={WINDOW[0]},{WINDOW[1]}", str(folder / "result" / "report.html")]
        sys.exit(subprocess.run(words, check=False).returncode)


if __name__ == "__main__":
    main()
