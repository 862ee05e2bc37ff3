"""How much memory a run took, over all of its processes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def _high_water_MB(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def peak_memory_MB(*pids: int | None) -> float:
    """Sum [MB] of the peaks of resident memory: this process, its largest ended child, and the processes ``pids``.

    An upper bound of the peak of the sum, since the processes need not peak together.
    """
    scale = 1 / 2**20 if sys.platform == "darwin" else 1 / 1024
    # Linux keeps ru_maxrss through exec: it may be that of the program which started this one
    own = _high_water_MB(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * scale
    return own + children + sum(_high_water_MB(pid) for pid in pids if pid is not None)
