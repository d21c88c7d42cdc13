"""Decorrelation's state: in `optimizer.state_dict()`, in a file of its own, and whether it fits.

`optimizer.state_dict()["timm_decor"]` has a dictionary a layer. The same dictionaries are in the entries of the layers'
weights ("state", parameter, "timm_decor"), for those who take nothing else of an optimizer's state, such as
torch.distributed.checkpoint's `get_state_dict`; tensors are shared, so that neither memory nor a file grows.

A checkpoint of the model is a plain one. decor.safetensors is R and the second moments behind it without the optimizer,
to go on with decorrelated training from weights alone: keys `<layer>|r|<name>` and `<layer>|moments|<name>`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from timm_decor.config import DecorConfig
from timm_decor.engine.group import LayerGroup
from timm_decor.engine.shards import is_cut
from timm_decor.layers import DecorLayer
from timm_decor.plan import LayerPlan, plan
from timm_decor.shape import parts
from timm_decor.structures import SCALE, is_of_outputs

STATE_KEY = "timm_decor"  # in optimizer.state_dict(), and in the entries of the layers' weights there
STATE_FORMAT = 5
_FILE_FORMAT = "1"
_PARTS = ("r", "moments")  # of a layer's state that are tensors
_BLOCK = 4096  # bytes
_FACTS = ("shape", "structure", "rank", "refreshes", "skips")


def layer_state(group: LayerGroup, position: int) -> dict[str, Any]:
    """Tensors and numbers that continue one layer exactly; `take_over` takes them back."""
    layer, count = group.layers[position], len(group.layers)
    return {
        "shape": list(layer.weight.shape),
        "structure": group.plan.structure,
        "rank": group.plan.rank,
        "outputs": group.plan.outputs,
        "r": {name: parts(value, count)[position] for name, value in group.sides.tensors().items()},
        "moments": group.moments_of(position),
        # inputs that no refresh has used yet: there are some after a step that a gradient scaler skipped
        "recorded": layer.recorded(),
        "refreshes": group.refreshes[position],
        "skips": group.skips[position],
        "late": position in group.late,
    }


def planned(plan: LayerPlan, entry: Mapping[str, Any]) -> LayerPlan:
    """A layer's plan as a saved state has it: with its rank."""
    return dataclasses.replace(plan, rank=entry["rank"])


