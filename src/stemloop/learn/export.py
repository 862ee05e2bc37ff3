"""A trained network as one ONNX file that carries its calibration and its numbers with it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from stemloop.core.errors import MissingExtra
from stemloop.learn.features import MAPS
from stemloop.learn.geometry import SIZE
from stemloop.learn.network import torch_module

#: The key of the file's metadata under which the JSON with calibration and numbers lies.
KEY = "stemloop"
OPSET = 17


def export(network: Any, card: dict[str, Any], path: Path) -> None:
    """Write ``network`` to ``path`` with ``card`` (JSON-able; ``factors`` among it) in its metadata.

    Inputs ``maps`` (n, 3, 64, 64) and ``condition`` (n, 3), outputs ``mean``, ``sigma`` (both in the network's units,
    sigma not yet calibrated), ``phase``, ``site``, ``novelty``; n is free.
    """
    torch = torch_module()
    try:
        import onnx
    except ModuleNotFoundError:
        raise MissingExtra("exporting needs onnx: pip install 'stemloop[ml]'.") from None
    example = (torch.zeros(2, MAPS, SIZE, SIZE), torch.zeros(2, 3))
    outputs = ["mean", "sigma", "phase", "site", "novelty"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            example,
            str(path),
            input_names=["maps", "condition"],
            output_names=outputs,
            dynamic_axes={name: {0: "n"} for name in ["maps", "condition", *outputs]},
            opset_version=OPSET,
            do_constant_folding=False,  # runtimes fold; the file keeps the names of the weights
            dynamo=False,
        )
    model = onnx.load(str(path))
    _halved(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: json.dumps(card, default=_plain)})
    onnx.save(model, str(path))


def _halved(model: Any) -> None:
    """Store large weights as float16 with a cast before their use, which runtimes fold when they load the file."""
    import onnx

    casts = []
    for stored in model.graph.initializer:
        if stored.data_type != onnx.TensorProto.FLOAT or np.prod(stored.dims) < 10_000:
            continue
        half = onnx.numpy_helper.to_array(stored).astype(np.float16)
        casts.append(onnx.helper.make_node("Cast", [f"{stored.name}.half"], [stored.name], to=onnx.TensorProto.FLOAT))
        stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{stored.name}.half"))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
