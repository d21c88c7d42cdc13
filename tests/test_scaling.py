"""benchmarks/scaling.py: what it counts is what processes send, and what it plans follows from the counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scaling
import timm
import torch
import torch.distributed as dist
from legends import legends
from processes import context, free_port, join_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_decor
from study import cluster, pictures, scaling_pages
from study.counting import Counted, count, units
from timm_decor import DecorConfig
from timm_decor.convert import decor_layers
from timm_decor.engine.sharing import _shares
from timm_decor.errors import UserError
from timm_decor.plan import plan

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "scaling"
EVERY, PROCESSES = 4, 2
CASE = Counted("test_vit", "sgd", DecorConfig(every=EVERY, output_every=2, rank=4), 2, (("img_size", 32), ("depth", 1)))


def noting(calls: list[tuple[str, int]]) -> None:
    """Let torch's collectives note the bytes that they are given: those of the whole that each is about."""

    def noted(kind: str, name: str) -> None:
        original = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.append((kind, max(tensor.nbytes for tensor in tensors)))  # of shares and the whole, the whole
            return original(*args, **kwargs)

        setattr(dist, name, collective)

    noted("all_reduce", "all_reduce")
    noted("broadcast", "broadcast")
    is_new = hasattr(dist, "all_gather_single")  # what fully_shard calls, by torch's version
    noted("all_gather", "all_gather_single" if is_new else "all_gather_into_tensor")
    noted("reduce_scatter", "reduce_scatter_single" if is_new else "reduce_scatter_tensor")


