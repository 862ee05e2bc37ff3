"""Where a result comes from: hashes of contents."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "shape": list(value.shape), "sha256": content_hash(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of bytes, an array (its type, shape and bytes) or any JSON-able value (keys sorted)."""
    digest = hashlib.sha256()
    if isinstance(value, (bytes, bytearray, memoryview)):
        digest.update(value)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(json.dumps(_plain(value), sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()
