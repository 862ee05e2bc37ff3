"""How the network learns: seeded, resumable, with calibrated deviations at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemloop.core.errors import InputError
from stemloop.learn.examples import Examples, exposed
from stemloop.learn.network import CRYSTALS, UNITS, build, torch_module

#: Deviations [units of 0.01] of the guesses that the second look is trained from, chosen at random. They are wide
#: against what a pattern tells, so that the guess itself tells nothing: a network that is given good guesses learns to
#: believe them, and then the second look adds little to the first.
GUESS_ERRORS = (0.7, 1.5)


@dataclass(frozen=True)
class Settings:
    """How to train: ``epochs`` passes in batches of ``batch``, over ``exposures`` noisy versions of each pattern in
    turn, the highest ``rate`` of a one-cycle schedule, hidden ``width``, ``threads`` of torch, ``seed`` of all."""

    epochs: int = 8
    exposures: int = 2
    batch: int = 256
    rate: float = 1.5e-3
    width: int = 192
    threads: int = 2
    seed: int = 0


Report = Callable[[int, int, dict[str, float]], None]


class _Exposures:
    """Each example exposed :attr:`Settings.exposures` times, in turn by epoch, and kept (as float16): counting noise
    costs more time than learning from it. The guesses of the second look are drawn anew at every visit."""

    def __init__(self, examples: Examples, settings: Settings) -> None:
        self._examples, self._settings = examples, settings
        self._made: dict[int, dict[str, Any]] = {}

    def _make(self, number: int) -> dict[str, Any]:
        def part(start: int) -> dict[str, Any]:
            rng = np.random.default_rng([self._settings.seed, number, start])
            made = exposed(self._examples.take(slice(start, start + 256)), rng)
            del made["counts"]
            return {**made, "maps": made["maps"].astype(np.float16)}

        with ThreadPoolExecutor(self._settings.threads) as pool:
            parts = list(pool.map(part, range(0, len(self._examples), 256)))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def batches(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch in a random order, without the first ``skip``."""
        number, size = epoch % self._settings.exposures, self._settings.batch
        if number not in self._made:
            self._made[number] = self._make(number)
        made = self._made[number]
        order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._examples))
        for start in range(skip * size, len(order) - size // 2, size):
            chosen = order[start : start + size]
            batch = {key: value[chosen] for key, value in made.items()}
            yield {**batch, "maps": batch["maps"].astype(np.float32)}


def _gaussian(torch: Any, error: Any, log_sigma: Any) -> Any:
    """The negative log-likelihood, weighted by the detached deviation so that hard examples do not starve easy ones
    (beta = 0.5; M. Seitzer et al., 2022, arXiv:2203.09168)."""
    likelihood = 0.5 * (error * torch.exp(-log_sigma)).square() + log_sigma
    return likelihood * torch.exp(log_sigma.detach()).clamp(0.03, 10.0)


def loss(network: Any, batch: dict[str, Any], generator: Any) -> tuple[Any, dict[str, float]]:
    """The loss of one batch, and its parts."""
    torch = torch_module()
    maps, known = torch.from_numpy(batch["maps"]), torch.from_numpy(batch["condition"])
    phase, site = torch.from_numpy(batch["phase"]), torch.from_numpy(batch["site"])
    wanted = torch.from_numpy((batch["labels"] / UNITS).astype(np.float32))
    _, named, guess = network.first_look(maps, known)
    parts = {"phase": torch.nn.functional.cross_entropy(named, phase)}
    total = parts["phase"]
    for c, name in enumerate(CRYSTALS):
        mine = torch.nonzero(phase == c)[:, 0]
        if len(mine) < 2:
            continue
        share = len(mine) / len(phase)
        true = wanted[mine]
        parts[f"{name} guess"] = torch.nn.functional.smooth_l1_loss(guess[mine, c], true[:, :4])
        spread = torch.tensor(GUESS_ERRORS)[torch.randint(len(GUESS_ERRORS), (len(mine), 1), generator=generator)]
        off = true[:, :4] + spread * torch.randn((len(mine), 4), generator=generator)
        mean, log_sigma, where, _ = network.second_look(c, maps[mine], known[mine], off)
        error = mean - true
        parts[name] = _gaussian(torch, error, log_sigma).mean()
        parts[f"{name} site"] = torch.nn.functional.cross_entropy(where, site[mine])
        parts[f"{name} off"] = error[:, :3].detach().abs().median()
        total = total + share * (parts[f"{name} guess"] + parts[name] + 0.3 * parts[f"{name} site"])
    return total, {key: float(value.detach()) for key, value in parts.items()}


def train(
    examples: Examples,
    settings: Settings,
    checkpoint: Path,
    resume: bool,
    report: Report,
    start: Path | None = None,
) -> Any:
    """Train a network on ``examples``; ``report(step, steps, parts of the loss)`` is called about every 20 steps.

    After every epoch (and every 200 steps) the whole state is written to ``checkpoint``, and ``resume`` goes on from
    it: order and noise come from (seed, epoch) alone, so a training that was interrupted sees what it would have seen.
    ``start`` is a checkpoint of an earlier training whose weights are the first ones of this. Returns the network with
    the running mean of its weights (over 500 steps, fewer at first).
    """
    torch = torch_module()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    network = build(settings.width)
    if start is not None:
        network.load_state_dict(torch.load(start, weights_only=True)["network"])
    average = torch.optim.swa_utils.AveragedModel(network, avg_fn=_running_mean)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=0.02)
    per_epoch = len(range(0, len(examples) - settings.batch // 2, settings.batch))
    steps = settings.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    exposures = _Exposures(examples, settings)
    state = {"network": network, "average": average, "optimiser": optimiser, "schedule": schedule}
    step = _restored(checkpoint, settings, len(examples), state, generator) if resume else 0
    network.train()
    while step < steps:
        for batch in exposures.batches(step // per_epoch, step % per_epoch):
            total, parts = loss(network, batch, generator)
            optimiser.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(network)
            step += 1
            if step % 20 == 0:
                report(step, steps, parts)
            if step % 200 == 0 or step % per_epoch == 0:
                _kept(checkpoint, settings, len(examples), state, generator, step)
    for (_, mean), (_, last) in zip(average.module.named_buffers(), network.named_buffers(), strict=True):
        mean.copy_(last)
    return average.module.eval()


def _running_mean(mean: Any, last: Any, seen: Any) -> Any:
    return mean + (last - mean) * max(1 - 0.998, 9.0 / (10.0 + float(seen)))


def _kept(path: Path, settings: Settings, n: int, state: dict[str, Any], generator: Any, step: int) -> None:
    torch = torch_module()
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: part.state_dict() for name, part in state.items()}
    scratch = path.with_suffix(".part")
    drawn = {"generator": generator.get_state(), "dropout": torch.get_rng_state()}
    torch.save({**held, **drawn, "step": step, "n": n, **_recipe(settings)}, scratch)
    scratch.replace(path)


def _recipe(settings: Settings) -> dict[str, Any]:
    return {"settings": {k: v for k, v in asdict(settings).items() if k != "threads"}}


def _restored(path: Path, settings: Settings, n: int, state: dict[str, Any], generator: Any) -> int:
    torch = torch_module()
    if not path.exists():
        return 0
    held = torch.load(path, weights_only=True)
    if held["settings"] != _recipe(settings)["settings"] or held["n"] != n:
        raise InputError(
            f"{path} was written for {held['n']} examples and {held['settings']}; resume with the same, or train anew."
        )
    for name, part in state.items():
        part.load_state_dict(held[name])
    generator.set_state(held["generator"])
    torch.set_rng_state(held["dropout"])
    return int(held["step"])
