"""What an HDF5 file may not do: reach outside itself, or grow beyond bounds when it is read.

HDF5 links and storage can name any file of the machine, and a few kilobytes can stand for terabytes. The walk below
opens no link that leaves the file. It runs in a child process (see :mod:`stemloop.store.sandbox`), because a malformed
file can crash the HDF5 library itself.
"""

from __future__ import annotations

import os
from typing import Any

import h5py

from stemloop.core.errors import UnreadableFile

#: deflate, shuffle, fletcher32, szip, scale-offset, LZF, Blosc, LZ4, bitshuffle, ZFP, Zstandard, Blosc2
FILTERS = frozenset({1, 2, 3, 4, 6, 32000, 32001, 32004, 32008, 32013, 32015, 32026})
_ALWAYS_FINE = 1 << 28


def check(path: str, *, objects: int = 100_000, depth: int = 64, ratio: int = 2000, total_bytes: int = 1 << 40) -> None:
    """Refuse, as an :class:`UnreadableFile`, an HDF5 file that is not harmless.

    Parameters
    ----------
    objects, depth : most objects, and deepest nesting of groups.
    ratio : most logical bytes a stored byte, for datasets above 256 MB.
    total_bytes : most logical bytes of all datasets together.
    """
    seen: set[int] = set()
    count = total = 0
    with h5py.File(path, "r", locking=False) as file:
        waiting: list[tuple[Any, int]] = [(file.id, 0)]
        while waiting:
            group, level = waiting.pop()
            if level > depth:
                raise _refusal(path, f"groups are nested deeper than {depth}")
            for name in group:
                count += 1
                if count > objects:
                    raise _refusal(path, f"it has more than {objects} objects")
                kind = group.links.get_info(name).type
                if kind == h5py.h5l.TYPE_SOFT:
                    continue
                if kind != h5py.h5l.TYPE_HARD:
                    raise _refusal(path, f"{_word(name)} is a link to another file")
                item = h5py.h5o.open(group, name)
                address = h5py.h5o.get_info(item).addr
                if address in seen:
                    continue
                seen.add(address)
                if isinstance(item, h5py.h5g.GroupID):
                    waiting.append((item, level + 1))
                elif isinstance(item, h5py.h5d.DatasetID):
                    total += _dataset(path, _word(name), item, ratio)
                    if total > total_bytes:
                        raise _refusal(path, f"its datasets stand for more than {total_bytes >> 30} GiB")


def _dataset(path: str, name: str, item: Any, ratio: int) -> int:
    """The logical size [bytes] of a dataset that is harmless."""
    plan = item.get_create_plist()
    if plan.get_external_count():
        raise _refusal(path, f"the data of {name} are in another file")
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise _refusal(path, f"{name} is put together from other datasets (virtual)")
    filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
    if not filters <= FILTERS:
        raise _refusal(path, f"{name} needs the unknown filter {min(filters - FILTERS)}")
    size = int(item.get_type().get_size())
    for side in item.shape or ():
        size *= side
    if size > _ALWAYS_FINE and size > ratio * max(item.get_storage_size(), 1):
        raise _refusal(path, f"{name} would grow from {item.get_storage_size()} to {size} bytes")
    return size


def _word(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))


def _refusal(path: str, why: str) -> UnreadableFile:
    return UnreadableFile(f"{os.path.basename(path)} was not read, to be safe: {why}.")
