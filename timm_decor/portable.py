"""R in a file of its own, decor.safetensors: to go on with decorrelated training from weights alone.

A checkpoint of the model is a plain one, and R lives in the optimizer's state, which nobody publishes. This is R and
the second moments behind it, without the optimizer: keys `<layer>|r|<name>` and `<layer>|moments|<name>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "1"
_PARTS = ("r", "moments")  # of a layer's state that are tensors
_FACTS = ("shape", "structure", "rank", "refreshes", "skips")


def write_r(state: Mapping[str, Any], path: str | Path) -> None:
    """Write R out of an optimizer's state.

    Args:
        state: `optimizer.state_dict()["timm_decor"]`.
        path: of the safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    facts = {}
    for layer, entry in state["layers"].items():
        facts[layer] = {key: entry[key] for key in _FACTS}
        for part in _PARTS:
            # a fresh copy of each, because safetensors refuses tensors that share memory
            tensors |= {
                f"{layer}|{part}|{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in entry[part].items()
            }
    metadata = {"format": "pt", "timm_decor": _FORMAT, "config": state["config"], "layers": json.dumps(facts)}
    save_file(tensors, path, metadata)


def read_r(path: str | Path) -> dict[str, Any]:
    """What `write_r` wrote, in the form of the optimizer's state: config (JSON) and layers.

    Raises:
        ValueError: no such file, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("timm_decor") != _FORMAT:
                raise ValueError(
                    f"{path} holds no R that this version can read (decor.safetensors of a decorrelated run)"
                )
            layers: dict[str, Any] = {
                name: {**facts, "r": {}, "moments": {}} for name, facts in json.loads(metadata["layers"]).items()
            }
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                layer, part, name = key.rsplit("|", 2)
                layers[layer][part][name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return {"config": metadata["config"], "layers": layers}
