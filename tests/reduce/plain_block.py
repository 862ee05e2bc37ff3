"""The plainest block: dense frames and numpy. What every other form has to equal."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PlainBlock:
    data: np.ndarray

    @property
    def frames(self):
        return len(self.data)

    @property
    def shape(self):
        return self.data.shape[1:]

    @property
    def nbytes(self):
        return self.data.nbytes

    def dot(self, masks):
        return np.einsum("nyx,kyx->nk", self.data.astype(np.float64), np.asarray(masks, np.float64))

    def moments(self):
        rows, columns = np.indices(self.shape)
        return self.dot(np.stack([np.ones(self.shape), rows, columns]))

    def total(self):
        return self.data.sum(0, dtype=np.uint64)

    def frame(self, index):
        return self.data[index]

    def dense(self):
        return self.data


def pieces(data, cuts):
    """A 4D scan cut into blocks after the positions ``cuts``."""
    flat = data.reshape(-1, *data.shape[2:])
    edges = [0, *cuts, len(flat)]
    return [(a, PlainBlock(flat[a:b])) for a, b in zip(edges[:-1], edges[1:]) if b > a]
