"""The memory that a run says it took is its own."""

import subprocess
import sys

import numpy as np

from stemloop.campaign.memory import peak_memory_MB

SAYS = "from stemloop.campaign.memory import peak_memory_MB; print(peak_memory_MB())"


def test_a_program_does_not_answer_for_the_one_that_started_it():
    held = np.ones(100 << 20)  # 800 MB of this process, which its child's ru_maxrss begins with
    mine = peak_memory_MB()
    said = float(subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True).stdout)
    assert held.sum() == 100 << 20
    assert said < 400 < 800 < mine
