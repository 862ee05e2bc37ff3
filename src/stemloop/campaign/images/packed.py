"""Results on the disk: any of the house's dataclasses as one ``.npz`` file, the same bytes for the same values.

Arrays are entries ``a0``, ``a1`` ...; how they belong together is JSON in the entry ``tree``. Nothing is pickled, a
file appears whole or not at all, and only classes of this package are made when it is read.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.durable import write_whole
from stemloop.core.errors import IntegrityError

_PACKAGE = "stemloop."


def write(path: Path, value: Any) -> None:
    """Write ``value`` (a dataclass, tuple, list, dictionary, array or plain word) into ``path``, in one step."""
    arrays: dict[str, NDArray[Any]] = {}
    tree = _fold(value, arrays)
    out = io.BytesIO()
    text = json.dumps(tree, sort_keys=True).encode()
    np.savez_compressed(out, tree=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    write_whole(path, out.getvalue())


def read(path: Path) -> Any:
    """What :func:`write` wrote; an :class:`IntegrityError` if it is not that."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _unfold(json.loads(bytes(arrays.pop("tree"))), arrays)
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, ImportError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is damaged or of another version ({error}); remove it and run again.") from None


def _fold(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:  # noqa: PLR0911 (a table of kinds)
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        inner = {name: _fold(getattr(value, name), arrays) for name in names}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", "fields": inner}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inner = {name: _fold(getattr(value, name), arrays) for name in value._fields}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", "fields": inner}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_fold(item, arrays) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_fold(key, arrays), _fold(item, arrays)] for key, item in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no value that is kept")


def _unfold(tree: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    if "tuple" in tree:
        return tuple(_unfold(item, arrays) for item in tree["tuple"])
    if "list" in tree:
        return [_unfold(item, arrays) for item in tree["list"]]
    if "dict" in tree:
        return {_unfold(key, arrays): _unfold(item, arrays) for key, item in tree["dict"]}
    module, _, name = tree["class"].partition(":")
    if not module.startswith(_PACKAGE):
        raise ValueError(f"a class of {module}")
    made = getattr(importlib.import_module(module), name)
    if not (dataclasses.is_dataclass(made) or hasattr(made, "_fields")):
        raise ValueError(f"{name} is no dataclass")
    return made(**{key: _unfold(item, arrays) for key, item in tree["fields"].items()})
