"""FSDP2: processes that each keep some rows of every weight take the step of one process that has them all."""

import contextlib
import dataclasses
import logging
import shlex
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator
from processes import as_launched, context, free_port, join_group, start_group
from safetensors.torch import load_file
from test_distributed import count_refreshed, tensors
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training_runs import DECOR, TINY

import timm_decor
from timm_decor import DecorConfig
from timm_decor.engine import shards
from timm_decor.training.keeping.whole import load_optimizer, load_weights, whole_optimizer, whole_weights

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 6) or not hasattr(Accelerator, "is_fsdp2"),
    reason="FSDP2 came with torch 2.6 and accelerate 1.6",
)

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "docs" / "accelerate_fsdp2.yaml"
STEPS, SAVED = 10, 5
MICRO = 4  # batches a step, whatever the number of processes
CONFIG = DecorConfig(every=3, sample=1.0, rank=4, sides="input")


class Net(nn.Module):
    """Rows that 2 and 4 processes share unevenly, or that not all have; groups that a share cuts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 9, (3, 2), padding=(1, 0), groups=3)  # 5 and 4 rows, or 3, 3, 3 and 0
        self.norm = nn.BatchNorm2d(9)
        self.pointwise = nn.Conv2d(9, 5, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.tokens = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.norm(self.grouped(x)).tanh()
        x = self.norm2(self.pointwise(x))
        x = self.tokens(x.flatten(2).transpose(1, 2)).tanh()
        return self.head(x.mean(1))


def made(kind, config):
    """A decorrelated model in float64, modules to shard by themselves, its images' size and how many a batch has."""
    torch.manual_seed(0)
    images = 2
    if kind == "vit":
        model = timm.create_model("test_vit", num_classes=10, img_size=32)
        units, size = list(model.blocks), 32
    elif kind == "resnet":
        model = timm.create_model("test_resnet", num_classes=10)
        units, size, images = [model.conv1, model.layer2, model.layer3[0].conv2], 32, 4  # two are +1 and -1 to a norm
    else:
        model = Net()
        units, size = [model.tokens, model.grouped], 9

    def fits(name, layer):  # a cut grouped convolution has no L
        return config.sides == "input" or name != "grouped"

    return timm_decor.decorrelate(model.double(), config, fits), units, size, images


def optimizer_of(kind, model):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    if kind == "adam":  # W is needed: the decay is in the gradient
        return torch.optim.Adam(model.parameters(), 5e-3, weight_decay=0.05)
    return torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)


@dataclasses.dataclass
class Bound:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    handle: object
    size: int
    images: int
    accelerator: object = None

    def train(self, steps, rank=0, processes=1):
        """Steps of MICRO batches each, of which this process has its share."""
        own = range(rank, MICRO, processes)
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(MICRO, self.images, 3, self.size, self.size, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (MICRO, self.images), generator=generator)
            self.optimizer.zero_grad()
            for i in own:
                if processes > 1:
                    self.model.set_requires_gradient_sync(i == own[-1])
                (F.cross_entropy(self.model(0.3 * x[i].cumsum(2)), y[i]) / len(own)).backward()
            self.optimizer.step()

    def end(self):
        """Weights, scale, refreshes; and what a direction of W is for the kernels."""
        layer, generator = self.model.get_submodule(self.handle.names[-1]), torch.Generator().manual_seed(0)
        v = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        name = f"{self.handle.names[-1]}.weight"
        (weight,) = [group.weights[0] for group in self.handle._groups if group.layers[0] is layer]
        v = v if weight.cut is None else shards.share(v, weight.parameter)
        back = self.handle.kernel_gradient(self.handle.kernel_direction({name: v}))[name]
        v = self.handle.kernel_direction({name: v})[name]
        v, back = (t if weight.cut is None else t.full_tensor() for t in (v, back))
        weights = whole_weights(self.model, True)
        weights = {key: value for key, value in weights.items() if "running" not in key and "num_batches" not in key}
        weights |= {"direction": v, "gradient": back}
        return weights, self.handle.scale, [(row.refreshes, row.skips) for row in self.handle.report(False).rows]


