"""timm_decor.hook and timm_decor.run: scripts that know nothing of decorrelation.

What switches the hook on runs in processes of its own, because the hook stays on.
"""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from torch.optim import Optimizer

from timm_decor import run

# timm's train.py in short: its parts, in its order, imported before the device modules. Nothing of timm_decor.
SCRIPT = """
import argparse, importlib, logging, os, signal
import numpy as np
import torch
from timm import utils
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2

parser = argparse.ArgumentParser()
parser.add_argument("--device-modules", nargs="+", default=[])
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--output")
parser.add_argument("--resume")
parser.add_argument("--kill", type=int)


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    for module in args.device_modules:
        importlib.import_module(module)
    utils.random_seed(1, 0)
    model = create_model(args.model, num_classes=4, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=0.02, momentum=0.9, weight_decay=1e-3)
    # explicit
    start = resume_checkpoint(model, args.resume, optimizer) if args.resume else 0
    ema = utils.ModelEmaV3(model, decay=0.9)
    if args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    saver = utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=args.output, max_history=2)
    mixup, loss_fn = Mixup(mixup_alpha=0.2, num_classes=4), SoftTargetCrossEntropy()
    for epoch in range(start, 4):
        utils.random_seed(epoch, 1)
        model.train()
        optimizer.zero_grad()
        for index in range(6):
            x, y = mixup(torch.randn(8, 3, 32, 32) + 0.5, torch.arange(8) % 4)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_fn(model(x), y) / 2
            loss.backward()
            if index % 2:
                utils.dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")
                optimizer.step()
                optimizer.zero_grad()
                ema.update(model)
            if epoch * 6 + index == args.kill:
                os.kill(os.getpid(), signal.SIGKILL)
        saver.save_checkpoint(epoch, metric=-loss.item())
    print(f"done after epoch {epoch}")


if __name__ == "__main__":
    main()
"""
EXPLICIT = """import timm_decor
    handle = timm_decor.attach(model, optimizer, timm_decor.DecorConfig(every=4, sample=1.0))"""


def clean(**variables):
    """This process's environment with no options but these."""
    return {key: value for key, value in os.environ.items() if not key.startswith("TIMM_DECOR_")} | variables


def child(words, environ, output):
    """`python WORDS` in a process that has torch and timm in memory, its output in a file."""
    os.environ.clear()
    os.environ.update(environ)
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")


def python(*words, **variables):
    """Run Python; (exit status, stdout and stderr together)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "timm_decor", "pytest"])  # a second for a process, and not ten
    with tempfile.NamedTemporaryFile("r") as file:
        process = context.Process(target=child, args=(list(map(str, words)), clean(**variables), file.name))
        process.start()
        process.join(240)
        assert process.exitcode is not None, f"{words} hangs: {file.read()}"
        return process.exitcode, file.read()


def lines(output):
    """What the hook said."""
    return [line for line in output.splitlines() if re.search("decorrelation (is|goes) on|plain: |takes over", line)]


def check(code):
    """Run statements under the hook; the assertions are in them."""
    status, output = python("-c", PRELUDE + code)
    assert status == 0, output
    return lines(output)


PRELUDE = """
import copy, gc, logging, pytest, timm, torch, timm_decor
from torch import nn
attach_of_before = timm_decor.attach  # a name from before the hook
import timm_decor.hook as hook

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def decor(**kwargs):
    return timm_decor.decorrelate(net(), timm_decor.DecorConfig(**kwargs))

def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)

def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "train.py"
    path.write_text(SCRIPT)
    return path


def final(folder):
    return torch.load(folder / "last.pth.tar", weights_only=True)


