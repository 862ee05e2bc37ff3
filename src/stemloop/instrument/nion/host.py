"""Nion's acquisition stack without its window: event loop, hardware sources, cameras, scan and controls.

The registries of Nion Swift belong to the process: there is at most one stack, so one instrument, a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nion.instrumentation import DriftTracker, HardwareSource, camera_base, scan_base, stem_controller
from nion.utils import Registry

from stemloop.core.errors import InputError, InstrumentError

T = TypeVar("T")

#: A synchronized scan waits this long [s] for the next pixel. Nion's own 20 s is too short for a slow camera.
SYNCHRONIZED_SCAN_TIMEOUT_S = 300.0
_STOP_S = 5.0
#: A camera's own thread may be in the middle of a frame when its live view has stopped.
_REST_S = 0.1


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
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nion event loop", daemon=True)
        self._started = self._in_own_thread(lambda: self._start(register))
        Stack._running = self

    def close(self) -> None:
        """Stop what plays or records, take out the devices and end the threads. Closing twice is harmless."""
        if Stack._running is self:
            self._in_own_thread(self._started.close)
            Stack._running = None

    def _start(self, register: Callable[[], Callable[[], None]]) -> contextlib.ExitStack:
        with contextlib.ExitStack() as started:  # undone, last first, if the rest does not start
            started.callback(self._loop.close)
            directory = started.enter_context(tempfile.TemporaryDirectory(prefix="stemloop-nion-"))
            started.enter_context(_services(Path(directory), self._loop))
            started.callback(register())
            self._thread.start()
            started.callback(self._end_loop)
            started.callback(_stop_all)
            return started.pop_all()

    def _in_own_thread(self, do: Callable[[], T]) -> T:
        """Nion asks for the event loop of the thread that registers devices; the caller's own loop stays as it is."""

        def with_loop() -> T:
            asyncio.set_event_loop(self._loop)
            return do()

        with ThreadPoolExecutor(1, thread_name_prefix="nion start") as own:
            return own.submit(with_loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)


@contextlib.contextmanager
def _services(directory: Path, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
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
    time.sleep(_REST_S)


def usim(sample: int = 0) -> Callable[[], Callable[[], None]]:
    """Nion's own simulator for :class:`Stack`; ``sample``: 0 flakes, 1 amorphous carbon, 2 both with gold."""

    def register() -> Callable[[], None]:
        from nion.usim_device import DeviceConfiguration

        made = DeviceConfiguration.AcquisitionContextConfiguration(
            sample_index=sample, set_configuration_location=False
        )
        made.run()
        return made.stop

    return register
