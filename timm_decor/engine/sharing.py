"""A refresh on several processes: one sum of the statistics, the work shared out, one exchange of the results.

Every process gets the same R to the bit, because each layer's is made by one process and sent to the others. On a
single process nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from timm_decor.engine.group import LayerGroup, Refreshed
from timm_decor.shape import parts


def averaged_moments(groups: Sequence[LayerGroup]) -> list[dict[str, Tensor]]:
    """Each group's recorded moments, averaged over the rows of all micro-batches and processes.

    One all-reduce in the default process group, of the same size on every process whatever inputs each of them saw.
    """
    totals = [group.recorded() for group in groups]
    if processes() > 1:
        _sum_over_processes([tensor for total in totals for tensor in total.values()])
    return [group.averaged(total) for group, total in zip(groups, totals, strict=True)]


def refreshed(groups: Sequence[LayerGroup], moments: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """L and R of every group after a refresh from `moments`; of several processes each makes those of some layers."""
    if processes() == 1:
        return [group.refreshed(each) for group, each in zip(groups, moments, strict=True)]
    share = _shares(groups, processes())[dist.get_rank()]
    results = []
    for group, each, index in zip(groups, moments, share, strict=True):
        tensors = {name: torch.zeros_like(value) for name, value in group.sides.tensors().items()}
        if index:
            for name, value in group.refreshed(each, index).items():
                parts(tensors[name], len(group.layers))[index] = parts(value, len(index))
        results.append(tensors)
    _sum_over_processes([tensor for tensors in results for tensor in tensors.values()])  # all but one of them are zeros
    return results


def agreed(groups: Sequence[LayerGroup], proposed: Sequence[Refreshed]) -> list[Refreshed]:
    """Each group's refresh, for the layers that every process found fit; they differ where each looks at other rows."""
    if all(group.weights[0].cut is None for group in groups):
        return list(proposed)
    flags = torch.cat([each.flags for each in proposed], 1).to(torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    of_groups = flags.bool().split([each.flags.shape[1] for each in proposed], 1)
    return [each._replace(flags=own) for each, own in zip(proposed, of_groups, strict=True)]


def averaged(value: Tensor) -> Tensor:
    """A scalar's mean over the processes where it is finite: the same on all of them, NaN where it is on none."""
    if processes() == 1:
        return value
    usable = torch.isfinite(value)
    total = torch.stack([torch.where(usable, value, 0).double(), usable.double()])
    dist.all_reduce(total)
    return (total[0] / total[1]).to(value)


def processes() -> int:
    """Processes that train together: those of the default process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _shares(groups: Sequence[LayerGroup], count: int) -> list[list[list[int]]]:
    """For each process and group the layers that it refreshes: the costliest first, to whoever has least to do.

    A layer's cost is its share of all operations and its share of all layers: the factorisations of a small one take a
    time of their own, on a GPU as long as a large one's, so that no process may have all of the small ones.
    """
    work = [group.plan.refresh_work for group in groups for _ in group.layers]
    tasks = []
    for number, group in enumerate(groups):
        cost = group.plan.refresh_work / sum(work) + 1 / len(work)
        tasks += [(cost, number, layer) for layer in range(len(group.layers))]
    load = [0.0] * count
    shares: list[list[list[int]]] = [[[] for _ in groups] for _ in range(count)]
    for cost, number, layer in sorted(tasks, key=lambda task: -task[0]):
        process = min(range(count), key=load.__getitem__)
        load[process] += cost
        shares[process][number].append(layer)
    return shares


def _sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over processes: one all-reduce a precision and device."""
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))