def equal(a, b):
    """Whether two checkpoints' tensors and numbers are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_training(a, b):
    return all(equal(a[key], b[key]) for key in ("epoch", "metric", "state_dict", "state_dict_ema", "optimizer"))


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_an_unmodified_loop_of_timms_parts(opt, script, tmp_path):
    """Equal to explicit attach to the bit; killed in mid-epoch and resumed, equal to the run that was not."""
    folders = {name: tmp_path / name for name in ("explicit", "hooked", "killed", "resumed")}
    for folder in folders.values():
        folder.mkdir()
    words = ["--model", "decor_test_resnet", "--opt", opt, "--model-kwargs", "decor_config={'every': 4}", "--output"]
    hooked = [script, "--device-modules", "timm_decor.hook", *words]
    variables = {"TIMM_DECOR_SAMPLE": "1.0"}

    if opt == "sgd":  # once is enough: the hook calls the same attach
        explicit = tmp_path / "explicit.py"
        explicit.write_text(SCRIPT.replace("# explicit", EXPLICIT))
        status, output = python(explicit, "--device-modules", "timm_decor", *words, folders["explicit"])
        assert status == 0, output
    status, output = python(*hooked, folders["hooked"], **variables)
    assert status == 0 and "done after epoch 3" in output, output
    kind = {"sgd": "SGD", "adamw": "AdamW"}[opt]
    (line,) = (line for line in lines(output) if "is on" in line)
    sides = (
        f"inputs {'and outputs ' if kind == 'SGD' else ''}decorrelated, steps as long as plain training's: keep its .*"
    )
    assert re.fullmatch(
        rf"decorrelation is on: \w+, \d+ layers, whiten, kronecker, every 4 steps, {kind}; {sides}", line
    ), line

    status, _ = python(*hooked, folders["killed"], "--kill", 16, **variables)
    assert status == -signal.SIGKILL
    resume = folders["killed"] / "last.pth.tar"
    status, output = python(*hooked, folders["resumed"], "--resume", resume, **variables)
    assert status == 0, output
    assert "decorrelation goes on after step 6, as the loaded optimizer state says" in output

    reference = final(folders["hooked"])
    assert reference["optimizer"]["timm_decor"]["step"] == 12
    assert all(layer["refreshes"] == 3 for layer in reference["optimizer"]["timm_decor"]["layers"].values())
    assert same_training(final(folders["resumed"]), reference)
    if opt == "sgd":
        assert same_training(final(folders["explicit"]), reference)


def test_a_plain_model_is_told_once(script, tmp_path):
    words = [script, "--device-modules", "timm_decor.hook", "--output", tmp_path, "--model", "test_resnet"]
    status, output = python(*words)
    assert status == 0, output
    (line,) = lines(output)
    assert line.startswith(
        "WARNING: training is plain: this SGD holds no weight of a decorrelated model; create one by"
    )


def test_what_a_script_can_do_with_optimizers():
    """One process for all of it: every block begins with nothing attached."""
    said = check(
        """
def fresh():
    gc.collect()
    assert hook.handles() == []

# without logging set up, the line is on stderr; the handle lives as long as its optimizer
model, = models = [decor(every=3)]
optimizer = sgd(model)
handle, = hook.handles()
step(model, optimizer)
assert handle.step == 1 and handle.config.every == 3 and handle.report().rows[0].refreshes == 1
del handle, optimizer, model, models
fresh()

# a copy of a model is a model; frozen ones and those of nobody are left alone
first = decor()
second = copy.deepcopy(first)
first.requires_grad_(False)
optimizer = torch.optim.AdamW([*second.parameters(), *first.parameters()])
handle, = hook.handles()
step(second, optimizer)
assert handle.step == 1 and handle._groups[0].layers[0] is second[0]
del handle, optimizer, first, second
fresh()

# an optimizer that is made later has the model, and the first one says so when it steps again
model = decor()
first, second = sgd(model), torch.optim.AdamW(model.parameters())
handle, = hook.handles()
assert handle._optimizer is second
step(model, second)
step(model, first)
step(model, first)
assert handle.step == 1 and "timm_decor" not in first.state_dict()
del handle, model, first, second
fresh()

# detach() is what the script wants: no warning
model = decor()
optimizer = sgd(model)
hook.handles()[0].detach()
step(model, optimizer)
assert hook.handles() == []
del model, optimizer

# explicit attach wins, on the same optimizer and on another, and is left alone by what comes after; by whatever name
for make in (lambda model, optimizer: optimizer, lambda model, optimizer: sgd(model)):
    model = decor()
    optimizer = sgd(model)
    optimizer = make(model, optimizer)
    handle = attach_of_before(model, optimizer, timm_decor.DecorConfig(every=7))
    assert hook.handles() == [] and handle.config.every == 7
    sgd(model)
    step(model, optimizer)
    assert handle.step == 1 and hook.handles() == []
    handle.detach()
    del model, optimizer, handle
