"""An ensemble that finds atom columns as one ONNX file that carries its calibration and its numbers with it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from stemloop.core.errors import MissingExtra
from stemloop.learn.atomnet import SIDE
from stemloop.learn.export import KEY, OPSET
from stemloop.learn.network import torch_module


def export(network: Any, card: dict[str, Any], path: Path) -> None:
    """Write ``network`` (of :func:`stemloop.learn.atomnet.ensemble`) to ``path`` with ``card`` in its metadata.

    Input ``images`` (n, 1, rows, columns), outputs ``maps`` (n, members, MAPS, rows / 2, columns / 2) and ``features``
    (n, k); n, rows and columns are free (multiples of 8).
    """
    torch = torch_module()
    try:
        import onnx
    except ModuleNotFoundError:
        raise MissingExtra("exporting needs onnx: pip install 'stemloop[ml]'.") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    free = {0: "n", 2: "rows", 3: "columns"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 1, SIDE, SIDE),),
            str(path),
            input_names=["images"],
            output_names=["maps", "features"],
            dynamic_axes={"images": free, "maps": {0: "n", 3: "cell rows", 4: "cell columns"}, "features": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: json.dumps(card)})
    onnx.save(model, str(path))
