"""Nion Swift as an instrument, and any instrument as a device in Nion Swift. Needs the extra ``nion``."""

from importlib.util import find_spec

from stemloop.core.errors import MissingExtra

try:
    _found = all(find_spec(f"nion.{part}") for part in ("swift", "instrumentation", "device_kit", "usim_device"))
except ModuleNotFoundError:
    _found = False
if not _found:
    raise MissingExtra("Nion's packages are not installed; install them with: pip install 'stemloop[nion]'")
