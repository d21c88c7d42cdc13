"""Which rows of a layer's weight are on this process: all of them, or its share under FSDP2 (torch's fully_shard).

fully_shard cuts each weight by rows, and the optimizer steps on the share that each process keeps (a DTensor with
Shard(0)). R acts on columns, so that what a step makes of a row needs no other row: the engine works on the rows that
are here, and only what adds up over rows (lengths, L's thin products, what a refresh decides) is summed over the
processes. Nothing else in the engine knows of shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_decor.layers import DecorLayer, is_sharded
from timm_decor.structures import OutputL, Sides

USE_FSDP2 = "use FSDP2, torch.distributed.fsdp.fully_shard"


class Cut(NamedTuple):
    """The rows of a weight that are here.

    Attributes:
        start: the first one.
        stop: the one behind the last.
        group: of the processes that have the others; None where each has all.
    """

    start: int
    stop: int
    group: Any


class Weight:
    """A layer's weight, with all rows here.

    Attributes:
        layer: whose it is.
        cut: None; those with equal ones can be one batch.
    """

    cut: Cut | None = None

    def __init__(self, layer: DecorLayer) -> None:
        self.layer = layer

    @property
    def parameter(self) -> Tensor:
        """What the optimizer holds."""
        return self.layer.weight

    @property
    def place(self) -> tuple[Any, ...]:
        """Where the parameter is, how much of it, cut over which processes, and in which precision."""
        parameter = self.parameter
        return parameter.dtype, parameter.device, parameter.numel(), getattr(parameter, "device_mesh", None)

    @property
    def value(self) -> Tensor:
        """The rows, in the parameter's memory; another tensor can take their place."""
        return self.parameter.data

    @value.setter
    def value(self, rows: Tensor) -> None:
        self.parameter.data = rows

    def local(self, tensor: Tensor) -> Tensor:
        """The rows that are here of a tensor like the parameter (its gradient, momentum), in its memory."""
        return tensor

    def whole(self, rows: Tensor) -> Tensor:
        """Rows, as a tensor like the parameter: what `local` takes apart."""
        return rows

    def grouped(self, rows: Tensor) -> Tensor:
        """Rows as (g, O, C, S): a view, but for rare memory formats."""
        return self.layer.grouped(rows)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """(g, O, C, S) as rows, a view where that is possible."""
        return self.layer.ungrouped(rows)

    def is_grouped_view(self, rows: Tensor) -> bool:
        """Whether `grouped` shares the rows' memory, so that what is written there is written to them."""
        return self.grouped(rows).data_ptr() == rows.data_ptr()

    def sides(self, sides: Sides, count: int) -> Sides:
        """L and R of `count` layers like this one, as they act on the rows that are here."""
        return sides

    def total(self, sums: Tensor) -> Tensor:
        """Sums over rows that are here, as sums over all rows."""
        return sums

    def gathered(self, rows: Tensor) -> Tensor:
        """(n, O, ...) of the rows that are here, of n layers like this one, with all rows."""
        return rows


