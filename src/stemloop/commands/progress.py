"""Progress bars on standard error, one for each step that is told of; none where nobody looks at them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def bars(*columns: Any, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """What it gives is called with (step, done, of how many). ``columns`` are those of ``rich.progress``, or none for
    the usual ones. An error takes them away."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as shown:
        tasks: dict[str, Any] = {}

        def tell(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = shown.add_task(title, total=total)
            shown.update(tasks[title], completed=done, total=total)

        try:
            yield tell
        except BaseException:
            shown.live.transient = True
            raise