def bound(kind, opt, knobs, mesh=None):
    """Bound to its optimizer; sharded over a mesh, if there is one."""
    config = dataclasses.replace(CONFIG, **knobs)
    model, units, size, images = made(kind, config)
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for module in (*units, model):
            fully_shard(module, mesh=mesh)
    optimizer = optimizer_of(opt, model)
    return Bound(model, optimizer, timm_decor.attach(model, optimizer), size, images)


DBP = {"rule": "dbp", "structure": "full", "decor_lr": 0.05, "preserve_function": False}
BOTH = {"sides": "both"}
CASES = {
    "net sgd": ("net", "sgd", {}),
    "net sgd both": ("net", "sgd", {**BOTH, "preserve_function": False}),
    "net sgd full": ("net", "sgd", {"structure": "full"}),
    "net adam both": ("net", "adam", {**BOTH, "structure": "full"}),
    "net adamw": ("net", "adamw", {}),
    "net adamw dbp": ("net", "adamw", DBP),
    "vit adamw": ("vit", "adamw", {}),
    "vit sgd both": ("vit", "sgd", BOTH),
    "resnet sgd space": ("resnet", "sgd", {"structure": "space"}),
    "resnet adamw": ("resnet", "adamw", {}),
}
ENDS = {  # by the number of processes: what is compared with one process
    2: ["net sgd", "net sgd, put back by hand", "net adam both", "net adamw dbp", "vit adamw", "resnet sgd space"],
    4: ["net sgd full", "net sgd both", "net sgd both, replicated", "vit sgd both", "resnet adamw"],
}
STATES = ["net sgd both", "net adamw"]  # saved by two processes, loaded by four
WAYS = ["dcp", "whole", "accelerate"]


