"""The arguments of train.py and validate.py. Names and defaults are timm's where timm has them.

Deliberate differences: values are range-checked, switches also have a `--no-` form so that a command line can undo a
recipe, schedules step on every update, `--pretrained-path` needs no `--pretrained` beside it, and `--device`,
`--workers` and `--num-classes` are found out when not given.
"""

from __future__ import annotations

import argparse
from typing import Any

from timm_decor import knobs
from timm_decor.config import DecorConfig
from timm_decor.errors import UserError
from timm_decor.training.parser import (
    KeyValues,
    Names,
    Parser,
    Rising,
    amount,
    below_one,
    count,
    crop,
    finite,
    index,
    positive,
    seed,
    share,
    sizes,
)

_SWITCH = argparse.BooleanOptionalAction
_SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none")
_DECAYS = ("1-sqrt", "linear", "cosine", "power", "exp")


def usual_decay_epochs(sched: str) -> float:
    """--decay-epochs where nobody says: as timm has it, in epochs, or below 1 as a share of them."""
    return 0.2 if sched in ("wsd", "rsqrt") else 90


def train_parser(prog: str = "train.py") -> Parser:
    """The command line of train.py."""
    parser = Parser(prog=prog, description="Train a timm image classifier, decorrelated or plain.")
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML recipe; the command line overrides it")
    add_data_arguments(parser, batch_size=128)
    group = parser.add_argument_group("training data")
    group.add_argument("--train-split", default="train", metavar="NAME", help="training split, as in train[:1000]")
    group.add_argument(
        "--val-split", default="validation", metavar="NAME", help="of files and folders also val or test"
    )
    group.add_argument("--train-num-samples", type=count, metavar="N", help="images that the training split must have")
    group.add_argument("--val-num-samples", type=count, metavar="N", help="images that the evaluation split must have")
    group.add_argument("-vb", "--validation-batch-size", type=count, metavar="N", help="default: --batch-size")
    add_model_arguments(parser, default_model="decor_resnet18")
    group = parser.add_argument_group("start")
    group.add_argument("--pretrained", action=_SWITCH, default=False, help="start from timm's pretrained weights")
    group.add_argument("--pretrained-path", metavar="FILE", help="pretrained weights to use instead; gets a new head")
    group.add_argument("--initial-checkpoint", metavar="FILE", help="start from these weights, head included")
    group.add_argument(
        "--initial-r", metavar="FILE", help="start with this R: the decor.safetensors of a published run"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="NAME",
        help="submodules not to train, as in conv1 bn1 layer1; their BatchNorm keeps its statistics",
    )
    group.add_argument(
        "--resume",
        metavar="PATH",
        help="run folder (or its resume.pt) to go on with, in place; auto: that of --experiment, if it holds a run",
    )
    group.add_argument("--drop", type=share, default=0.0, metavar="PCT", help="dropout rate")
    group.add_argument("--drop-path", type=share, metavar="PCT", help="drop path rate")
    group.add_argument("--drop-block", type=share, metavar="PCT", help="drop block rate, for models that have it")
    group.add_argument("--bn-momentum", type=share, metavar="X", help="of every BatchNorm; default: the model's")
    group.add_argument("--bn-eps", type=positive, metavar="X", help="of every BatchNorm; default: the model's")
    group.add_argument("--head-init-scale", type=amount, metavar="X", help="multiply the head's weight and bias")
    group.add_argument("--head-init-bias", type=finite, metavar="X", help="set the head's bias")
    group.add_argument("--sync-bn", action=_SWITCH, default=False, help="BatchNorm over the images of all processes")
    group.add_argument("--grad-checkpointing", action=_SWITCH, default=False, help="trade compute for memory")
    _add_decor_arguments(parser)
    _add_optimizer_arguments(parser)
    _add_schedule_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_distillation_arguments(parser)
    _add_run_arguments(parser)
    return parser