fresh()

# Lookahead and a wrapper that holds the optimizer
model = decor()
optimizer = timm.optim.create_optimizer_v2(model, "lookahead_sgd", lr=0.1)
step(model, optimizer)
assert hook.handles()[0].step == 1 and "timm_decor" in optimizer.state_dict()
del model, optimizer
fresh()

# a wrapper around what could never be attached: training goes on
class Duck:
    param_groups = []

class Around(torch.optim.SGD):
    optim = Duck()

plain = net()
step(plain, Around(plain.parameters(), 0.1))
del plain

# refused, in the line that attach has for it, where the optimizer is made
model, other = decor(), decor()
with pytest.raises(ValueError, match="timm_decor.hook: MADGRAD keeps a copy of the weights"):
    timm.optim.create_optimizer_v2(model, "madgrad", lr=0.1)
with pytest.raises(ValueError, match="a SGD holds 2 decorrelated models"):
    torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1)

# a part of the layers
optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
step(model, optimizer)
"""
    )
    assert [line for line in said if "is on" not in line] == [
        "timm_decor.hook: steps of this SGD are plain: Sequential is attached to another optimizer, the last that was "
        "made",
        "timm_decor.hook: the script calls timm_decor.attach itself, which takes over",
        "timm_decor.hook: the script calls timm_decor.attach itself, which takes over",
        "timm_decor.hook: training is plain: this Around holds no weight of a decorrelated model; create one by its "
        "decor_ name (--model decor_resnet18), or call timm_decor.decorrelate(model) before the optimizer is made",
        "timm_decor.hook: steps of this SGD are plain: it holds 1 of Sequential's 2 decorrelated layers; one "
        "optimizer must hold them all",
    ]
    assert (
        said[0] == "timm_decor.hook: decorrelation is on: Sequential, 2 layers, whiten, kronecker, every 3 steps, SGD; "
        "inputs and outputs decorrelated, steps as long as plain training's: keep its learning rate"
    )


def test_torchscript_is_told_and_compile_works():
    said = check(
        """
model = decor(every=1)
optimizer = sgd(model)
compiled = torch.compile(model, backend="eager")
for _ in range(2):
    step(compiled, optimizer)
assert all(row.refreshes == 2 for row in hook.handles()[0].report().rows)
del model, optimizer, compiled
gc.collect()
torch._dynamo.reset()
model = torch.jit.script(decor(every=1))
optimizer = sgd(model)
for _ in range(2):
    step(model, optimizer)
assert hook.handles() == [] and "timm_decor" not in optimizer.state_dict()
"""
    )
    told = [line for line in said if "is on" not in line and "deprecated" not in line]
    assert len(told) == 1 and "training is plain: Sequential has gradients, but no input came through" in told[0]


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("EVREY", "5", "unknown environment variable TIMM_DECOR_EVREY; did you mean TIMM_DECOR_EVERY?"),
        ("ZZZ", "5", "unknown environment variable TIMM_DECOR_ZZZ; there are TIMM_DECOR_RULE, TIMM_DECOR_KAPPA"),
        ("EVERY", "0", "environment variable TIMM_DECOR_EVERY='0': every=0: must be 1 or more"),
        ("EVERY", "often", "TIMM_DECOR_EVERY='often': must be a whole number"),
        ("SAMPLE", "nan", "TIMM_DECOR_SAMPLE='nan': sample=nan: must be in (0, 1]"),
        ("DAMPING", "", "TIMM_DECOR_DAMPING='': must be a number"),
        ("RULE", "whitne", "TIMM_DECOR_RULE='whitne': unknown rule 'whitne'; did you mean 'whiten'?"),
        ("STRUCTURE", "ful", "TIMM_DECOR_STRUCTURE='ful': unknown structure 'ful'; did you mean 'full'?"),
        ("PRESERVE_FUNCTION", "maybe", "TIMM_DECOR_PRESERVE_FUNCTION='maybe': must be true or false"),
        ("WARMUP", "3", "environment variable TIMM_DECOR_WARMUP was removed: "),
    ],
)
def test_a_variable_that_is_wrong_switches_nothing_on(name, value, words, monkeypatch, capsys, script):
    monkeypatch.setenv(f"TIMM_DECOR_{name}", value)
    before = Optimizer.__init__
    assert run.main([str(script)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("timm_decor.run: error: ") and error.count("\n") == 1
    assert Optimizer.__init__ is before and "timm_decor.hook" not in sys.modules


def test_variables_reach_the_config():
    code = """