def worker(rank, processes, port, folder):
    """Run every check of that number of processes; their results are in `<processes>-<rank>.pt`."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    join_group(rank, processes, port)
    as_launched("--config_file", str(LAUNCH), "--mixed_precision", "no", "--fsdp_auto_wrap_policy", "NO_WRAP")
    accelerator = Accelerator(cpu=True)  # it starts the group of processes
    mesh = init_device_mesh("cpu", (processes,))
    results = {}
    with warnings() as results["told"]:
        for name in ENDS[processes]:
            base, _, how = name.partition(", ")
            results[name] = trained(CASES[base], halves() if how == "replicated" else mesh, rank, processes, how)
    for name in STATES:
        for way in WAYS:
            results[name, way] = kept(way, folder / f"{name} {way}", CASES[name], mesh, rank, processes)
    for refused in REFUSED if processes == 4 else ():
        with pytest.raises(ValueError) as error:
            refused(mesh)
        results[refused.__name__] = str(error.value)
    results["one cannot"] = one_cannot(mesh, rank, processes)
    results["interrupted"] = interrupted(mesh, rank, processes)
    results["grouped"] = outputs_of_groups(mesh)
    results["another steps"] = another_steps(mesh, rank, processes)
    accelerator.wait_for_everyone()
    torch.save(results, folder / f"{processes}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shares(model):
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def warnings():
    """A list that takes what is told meanwhile."""
    lines, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("timm_decor")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def halves():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def trained(case, mesh, rank, processes, how):
    """Where STEPS steps end, with an evaluation on the way, which leaves the outermost module's weights whole.

    Behind it one process alone looks at things, and all load the state that they have.
    """
    it = bound(*case, mesh)
    if how == "put back by hand":  # the layers' weights are whole even in a step
        it.model.set_reshard_after_backward(False)
        it.optimizer.register_step_post_hook(lambda *_: [module.reshard() for module in shares(it.model)])
    it.train(range(SAVED), rank, processes)
    with torch.no_grad():
        it.model.eval()(torch.zeros(1, 3, it.size, it.size, dtype=torch.float64))
    if rank == 0:
        it.handle.report(), it.optimizer.state_dict()
    it.optimizer.load_state_dict(it.optimizer.state_dict())
    assert all(weight.cut for group in it.handle._groups for weight in group.weights)
    it.model.train()
    it.train(range(SAVED, STEPS), rank, processes)
    return it.end()


def kept(way, path, case, mesh, rank, processes):
    """Two processes train and save; four load, go on, and return where it ends."""
    if way == "accelerate":
        # attached before the model is sharded, and behind it
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # it knows no buffers
        model, _, size, images = made(case[0], dataclasses.replace(CONFIG, **case[2]))
        optimizer = optimizer_of(case[1], model)
        handle = timm_decor.attach(model, optimizer) if processes == 2 else None
        model, prepared = accelerator.prepare(model, optimizer)
        it = Bound(model, optimizer, handle or timm_decor.attach(model, prepared), size, images, accelerator)
    else:
        it = bound(*case, mesh)
    if processes == 2:
        it.train(range(SAVED), rank, processes)
        save(way, path, it, rank)
        return None
    load(way, path, it)
    assert it.handle.step == SAVED
    it.train(range(SAVED, STEPS), rank, processes)
    return it.end()


def save(way, path, it, rank):
    if way == "accelerate":
        it.accelerator.save_state(str(path))
    elif way == "dcp":
        model_state, optimizer_state = get_state_dict(it.model, it.optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    else:
        state = whole_weights(it.model, rank == 0), whole_optimizer(it.optimizer, rank == 0)
        if rank == 0:
            torch.save(state, path)


def load(way, path, it):
    if way == "accelerate":
        it.accelerator.load_state(str(path))
    elif way == "dcp":
        model_state, optimizer_state = get_state_dict(it.model, it.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(it.model, it.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        weights, optimizer_state = torch.load(path, weights_only=True)
        load_weights(it.model, weights)
        load_optimizer(it.optimizer, optimizer_state)


def one_cannot(mesh, rank, processes):
    """Refreshes and skips where what a refresh would move is not finite in the rows of one process.

    And whose R this process has made.
    """
    it = bound("net", "sgd", {}, mesh)
    made = count_refreshed(it.handle)
    it.train(range(3), rank, processes)
    if rank == 0:
        it.optimizer.state[it.model.first.weight]["momentum_buffer"]._local_tensor[0] = float("inf")
    it.train([3], rank, processes)
    return it.end()[2], set(made)


class Stumbling(torch.optim.AdamW):
    """Fails when it is told to."""

    stumbles = False

    def step(self, closure=None):
        if self.stumbles:
            raise RuntimeError("stumbled")
        return super().step(closure)


def interrupted(mesh, rank, processes):
    """Where it ends if a step has failed on the way and is made again."""
    it = bound("net", "adamw", {}, mesh)
    it.handle.detach()
    it.optimizer = Stumbling(it.optimizer.param_groups)
    it.handle = timm_decor.attach(it.model, it.optimizer)
    it.train(range(SAVED), rank, processes)
    before = [shards.here(p).clone() for p in it.model.parameters()]
    it.optimizer.stumbles = True
    with pytest.raises(RuntimeError, match="stumbled"):
        it.train([SAVED], rank, processes)
    assert all(torch.equal(shards.here(p), kept) for p, kept in zip(it.model.parameters(), before, strict=True))
    it.optimizer.stumbles = False
    it.optimizer.step()
    it.train(range(SAVED + 1, STEPS), rank, processes)
    return it.end()


def another_steps(mesh, rank, processes):
    """What is told where the attached optimizer is not the one that steps."""
    it = bound("net", "sgd", {}, mesh)
    it.optimizer = optimizer_of("adamw", it.model)
    with warnings() as told:
        it.train(range(5), rank, processes)  # they are looked at after one, two and four
    return told


def outputs_of_groups(mesh):
    """What is told of grouped convolutions, and which layers have an L."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Net().double(), mesh=mesh)
    timm_decor.decorrelate(model, dataclasses.replace(CONFIG, sides="both"))  # sharded before, this time
    with warnings() as told:
        handle = timm_decor.attach(model, optimizer_of("sgd", model))
    return told, [row.structure for row in handle.report().rows]


def left_out(mesh):
    from torch.distributed.fsdp import fully_shard

    model = timm_decor.decorrelate(Net(), CONFIG)
    fully_shard(model, mesh=mesh, ignored_params={model.head.weight})
    timm_decor.attach(model, optimizer_of("sgd", model))