def take_over(group: LayerGroup, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Continue from saved layers, whatever device or grouping they were saved from; the plans agree.

    What is saved of the other side is left, and what is missing, or a layer that is, starts from the identity: SGD and
    AdamW can begin with each other's R, and a head of other classes with the R of its inputs.
    """
    count = len(group.names)
    entries = [_fitting(saved.get(name, {}), layer) for name, layer in zip(group.names, group.layers, strict=True)]

    def together(kind: str, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat(
                [
                    entry.get(kind, {}).get(name, own).to(own, copy=True)
                    for entry, own in zip(entries, parts(value, count), strict=True)
                ]
            )
            for name, value in now.items()
        }

    group.sides = group.sides.with_tensors(together("r", group.sides.tensors()))
    group.moments = together("moments", group.moments)
    group.refreshes, group.skips = ([entry.get(key, 0) for entry in entries] for key in ("refreshes", "skips"))
    group.late = [i for i, entry in enumerate(entries) if entry.get("late")]


def _fitting(entry: Mapping[str, Any], layer: DecorLayer) -> Mapping[str, Any]:
    """A saved layer without its output side where it has other outputs: tensor by tensor, some would fit by chance."""
    if not entry or entry["shape"] == list(layer.weight.shape):
        return entry
    of_inputs = {
        part: {name: value for name, value in entry[part].items() if not is_of_outputs(name)} for part in _PARTS
    }
    return {**entry, **of_inputs}


def restore_recorded(group: LayerGroup, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Go on recording where the state was saved; recording must have started."""
    for name, layer in zip(group.names, group.layers, strict=True):
        layer.restore_recorded(saved.get(name, {}).get("recorded", {}))


def with_entries(optimizer: Optimizer, state_dict: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state with decorrelation's in the entries of the weights as well.

    Args:
        optimizer: whose state it is.
        state_dict: with decorrelation's state under `STATE_KEY`.
        weights: of the layers, by the layers' names.
    """
    position = {id(p): i for i, p in enumerate(_parameters(optimizer))}
    saved, state = state_dict[STATE_KEY], dict(state_dict["state"])
    common = {key: value for key, value in saved.items() if key != "layers"}
    for name, weight in weights.items():
        number, layer = position.get(id(weight)), saved["layers"][name]
        if number is None:  # it was replaced after attach
            continue
        # A weight's first step fills an entry that is empty, and would take ours for the optimizer's.
        if state.get(number) or not any(state.values()):
            # Of sharded weights each process recorded its own sums, and entries are taken to be the same everywhere. A
            # late layer has sums at most times, and a state loads into entries of the same tensors: it begins anew.
            kept = _PARTS if is_cut(weight) or layer["late"] else (*_PARTS, "recorded")
            tensors = {key: value for key, value in layer.items() if key in kept}
            facts = {key: value for key, value in layer.items() if not isinstance(value, dict)}
            entry = {"facts": _as_tensor({"common": common, "layer": facts}), **tensors}
            state[number] = {**state.get(number, {}), STATE_KEY: entry}
    return {**state_dict, "state": state}


def without_entries(
    optimizer: Optimizer, state_dict: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """An optimizer's state as torch is to load it, and decorrelation's out of it; None where there is none.

    Args:
        optimizer: that is to load it; its parameters are in the order of the state's.
        state_dict: with numbers or names for parameters.
        weights: of the layers, by the layers' names.
    """
    keys = [key for group in state_dict.get("param_groups", ()) for key in group["params"]]
    names = {id(weight): name for name, weight in weights.items()}
    layer_of = {key: names.get(id(p)) for key, p in zip(keys, _parameters(optimizer), strict=False)}
    found: dict[str, Any] | None = None
    state = {}
    for key, entry in state_dict.get("state", {}).items():
        if isinstance(entry, Mapping) and STATE_KEY in entry:
            own, name = dict(entry[STATE_KEY]), layer_of.get(key)
            facts = _from_tensor(own.pop("facts"))
            found = found or {**facts["common"], "layers": {}}
            if name is not None:
                found["layers"][name] = {**facts["layer"], "recorded": {}, **own}
            entry = {name: value for name, value in entry.items() if name != STATE_KEY}
            if not entry:
                continue
        state[key] = entry
    rest = {key: value for key, value in state_dict.items() if key != STATE_KEY}
    return {**rest, "state": state}, state_dict.get(STATE_KEY, found)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which an optimizer's state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_tensor(facts: dict[str, Any]) -> Tensor:
    """Facts as bytes of JSON: torch.distributed.checkpoint flattens no text and no lists.

    Of one length however many digits a count has: it loads into tensors of the same size.
    """
    text = json.dumps(facts).encode()
    text = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _from_tensor(text: Tensor) -> dict[str, Any]:
    return json.loads(bytes(text.tolist()))


def check_loadable(
    saved: Mapping[str, Any], kind: str, layers: Sequence[tuple[str, DecorLayer]], config: DecorConfig
) -> None:
    """Refuse the state of another version, model or kind of optimizer.

    Raises:
        ValueError: with what does not fit.
    """
    if saved.get("format") != STATE_FORMAT:
        raise ValueError(
            f"decorrelation state format {saved.get('format')!r}; can read {STATE_FORMAT}: go on from the weights alone"
        )
    check_fits(saved, layers, config)
    for name, layer in layers:
        has, shape = saved["layers"][name]["shape"], list(layer.weight.shape)
        if has != shape:
            raise ValueError(f"the optimizer state has shape {has} for layer {name}, not {shape}")
    if saved["kind"] != kind:
        raise ValueError(f"the optimizer state is that of a {saved['kind']}, not that of a {kind}")
    _check_same(saved, config, "sides", "graft", "rank")


def check_fits(saved: Mapping[str, Any], layers: Sequence[tuple[str, DecorLayer]], config: DecorConfig) -> None:
    """Refuse the R of another rule, structure or model; a head of other classes has the same inputs.

    Raises:
        ValueError: with what does not fit.
    """
    _check_same(saved, config, "rule", "structure")
    for name, layer in layers:
        entry, shape = saved["layers"].get(name), list(layer.weight.shape)
        if entry is None or entry["shape"][1:] != shape[1:]:
            has = "nothing" if entry is None else f"shape {entry['shape']}"
            raise ValueError(f"the saved R has {has} for layer {name}, which has shape {shape}")
        own = plan(config, layer.decor_shape, layer.weight.dtype).identity("meta").tensors()
        groups = next((len(r) for n, r in entry["r"].items() if _is_of_groups(n, own) and len(r) != len(own[n])), None)
        if groups is not None:
            raise ValueError(f"the saved R has {groups} groups for layer {name}, which has {layer.decor_shape.groups}")


def _is_of_groups(name: str, own: Mapping[str, Tensor]) -> bool:
    return name in own and name != SCALE and not is_of_outputs(name)


def _check_same(saved: Mapping[str, Any], config: DecorConfig, *names: str) -> None:
    theirs = json.loads(saved["config"])
    for name in names:
        has, wanted = theirs.get(name), getattr(config, name)
        if has != wanted:
            raise ValueError(
                f"the saved R is of {name} {has!r}, this run uses {wanted!r}; "
                f"attach with the saved config, or start without that R"
            )


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
                if name != SCALE  # another run's gradients have another; it is measured anew
            }
    metadata = {"format": "pt", "timm_decor": _FILE_FORMAT, "config": state["config"], "layers": json.dumps(facts)}
    save_file(tensors, path, metadata)


def read_r(path: str | Path) -> dict[str, Any]:
    """What `write_r` wrote, in the form of the optimizer's state: config (JSON) and layers.

    Raises:
        ValueError: no such file, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("timm_decor") != _FILE_FORMAT:
                raise ValueError(
                    f"{path} holds no R that this version can read (decor.safetensors of a decorrelated run)"
                )
            layers: dict[str, Any] = {
                name: {**{key: facts[key] for key in _FACTS}, "r": {}, "moments": {}}
                for name, facts in json.loads(metadata["layers"]).items()
            }
            dict(json.loads(metadata["config"]))
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                layer, part, name = key.rsplit("|", 2)
                layers[layer][part][name] = file.get_tensor(key)
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return {"config": metadata["config"], "layers": layers}
