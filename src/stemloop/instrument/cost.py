"""What a plan would cost: the table that a dry run answers."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from stemloop.core.errors import StemloopError, from_code
from stemloop.core.instruction import Instruction


@dataclass(frozen=True)
class Cost:
    """What one instruction would cost: ``electrons`` and ``seconds``; ``verdict`` is ``ok`` or the refusal's code."""

    kind: str
    instruction: Instruction
    electrons: float
    seconds: float
    verdict: str
    message: str

    @property
    def refusal(self) -> StemloopError | None:
        """The error that the instruction would raise, or None."""
        return None if self.verdict == "ok" else from_code(self.verdict, self.message)


@dataclass(frozen=True)
class Costs(Sequence[Cost]):
    """The costs of a plan's steps, in order. ``ok`` says whether all of it would be carried out."""

    steps: tuple[Cost, ...]

    @property
    def electrons(self) -> float:
        """Electrons of all steps together."""
        return sum(step.electrons for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time [s] of all steps together."""
        return sum(step.seconds for step in self.steps)

    @property
    def ok(self) -> bool:
        """Whether no step would be refused."""
        return all(step.verdict == "ok" for step in self.steps)

    @overload
    def __getitem__(self, index: int) -> Cost: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Cost]: ...
    def __getitem__(self, index: int | slice) -> Cost | Sequence[Cost]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        yield "step", "electrons", "seconds", "verdict"
        for step in self.steps:
            verdict = step.verdict if step.verdict == "ok" else f"{step.verdict}: {step.message}"
            yield step.kind, f"{step.electrons:.3g}", f"{step.seconds:.3g}", verdict
        yield "in all", f"{self.electrons:.3g}", f"{self.seconds:.3g}", "ok" if self.ok else "refused"

    def __repr__(self) -> str:
        return "\n".join(f"{kind:<12}{dose:>12}{time:>10}  {verdict}" for kind, dose, time, verdict in self._rows())

    def _repr_html_(self) -> str:
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows())
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
