"""Folds over blocks: one pass, in any pieces, in any order, on any executor, with the same bits.

A :class:`~stemloop.core.protocols.Fold` says its empty part, takes blocks in, and merges parts. Everything that a fold
of this room keeps is either one row a position (:class:`Rows`; nothing is added up between positions) or a sum of
whole numbers. Both are exact, so the order of the additions cannot be seen in the result. Fractional weights are
rounded to whole multiples of 2^-16 for the same reason (:mod:`stemloop.reduce.detectors`).

The memory taken is that of the maps and of the few blocks that are under way, however long the scan is.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, MissingExtra
from stemloop.core.protocols import Block, Fold

#: (number of the first position, its block), or something to call where the work is done that gives such pairs.
Piece = tuple[int, Block] | Callable[[], Iterable[tuple[int, Block]]]
Maps = dict[str, NDArray[Any]]


@dataclass
class Rows:
    """A part that keeps one row of numbers a position: ``pieces`` are (first position, rows (n, k))."""

    scan: tuple[int, int]
    pieces: list[tuple[int, NDArray[Any]]] = field(default_factory=list)

    def add(self, first: int, rows: NDArray[Any]) -> Rows:
        """Take in the rows of the positions from ``first`` on."""
        self.pieces.append((first, rows))
        return self

    def join(self, other: Rows) -> Rows:
        """The rows of both."""
        return Rows(self.scan, self.pieces + other.pieces)

    def table(self, width: int) -> NDArray[np.float64]:
        """(scan rows, scan columns, ``width``): NaN where no block came."""
        table = np.full((self.scan[0] * self.scan[1], width), np.nan)
        for first, rows in self.pieces:
            table[first : first + len(rows)] = rows
        return table.reshape(*self.scan, width)


@dataclass(frozen=True)
class Together:
    """Several folds as one: each block is read once. Their maps must have different names."""

    folds: tuple[Fold, ...]

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> list[Any]:
        return [fold.init(scan, shape) for fold in self.folds]

    def step(self, part: list[Any], block: Block, first: int) -> list[Any]:
        return [fold.step(one, block, first) for fold, one in zip(self.folds, part, strict=True)]

    def merge(self, one: list[Any], other: list[Any]) -> list[Any]:
        return [fold.merge(a, b) for fold, a, b in zip(self.folds, one, other, strict=True)]

    def finish(self, part: list[Any]) -> Maps:
        maps: Maps = {}
        for fold, one in zip(self.folds, part, strict=True):
            found = fold.finish(one)
            if twice := maps.keys() & found.keys():
                raise InputError(f"two folds give a map called {', '.join(sorted(twice))}: give them other names.")
            maps.update(found)
        return maps


class Reduction:
    """A fold under way: takes blocks as they come and says at any time what is known.

    Each position may come once; a second block for it is an :class:`InputError`, as is one outside the scan or with
    frames of another shape. ``result`` leaves NaN where no block has come yet, and may be asked again and again.
    """

    def __init__(self, fold: Fold, scan: tuple[int, int], shape: tuple[int, int]) -> None:
        if min(*scan, *shape) < 1:
            raise InputError(f"a scan and its frames need sizes of at least 1; got {scan} and {shape}.")
        self.fold, self.scan, self.shape = fold, scan, shape
        self.part = fold.init(scan, shape)
        self._seen = np.zeros(scan[0] * scan[1], dtype=bool)

    @property
    def done(self) -> int:
        """Number of positions that were taken in."""
        return int(np.count_nonzero(self._seen))

    def missing(self) -> NDArray[np.int64]:
        """The positions (numbers, row-major) that have not come."""
        return np.flatnonzero(~self._seen)

    def take(self, first: int, block: Block) -> None:
        """Take in ``block``, whose first frame is position number ``first``."""
        self._mark(first, block.frames, block.shape)
        self.part = self.fold.step(self.part, block, first)

    def join(self, other: Reduction) -> None:
        """Take in what ``other``, of the same fold and scan, has seen."""
        if twice := np.flatnonzero(self._seen & other._seen).tolist():
            raise InputError(f"position {twice[0]} came twice: leave one of its blocks out.")
        self._seen |= other._seen
        self.part = self.fold.merge(self.part, other.part)

    def result(self) -> Maps:
        """The maps and patterns as far as they are known."""
        return self.fold.finish(self.part)

    def _mark(self, first: int, frames: int, shape: tuple[int, int]) -> None:
        if tuple(shape) != tuple(self.shape):
            raise InputError(f"a block has frames of {tuple(shape)}, the scan has {tuple(self.shape)}.")
        if first < 0 or first + frames > len(self._seen):
            raise InputError(
                f"a block covers positions {first} to {first + frames - 1}; a scan of {self.scan} has "
                f"{len(self._seen)}: give the scan that was measured."
            )
        if self._seen[first : first + frames].any():
            raise InputError(f"a position from {first} to {first + frames - 1} came twice: leave one block out.")
        self._seen[first : first + frames] = True


def reduce(
    folds: Fold | Sequence[Fold],
    pieces: Iterable[Piece],
    scan: tuple[int, int],
    shape: tuple[int, int],
    *,
    threads: int = 1,
    client: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Maps:
    """Fold a whole scan and return its maps and patterns.

    Parameters
    ----------
    folds : one fold, or several that share each block.
    pieces : what a live stream or a file gives: (first position, block), in any order; or callables that give such
        pairs when they are called, which lets a worker read its own part of a file.
    scan, shape : (rows, columns) of the scan and of a frame.
    threads : threads that fold at the same time (the kernels of blocks release the interpreter's lock).
    client : a ``distributed.Client``; its workers fold instead of threads (extra ``dask``). Blocks must pickle.
    progress : called with the number of positions that are done.

    Returns
    -------
    The maps by name; NaN where no block came. The bits do not depend on pieces, order, threads or client.

    At most two pieces a worker are under way, so the memory does not grow with the scan.
    """
    whole = Reduction(Together(tuple(folds)) if isinstance(folds, Sequence) else folds, scan, shape)
    if client is not None:
        return _on_dask(whole, pieces, client, progress)
    if threads > 1:
        return _on_threads(whole, pieces, threads, progress)
    for first, block in _pairs(pieces):
        whole.take(first, block)
        if progress:
            progress(whole.done)
    return whole.result()


def _pairs(pieces: Iterable[Piece]) -> Iterator[tuple[int, Block]]:
    for piece in pieces:
        if callable(piece):
            yield from piece()
        else:
            yield piece


def _folded(fold: Fold, scan: tuple[int, int], shape: tuple[int, int], piece: Piece) -> Reduction:
    """One piece as a part of its own."""
    part = Reduction(fold, scan, shape)
    for first, block in _pairs([piece]):
        part.take(first, block)
    return part


def _on_threads(
    whole: Reduction, pieces: Iterable[Piece], threads: int, progress: Callable[[int], None] | None
) -> Maps:
    """Each thread keeps its own part; a semaphore holds the source back while two pieces a thread are under way."""
    own, parts, room = threading.local(), [], threading.BoundedSemaphore(2 * threads)
    lock, done = threading.Lock(), 0

    def work(piece: Piece) -> None:
        nonlocal done
        try:
            if not hasattr(own, "part"):
                own.part = Reduction(whole.fold, whole.scan, whole.shape)
                with lock:
                    parts.append(own.part)
            for first, block in _pairs([piece]):
                own.part.take(first, block)
                with lock:
                    done += block.frames
        finally:
            room.release()

    under_way: set[concurrent.futures.Future[None]] = set()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for piece in pieces:
            room.acquire()
            under_way.add(pool.submit(work, piece))
            for future in [f for f in under_way if f.done()]:
                under_way.remove(future)
                future.result()
            if progress:
                progress(done)
        for future in under_way:
            future.result()
    for part in parts:
        whole.join(part)
    if progress:
        progress(whole.done)
    return whole.result()


def _on_dask(whole: Reduction, pieces: Iterable[Piece], client: Any, progress: Callable[[int], None] | None) -> Maps:
    """A task a piece; parts are merged as they come back."""
    try:
        from distributed import wait
    except ImportError:
        raise MissingExtra("folding on Dask needs the package distributed: pip install 'stemloop[dask]'.") from None

    most = 2 * max(1, sum(client.nthreads().values()))
    under_way: set[Any] = set()

    def collect() -> None:
        nonlocal under_way
        finished = wait(under_way, return_when="FIRST_COMPLETED")
        under_way = set(finished.not_done)
        for future in finished.done:
            whole.join(future.result())
        if progress:
            progress(whole.done)

    for piece in pieces:
        under_way.add(client.submit(_folded, whole.fold, whole.scan, whole.shape, piece, pure=False))
        if len(under_way) >= most:
            collect()
    while under_way:
        collect()
    return whole.result()
