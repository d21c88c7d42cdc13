"""Two processes with half a batch each take the step of one process with the whole batch."""

import os
import shlex
import signal
import sys
import time

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from chaos import final, same
from processes import context, free_port, join_group, start_group
from safetensors.torch import load_file
from test_attach import batch, net
from torch.nn.parallel import DistributedDataParallel
from training_runs import DECOR, TINY, history, reset_accelerate

import timm_decor
from timm_decor import DecorConfig
from timm_decor.errors import UserError
from timm_decor.training import runtime
from timm_decor.training.build import freeze, synchronized
from timm_decor.training.runtime import make_accelerator

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
    assert [row.refreshes for row in handle.report().rows] == [4] * 3
    # alone a process makes R of all three layers; of two, one makes the costliest layer's and one the others'
    assert len(set(refreshed)) == {1: [3], 2: [1, 2]}[world_size][rank], refreshed
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def count_refreshed(handle):
    """A list that fills with the number of each layer whose R this process makes anew."""
    made = []

    def watched(number, group):
        original = group.refreshed

        def refreshed(moments, index=None):
            made.extend(number for _ in (index or [0]))
            return original(moments, index)

        return refreshed

    for number, group in enumerate(handle._groups):
        group.refreshed = watched(number, group)
    return made


def worker(rank, world_size, store, results, structure, opt):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.save(train(rank, world_size, structure, opt), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("structure,opt", [("kronecker", "sgd"), ("kronecker", "adamw"), ("full", "sgd")])
def test_two_processes_equal_one(tmp_path, structure, opt):
    arguments = (2, tmp_path / "store", tmp_path, structure, opt)
    workers = [context().Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train(0, 1, structure, opt), rtol=1e-9, atol=1e-11)


class TestTrainingLoop:
    """train.py on two processes."""

    @pytest.mark.parametrize(
        "words",
        [
            "--opt sgd --lr 0.05 --grad-accum-steps 2",
            "--opt adamw --lr 0.002 --clip-grad 1 --decor-structure full",
            "--opt sgd --lr 0.05 --decor-rule dbp --decor-structure space --no-decor-preserve-function",
        ],
    )
    def test_two_processes_equal_one(self, words, tmp_path):
        """Ten updates, the last of an epoch from fewer batches, with images left over that make no batch."""
        ends = []
        epochs = 5 if "accum" in words else 4
        words = shlex.split(
            f"--model test_vit --model-kwargs img_size=32 --no-aug --train-split train[:230] --epochs {epochs} "
            f"--decor --decor-every 3 --decor-sample 1 --val-split test[:10] {words}"
        )
        for size, batch_size in ((1, 64), (2, 32)):
            run = tmp_path / str(size)
            command = [*TINY, *words, "-b", str(batch_size), "--output", str(tmp_path), "--experiment", run.name]
            group = start_group(command, tmp_path / "log", tmp_path / f"ends{size}", size, float64=True)
            for process in group:
                process.join()
                assert process.exitcode == 0, (tmp_path / "log").read_text()
            ends += [torch.load(tmp_path / f"ends{size}" / f"{rank}.pt") for rank in range(size)]
            assert history(run)[-1]["steps"] >= 10
            best = max(row["eval_top1"] for row in history(run)) / 10  # of ten images, which two processes share
            assert f": {best:.0f} of 10 images right" in (run / "report.html").read_text()
        whole, first, second = ends
        assert same(first, second)
        refreshes = [layer["refreshes"] for layer in first[1]["timm_decor"]["layers"].values()]
        assert min(refreshes) >= 4
        for a, b in zip(tensors(whole), tensors(first), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    def test_running_statistics_are_of_the_images_of_both(self, tmp_path):
        """Where nothing moves, the mean that the first BatchNorm has seen is that of the whole batches."""
        means = []
        for size, batch_size in ((1, 64), (2, 32)):
            words = ["--no-aug", "--lr", "0", "--epochs", "1", "-b", str(batch_size)]
            command = [*TINY, *words, "--output", str(tmp_path), "--experiment", str(size)]
            for process in start_group(command, tmp_path / "log", tmp_path / f"ends{size}", size):
                process.join()
                assert process.exitcode == 0, (tmp_path / "log").read_text()
            means.append(load_file(tmp_path / str(size) / "last.safetensors")["conv1.1.running_mean"])
        torch.testing.assert_close(*means)

    def test_stopped_killed_and_resumed(self, tmp_path):
        """A signal to one of them stops both after the same update; killed ones go on; all end with the same."""
        words = shlex.split(
            "--epochs 6 --train-split train[:224] --model-ema --model-ema-decay 0.9 --drop 0.2 --mixup 0.4 "
            "--val-interval 3 --resume auto"
        )

        def group(name, *more):
            command = [*TINY, *DECOR, *words, *more, "--output", str(tmp_path), "--experiment", name]
            return start_group(command, tmp_path / f"{name}.log", tmp_path / f"ends-{name}", 2)

        def joined(processes):
            for process in processes:
                process.join()
            return [process.exitcode for process in processes]

        assert joined(group("whole")) == [0, 0], (tmp_path / "whole.log").read_text()
        parts, log = tmp_path / "parts", tmp_path / "parts.log"
        processes = group("parts", "--recovery-interval", "2")
        while not (parts / "resume.pt").exists():
            time.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGTERM)
        assert joined(processes) == [143, 143], log.read_text()
        assert log.read_text().count(" stopped by SIGTERM after update ") == 1
        before = (parts / "resume.pt").stat().st_mtime_ns
        processes = group("parts", "--recovery-interval", "1")
        while (parts / "resume.pt").stat().st_mtime_ns == before and processes[0].exitcode is None:
            time.sleep(0.01)
        for process in processes:
            process.kill()
        assert joined(processes) == [-9, -9]
        assert joined(group("parts")) == [0, 0], log.read_text()
        assert log.read_text().count(" goes on after update ") == 2
        assert same(final(parts), final(tmp_path / "whole"))
        ends = [torch.load(tmp_path / "ends-parts" / f"{rank}.pt") for rank in range(2)]
        assert same(*ends), "weights, running statistics, R"
        assert same(ends[0], torch.load(tmp_path / "ends-whole" / "0.pt"))


def as_one_of(rank, world_size, port):
    """Exits with the number of processes that train together, told no device."""
    join_group(rank, world_size, port)
    runtime._has_accelerator = lambda: False
    torch.cuda.is_available = lambda: False
    sys.exit(make_accelerator(None, False, "float16").num_processes)


def as_one_of_mpi(port):
    """Exits with the number of processes that Accelerate would join, for whom it does not wait."""
    os.environ |= {
        "PMI_SIZE": "3", "PMI_RANK": "0", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    dist.init_process_group = lambda *args, **kwargs: None
    dist.get_world_size, dist.get_rank = (lambda *args: 3), (lambda *args: 0)
    sys.exit(make_accelerator("cpu", False, "float16").num_processes)


class TestSetUp:
    @pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron_LM"])
    def test_what_cuts_weights_into_pieces_is_refused(self, name, monkeypatch):
        monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
        kind = {"FSDP": "FSDP1"}.get(name, name)
        with pytest.raises(UserError, match=f"^accelerate is set up for {kind}, .*; decorrelation knows FSDP2: "):
            make_accelerator("cpu", False, "float16")

    def test_a_torch_without_fsdp2(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
        with pytest.raises(UserError, match="^FSDP2 needs torch 2.6 and accelerate 1.6 or newer; here are torch 2.5.1"):
            make_accelerator("cpu", False, "float16")

    def test_processes_that_torchrun_starts_train_together_without_a_gpu_too(self):
        port = free_port()
        group = [context().Process(target=as_one_of, args=(rank, 2, port)) for rank in range(2)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [2, 2]

    def test_processes_that_mpi_starts_are_not_refused(self):
        """It sets other variables, of which Accelerate makes torch's."""
        process = context().Process(target=as_one_of_mpi, args=(free_port(),))
        process.start()
        process.join()
        assert process.exitcode == 3

    def test_processes_that_cannot_train_together_are_refused(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(runtime, "_has_accelerator", lambda: True)
        reset_accelerate()
        with pytest.raises(UserError, match=r"^2 processes were started .*, but on \w+ Accelerate trains with 1: use "):
            make_accelerator(None, False, "float16")
        reset_accelerate()

    def test_accumulation_is_what_the_arguments_say(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
        reset_accelerate()
        assert make_accelerator("cpu", False, "float16", 3).gradient_accumulation_steps == 3
        reset_accelerate()

    def test_sync_bn(self):
        model = timm.create_model("test_resnet", num_classes=10)
        keys, cuda = list(model.state_dict()), torch.device("cuda")
        assert synchronized(model, [], torch.device("cpu"), 1) is model, "nobody to share with"
        with pytest.raises(UserError, match="--sync-bn needs GPUs"):
            synchronized(model, [], torch.device("cpu"), 2)
        freeze(model, ["layer1"])
        model = synchronized(model, ["layer1"], cuda, 2).train()
        norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms.values())
        assert {name for name, norm in norms.items() if not norm.training} == {n for n in norms if "layer1" in n}
        assert list(model.state_dict()) == keys


def tensors(state):
    """All floating-point tensors of a nested state, in order; not R's bases, which are free among equal eigenvalues."""
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    if isinstance(state, dict):
        state = [value for key, value in state.items() if not str(key).endswith("_basis")]
    items = state if isinstance(state, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]