def over_a_part(mesh):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(timm_decor.decorrelate(Net(), CONFIG), mesh=halves()["shard"])
    timm_decor.attach(model, optimizer_of("sgd", model))


def by_columns(mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = timm_decor.decorrelate(nn.Sequential(nn.Linear(8, 8)), CONFIG)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    timm_decor.attach(model, optimizer_of("sgd", model))


def tensor_parallel(mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = timm_decor.decorrelate(nn.Sequential(nn.Linear(8, 8)), CONFIG)
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    timm_decor.attach(model, optimizer_of("sgd", model))


def not_held(mesh):
    """Sharded behind `attach`, and nobody tells the optimizer."""
    from torch.distributed.fsdp import fully_shard

    it = bound("net", "sgd", {})
    fully_shard(it.model, mesh=mesh)
    it.train([0], mesh.get_local_rank(), 4)


REFUSED = {
    left_out: "layer head is left out by fully_shard (ignored_params, or no fully_shard of the whole model), and "
    "others are cut: FSDP does not average its gradient; freeze it, or shard it as well",
    over_a_part: "the weight of first is cut over 2 of 4 processes (tensor or pipeline parallel?): only data parallel "
    "meshes are known",
    by_columns: "the weight of 0 is placed as (Shard(dim=1),): only rows can be cut, Shard(0)",
    tensor_parallel: "the weight of 0 is a DTensor that fully_shard did not make (tensor parallel?)",
    not_held: "the optimizer does not hold the weight of first and 4 more layers; make the optimizer from this model's "
    "parameters, after decorrelate (and fully_shard) and before attach",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the processes found, by their number and then by rank: first two of them, then four."""
    folder, found = tmp_path_factory.mktemp("fsdp"), {}
    for processes in (2, 4):
        arguments = (processes, free_port(), folder)
        group = [context().Process(target=worker, args=(rank, *arguments)) for rank in range(processes)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0] * processes
        found[processes] = [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]
    return found


@pytest.fixture(scope="module")
def alone():
    """Where one process ends, by the case's name; each trained once."""
    ends = {}

    def end(name):
        if name not in ends:
            it = bound(*CASES[name])
            it.train(range(STEPS))
            ends[name] = it.end()
        return ends[name]

    return end


def assert_equal(found, expected):
    weights, scale, refreshes = found
    assert weights.keys() == expected[0].keys()
    for key, value in expected[0].items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-9)
    assert scale == pytest.approx(expected[1], rel=1e-9)
    assert refreshes == expected[2] == [(4, 0)] * len(refreshes)


class TestSteps:
    @pytest.mark.parametrize("processes,name", [(processes, name) for processes in ENDS for name in ENDS[processes]])
    def test_equal_those_of_one_process(self, ran, alone, processes, name):
        for of_one in ran[processes]:
            assert_equal(of_one[name], alone(name.partition(",")[0]))

    def test_one_that_fails_leaves_the_rows(self, ran):
        expected = interrupted(None, 0, 1)
        for of_one in (*ran[2], *ran[4]):
            assert_equal(of_one["interrupted"], expected)

    @pytest.mark.parametrize("processes", [2, 4])
    def test_nothing_is_told(self, ran, processes):
        assert [of_one["told"] for of_one in ran[processes]] == [[]] * processes

    @pytest.mark.parametrize("processes", [2, 4])
    def test_a_refresh_that_one_process_cannot_take_is_taken_by_none(self, ran, processes):
        assert [of_one["one cannot"][0] for of_one in ran[processes]] == [[(1, 1)] + [(2, 0)] * 4] * processes

    @pytest.mark.parametrize("processes", [2, 4])
    def test_each_makes_the_r_of_some_layers(self, ran, processes):
        made = [of_one["one cannot"][1] for of_one in ran[processes]]
        assert all(made) and sorted(number for numbers in made for number in numbers) == list(range(5))

    @pytest.mark.parametrize("processes", [2, 4])
    def test_grouped_convolutions_have_no_output_side(self, ran, processes):
        for told, structures in (of_one["grouped"] for of_one in ran[processes]):
            assert told == ["the outputs of grouped are not decorrelated: fully_shard cuts the rows of its groups"]
            assert structures == ["kronecker + outputs", "kronecker", *["kronecker + outputs"] * 3]

    @pytest.mark.parametrize("processes", [2, 4])
    def test_steps_of_another_optimizer_are_noticed(self, ran, processes):
        line = "the weights move, but step() of the attached SGD is not called: training is plain"
        assert [of_one["another steps"] for of_one in ran[processes]] == [[line]] * processes


class TestState:
    """Saved by two processes, gone on with by four."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", STATES)
    def test_goes_on_as_if_never_left(self, ran, alone, name, way):
        for of_one in ran[4]:
            assert_equal(of_one[name, way], alone(name))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.__name__)
def test_what_would_be_wrong_is_refused(ran, refused):
    assert {of_one[refused.__name__] for of_one in ran[4]} == {REFUSED[refused]}


def test_an_early_fully_shard_is_refused(monkeypatch):
    kind = type("FSDPNet", (type("FSDPModule", (), {}), Net), {})
    model = timm_decor.decorrelate(kind(), CONFIG)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
    with pytest.raises(ValueError, match="^torch 2.5.1 has an early fully_shard: FSDP2 needs torch 2.6 or newer$"):
        timm_decor.attach(model, optimizer_of("sgd", model))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_other_kinds_of_pieces_name_this_one(name):
    kind = type(name, (nn.Sequential,), {})
    model = kind(timm_decor.decorrelate(Net(), CONFIG))
    with pytest.raises(ValueError, match=f"^{name} keeps weights in flat pieces without rows: use FSDP2, "):
        timm_decor.attach(model, optimizer_of("sgd", model))


class TestTrainingLoop:
    """train.py as `accelerate launch` starts it with docs/accelerate_fsdp2.yaml."""

    def test_killed_and_resumed_it_ends_as_one_process(self, tmp_path):
        words = shlex.split(
            "--model test_vit --model-kwargs img_size=32 --no-aug --train-split train[:230] --val-split test[:10] "
            "--epochs 2 --opt sgd --lr 0.05 --clip-grad 1 --model-ema --model-ema-decay 0.9 --decor-every 3 "
            "--decor-sample 1 --channels-last --resume auto"
        )

        def group(size, *more):
            command = [*TINY, *DECOR, *words, "-b", str(64 // size), *more, "--output", str(tmp_path)]
            command += ["--experiment", str(size)]
            return start_group(command, log(size), tmp_path, size, float64=True, launched=str(LAUNCH))

        def log(size):
            return tmp_path / f"{size}.log"

        def ended(processes):
            for process in processes:
                process.join()
            return [process.exitcode for process in processes]

        alone = group(1)
        processes = group(2, "--recovery-interval", "1")
        while not (tmp_path / "2" / "resume.pt").exists() and processes[0].exitcode is None:
            time.sleep(0.01)
        for process in processes:
            process.kill()
        assert ended(processes) == [-9, -9], log(2).read_text()
        assert ended(group(2)) == [0, 0], log(2).read_text()
        assert log(2).read_text().count(" goes on after update ") == 1
        assert ended(alone) == [0], log(1).read_text()
        line = "accelerate's FSDP is for several GPUs, and not followed on 1 x cpu: each process has the whole model"
        assert line in log(1).read_text() and line not in log(2).read_text()
        for name in ("last", "last-ema", "best"):
            ours, whole = (load_file(tmp_path / size / f"{name}.safetensors") for size in ("2", "1"))
            assert ours.keys() == whole.keys()
            for key, value in whole.items():
                torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9)
        timm.create_model("test_vit", img_size=32, num_classes=10).load_state_dict(ours, strict=True)
        # and the state to go on from is that of one process: any number can
        ours, whole = (torch.load(tmp_path / size / "resume.pt", weights_only=True)["optimizer"] for size in ("2", "1"))
        assert [len(t) for t in (tensors(ours), ours["timm_decor"]["layers"])] == [
            len(t) for t in (tensors(whole), whole["timm_decor"]["layers"])
        ]
        for a, b in zip(tensors(ours), tensors(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
