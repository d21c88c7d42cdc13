"""Arguments that do nothing by themselves: refused where a run would be another one than was meant, else told of."""

from __future__ import annotations

import argparse

from timm_decor.errors import UserError
from timm_decor.training.args import usual_decay_epochs

# An argument, and the one without which it does nothing.
_FORGOTTEN = (  # whoever gives the first meant the second
    ("compare_lr", "compare"),
    ("compare_epochs", "compare"),
    ("find_updates", "find_lr"),
    ("task_loss_weight", "kd_model_name"),
    ("distill_loss_weight", "kd_model_name"),
    ("kd_pretrained_path", "kd_model_name"),
)
_IDLE = (  # recipes have them at hand for when the second is turned on
    ("kd_distill_type", "kd_model_name"),
    ("kd_token_distill_type", "kd_model_name"),
    ("kd_temperature", "kd_model_name"),
    ("clip_mode", "clip_grad"),
    ("torchcompile_mode", "torchcompile"),
    ("bce_target_thresh", "bce_loss"),
    ("bce_sum", "bce_loss"),
    ("bce_pos_weight", "bce_loss"),
    ("model_ema_warmup", "model_ema"),
    ("remode", "reprob"),
    ("recount", "reprob"),
    ("model_ema_decay", "model_ema"),
    ("mixup_prob", ("mixup", "cutmix", "cutmix_minmax")),
    ("mixup_mode", ("mixup", "cutmix", "cutmix_minmax")),
    ("mixup_off_epoch", ("mixup", "cutmix", "cutmix_minmax")),
    ("color_jitter_prob", "color_jitter"),
    ("lr_noise_pct", "lr_noise"),
    ("lr_noise_std", "lr_noise"),
    ("layer_decay_min_scale", "layer_decay"),
    ("layer_decay_no_opt_scale", "layer_decay"),
    ("project_name", "log_with"),
)
_CYCLES = ("cosine", "poly", "tanh")
_STABLE = ("rsqrt", "wsd")
_SCHEDULES = {  # which of the schedules of --sched read an argument
    "decay_rate": ("multistep", "plateau", "poly", "step"),
    "decay_milestones": ("multistep",),
    "decay_epochs": (*_STABLE, "step"),
    "patience_epochs": ("plateau",),
    "lr_cycle_mul": _CYCLES,
    "lr_cycle_decay": _CYCLES,
    "lr_cycle_limit": _CYCLES,
    "lr_k_decay": ("cosine", "poly"),
    "lr_decay_fn": _STABLE,
    "lr_stable_timescale": ("rsqrt",),
    "min_lr": (*_CYCLES, *_STABLE, "plateau"),
    "cooldown_epochs": (*_CYCLES, *_STABLE),  # timm adds them to those that have an end
}
_OF_SCHEDULES = ("warmup_epochs", "warmup_lr", "warmup_prefix", "lr_noise")  # all but none do something with them
_AUGMENTS = ("aa", "reprob", "train_crop_mode", "vflip", "grayscale_prob", "gaussian_blur_prob")  # not with --no-aug
_MAPPED = ("folder", "wds")  # data sets that --class-map numbers


def refuse_forgotten(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse an argument without the one that it belongs to.

    Raises:
        UserError: names both.
    """
    for name, other in _FORGOTTEN:
        if _is_given(args, parser, name) and not getattr(args, other):
            raise UserError(f"{_flag(name)} does nothing without {_flag(other)}")


def refuse_class_map(args: argparse.Namespace) -> None:
    """Refuse --class-map for data whose classes it would not number.

    Raises:
        UserError: names the data set.
    """
    dataset = args.dataset or ("folder" if args.data_dir else "digits")
    if args.class_map and dataset.split("/", 1)[0].lower() not in _MAPPED:
        raise UserError(f"--class-map numbers the classes of folders and of wds/, not those of --dataset {dataset}")


def idle(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A line for each argument that waits for another one which is off."""
    lines = [
        f"{_flag(name)} does nothing without {' or '.join(map(_flag, others))}"
        for name, given in (*_FORGOTTEN, *_IDLE)  # the former of a run that has begun: else they are refused
        for others in [(given,) if isinstance(given, str) else given]
        if hasattr(args, name) and _is_given(args, parser, name) and not any(getattr(args, other) for other in others)
    ]
    if getattr(args, "no_aug", False):
        lines += [f"{_flag(name)} does nothing beside --no-aug" for name in _AUGMENTS if _is_given(args, parser, name)]
    if hasattr(args, "sched"):
        lines += _idle_in_schedule(args, parser)
    if getattr(args, "lr", None) is not None:
        names = ("lr_base", "lr_base_size", "lr_base_scale")
        lines += [f"{_flag(name)} does nothing beside --lr" for name in names if _is_given(args, parser, name)]
    if args.input_size and (args.img_size or args.in_chans):
        lines.append(f"{'--img-size' if args.img_size else '--in-chans'} does nothing beside --input-size")
    return lines


def _idle_in_schedule(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Those of other schedules than --sched, with the ones that would read them."""
    lines = [
        f"{_flag(name)} does nothing with --sched {args.sched}: it is for {', '.join(of)}"
        for name, of in _SCHEDULES.items()
        if args.sched not in of and _is_given(args, parser, name)
    ]
    none = [name for name in _OF_SCHEDULES if getattr(args, name)] if args.sched == "none" else []
    return lines + [f"{_flag(name)} does nothing with --sched none" for name in none if _is_given(args, parser, name)]


def _is_given(args: argparse.Namespace, parser: argparse.ArgumentParser, name: str) -> bool:
    if name == "decay_epochs":  # it has a default for each schedule
        return args.decay_epochs not in (None, usual_decay_epochs(args.sched))
    return bool(getattr(args, name) != parser.get_default(name))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
