"""Make docs/images/analysis.png: a simulated ferroelectric, `stemloop analyze`, and the top of its report.

python docs/take_pictures.py            (needs a Chromium that takes screenshots without a window)
"""

import math
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import stemloop
from stemloop.simulate.pictures import Layout, counted, layout, mean_image

SHAPE, PIXEL_PM, SHIFT_PM = (320, 400), 18.0, 17.0
PICTURE = Path(__file__).parent / "images" / "analysis.png"
WINDOW, SCALE = (1000, 1590), 0.82


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
    image = counted(mean_image(two_domains(), dose=3e4), np.random.default_rng(3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, result = folder / "two_domains.npy", folder / "result"
        np.save(source, image)
        stemloop.analyze(source, out=result, pixel_size_nm=PIXEL_PM / 1e3, material="BaTiO3")
        browser = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars"]
        size = [f"--force-device-scale-factor={SCALE}", f"--window-size={WINDOW[0]},{WINDOW[1]}"]
        subprocess.run([*browser, *size, f"--screenshot={PICTURE}", str(result / "report.html")], check=True)


if __name__ == "__main__":
    main()
