"""The network that finds atom columns: what it is, what it learns from, and how.

A small U-Net (O. Ronneberger et al., 2015, doi:10.1007/978-3-319-24574-4_28) on images at its own scale
(:mod:`stemloop.learn.atomnet_image`). It answers at half resolution with points instead of areas (X. Zhou et al.,
"Objects as points", 2019, arXiv:1904.07850): a chance, an offset within the cell and a width. Several members make an
ensemble, whose disagreement tells what is not known (B. Lakshminarayanan et al., 2017, arXiv:1612.01474). They share
the first part of their training (compare the snapshots of G. Huang et al., 2017, arXiv:1704.00109), which costs less
and makes them more alike.

torch is imported when a network is built, never when this page is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.learn.atomnet_image import CELL, MAPS
from stemloop.learn.network import torch_module

Floats = NDArray[np.float64]

#: Pixels a side of an example; a multiple of :data:`DIVISOR`.
SIDE = 128
#: Sides of images that the network takes are multiples of this.
DIVISOR = 8
#: Width [cells] of the bump that marks a column in the target.
_BUMP = 0.8
#: Cells around a column that learn its offset and width.
_NEAR = 1.5


@dataclass(frozen=True)
class Example:
    """An image (SIDE, SIDE) at the network's scale, normalised, and its columns: ``position`` (n, 2) [px] and
    ``log_width`` (n,), the logarithm of width / WIDTH."""

    image: NDArray[np.float32]
    position: Floats
    log_width: Floats


@dataclass(frozen=True)
class Settings:
    """How to train: ``members`` networks of ``channels`` a level. One network learns for ``shared`` passes over the
    examples in batches of ``batch``; from it each member goes its own way for ``epochs`` more. ``rate`` is the highest
    of a one-cycle schedule (each way has one), ``halved``: forward in bfloat16, ``threads`` of torch, ``seed`` of all.
    """

    members: int = 3
    channels: tuple[int, int, int] = (16, 32, 64)
    shared: int = 9
    epochs: int = 2
    batch: int = 8
    rate: float = 4e-3
    halved: bool = True
    threads: int = 1
    seed: int = 0


Report = Callable[[int, int, int, float], None]


def build(channels: Sequence[int] = Settings.channels) -> Any:
    """A new network (``torch.nn.Module``) of three levels with ``channels`` each.

    ``forward(images (n, 1, rows, columns))``, sides multiples of 8, gives maps (n, MAPS, rows / 2, columns / 2) and
    features (n, k), the mean of the lowest level over the image.
    """
    torch = torch_module()
    nn = torch.nn
    one, two, three = channels

    def step(inputs: int, outputs: int, dilation: int = 1) -> Any:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    class Network(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Sequential(nn.PixelUnshuffle(CELL), step(CELL**2, one), step(one, one))
            self.middle = nn.Sequential(nn.MaxPool2d(2), step(one, two), step(two, two))
            self.coarse = nn.Sequential(nn.MaxPool2d(2), step(two, three), step(three, three, 2), step(three, three, 2))
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
            self.middle_again = nn.Sequential(step(three + two, two), step(two, two))
            self.fine_again = nn.Sequential(step(two + one, one), step(one, one))
            self.head = nn.Conv2d(one, MAPS, 1)
            nn.init.constant_(self.head.bias[0], -3.0)

        def forward(self, images: Any) -> tuple[Any, Any]:
            fine = self.fine(images)
            middle = self.middle(fine)
            coarse = self.coarse(middle)
            middle = self.middle_again(torch.cat([self.up(coarse), middle], 1))
            fine = self.fine_again(torch.cat([self.up(middle), fine], 1))
            return self.head(fine), coarse.mean((2, 3))

    return Network()


def ensemble(members: Sequence[Any]) -> Any:
    """The members as one module: maps (n, members, MAPS, rows / 2, columns / 2) and features (n, members * k)."""
    torch = torch_module()

    class Ensemble(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.members = torch.nn.ModuleList(members)

        def forward(self, images: Any) -> tuple[Any, Any]:
            answers = [member(images) for member in self.members]
            return torch.stack([a[0] for a in answers], 1), torch.cat([a[1] for a in answers], 1)

    return Ensemble().eval()


def target(example: Example) -> NDArray[np.float32]:
    """(MAPS + 1, SIDE / 2, SIDE / 2): bumps, offsets (row, col) [cells], log widths, and where the last three count."""
    cells = SIDE // CELL
    made = np.zeros((MAPS + 1, cells, cells), np.float32)
    made[0] = 0.0
    nearest = np.full((cells, cells), np.inf)
    place = (example.position + 0.5) / CELL - 0.5
    for (y, x), log_width in zip(place, example.log_width, strict=True):
        top, left = max(0, int(np.floor(y)) - 2), max(0, int(np.floor(x)) - 2)
        bottom, right = min(cells, int(np.floor(y)) + 4), min(cells, int(np.floor(x)) + 4)
        if top >= bottom or left >= right:
            continue
        dy, dx = y - np.arange(top, bottom)[:, None], x - np.arange(left, right)[None, :]
        distance = np.hypot(dy, dx)
        part = (slice(top, bottom), slice(left, right))
        made[0][part] = np.maximum(made[0][part], np.exp(-0.5 * (distance / _BUMP) ** 2))
        mine = (distance < _NEAR) & (distance < nearest[part])
        nearest[part] = np.where(mine, distance, nearest[part])
        for channel, value in ((1, dy), (2, dx), (3, log_width)):
            made[channel][part] = np.where(mine, value, made[channel][part])
    made[MAPS] = np.isfinite(nearest)
    return made


def loss(maps: Any, wanted: Any) -> Any:
    """Cross-entropy of the bumps a column, and absolute errors of offset and width where there is one."""
    torch = torch_module()
    bump, near = wanted[:, 0], wanted[:, MAPS]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(maps[:, 0], bump, reduction="none").sum((1, 2))
    unavoidable = torch.special.entr(bump).sum((1, 2)) + torch.special.entr(1 - bump).sum((1, 2))
    places = (entropy - unavoidable) / (bump.sum((1, 2)) + 60)
    away = (maps[:, 1:MAPS] - wanted[:, 1:MAPS]).abs() * near[:, None]
    away = away.sum((0, 2, 3)) / (near.sum() + 1)
    return places.mean() + 0.3 * (away[0] + away[1]) + 0.3 * away[2]


def train(examples: Sequence[Example], settings: Settings, report: Report, kept: Path | None = None) -> list[Any]:
    """Train every member on ``examples``; ``report(member, step, steps, loss)`` is called at each step
    (member -1 is what all share).

    An example is shown mirrored and turned by quarters at random. First weights, order and mirrors come from
    (seed, member) alone, so the same examples, settings and machine give the same weights to the last bit.
    Where a folder is ``kept``, what all share and each member is written to it when done, and what lies there is not
    taught again: an interrupted training goes on, and ends with the same bits.
    """
    torch = torch_module()
    if len(examples) < settings.batch:
        raise InputError(f"{len(examples)} examples do not fill one batch of {settings.batch}; make more.")
    torch.set_num_threads(settings.threads)
    images = np.stack([e.image for e in examples]).astype(np.float16)
    wanted = np.stack([target(e) for e in examples]).astype(np.float16)
    torch.manual_seed(settings.seed)
    first = build(settings.channels)
    if settings.shared and not _remembered(first, kept, "shared"):
        _taught(first, -1, settings.shared, images, wanted, settings, report)
        _remember(first, kept, "shared")
    members = []
    for number in range(settings.members):
        torch.manual_seed(1000 * (settings.seed + 1) + number)
        member = build(settings.channels)
        if not _remembered(member, kept, f"member-{number}"):
            if settings.shared:
                member.load_state_dict(first.state_dict())
            _taught(member, number, settings.epochs, images, wanted, settings, report)
            _remember(member, kept, f"member-{number}")
        members.append(member.to(memory_format=torch.contiguous_format).eval())
    return members


def finished(settings: Settings, kept: Path | None) -> bool:
    """Whether all stages of a training with ``settings`` lie in the folder ``kept``."""
    return kept is not None and all((kept / f"member-{n}.pt").exists() for n in range(settings.members))


def _remember(network: Any, kept: Path | None, name: str) -> None:
    """Write what ``network`` has learnt to the folder ``kept``."""
    if kept is not None:
        partial = kept / f"{name}.partial"
        torch_module().save(network.state_dict(), partial)
        partial.replace(kept / f"{name}.pt")


def _remembered(network: Any, kept: Path | None, name: str) -> bool:
    """Whether the folder ``kept`` knew what ``network`` has to learn; then it knows it."""
    if kept is None or not (kept / f"{name}.pt").exists():
        return False
    network.load_state_dict(torch_module().load(kept / f"{name}.pt", weights_only=True))
    return True


def _taught(
    network: Any,
    number: int,
    epochs: int,
    images: NDArray[np.float16],
    wanted: NDArray[np.float16],
    settings: Settings,
    report: Report,
) -> Any:
    """``network`` after ``epochs`` passes, in the order of the member ``number`` (-1: of what all share)."""
    torch = torch_module()
    rng = np.random.default_rng([settings.seed, number + 1])
    network = network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=1e-3)
    steps = epochs * (len(images) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=steps + 1, pct_start=0.2)
    network.train()
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - settings.batch + 1, settings.batch):
            chosen = order[start : start + settings.batch]
            turns = rng.integers(8, size=len(chosen))
            seen = np.stack([turned(images[i, None], t) for i, t in zip(chosen, turns, strict=True)])
            goal = np.stack([turned_target(wanted[i], t) for i, t in zip(chosen, turns, strict=True)])
            tensor = torch.from_numpy(seen.astype(np.float32)).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.halved):
                maps, _ = network(tensor)
            value = loss(maps.float(), torch.from_numpy(goal.astype(np.float32)))
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            step += 1
            report(number, step, steps, float(value.detach()))
    return network.eval()


def turned(maps: NDArray[Any], turn: int) -> NDArray[Any]:
    """``maps`` (k, rows, columns) turned by ``turn % 4`` quarters, and from 4 on transposed before."""
    if turn >= 4:
        maps = maps.transpose(0, 2, 1)
    return np.rot90(maps, turn % 4, axes=(1, 2))


def turned_target(maps: NDArray[Any], turn: int) -> NDArray[Any]:
    """A :func:`target` turned like its image: the offsets turn with it."""
    moved = turned(maps, turn).copy()
    row, col = (2, 1) if turn >= 4 else (1, 2)
    row_sign, col_sign = 1, 1
    for _ in range(turn % 4):  # a quarter turn maps (row, col) to (-col, row)
        row, col, row_sign, col_sign = col, row, -col_sign, row_sign
    moved[1], moved[2] = row_sign * moved[row].copy(), col_sign * moved[col].copy()
    return moved
