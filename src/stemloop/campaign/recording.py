"""Recorded files as something to run on."""

from __future__ import annotations

from stemloop.core.errors import InputError
from stemloop.core.signal import Signal
from stemloop.store.readers import read


def recording(path: str) -> Signal:
    """The signal of a file with the most scanned dimensions: a spectrum image rather than its survey."""
    signals = read(path)
    if not signals:
        raise InputError(f"{path} holds no signal that can be replayed.")
    return max(signals, key=lambda signal: (signal.data.ndim, signal.data.size))