class CutWeight(Weight):
    """A layer's weight of which some rows are here, perhaps none.

    The rows of a grouped convolution are made up to whole groups by zeros: R is a matrix a group.
    """

    cut: Cut

    def __init__(self, layer: DecorLayer, cut: Cut) -> None:
        super().__init__(layer)
        self.cut = cut
        shape = layer.decor_shape
        self._size = shape.channels, shape.positions
        if shape.groups == 1:
            self._groups, self._before, self._outputs = slice(0, 1), 0, cut.stop - cut.start
        else:
            self._outputs, first = shape.outputs, min(cut.start // shape.outputs, shape.groups - 1)
            self._groups = slice(first, max(first + 1, -(-cut.stop // shape.outputs)))  # one of zeros where no row is
            self._before = cut.start - first * shape.outputs if cut.stop > cut.start else 0
        self._all_outputs = shape.outputs
        self._is_grouped = shape.groups > 1
        self._parameter = layer.weight

    @property
    def parameter(self) -> Tensor:
        # From the outermost module's forward to the end of backward, and after an evaluation, the layer has the whole
        # weight. To put the shares back would have to be done by all processes at once.
        if is_cut(self.layer.weight):
            self._parameter = self.layer.weight
        return self._parameter

    @property
    def value(self) -> Tensor:
        # torch has no public way to the memory itself: a parameter's to_local() is a view, or not, by its version.
        return self.parameter._local_tensor  # type: ignore[attr-defined]

    @value.setter
    def value(self, rows: Tensor) -> None:
        self.parameter._local_tensor = rows  # type: ignore[attr-defined]

    def local(self, tensor: Tensor) -> Tensor:
        if not is_cut(tensor):
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} is whole, and the weight is cut by fully_shard: "
                f"a DTensor like the parameter is needed"
            )
        return tensor._local_tensor  # type: ignore[attr-defined]

    def whole(self, rows: Tensor) -> Tensor:
        return shared_out(rows, self.parameter)

    def grouped(self, rows: Tensor) -> Tensor:
        rows = rows.reshape(len(rows), *self._size)
        groups, here = self._groups.stop - self._groups.start, len(rows)
        if groups * self._outputs != here:
            made_up = rows.new_zeros(groups * self._outputs, *self._size)
            made_up[self._before : self._before + here] = rows
            rows = made_up
        return rows.view(groups, self._outputs, *self._size)

    def ungrouped(self, rows: Tensor) -> Tensor:
        here = self.cut.stop - self.cut.start
        return rows.flatten(0, 1)[self._before : self._before + here].reshape(here, *self.parameter.shape[1:])

    def sides(self, sides: Sides, count: int) -> Sides:
        if self._is_grouped:  # without L: see plan.plan
            return sides.of_groups(count, self._groups)
        outputs = sides.outputs
        if isinstance(outputs, OutputL):
            outputs = _CutL(outputs, self)
        return Sides(sides.inputs, outputs, sides.scale)

    def total(self, sums: Tensor) -> Tensor:
        if self.cut.group is None:
            return sums
        sums = sums.contiguous()
        dist.all_reduce(sums, group=self.cut.group)
        return sums

    def gathered(self, rows: Tensor) -> Tensor:
        out = rows.new_zeros(len(rows), self._all_outputs, *rows.shape[2:])
        out[:, self.cut.start : self.cut.stop] = rows
        return self.total(out)


class _CutL(OutputL):
    """L where it acts on the rows that are here.

    L mixes rows, but only along the directions that it keeps: what the processes sum is (n, r, D), not the weight.
    """

    def __init__(self, whole: OutputL, weight: CutWeight) -> None:
        basis = whole.basis[:, weight.cut.start : weight.cut.stop]
        super().__init__({"basis": basis, "gain": whole.gain, "tail": whole.tail})
        self._weight = weight

    def projected(self, rows: Tensor) -> Tensor:
        return self._weight.total(super().projected(rows))


def weight_of(layer: DecorLayer) -> Weight:
    """A layer's weight as it is now."""
    cut = _cut(layer.weight)
    return Weight(layer) if cut is None else CutWeight(layer, cut)


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: a share of it is here."""
    return hasattr(tensor, "_local_tensor")  # not isinstance: the class takes a while to import


def here(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are here."""
    return tensor._local_tensor if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def shared_out(rows: Tensor, like: Any) -> Tensor:
    """The rows that are here as a DTensor like another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def share(tensor: Tensor, like: Any) -> Tensor:
    """Of a whole tensor the rows that are here, as a DTensor like another one."""
    cut = _cut(like)
    assert cut is not None
    rows = tensor[cut.start : cut.stop].to(like.device, copy=True, memory_format=torch.contiguous_format)
    return shared_out(rows, like)


def put_back(model: nn.Module, layers: Iterable[tuple[str, DecorLayer]]) -> None:
    """Let every layer have the share again that the optimizer holds.

    All processes must do so at once: one whose weights are whole takes no part in putting the others' together.
    """
    if any("_is_fsdp_managed_module" in vars(layer) and not is_cut(layer.weight) for _, layer in layers):
        for module in model.modules():
            if is_sharded(module):
                module.reshard()  # type: ignore[operator]


def refuse_kinds(model: nn.Module) -> None:
    """Refuse models whose weights are cut into pieces that are no rows.

    Raises:
        ValueError: names the kind, and what to use.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(f"{kind} keeps weights in flat pieces without rows: {USE_FSDP2}")
        if is_sharded(module) and torch.__version__ < (2, 6):  # type: ignore[operator]
            raise ValueError(f"torch {torch.__version__} has an early fully_shard: FSDP2 needs torch 2.6 or newer")


def check_cuts(layers: Sequence[tuple[str, DecorLayer]]) -> None:
    """Refuse weights that are cut in another way than fully_shard does: they would train wrongly, and in silence.

    Args:
        layers: that are trained.

    Raises:
        ValueError: with what does not fit.
    """
    for name, layer in layers:
        if layer.weight.numel() != layer.decor_shape.size:  # what FSDP's first form and DeepSpeed leave between steps
            raise ValueError(
                f"the weight of {name} is here in flat pieces without rows (FSDP 1 or DeepSpeed): {USE_FSDP2}"
            )
    if not any(is_cut(layer.weight) for _, layer in layers):
        return
    if len({_checked(name, layer) for name, layer in layers}) > 1:
        raise ValueError("the layers' weights are cut over different processes: one device mesh for all of them")
    _check_backend(layers[0][1].weight)


def _checked(name: str, layer: DecorLayer) -> Any:
    """The processes over which a layer's weight is cut."""
    weight: Any = layer.weight
    if not is_cut(weight):
        raise ValueError(
            f"layer {name} is left out by fully_shard (ignored_params, or no fully_shard of the whole model), and "
            f"others are cut: FSDP does not average its gradient; freeze it, or shard it as well"
        )
    if "_is_fsdp_managed_module" not in vars(layer):
        raise ValueError(f"the weight of {name} is a DTensor that fully_shard did not make (tensor parallel?)")
    mesh, placements, processes = weight.device_mesh, weight.placements, dist.get_world_size()
    if mesh.size() != processes:
        raise ValueError(
            f"the weight of {name} is cut over {mesh.size()} of {processes} processes (tensor or pipeline parallel?): "
            f"only data parallel meshes are known"
        )
    kinds = [type(p).__name__ for p in placements if not p.is_replicate()]  # a _StridedShard is a tensor-parallel one
    if kinds not in ([], ["Shard"]) or not all(p.is_replicate() or p.dim == 0 for p in placements):
        raise ValueError(f"the weight of {name} is placed as {placements}: only rows can be cut, Shard(0)")
    cut = _cut(weight)
    assert cut is not None
    if len(weight._local_tensor) != cut.stop - cut.start:
        raise ValueError(f"the weight of {name} has {len(weight._local_tensor)} rows here, not {cut.stop - cut.start}")
    return cut.group


def _check_backend(weight: Any) -> None:
    """Offloaded weights are on the CPU, where not every process group can sum."""
    try:
        dist.all_reduce(torch.zeros(1, device=weight.device))
    except RuntimeError as error:
        raise ValueError(
            f"the weights are on {weight.device.type}, where these processes cannot add up ({error}): "
            f"init_process_group('cpu:gloo,cuda:nccl')"
        ) from error


def _cut(weight: Any) -> Cut | None:
    """Which rows of a weight are here; None for all of an ordinary tensor."""
    if not is_cut(weight):
        return None
    rows, mesh = weight.shape[0], weight.device_mesh
    over = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not over:
        return Cut(0, rows, None)
    (dim,) = over[-1:]
    each = -(-rows // mesh.size(dim))  # as torch.chunk: the last ones may have fewer, or none
    start = min(rows, each * mesh.get_local_rank(dim))
    return Cut(start, min(rows, start + each), mesh.get_group(dim))
