"""The instrument's process: ``python -m stemloop.campaign.host DIR/instrument`` builds the instrument that
``config.json`` names, and serves it until it is stopped or nobody has asked for anything for a while."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stemloop.campaign.site import IDLE_EXIT_S, write_json
from stemloop.core.errors import InputError, StemloopError
from stemloop.core.protocols import Instrument


def build(config: dict[str, Any], folder: Path) -> Instrument:
    """The instrument that a run's settings name: ``twin`` or ``replay:FILE``."""
    kind, _, argument = str(config["instrument"]).partition(":")
    if kind == "twin" and not argument:
        from stemloop.simulate.twin import Twin

        twin = Twin(config["specimen"], seed=config["seed"], damage=config["damage"])
        truth = folder.parent / "truth"
        truth.mkdir(exist_ok=True)
        twin.write_truth(truth / "truth.npz")
        return twin
    if kind == "replay" and argument:
        from stemloop.instrument.replay import Replay
        from stemloop.store.readers import read

        return Replay(_recording(read(argument), argument))
    raise InputError(f"unknown instrument {config['instrument']!r}; known: twin, replay:FILE.")


def _recording(signals: list[Any], path: str) -> Any:
    """The signal of a file with the most scanned dimensions: a spectrum image rather than its survey."""
    if not signals:
        raise InputError(f"{path} holds no signal that can be replayed.")
    return max(signals, key=lambda signal: (signal.data.ndim, signal.data.size))


def main(folder: Path) -> int:
    """Serve the instrument of ``folder/config.json``; a failure at the start is left in ``failed.json``."""
    from stemloop.instrument.server import serve
    from stemloop.stream.channel import Sender

    try:
        config = json.loads((folder / "config.json").read_text())
        instrument = build(config, folder)
        sink = Sender(config["frames"], run=config["run"])
        serve(instrument, folder, sink=sink, dose_budget=config["max_electrons"], idle_exit_s=IDLE_EXIT_S)
    except StemloopError as error:
        write_json(folder / "failed.json", {"code": error.code, "message": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
