"""How far a command is, for somebody who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with (positions done, positions in all).
Progress = Callable[[int, int], None]


def _nobody(done: int, of: int) -> None:
    """Nobody watches."""


@contextmanager
def show(watching: bool | Progress, title: str, of: int) -> Iterator[Progress]:
    """What to call when positions have been exposed: a bar in the terminal or notebook, a function, or nothing.

    A bar is drawn for more than one position only; it needs no network and is gone when the command has ended.
    """
    if not isinstance(watching, bool):
        yield watching
        return
    if not watching or of < 2:
        yield _nobody
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        task = bars.add_task(title, total=of)
        yield lambda done, of: bars.update(task, completed=done, total=of)
        bars.update(task, completed=bars.tasks[0].total)
