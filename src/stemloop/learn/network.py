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


def build(width: int = 192) -> Any:  # noqa: C901 (modules can only be defined once torch is there)
    """A new network (``torch.nn.Module``) with hidden layers of ``width`` units.

    ``forward(maps (n, 3, 64, 64), condition (n, 3))`` gives ``mean`` (n, 7) and ``sigma`` (n, 7) in :data:`UNITS` of
    ``(v_mean, v_diff, v_xy, phi, thickness, tilt_y, tilt_x)``, ``phase`` (n, 4) and ``site`` (n, 3) probabilities and
    ``novelty`` (n,). ``first_look`` and ``second_look`` are its two halves, for training.
    """
    torch = torch_module()
    nn = torch.nn

    def hidden(inputs: int) -> Any:
        return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def scaled(norm: Any, x: Any) -> Any:
        """``norm(x)`` within +-8; out of training in plain arithmetic, which exports whatever the shape's history."""
        if norm.training:
            return norm(x).clamp(-8, 8)
        return ((x - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)).clamp(-8, 8)

    step = torch.arange(-_WINDOW, _WINDOW + 1, dtype=torch.float32)
    window = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1).reshape(1, 1, -1, 2)

    def windows(maps: Any, g: Any, guess: Any) -> Any:
        """(n, maps, m, points) of ``maps`` around the reflections ``g`` (n or 1, m, 2) of the guessed lattice."""
        m, d, s, phi = (guess[:, i : i + 1] * UNITS[i] for i in range(4))
        a, b = 1 + m + d, 1 + m - d
        det = a * b - s * s
        cos, sin = torch.cos(phi), torch.sin(phi)
        x, y = cos * g[..., 0] - sin * g[..., 1], sin * g[..., 0] + cos * g[..., 1]
        moved = torch.stack([(b * x - s * y) / det, (a * y - s * x) / det], -1)
        grid = (moved[:, :, None, :] + window + CENTRE) * (2 / (SIZE - 1)) - 1
        return nn.functional.grid_sample(maps, grid, mode="bicubic", padding_mode="zeros", align_corners=True)

    class Expert(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, reflections: int) -> None:
            super().__init__()
            self.reflections = reflections
            self.inputs = inputs = MAPS * reflections * window.shape[2]
            self.scale = nn.BatchNorm1d(inputs, affine=False)
            self.trunk = hidden(inputs + _CONDITIONS)
            self.mean = nn.Linear(width, 7)
            self.log_sigma = nn.Linear(width, 7)
            self.site = nn.Linear(width, len(SITES))

        def forward(self, seen: Any, known: Any, guess: Any) -> tuple[Any, Any, Any, Any]:
            mine = scaled(self.scale, seen[:, :, : self.reflections].reshape(-1, self.inputs))
            features = self.trunk(torch.cat([mine, known], 1))
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
            places = [reflections(p) / PIXEL_PER_A for p in CRYSTALS]
            table = np.zeros((len(CRYSTALS), max(map(len, places)), 2), dtype=np.float32)
            for c, g in enumerate(places):
                table[c, : len(g)] = g
            self.register_buffer("table", torch.from_numpy(table), persistent=False)
            self.experts = nn.ModuleList(Expert(len(g)) for g in places)
            k, kinds = 2 * width + BEAM, len(PHASES)
            self.register_buffer("centre", torch.zeros(kinds, k))
            self.register_buffer("whiten", torch.zeros(kinds, k, NOVELTY_DIMENSIONS + BEAM))
            self.register_buffer("reach", torch.ones(kinds, 2))

        def first_look(self, maps: Any, known: Any) -> tuple[Any, Any, Any]:
            small = nn.functional.avg_pool2d(maps[:, :2], 2).flatten(1)
            look = self.trunk(torch.cat([self.drop(scaled(self.scale, small)), known], 1))
            return look, self.phase(look), self.guess(look).reshape(-1, len(CRYSTALS), 4)

        def second_look(self, crystal: int, maps: Any, known: Any, guess: Any) -> tuple[Any, Any, Any, Any]:
            expert = self.experts[crystal]
            seen = windows(maps, self.table[crystal : crystal + 1, : expert.reflections], guess)
            return expert(seen, known, guess)  # type: ignore[no-any-return]

        def features(self, maps: Any, known: Any) -> tuple[Any, ...]:
            """Both looks, the second twice, by the expert of the likeliest crystal."""
            look, phase, guesses = self.first_look(maps, known)
            chosen = nn.functional.one_hot(phase[:, : len(CRYSTALS)].argmax(1), len(CRYSTALS)).to(maps.dtype)
            g = torch.einsum("nc,cmx->nmx", chosen, self.table)
            guess = (guesses * chosen[:, :, None]).sum(1)
            for _ in range(2):
                seen = windows(maps, g, guess)
                answers = [expert(seen, known, guess) for expert in self.experts]
                mean, log_sigma, site, features = (
                    sum(a[part] * chosen[:, c : c + 1] for c, a in enumerate(answers)) for part in range(4)
                )
                guess = mean[:, :4]
            near = slice(CENTRE - 4, CENTRE + 5, 2)
            beam = maps[:, :2, near, near].reshape(-1, BEAM)
            return mean, log_sigma, phase, site, torch.cat([look, features, beam], 1)

        def distance(self, features: Any, named: Any) -> Any:
            """Novelty: how far (n, k) features lie from those of the training set's phase ``named`` (n,), 3 at the
            edge of what is usual: the larger of two Mahalanobis distances, that of the hidden layers in
            :data:`NOVELTY_DIMENSIONS` directions and that of the maps around the undiffracted beam."""
            chosen = nn.functional.one_hot(torch.as_tensor(named), len(PHASES)).to(features.dtype)
            away = torch.einsum("npk,pkd->npd", features[:, None, :] - self.centre, self.whiten).square()
            parts = [away[:, :, :NOVELTY_DIMENSIONS].mean(2), away[:, :, NOVELTY_DIMENSIONS:].mean(2)]
            return 3 * ((torch.stack(parts, 2).sqrt() / self.reach).amax(2) * chosen).sum(1)

        def forward(self, maps: Any, known: Any) -> tuple[Any, ...]:
            mean, log_sigma, phase, site, features = self.features(maps, known)
            novelty = self.distance(features, phase.argmax(1))
            return mean, log_sigma.exp(), phase.softmax(1), site.softmax(1), novelty

    return Network()


#: The features' principal directions whose distance from the training set is the novelty.
NOVELTY_DIMENSIONS = 48
#: Values of the intensity and edge maps around the undiffracted beam: 5 x 5 places each, 2 pixels apart.
BEAM = 50
