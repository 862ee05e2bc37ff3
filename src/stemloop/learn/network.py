"""The network that reads one nano-beam diffraction pattern.

It looks twice. A first, coarse look at the halved maps names the phase and guesses the stretch and rotation. Then, as a
registration of images is refined (B. D. Lucas and T. Kanade, 1981), the maps are sampled in small windows around the
places where the guessed lattice of that phase puts its reflections, and an expert of the phase reads from the windows
how far the guess is off, each quantity with its own deviation, and thickness, tilt and site. The second look is
repeated once from its own answer.

torch is imported when a network is built, never when this page is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemloop.core.errors import MissingExtra
from stemloop.core.structure import PHASES, SITES
from stemloop.learn.features import MAPS
from stemloop.learn.geometry import CENTRE, PIXEL_PER_A, SIZE, reflections

#: The unit of each output: strains and rotation in 0.01, thickness in nm, tilts in 0.01 rad.
UNITS = np.array([0.01, 0.01, 0.01, 0.01, 1e-9, 0.01, 0.01])
CRYSTALS = tuple(p for p in PHASES if p != "vacuum")
_WINDOW = 2
_CONDITIONS = 3


def torch_module() -> Any:
    """The torch package, or a :class:`MissingExtra` that says how to get it."""
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtra("training needs torch: pip install 'stemloop[ml]'.") from None
    return torch


def build(width: int = 192) -> Any:
    """A new network (``torch.nn.Module``) with hidden layers of ``width`` units.

    ``forward(maps (n, 3, 64, 64), condition (n, 3))`` gives ``mean`` (n, 7) and ``sigma`` (n, 7) in :data:`UNITS` of
    ``(v_mean, v_diff, v_xy, phi, thickness, tilt_y, tilt_x)``, ``phase`` (n, 4) and ``site`` (n, 3) probabilities and
    ``novelty`` (n,). ``first_look`` and ``second_look`` are its two halves, for training.
    """
    torch = torch_module()
    nn = torch.nn

    def hidden(inputs: int) -> Any:
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    class Expert(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, phase: str) -> None:
            super().__init__()
            g = torch.tensor(reflections(phase), dtype=torch.float32) / PIXEL_PER_A
            step = torch.arange(-_WINDOW, _WINDOW + 1, dtype=torch.float32)
            window = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1).reshape(1, 1, -1, 2)
            self.register_buffer("reflections", g, persistent=False)
            self.register_buffer("window", window, persistent=False)
            inputs = MAPS * len(g) * window.shape[2]
            self.scale = nn.BatchNorm1d(inputs, affine=False)
            self.trunk = hidden(inputs + _CONDITIONS)
            self.mean = nn.Linear(width, 7)
            self.log_sigma = nn.Linear(width, 7)
            self.site = nn.Linear(width, len(SITES))

        def forward(self, maps: Any, known: Any, guess: Any) -> tuple[Any, Any, Any, Any]:
            m, d, s, phi = (guess[:, i] * UNITS[i] for i in range(4))
            a, b = 1 + m + d, 1 + m - d
            det = a * b - s * s
            gx, gy = self.reflections[:, 0][None], self.reflections[:, 1][None]
            cos, sin = torch.cos(phi)[:, None], torch.sin(phi)[:, None]
            rx, ry = cos * gx - sin * gy, sin * gx + cos * gy
            x = (b[:, None] * rx - s[:, None] * ry) / det[:, None]
            y = (a[:, None] * ry - s[:, None] * rx) / det[:, None]
            at = torch.stack([x, y], -1)[:, :, None, :] + self.window + CENTRE
            grid = at * (2 / (SIZE - 1)) - 1
            seen = nn.functional.grid_sample(maps, grid, mode="bicubic", padding_mode="zeros", align_corners=True)
            seen = self.scale(seen.flatten(1)).clamp(-8, 8)
            features = self.trunk(torch.cat([seen, known], 1))
            step = self.mean(features)
            mean = torch.cat([step[:, :4] + guess, step[:, 4:]], 1)
            return mean, self.log_sigma(features).clamp(-7, 4), self.site(features), features

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.BatchNorm1d(2 * (SIZE // 2) ** 2, affine=False)
            self.trunk = hidden(2 * (SIZE // 2) ** 2 + _CONDITIONS)
            self.drop = nn.Dropout(0.1)
            self.phase = nn.Linear(width, len(PHASES))
            self.guess = nn.Linear(width, 4 * len(CRYSTALS))
            self.experts = nn.ModuleList(Expert(p) for p in CRYSTALS)
            k = 2 * width
            self.register_buffer("centre", torch.zeros(len(PHASES), k))
            self.register_buffer("whiten", torch.zeros(len(PHASES), k, NOVELTY_DIMENSIONS))
            self.register_buffer("reach", torch.ones(len(PHASES)))

        def first_look(self, maps: Any, known: Any) -> tuple[Any, Any, Any]:
            small = nn.functional.avg_pool2d(maps[:, :2], 2).flatten(1)
            look = self.trunk(torch.cat([self.drop(self.scale(small).clamp(-8, 8)), known], 1))
            return look, self.phase(look), self.guess(look).reshape(-1, len(CRYSTALS), 4)

        def second_look(self, crystal: int, maps: Any, known: Any, guess: Any) -> tuple[Any, Any, Any, Any]:
            return self.experts[crystal](maps, known, guess)  # type: ignore[no-any-return]

        def read(self, crystal: int, maps: Any, known: Any, guess: Any) -> tuple[Any, Any, Any, Any]:
            """Two second looks, the latter from the answer of the former."""
            once = self.second_look(crystal, maps, known, guess)[0][:, :4]
            return self.second_look(crystal, maps, known, once)

        def features(self, maps: Any, known: Any) -> tuple[Any, ...]:
            look, phase, guess = self.first_look(maps, known)
            chosen = nn.functional.one_hot(phase[:, : len(CRYSTALS)].argmax(1), len(CRYSTALS)).to(maps.dtype)
            answers = [self.read(c, maps, known, guess[:, c]) for c in range(len(CRYSTALS))]
            mean, log_sigma, site, features = (
                sum(a[part] * chosen[:, c : c + 1] for c, a in enumerate(answers)) for part in range(4)
            )
            return mean, log_sigma, phase, site, torch.cat([look, features], 1)

        def distance(self, features: Any, named: Any) -> Any:
            """Novelty: how far (n, k) features lie from those of the training set's phase ``named`` (n,), 3 at the
            edge of what is usual (a Mahalanobis distance in :data:`NOVELTY_DIMENSIONS` directions)."""
            chosen = nn.functional.one_hot(torch.as_tensor(named), len(PHASES)).to(features.dtype)
            at = torch.einsum("nk,pkd->npd", features, self.whiten)
            away = at - torch.einsum("pk,pkd->pd", self.centre, self.whiten)
            return 3 * ((away.square().mean(2).sqrt() / self.reach) * chosen).sum(1)

        def forward(self, maps: Any, known: Any) -> tuple[Any, ...]:
            mean, log_sigma, phase, site, features = self.features(maps, known)
            novelty = self.distance(features, phase.argmax(1))
            return mean, log_sigma.exp(), phase.softmax(1), site.softmax(1), novelty

    return Network()


#: The features' principal directions whose distance from the training set is the novelty.
NOVELTY_DIMENSIONS = 48
