"""The instrument's process: ``python -m stemloop.campaign.host DIR/instrument`` builds the instrument that
``config.json`` names, and serves it until it is stopped or nobody has asked for anything for a while."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemloop.core.errors import InputError, InstrumentError, MissingExtra, StemloopError
from stemloop.core.protocols import Instrument

if TYPE_CHECKING:
    from stemloop.simulate.twin import Twin

#: What ``--instrument`` may name: the twin, the twin or Nion's own simulator inside Nion Swift, a recording.
KINDS = "twin, nion:twin, nion:usim, replay:FILE"

#: Of sulphur in MoS2 at 80 kV: J. C. Meyer et al., Phys. Rev. Lett. 109, 035503 (2012),
#: doi:10.1103/PhysRevLett.109.035503. Carbon in graphene is safe at 60 kV.
KNOCK_ON_BARN = {"MoS2": 1.8}


def build(config: dict[str, Any], folder: Path) -> Instrument:
    """The instrument that a run's settings name: see :data:`KINDS`."""
    kind, _, argument = str(config["instrument"]).partition(":")
    if kind == "twin" and not argument:
        return _twin(config, folder)
    if kind == "nion" and argument == "twin":
        from stemloop.instrument.nion.kinds import inside_nion

        return inside_nion(_twin(config, folder))
    if kind == "nion" and argument == "usim":
        from stemloop.instrument.nion.kinds import usim

        return usim()
    if kind == "replay" and argument:
        from stemloop.campaign.recording import recording
        from stemloop.instrument.replay import Replay

        return Replay(recording(argument))
    raise InputError(f"unknown instrument {config['instrument']!r}; known: {KINDS}.")


def _twin(config: dict[str, Any], folder: Path) -> Twin:
    """The twin of the settings; its truth goes beside the run, for scoring."""
    from stemloop.simulate.twin import Twin

    twin = Twin(config["specimen"], config["seed"], damage_barn=_cross_section(config))
    if "run" in config:  # for scoring
        truth = folder.parent / "truth"
        truth.mkdir(exist_ok=True)
        twin.write_truth(str(truth / "truth.npz"))
    return twin


def _cross_section(config: dict[str, Any]) -> float | None:
    """Knock-on cross-section [barn] if the beam is to damage the specimen."""
    if not config["damage"]:
        return None
    if config["specimen"] not in KNOCK_ON_BARN:
        raise InputError(f"no knock-on cross-section is known for {config['specimen']}; leave --damage out.")
    return KNOCK_ON_BARN[config["specimen"]]


def serve_by_hand(
    kind: str,
    directory: Path,
    *,
    specimen: str = "MoS2",
    seed: int = 0,
    limits: Path | None = None,
    dose_budget: float | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: tuple[Path, Path] | None = None,
    tell: Callable[[str], Any] = lambda _: None,
) -> None:
    """Serve the instrument ``kind`` out of ``directory`` until Ctrl-C; ``tell`` is given the address once it listens.

    What the rest means says :func:`stemloop.instrument.server.serve`; ``limits`` is a YAML or JSON file.
    """
    from stemloop.instrument.limits import Limits
    from stemloop.instrument.server import serve

    declared = None if limits is None else Limits.load(limits)
    try:
        instrument = build({"instrument": kind, "specimen": specimen, "seed": seed, "damage": False}, directory)
    except ModuleNotFoundError as error:  # a microscope's PC may have only what serving needs
        raise MissingExtra(
            f"{kind} needs the package {error.name}, which is not installed: install stemloop with all it depends on."
        ) from None
    name = instrument.info.name
    ended = threading.Event()
    teller = threading.Thread(target=_announce, args=(name, directory, ended, tell), daemon=True)
    teller.start()
    try:
        serve(instrument, directory, limits=declared, dose_budget=dose_budget, host=host, port=port, tls=tls)
    finally:
        ended.set()


def _announce(name: str, directory: Path, ended: threading.Event, tell: Callable[[str], Any]) -> None:
    """Say where the server listens, as soon as it does."""
    while not ended.wait(0.05):
        with contextlib.suppress(OSError, ValueError, KeyError):
            address = json.loads((directory / "address.json").read_text())
            if address["pid"] != os.getpid():
                continue  # of a server before, or of another that runs
            where = f"{address['scheme']}://{address['host']}:{address['port']}"
            tell(f"{name}: {where}, memory in {directory}. Ctrl-C ends it.")
            return


def main(folder: Path) -> int:
    """Serve the instrument of ``folder/config.json``; a failure is left in ``failed.json`` for the run to tell."""
    from stemloop.campaign.site import IDLE_EXIT_S
    from stemloop.instrument.server import serve
    from stemloop.stream.channel import Sender

    try:
        config = json.loads((folder / "config.json").read_text())
        instrument = build(config, folder)
        sink = Sender(config["frames"], run=config["run"])
        serve(instrument, folder, sink=sink, dose_budget=config["max_electrons"], idle_exit_s=IDLE_EXIT_S)
    except StemloopError as error:
        return _failed(folder, error)
    except Exception as error:  # whatever else went wrong must reach the user too, in a line
        traceback.print_exc()  # into log.txt
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _failed(folder, InstrumentError(f"the instrument failed ({words}); see {folder / 'log.txt'}."))
    return 0


def _failed(folder: Path, error: StemloopError) -> int:
    from stemloop.campaign.site import write_json

    write_json(folder / "failed.json", {"code": error.code, "message": str(error)})
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