def trained(sharded: bool, decorrelated: bool) -> dict[str, list[tuple[str, int]]]:
    """What one of two processes sends from the second refresh to the third: in forward and backward, and in steps."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(CASE.model, **dict(CASE.model_kwargs))
    sent: dict[str, list[tuple[str, int]]] = {"model": [], "step": []}
    if decorrelated:
        timm_decor.decorrelate(model, CASE.config)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (PROCESSES,))
        for unit in units(model):
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, allreduce_hook)  # what it does by itself, but in Python
    optimizer = timm.optim.create_optimizer_v2(model, opt=CASE.opt, lr=0.01, momentum=0.9)
    if decorrelated:
        timm_decor.attach(model, optimizer)
    for step in range(2 * EVERY):
        if step == EVERY:
            sent["model"], sent["step"] = [], []
        calls.clear()
        wrapped(torch.randn(2, 3, 32, 32)).square().sum().backward()
        sent["model"] += calls
        calls.clear()
        optimizer.step()
        sent["step"] += calls
        optimizer.zero_grad()
    return sent


calls: list[tuple[str, int]] = []


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, PROCESSES, port)
    dist.init_process_group("gloo")
    noting(calls)
    found = {"ddp": trained(False, True), "fsdp": trained(True, True), "plain fsdp": trained(True, False)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def bytes_of(sent: list[Any]) -> dict[str, int]:
    return {kind: sum(size for k, size in sent if k == kind) for kind in dict(sent)}


def of_a_period(kinds: dict[str, Any], what: str) -> dict[str, int]:
    """What the counts say of `every` steps."""
    total: dict[str, int] = {}
    for kind in kinds.values():
        for name, each in kind["sent"].items():
            total[name] = total.get(name, 0) + kind["times"] * each[what]
    return total


def test_what_is_counted_is_what_gloo_sends(tmp_path: Path) -> None:
    arguments = (free_port(), str(tmp_path))
    workers = [context().Process(target=worker, args=(rank, *arguments)) for rank in range(PROCESSES)]
    for process in workers:
        process.start()
    counted = count(CASE, PROCESSES)
    for process in workers:
        process.join()
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES))
    assert first == second, "all processes take part in the same collectives"
    assert set(counted["ddp"]) == set(counted["fsdp"]) == {"refresh + look", "measure", "look", "ordinary"}
    assert bytes_of(first["ddp"]["step"]) == of_a_period(counted["ddp"], "bytes")
    assert len(first["ddp"]["step"]) == of_a_period(counted["ddp"], "calls")["all_reduce"]
    assert bytes_of(first["fsdp"]["step"]) == of_a_period(counted["fsdp"], "bytes")
    gradients = {kind: EVERY * each["bytes"] for kind, each in cluster.gradients(counted).items()}
    assert bytes_of(first["ddp"]["model"]) == gradients
    plain = {kind: EVERY * each["bytes"] for kind, each in counted["plain_fsdp"].items()}
    assert bytes_of(first["plain fsdp"]["model"]) == bytes_of(first["fsdp"]["model"]) == plain
    assert first["plain fsdp"]["step"] == []


def test_layers_are_shared_out_by_work_and_by_number() -> None:
    """No process has nearly all of the small layers, and none waits for more than a layer more than it must."""
    for name in ("resnet50", "vit_base_patch16_224"):
        with torch.device("meta"):
            model = timm_decor.decorrelate(timm.create_model(name))
        for linear in (True, False):
            plans = [plan(DecorConfig(), layer.decor_shape, torch.float32, linear) for _, layer in decor_layers(model)]
            groups, work = [SimpleNamespace(plan=one, layers=[None]) for one in plans], [p.refresh_work for p in plans]
            for processes in (2, 8, 16, 64):
                shares = _shares(groups, processes)
                assert sorted(i for share in shares for i, own in enumerate(share) if own) == list(range(len(plans)))
                number = max(sum(map(len, share)) for share in shares)
                most = max(sum(work[i] for i, own in enumerate(share) if own) for share in shares)
                assert number <= 2 * -(-len(plans) // processes)
                assert most <= 1.3 * max(sum(work) / processes, *work)


MACHINE = cluster.Machine(rate=1e12, rate32=1e12, matrix_seconds=0.0, node=1e9, network=1e9)


def test_a_ring_sends_what_the_formula_says() -> None:
    """Of 8 GB nothing counts but the speed: 2 (n - 1) / n of them over each link, or half of that."""
    for n in (2, 8, 64):
        for kind, rounds in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
            found = cluster.sending({kind: {"calls": 1, "bytes": 8 * 10**9}}, n, MACHINE)
            assert found == pytest.approx(rounds * (n - 1) / n * 8, rel=1e-3)
    both = cluster.sending(
        {"all_reduce": {"calls": 2, "bytes": 2}, "broadcast": {"calls": 1, "bytes": 10**9}}, 8, MACHINE
    )
    assert 1 < both < 1.001
    assert cluster.sending({"all_reduce": {"calls": 1, "bytes": 10**9}}, 1, MACHINE) == 0, "nobody to send it to"
    fast = cluster.Machine(node=2e9, network=1e9)
    one, two = (cluster.sending({"all_gather": {"calls": 1, "bytes": 8 * 10**9}}, n, fast) for n in (8, 16))
    assert one == pytest.approx(3.5, rel=1e-3) and two == pytest.approx(7.5, rel=1e-3), "the slowest link decides"
    small = [cluster.sending({"all_reduce": {"calls": 1, "bytes": 8}}, n, cluster.Machine()) for n in (64, 512)]
    assert small[1] < 2 * small[0] < 1e-3, "a tree takes log n steps"


def made_up(refresh: dict[str, int]) -> dict[str, Any]:
    """Counts of a model that one process computes in 3 s and refreshes in as many as are given."""

    def kind(sent: int, flops: float) -> dict[str, Any]:
        calls = {"all_reduce": {"calls": 1, "bytes": sent}} if sent else {}
        return {"sent": calls, "work": {"flops": flops, "matrices": 0}}

    kinds = {"ordinary": kind(0, 1e12), "look": kind(0, 3e12), "refresh + look": kind(4 * 10**9, 7e12)}
    return {
        "every": 4, "output_every": 2, "weight_bytes": 10**9, "buffer_bytes": 0, "plain_work": {"flops": 3e12},
        "statistics_work": {"flops": 8e12}, "ddp": {**kinds, "measure": kind(0, 1e12)}, "model": "m", "opt": "sgd",
        "refresh": {"busiest": {n: {"flops": each * 1e12, "matrices": 5} for n, each in refresh.items()}},
    }  # fmt: skip


def test_a_step_is_the_mean_over_its_kinds() -> None:
    """Of four steps one refreshes and looks, one looks, two are ordinary."""
    counts = made_up({"1": 8, "2": 4, "4": 3})
    assert cluster.step(counts, 1, MACHINE) == cluster.Step(3.0, 0.0, (7 + 3 + 1 + 1) / 4, 2.0, 2.0, 0.0)
    two = cluster.step(counts, 2, MACHINE)
    assert two[:5] == (3.0, 0.0, 3.0, 2.0, 1.0), "gradients hide behind the backward pass"
    assert two.wire == pytest.approx(1.0, rel=1e-3)
    assert cluster.step(counts, 4, MACHINE, every=8) == pytest.approx((3, 0, 2.5, 1, 3 / 8, 0.75), rel=1e-2)
    slow = cluster.step(counts, 2, cluster.Machine(rate=1e12, node=2e8))
    assert slow.waiting == pytest.approx(5 - 2, rel=1e-2) and slow.plain == slow.compute + slow.waiting
    launches = cluster.step(counts, 1, cluster.Machine(rate32=1e12, matrix_seconds=0.8))
    assert launches.refresh == pytest.approx((8 + 5 * 0.8) / 4)
    with pytest.raises(UserError, match="--ranks 3: a refresh was shared out among 1, 2, 4"):
        cluster.step(counts, 3, MACHINE)


def test_the_smallest_every_that_is_offered() -> None:
    quiet = {"statistics_work": {"flops": 0}}
    found = [scaling_pages._enough({**made_up({"8": share}), **quiet}, 8, "ddp") for share in (0, 1, 1000)]
    assert found == ["`every=50`", "`every=100`", "no `every`"]


def test_count_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "counts.json"
    with pytest.raises(UserError, match="there is no .*counts.json: `python benchmarks/scaling.py count --json "):
        scaling.main(["plan", str(file)])
    command = ["count", "--smoke", "--opt", "adamw", "--batch-size", "2", "--json", str(file)]
    scaling.main(command)
    first = file.read_text(encoding="utf-8")
    (result,) = json.loads(first)["results"]
    assert set(result["ddp"]) == {"refresh", "measure", "ordinary"}, "AdamW has no output side to look at"
    assert result["ddp"]["ordinary"]["sent"] == {} and result["fsdp"]["ordinary"]["sent"] == {}
    held = cluster.sent_bytes(result["ddp"]["refresh"]["sent"])
    assert result["moment_bytes"] < held <= result["moment_bytes"] + result["r_bytes"] + 4 * result["layers"]
    assert [int(n) for n in result["refresh"]["busiest"]][-1] == 512
    scaling.main(command)
    assert file.read_text(encoding="utf-8") == first, "it is there already"
    capsys.readouterr()
    scaling.main(["plan", str(file), "--ranks", "8", "512", "--every", "20", "100", "--network", "1e9"])
    said = capsys.readouterr().out
    assert "a refresh every 100 steps" in said and said.count("test_vit") == 8


def test_time(tmp_path: Path) -> None:
    """Seconds are not asserted: that they are there, of each number of processes."""
    file = tmp_path / "time.json"
    scaling.main(["time", "--smoke", "--json", str(file)])
    record = json.loads(file.read_text(encoding="utf-8"))
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    (result,) = record["results"]
    assert [*result["processes"]] == ["1", "2"]
    for found in result["processes"].values():
        assert len(found["blocks"]) == 2
        assert all(seconds > 0 for block in found["blocks"] for seconds in block.values())
    table = scaling_pages.measured(record)
    assert "2 alternating blocks" in table and table.count("test_vit, 32 px, batch 4 each, sgd") == 2


def test_the_picture_has_its_legends_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = scaling_pages.read(RESULTS / "counts.json")
    found = legends(monkeypatch, lambda: pictures.scaling_picture(counts, tmp_path / "s.png"))
    assert found == 2
