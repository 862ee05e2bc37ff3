"""Kept and found: vendor files read safely, sealed open files."""

from stemloop.store.files import read_sealed, seal, verify
from stemloop.store.readers import read

__all__ = ["read", "read_sealed", "seal", "verify"]