def validate_parser(prog: str = "validate.py") -> Parser:
    """The command line of validate.py."""
    parser = Parser(prog=prog, description="Evaluate a checkpoint, or timm's pretrained weights.")
    add_data_arguments(parser, batch_size=256)
    add_model_arguments(parser, default_model=None)
    parser.add_argument("--split", default="validation", metavar="NAME", help="of files and folders also val or test")
    parser.add_argument("--num-samples", type=count, metavar="N", help="images that the split must have")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="PATH",
        help="safetensors, or a torch file that loads weights-only; several, or folders of them, give a row each",
    )
    parser.add_argument("--pretrained", action=_SWITCH, default=False, help="timm's weights; implied by no checkpoint")
    parser.add_argument("--use-ema", action=_SWITCH, default=False, help="the checkpoint's averaged weights")
    parser.add_argument(
        "--test-pool", action=_SWITCH, default=False, help="pool test-time images larger than training's"
    )
    parser.add_argument(
        "--use-train-size",
        action=_SWITCH,
        default=False,
        help="evaluate timm's weights at training's size, not at tests'",
    )
    parser.add_argument("--results-file", metavar="FILE", help="write the rows here as well, the best first")
    parser.add_argument(
        "--results-format", choices=("csv", "json", "md"), help="format of that file; default: by its ending, else csv"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, as in a pipe, where a terminal would get a table"
    )
    parser.add_argument("--confusion-matrix", metavar="FILE", help="write it as FILE, a csv, and as a png beside it")
    parser.add_argument("--worst-images", metavar="FILE", help="write the images with the highest loss as one png")
    parser.add_argument("--sample-images", metavar="FILE", help="write images from all over the split as one png")
    _add_timeout(parser)
    parser.add_argument("--seed", type=seed, default=42, help="random seed")
    return parser


def predict_parser(prog: str) -> Parser:
    """The command line of predict."""
    parser = Parser(prog=prog, description="Say what is in images.")
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a checkpoint, train.py's folder of one, or a pretrained model as resnet18.a1_in1k or hf-hub:OWNER/NAME",
    )
    parser.add_argument("paths", nargs="+", metavar="IMAGE", help="image files, folders of them, or quoted wildcards")
    parser.add_argument("--top", type=count, default=5, metavar="N", help="classes to name for each image")
    parser.add_argument("--output", metavar="FILE", help="write .csv, .jsonl or .parquet, instead of a table here")
    parser.add_argument("--picture", metavar="FILE", help="draw the first images with what was predicted, as one png")
    parser.add_argument("--use-ema", action=_SWITCH, help="averaged weights; default: where they made a folder's best")
    group = parser.add_argument_group("images")
    _add_loader_arguments(group, batch_size=64)
    _add_image_arguments(group)
    add_model_arguments(parser, default_model=None)
    return parser


def export_parser(prog: str) -> Parser:
    """The command line of export."""
    parser = Parser(prog=prog, description="Write a trained model as ONNX, torch.export or TorchScript, and check it.")
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a checkpoint, train.py's folder of one, or a pretrained model as resnet18.a1_in1k or hf-hub:OWNER/NAME",
    )
    parser.add_argument("file", metavar="FILE", help="its ending says the format: .onnx, .pt2 or .ts (TorchScript)")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="what it is checked on; default: handwritten digits"
    )
    parser.add_argument("--use-ema", action=_SWITCH, help="averaged weights; default: where they made a folder's best")
    _add_image_arguments(parser.add_argument_group("images"))
    _add_create_arguments(parser.add_argument_group("model"), default_model=None)
    return parser