import dataclasses
import timm_decor.hook as hook
from timm_decor.knobs import from_environment
others = {"OTHER": "x", "TIMM_DECOR_HUB_OWNER": "somebody"}
assert from_environment({"TIMM_DECOR_RULE": "dbp", **others}) == {"rule": "dbp"}
model = decor(rank=5, max_dim=100)
optimizer = sgd(model)
config = hook.handles()[0].config
wanted = timm_decor.DecorConfig(every=50, structure="space", preserve_function=False, damping=2, rank=5, max_dim=100)
assert config == dataclasses.replace(wanted, sides="both"), config
assert model.decor_report.config == wanted
hook._OPTIONS.update(rule="dbp", structure="kronecker")
with pytest.raises(ValueError, match="timm_decor.hook: rule 'dbp' does not go with structure 'kronecker'"):
    sgd(decor())
"""
    names = {"EVERY": "50", "STRUCTURE": "space", "PRESERVE_FUNCTION": "False", "DAMPING": "2"}
    status, output = python("-c", PRELUDE + code, **{f"TIMM_DECOR_{name}": value for name, value in names.items()})
    assert status == 0, output
    assert "1 layers, whiten, space, every 50 steps, SGD" in output


def test_only_the_first_process_speaks():
    code = PRELUDE + "step(*(lambda m: (m, sgd(m)))(decor())); step(*(lambda m: (m, sgd(m)))(net()))"
    status, output = python("-c", code, RANK="1")
    assert status == 0 and lines(output) == [], output


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], "nothing to run; usage: python -m timm_decor.run SCRIPT"),
        (["-m"], "-m needs a module; usage: "),
        (["-x", "train.py"], "unknown option '-x'; usage: "),
        (["no/train.py"], "'no/train.py' is not a file"),
        (["-m", "no_such.module"], "no Python module 'no_such.module'"),
    ],
)
def test_run_with_nothing_to_run(argv, words, capsys):
    assert run.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"timm_decor.run: error: {words}") and error.count("\n") == 1
    assert "timm_decor.hook" not in sys.modules


def test_run_names_what_a_package_lacks(tmp_path, monkeypatch):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        run.main(["-m", "lacking.train"])


def test_run_help(capsys):
    assert run.main(["--help"]) == 0
    assert capsys.readouterr().out == run.USAGE + "\n"


REPORT = """
import atexit, inspect, json, pickle, sys
import helper
class Thing: pass
def main(value: int): pass
assert main.__annotations__ == {"value": int}
assert pickle.loads(pickle.dumps(Thing)) is Thing and "def main" in inspect.getsource(main)
atexit.register(lambda: pickle.dumps(Thing))
spec = __spec__ and __spec__.name
print(json.dumps([__name__, sys.modules["__main__"].__file__ == __file__, spec, __file__, sys.argv, sys.path[0]]))
sys.exit(3)
"""


def test_run_is_as_python_runs(tmp_path):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "report.py").write_text(REPORT)
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def output(*words):
        command = [sys.executable, *map(str, words), "a", "--b", "-m"]
        done = subprocess.run(command, env=clean(PYTHONPATH=path), text=True, capture_output=True, cwd=tmp_path.parent)
        assert done.returncode == 3, done.stderr
        return done.stdout, done.stderr

    for words in ([tmp_path / "report.py"], ["-m", "report"]):
        assert output("-m", "timm_decor.run", *words) == output(*words)


def test_run_switches_the_hook_on(script, tmp_path):
    words = [script, "--model", "decor_test_resnet", "--opt", "lookahead_adamw", "--output", tmp_path]
    status, output = python("-m", "timm_decor.run", *words)
    assert status == 0, output
    assert any(re.match(r"decorrelation is on: \w+, \d+ layers, .*, AdamW", line) for line in lines(output)), output
    assert final(tmp_path)["optimizer"]["timm_decor"]["step"] == 12
