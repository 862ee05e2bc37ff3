"""The instruments of this room: Nion's own simulator, any instrument inside the stack, and a microscope."""

from __future__ import annotations

from dataclasses import replace

from stemloop.core.errors import InputError
from stemloop.core.protocols import Instrument
from stemloop.instrument.nion import device
from stemloop.instrument.nion.adapter import NionInstrument, Setup
from stemloop.instrument.nion.device import Inside
from stemloop.instrument.nion.host import NION, USIM, Ids, Stack, find
from stemloop.instrument.nion.host import usim as usim_devices

#: The simulator's probe is a point; its "source" sets how fine a map of it is drawn.
USIM_SETUP = Setup(name="Nion's simulated STEM", field_m=(200e-9, 200e-9), source_fwhm_m=10e-9, binning=8)


def usim(sample: int = 0, setup: Setup = USIM_SETUP) -> NionInstrument:
    """Nion's simulator in a stack of its own. ``sample``: 0 flakes, 1 amorphous carbon, 2 flakes with gold."""
    stack = Stack(usim_devices(sample))
    return _over(stack, USIM, setup, None)


def inside_nion(instrument: Instrument, ids: Ids = device.TWIN) -> NionInstrument:
    """``instrument`` as a scan unit and cameras in a Nion stack, driven through that stack."""
    info = instrument.info
    if not {"image", "diffraction"} <= set(info.instructions):
        raise InputError(f"{info.name} cannot image and diffract, so it cannot be a device in Nion's stack.")
    ids = replace(ids, eels=ids.eels or "stemloop_eels") if "spectrum" in info.instructions else replace(ids, eels=None)
    inside = Inside(instrument)
    stack = Stack(device.register(inside, ids))
    setup = Setup(
        name=f"{info.name}, in Nion Swift",
        field_m=info.field_m,
        channels={name: name for name in info.detectors},
        source_fwhm_m=info.source_fwhm_m,
        sample=info.sample,
        counts=True,
        square_pixels=False,
    )
    return _over(stack, ids, setup, inside)


def attach(setup: Setup, ids: Ids = NION) -> NionInstrument:
    """The microscope of the Nion Swift in whose process this is called. It is left running at the end."""
    return NionInstrument(find(ids), setup)


def _over(stack: Stack, ids: Ids, setup: Setup, inside: Inside | None) -> NionInstrument:
    def close() -> None:
        stack.close()
        if inside is not None:
            inside.instrument.close()

    try:
        return NionInstrument(find(ids), setup, inside, close)
    except BaseException:
        stack.close()
        raise
