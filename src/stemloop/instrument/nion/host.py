"""Nion's acquisition stack without its window: event loop, hardware sources, cameras, scan and controls.

The registries of Nion Swift belong to the process: there is at most one stack, so one instrument, a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemloop.core.errors import InputError, InstrumentError, MissingExtra

try:
    from nion.instrumentation import DriftTracker, HardwareSource, camera_base, scan_base, stem_controller
    from nion.utils import Registry
except ImportError:
    raise MissingExtra("the instrument nion needs Nion's packages: install them with: pip install stemloop[nion]") from None

_log = logging.getLogger(__name__)

#: A synchronized scan waits this long [s] for the next pixel. Nion's own 20 s is too short for a slow camera.
SYNCHRONIZED_SCAN_TIMEOUT_S = 300.0
_STOP_S = 5.0


@dataclass(frozen=True)
class Ids:
    """By what names the hardware is registered: the microscope's controls (``stem``), the ``scan`` unit, the
    diffraction ``camera`` and the ``eels`` camera (None where there is none)."""

    stem: str
    scan: str
    camera: str | None = None
    eels: str | None = None


USIM = Ids("usim_stem_controller", "usim_scan_device", "usim_ronchigram_camera", "usim_eels_camera")
#: Usual names on a Nion microscope. The cameras' names differ from site to site: see :func:`registered`.
NION = Ids("autostem_controller", "superscan", "ronchigram_camera", "eels_camera")


@dataclass(frozen=True)
class Hardware:
    """The registered parts of a microscope; ``camera`` and ``eels`` are None where there is none."""

    stem: Any
    scan: Any
    camera: Any = None
    eels: Any = None


def registered() -> dict[str, list[str]]:
    """The ids of the hardware sources and instruments that this process knows; run it in Nion Swift to see yours."""
    manager = HardwareSource.HardwareSourceManager()
    return {
        "sources": sorted(str(source.hardware_source_id) for source in manager.hardware_sources),
        "instruments": sorted(str(instrument.instrument_id) for instrument in manager.instruments),
    }


def find(ids: Ids) -> Hardware:
    """Look up the hardware of ``ids`` in this process: one that :class:`Stack` started, or Nion Swift's own."""
    manager = HardwareSource.HardwareSourceManager()
    found: dict[str, Any] = {"stem": manager.get_instrument_by_id(ids.stem) or _controller(ids.stem)}
    for part in ("scan", "camera", "eels"):
        name = getattr(ids, part)
        found[part] = manager.get_hardware_source_for_hardware_source_id(name) if name else None
    missing = [f"{part} {getattr(ids, part)!r}" for part in found if getattr(ids, part) and found[part] is None]
    if missing:
        known = registered()
        raise InputError(
            f"Nion Swift knows no {', '.join(missing)}; it knows {', '.join(known['sources'] + known['instruments'])}."
        )
    return Hardware(**found)


def _controller(name: str) -> Any:
    matching = (c for c in Registry.get_components_by_type("stem_controller") if c.instrument_id == name)
    return next(matching, None)


class Stack:
    """A running stack with the devices that ``register`` entered; ``close`` ends all of its threads.

    ``register`` is called when the stack is ready for devices, and returns what takes them out again.
    """

    _running: Stack | None = None

    def __init__(self, register: Callable[[], Callable[[], None]]) -> None:
        if Stack._running is not None:
            raise InstrumentError("a Nion stack runs in this process already; one process holds one instrument.")
        scan_base.SYNCHRONIZED_SCAN_TIMEOUT = SYNCHRONIZED_SCAN_TIMEOUT_S
        self._directory = tempfile.TemporaryDirectory(prefix="stemloop-nion-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nion event loop", daemon=True)
        with contextlib.ExitStack() as started:  # undone, last first, if the rest does not start
            started.callback(self._directory.cleanup)
            started.callback(self._loop.close)
            with _event_loop(self._loop):  # Nion asks for the loop of the thread that registers devices
                started.enter_context(_nion_services(Path(self._directory.name), self._loop))
                started.callback(register())
            self._thread.start()
            started.callback(self._end_loop)
            started.callback(_stop_all)
            self._started = started.pop_all()
        Stack._running = self

    def close(self) -> None:
        """Stop what plays or records, take out the devices and end the threads. Closing twice is harmless."""
        if Stack._running is self:
            Stack._running = None
            with _event_loop(asyncio.new_event_loop(), close=True):
                self._started.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)


@contextlib.contextmanager
def _event_loop(loop: asyncio.AbstractEventLoop, close: bool = False) -> Any:
    """Make ``loop`` the event loop of this thread for a while."""
    try:
        before = asyncio.get_event_loop_policy()._local._loop  # type: ignore[attr-defined]  # asking makes a loop
    except AttributeError:
        before = None
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(before)
        if close:
            loop.close()


@contextlib.contextmanager
def _nion_services(directory: Path, loop: asyncio.AbstractEventLoop) -> Any:
    HardwareSource.run()
    DriftTracker.run()
    camera_base.run(directory)
    scan_base.run(directory)
    stem_controller.register_event_loop(loop)
    try:
        yield
    finally:
        stem_controller.unregister_event_loop()
        scan_base.stop()
        camera_base.stop()
        for tracker in Registry.get_components_by_type("drift_tracker"):
            Registry.unregister_component(tracker, {"drift_tracker"})
        HardwareSource.stop()
        HardwareSource.HardwareSourceManager().close()


def _stop_all() -> None:
    for source in HardwareSource.HardwareSourceManager().hardware_sources:
        stop_playing(source)


def stop_playing(source: Any) -> None:
    """Stop the live view of a camera or scan, and wait until it has stopped: its frames began before the command."""
    if not source.is_playing:
        return
    source.abort_playing(sync_timeout=_STOP_S)
    end = time.monotonic() + _STOP_S
    while source.is_playing:
        if time.monotonic() > end:
            raise InstrumentError(f"the live view of {source.display_name} does not stop; stop it in Nion Swift.")
        time.sleep(0.001)


def usim(sample: int = 0) -> Callable[[], Callable[[], None]]:
    """Nion's own simulator for :class:`Stack`; ``sample``: 0 flakes, 1 amorphous carbon, 2 both with gold."""

    def register() -> Callable[[], None]:
        from nion.usim_device import DeviceConfiguration

        made = DeviceConfiguration.AcquisitionContextConfiguration(sample_index=sample, set_configuration_location=False)
        made.run()
        return made.stop

    return register
