"""Files that are there whole or not at all, and names that survive a power cut."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stemloop.core.errors import StorageError


def write_whole(path: Path, content: bytes | str, mode: int | None = None, mend: str = "") -> None:
    """Make ``content`` (a text as UTF-8) the file ``path``; see :func:`replacing`."""
    with writing(path, mode, mend) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: Path, mode: int | None = None, mend: str = "") -> Iterator[BinaryIO]:
    """A file to write to that becomes ``path`` when the block ends without an error; see :func:`replacing`."""
    with replacing(path, mode, mend) as part, open(part, "wb", opener=lambda p, flags: _new(p, flags, mode)) as file:
        yield file


@contextlib.contextmanager
def replacing(path: Path, mode: int | None = None, mend: str = "") -> Iterator[Path]:
    """A free name beside ``path``. The file that the block writes there takes the place of ``path`` in one step.

    A reader sees all of the new file or all of the old one, whenever the writer is killed or the power goes: the bytes
    are on the disk (fsync) before the name is theirs (rename), and the name is, too, when this returns. If the block
    raises, ``path`` is as it was and nothing stays beside it; what a killed writer leaves begins with a dot. Where
    ``path`` is a symbolic link, the file that it points to is replaced. A device or a pipe is left alone.

    path : its folder must exist.
    mode : the new file's permission bits; default those of the old file, or where there is none what is usual here.
    mend : what the reader of the error may do, default to make room or to choose another folder.

    Raises
    ------
    StorageError : for every ``OSError``: a full or read-only disk, a missing folder, no permission; and where ``path``
    is no file.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else path
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} is there already and is no file; choose another name.")
    part = path.with_name(f".{path.name}.{threading.get_native_id()}.part")
    try:
        part.unlink(missing_ok=True)
        yield part
        bits = _bits(path) if mode is None else mode
        with open(part, "rb+") as file:
            if bits is not None:
                part.chmod(bits)
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.absolute().parent)
    except OSError as error:
        mend = mend or "Make room, or choose another folder."
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. {mend}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _new(path: str, flags: int, mode: int | None) -> int:
    return os.open(path, flags | os.O_EXCL, 0o666 if mode is None else mode)


def _bits(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a new, renamed or removed file stays so after a power cut (POSIX).

    Where a folder cannot be opened (Windows) the system keeps names by itself and nothing is done.
    """
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