def add_data_arguments(parser: Parser, batch_size: int) -> None:
    """Arguments that say which images, and how they become tensors."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="root folder of the data; of wds/ also a URL")
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help="digits (scikit-learn's, no folder needed), parquet, folder, torch/<name>, hfds/<name>, or "
        "streamed: wds/ (tar shards in --data-dir), hfids/<name>; "
        "default: folder with --data-dir, else digits",
    )
    group.add_argument("--dataset-download", action=_SWITCH, default=False, help="let torch/ datasets download")
    group.add_argument("--class-map", metavar="FILE", help="file that maps class names to indices (folder, wds)")
    group.add_argument("--input-key", metavar="NAME", help="image column (parquet, hfds, hfids), or extensions (wds)")
    group.add_argument(
        "--target-key", metavar="NAME", help="label column (parquet, hfds, hfids), or field of the json (wds)"
    )
    group.add_argument(
        "--cache-images",
        action=_SWITCH,
        help="keep decoded images in memory; default: yes for digits and parquet where that takes less than 1 GiB",
    )
    _add_loader_arguments(group, batch_size)
    _add_image_arguments(group)


def _add_loader_arguments(group: argparse._ArgumentGroup, batch_size: int) -> None:
    """How images become batches."""
    group.add_argument("-b", "--batch-size", type=count, default=batch_size, metavar="N", help="per process")
    group.add_argument("-j", "--workers", type=index, metavar="N", help="data processes; default: CPUs - 2, at most 8")
    group.add_argument("--pin-mem", action=_SWITCH, help="pin CPU memory for the transfer to a GPU; default: with CUDA")


def _add_image_arguments(group: argparse._ArgumentGroup) -> None:
    """How images become tensors."""
    group.add_argument("--img-size", type=count, metavar="N", help="default: the model's")
    group.add_argument("--in-chans", type=count, metavar="N", help="image channels: 3 (default) or 1")
    group.add_argument("--input-size", nargs=3, type=count, metavar=("C", "H", "W"), help="instead of the two above")
    group.add_argument("--crop-pct", type=crop, metavar="PCT", help="centre crop at evaluation; default: the model's")
    group.add_argument("--crop-mode", choices=("center", "squash", "border"), help="that crop's; default: the model's")
    group.add_argument("--mean", type=finite, nargs="+", help="mean pixel value; default: the model's")
    group.add_argument("--std", type=positive, nargs="+", help="deviation of pixel values; default: the model's")
    group.add_argument("--interpolation", metavar="NAME", help="resize interpolation; default: the model's")


def add_model_arguments(parser: Parser, default_model: str | None) -> None:
    """Arguments that say which model, on which device."""
    group = parser.add_argument_group("model")
    _add_create_arguments(group, default_model)
    group.add_argument("--channels-last", action=_SWITCH, default=False, help="channels_last memory layout")
    group.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    group.add_argument("--torchcompile-mode", metavar="MODE", help="torch.compile's mode")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps; default: the best there is")
    group.add_argument("--amp", action=_SWITCH, help="automatic mixed precision; default: accelerate's, else no")
    group.add_argument("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="AMP's dtype")


def _add_create_arguments(group: argparse._ArgumentGroup, default_model: str | None) -> None:
    """Which model, and how timm makes it."""
    group.add_argument("-m", "--model", default=default_model, metavar="NAME", help="any timm model, or a decor_ one")
    group.add_argument("--num-classes", type=count, metavar="N", help="default: the data set's, else the model's")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="for the model")
    group.add_argument("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax; default: the model's")


def _add_decor_arguments(parser: Parser) -> None:
    """`--decor` and the knobs."""
    group = parser.add_argument_group("decorrelation", "For decor_ models, and for any other with --decor.")
    group.add_argument("--decor", action=_SWITCH, default=False, help="decorrelate a plain timm model")
    knobs.add_arguments(group)


def decor_config(args: argparse.Namespace) -> DecorConfig:
    """The DecorConfig that the `--decor-*` arguments describe.

    Raises:
        UserError: what DecorConfig refuses, in its words.
    """
    try:
        return knobs.from_arguments(args)
    except (ValueError, TypeError) as error:
        raise UserError(f"--decor-*: {error}") from error


def _add_optimizer_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="sgd", metavar="NAME", help="one of timm's optimizers")
    group.add_argument("--opt-eps", type=amount, metavar="EPS", help="default: the optimizer's")
    group.add_argument("--opt-betas", type=below_one, nargs="+", metavar="BETA", help="default: the optimizer's")
    group.add_argument("--momentum", type=amount, default=0.9, help="optimizer momentum")
    group.add_argument("--weight-decay", type=amount, default=2e-5, help="not applied to biases and norms")
    group.add_argument("--clip-grad", type=positive, metavar="NORM", help="clip gradients; default: no")
    group.add_argument("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="how to clip")
    group.add_argument("--layer-decay", type=amount, metavar="X", help="layer-wise learning rate decay")
    group.add_argument("--layer-decay-min-scale", type=share, default=0.0, metavar="X", help="its smallest factor")
    group.add_argument("--layer-decay-no-opt-scale", type=share, metavar="X", help="freeze below this factor")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="for the optimizer")
    group.add_argument(
        "--grad-accum-steps", type=count, metavar="N", help="batches an update; default: accelerate's, else 1"
    )
    group.add_argument("--model-ema", action=_SWITCH, default=False, help="keep a moving average of the weights")
    group.add_argument("--model-ema-decay", type=share, default=0.9998, help="of that average")
    group.add_argument("--model-ema-warmup", action=_SWITCH, default=False, help="let that decay grow from 0")


def _add_schedule_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("learning rate")
    group.add_argument("--sched", default="cosine", choices=_SCHEDULES, metavar="NAME", help=", ".join(_SCHEDULES))
    group.add_argument("--sched-on-updates", action=_SWITCH, default=True, help="step the schedule on each update")
    group.add_argument("--lr", type=amount, help="learning rate; default: from --lr-base")
    group.add_argument("--lr-base", type=amount, default=0.1, help="lr = lr_base * global_batch / lr_base_size")
    group.add_argument("--lr-base-size", type=count, default=256, metavar="N", help="see --lr-base")
    group.add_argument("--lr-base-scale", choices=("linear", "sqrt"), help="default: by optimizer, as timm does")
    group.add_argument("--lr-noise", type=finite, nargs="+", help="epoch shares at which noise goes on and off")
    group.add_argument("--lr-noise-pct", type=amount, default=0.67, help="limit of that noise")
    group.add_argument("--lr-noise-std", type=amount, default=1.0, help="deviation of that noise")
    group.add_argument("--lr-cycle-mul", type=positive, default=1.0, help="factor of a cycle's length")
    group.add_argument("--lr-cycle-decay", type=amount, default=0.5, help="factor of the learning rate, per cycle")
    group.add_argument("--lr-cycle-limit", type=count, default=1, help="number of cycles")
    group.add_argument("--lr-k-decay", type=amount, default=1.0, help="k-decay of cosine and poly")
    group.add_argument("--lr-decay-fn", choices=_DECAYS, help="wsd's and rsqrt's decay; default: 1-sqrt and linear")
    group.add_argument(
        "--lr-stable-timescale", type=positive, metavar="N", help="rsqrt's, in epochs; default: --warmup-epochs"
    )
    group.add_argument("--warmup-lr", type=amount, default=1e-5, help="learning rate at the first update")
    group.add_argument("--warmup-epochs", type=amount, default=5, metavar="N", help="may be a fraction of an epoch")
    group.add_argument("--warmup-prefix", action=_SWITCH, default=False, help="schedule starts after the warm-up")
    group.add_argument("--cooldown-epochs", type=index, default=0, metavar="N", help="epochs at --min-lr, at the end")
    group.add_argument("--min-lr", type=amount, default=0.0, help="lower bound")
    group.add_argument("--epochs", type=count, default=300, metavar="N", help="epochs to train")
    group.add_argument("--decay-milestones", type=count, nargs="+", default=[90, 180, 270], help="multistep's epochs")
    group.add_argument(
        "--decay-epochs",
        type=positive,
        metavar="N",
        help="step's interval, default: 90; wsd's and rsqrt's last part, below 1 a share, default: 0.2",
    )
    group.add_argument("--decay-rate", "--dr", type=amount, default=0.1, help="step's factor; poly's power")
    group.add_argument("--patience-epochs", type=index, default=10, metavar="N", help="plateau's patience")


def _add_augmentation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and loss")
    group.add_argument("--aug", dest="no_aug", action="store_false", default=False, help="take back a recipe's no_aug")
    group.add_argument("--no-aug", action="store_true", help="no training augmentation at all")
    group.add_argument("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="default: rrc, a random resized crop")
    group.add_argument(
        "--scale", type=positive, nargs=2, action=Rising, default=[0.08, 1.0], help="share of the area a crop takes"
    )
    group.add_argument(
        "--ratio", type=positive, nargs=2, action=Rising, default=[3 / 4, 4 / 3], help="a crop's aspect ratio"
    )
    group.add_argument("--hflip", type=share, default=0.5, help="chance of a horizontal flip")
    group.add_argument("--vflip", type=share, default=0.0, help="chance of a vertical flip")
    group.add_argument("--color-jitter", type=amount, default=0.4, help="strength of colour jitter")
    group.add_argument("--color-jitter-prob", type=share, metavar="PCT", help="chance of colour jitter; default: 1")
    group.add_argument("--grayscale-prob", type=share, metavar="PCT", help="chance of a grey image")
    group.add_argument("--gaussian-blur-prob", type=share, metavar="PCT", help="chance of a blur")
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment policy, as rand-m9-mstd0.5")
    group.add_argument("--reprob", type=share, default=0.0, help="chance of random erasing")
    group.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erasing writes")
    group.add_argument("--recount", type=count, default=1, help="blocks to erase")
    group.add_argument("--mixup", type=amount, default=0.0, metavar="ALPHA", help="mixup, if above 0")
    group.add_argument("--cutmix", type=amount, default=0.0, metavar="ALPHA", help="cutmix, if above 0")
    group.add_argument(
        "--cutmix-minmax", type=share, nargs=2, action=Rising, help="cutmix's smallest and largest share"
    )
    group.add_argument("--mixup-prob", type=share, default=1.0, help="chance that a batch is mixed")
    group.add_argument("--mixup-switch-prob", type=share, default=0.5, help="chance of cutmix where both are on")
    group.add_argument("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares a mix")
    group.add_argument("--mixup-off-epoch", type=index, default=0, metavar="N", help="stop mixing there, if above 0")
    group.add_argument("--train-interpolation", default="random", help="random, bilinear or bicubic")
    group.add_argument(
        "--progressive-size",
        type=sizes,
        metavar="SIZES",
        help="training images by shares of the epochs, smaller ones first, as 48:0.4,64:0.6",
    )
    group.add_argument("--smoothing", type=below_one, default=0.1, help="label smoothing")
    group.add_argument("--bce-loss", action=_SWITCH, default=False, help="binary cross-entropy")
    group.add_argument("--bce-target-thresh", type=share, help="threshold for softened targets of --bce-loss")
    group.add_argument("--bce-sum", action=_SWITCH, default=False, help="--bce-loss sums over classes")
    group.add_argument("--bce-pos-weight", type=positive, metavar="X", help="weight of positives in --bce-loss")


def _add_distillation_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--kd-model-name", metavar="NAME", help="teacher, any timm model; no distillation without")
    group.add_argument("--kd-pretrained-path", metavar="FILE", help="the teacher's weights, head included")
    group.add_argument("--kd-distill-type", default="logit", choices=("logit", "token"), help="what learns from it")
    group.add_argument("--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="loss of token")
    group.add_argument("--kd-temperature", type=positive, default=4.0, metavar="T", help="of both softmaxes")
    group.add_argument("--task-loss-weight", type=amount, metavar="X", help="weight of the labels' loss; default: 1")
    group.add_argument(
        "--distill-loss-weight", type=amount, metavar="X", help="of the teacher's; default: 1, or 1 - the task's"
    )


def _add_timeout(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--dist-timeout",
        type=positive,
        metavar="SECONDS",
        help="how long a process waits for another one; default: torch's, 600 on GPUs and 1800 elsewhere",
    )


def _add_run_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed, default=42, help="random seed")
    group.add_argument("--log-interval", type=count, default=50, metavar="N", help="batches between progress figures")
    group.add_argument(
        "--report-mistakes",
        action=_SWITCH,
        default=True,
        help="show in report.html what the best checkpoint gets wrong, by one more evaluation at the end",
    )
    group.add_argument("--val-interval", type=count, default=1, metavar="N", help="epochs between evaluations")
    group.add_argument("--checkpoint-hist", type=index, default=10, metavar="N", help="best checkpoints to keep")
    group.add_argument(
        "--recovery-interval",
        type=index,
        default=0,
        metavar="N",
        help="updates between checkpoints within an epoch; 0: at its end only",
    )
    _add_timeout(group)
    group.add_argument("--output", default="output", metavar="DIR", help="folder of runs")
    group.add_argument("--experiment", metavar="NAME", help="this run's folder there; default: time-model-size")
    group.add_argument(
        "--log-with",
        nargs="+",
        default=[],
        action=Names,
        choices=("tensorboard", "wandb", "trackio", "none"),
        help="experiment trackers; repeatable, none takes back those before it",
    )
    group.add_argument("--project-name", default="timm_decor", metavar="NAME", help="the trackers' project")
    group.add_argument("--eval-metric", default="top1", choices=("top1", "top5", "loss"), help="what 'best' means")
    group = parser.add_argument_group("comparison with the plain twin")
    group.add_argument("--compare", action=_SWITCH, default=False, help="train both twins and write the comparison")
    group.add_argument("--compare-lr", type=amount, metavar="LR", help="the twin's learning rate; default: the same")
    group.add_argument(
        "--find-lr", type=positive, nargs=2, metavar=("LOW", "HIGH"),
        help="train nothing: try learning rates from LOW to HIGH in short trainings; with --compare for both twins",
    )  # fmt: skip
    group.add_argument("--find-updates", type=count, default=200, metavar="N", help="--find-lr: updates of each")
    group.add_argument("--compare-epochs", type=count, metavar="N", help="the twin's epochs; default: the same")


def as_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as a recipe that `-c` reads back; without those that name this very call."""
    return {key: value for key, value in vars(args).items() if key not in ("config", "resume")}
