"""Two processes with half a batch each take the step of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_attach import batch, net
from torch.nn.parallel import DistributedDataParallel

import timm_decor
from timm_decor import DecorConfig

STEPS = 10


def train(rank, world_size, structure, opt):
    """The weights after STEPS steps on this rank's share of each batch."""
    model = timm_decor.decorrelate(net(torch.float64), DecorConfig(structure=structure, every=3, sample=1.0))
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 0.01)}[opt]
    optimizer = make(model.parameters())
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    handle = timm_decor.attach(wrapped, optimizer)
    refreshed = count_refreshed(handle)
    for step in range(STEPS):
        x, y = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x[rank::world_size]), y[rank::world_size]).backward()
        optimizer.step()
    assert [row.refreshes for row in handle.report().rows] == [4 if structure != "auto" else 3] * 3
    # alone a process makes R of all three layers; of two, one makes the costliest layer's and one the others'
    assert len(set(refreshed)) == {1: [3], 2: [1, 2]}[world_size][rank], refreshed
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def count_refreshed(handle):
    """A list that fills with the number of each layer whose R this process makes anew."""
    made = []

    def watched(number, group):
        original = group.refreshed

        def refreshed(moments, pace, index=None):
            made.extend(number for _ in (index or [0]))
            return original(moments, pace, index)

        return refreshed

    for number, group in enumerate(handle._groups):
        group.refreshed = watched(number, group)
    return made


def worker(rank, world_size, store, results, structure, opt):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.save(train(rank, world_size, structure, opt), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "structure,opt", [("kronecker", "sgd"), ("kronecker", "adamw"), ("full", "sgd"), ("auto", "adamw")]
)
def test_two_processes_equal_one(tmp_path, structure, opt):
    mp.spawn(worker, args=(2, tmp_path / "store", tmp_path, structure, opt), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    if structure != "auto":  # which chooses by a process's share of the rows
        torch.testing.assert_close(first, train(0, 1, structure, opt), rtol=1e-9, atol=1e-11)
