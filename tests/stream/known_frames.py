import numpy as np

from stemloop.core.protocols import Batch


def frames(first, n, shape=(6, 5)):
    """Frame k can be told from every other: its numbers are k * 31 + 0, 1, 2 ..."""
    pixels = np.arange(np.prod(shape)).reshape(shape)
    return (np.arange(first, first + n).reshape(-1, *[1] * len(shape)) * 31 + pixels).astype(np.uint32)


def batch(first, n, stream="cbed"):
    return Batch(stream, first, frames(first, n), {"first": first})
