"""The arguments as typed values, a group for each concern, so that a function's signature says what it depends on.

Fields have the names of the arguments. Defaults are where the arguments are, in `timm_decor/training/args.py`, and
nowhere else. tests/test_options.py holds each field's type against its argument.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from timm_decor.config import DecorConfig
from timm_decor.training.args import decor_config

_Options = TypeVar("_Options", bound="Options")


class Options:
    """A group of arguments, or several groups in one."""

    @classmethod
    def of(cls: type[_Options], args: argparse.Namespace) -> _Options:
        """Take the fields from parsed arguments, by name.

        Args:
            args: of a parser that has them all; train.py's after `follow_launcher`.

        Raises:
            UserError: what DecorConfig refuses.
        """
        return cls(**{name: _value(name, kind, args) for name, kind in get_type_hints(cls).items()})


def _value(name: str, kind: Any, args: argparse.Namespace) -> Any:
    if kind is DecorConfig:
        return decor_config(args)
    return kind.of(args) if isinstance(kind, type) and issubclass(kind, Options) else getattr(args, name)


@dataclass(frozen=True)
class DataOptions(Options):
    """Where images come from."""

    data_dir: str | None
    dataset: str | None
    dataset_download: bool
    class_map: str | None
    input_key: str | None
    target_key: str | None
    cache_images: bool | None


@dataclass(frozen=True)
class SplitOptions(Options):
    """Which images are trained on, and which are evaluated."""

    train_split: str
    val_split: str
    train_num_samples: int | None
    val_num_samples: int | None


@dataclass(frozen=True)
class ImageOptions(Options):
    """How images become tensors, as far as it is not left to the model."""

    img_size: int | None
    in_chans: int | None
    input_size: list[int] | None
    crop_pct: float | None
    crop_mode: str | None
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None


@dataclass(frozen=True)
class LoaderOptions(Options):
    """How images become batches."""

    batch_size: int
    workers: int | None
    pin_mem: bool | None


@dataclass(frozen=True)
class AugmentOptions(Options):
    """What happens to a training image."""

    no_aug: bool
    train_crop_mode: str | None
    scale: list[float]
    ratio: list[float]
    hflip: float
    vflip: float
    color_jitter: float
    color_jitter_prob: float | None
    grayscale_prob: float | None
    gaussian_blur_prob: float | None
    aa: str | None
    reprob: float
    remode: str
    recount: int
    train_interpolation: str
    progressive_size: str | None


@dataclass(frozen=True)
class LabelOptions(Options):
    """What makes labels soft: images that are mixed, and smoothing."""

    mixup: float
    cutmix: float
    cutmix_minmax: list[float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    mixup_off_epoch: int
    smoothing: float

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class CreateOptions(Options):
    """How timm makes a model."""

    num_classes: int | None
    model_kwargs: dict[str, Any]
    gp: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """What a model is made with beside its classes and channels, as a checkpoint says it."""
        return {**self.model_kwargs, **({"global_pool": self.gp} if self.gp else {})}


@dataclass(frozen=True)
class StartOptions(Options):
    """What training begins with, and what of it stays as it is."""

    pretrained: bool
    pretrained_path: str | None
    initial_checkpoint: str | None
    initial_r: str | None
    head_init_scale: float | None
    head_init_bias: float | None
    freeze: list[str]


@dataclass(frozen=True)
class LayerOptions(Options):
    """How a model's layers behave in training."""

    decor: bool
    drop: float
    drop_path: float | None
    drop_block: float | None
    bn_momentum: float | None
    bn_eps: float | None
    sync_bn: bool
    grad_checkpointing: bool


@dataclass(frozen=True)
class DeviceOptions(Options):
    """On what, and in which form, a model runs."""

    device: str | None
    channels_last: bool
    torchcompile: str | None
    torchcompile_mode: str | None
    amp: bool | None
    amp_dtype: str


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimizer and its learning rate; timm's `optimizer_kwargs` reads them."""

    opt: str
    opt_eps: float | None
    opt_betas: list[float] | None
    momentum: float
    weight_decay: float
    layer_decay: float | None
    layer_decay_min_scale: float
    layer_decay_no_opt_scale: float | None
    opt_kwargs: dict[str, Any]
    lr: float | None
    lr_base: float
    lr_base_size: int
    lr_base_scale: str | None


@dataclass(frozen=True)
class UpdateOptions(Options):
    """What belongs to an update besides the optimizer."""

    grad_accum_steps: int
    clip_grad: float | None
    clip_mode: str
    model_ema: bool
    model_ema_decay: float
    model_ema_warmup: bool


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """How long training lasts, and the learning rate's way; timm's `scheduler_kwargs` reads them."""

    sched: str
    sched_on_updates: bool
    lr_noise: list[float] | None
    lr_noise_pct: float
    lr_noise_std: float
    lr_cycle_mul: float
    lr_cycle_decay: float
    lr_cycle_limit: int
    lr_k_decay: float
    lr_decay_fn: str | None
    lr_stable_timescale: float | None
    warmup_lr: float
    warmup_epochs: float
    warmup_prefix: bool
    cooldown_epochs: int
    min_lr: float
    epochs: int
    decay_milestones: list[int]
    decay_epochs: float
    decay_rate: float
    patience_epochs: int


@dataclass(frozen=True)
class LossOptions(Options):
    """The loss of the labels."""

    bce_loss: bool
    bce_target_thresh: float | None
    bce_sum: bool
    bce_pos_weight: float | None


@dataclass(frozen=True)
class DistillOptions(Options):
    """The loss of a teacher."""

    kd_model_name: str | None
    kd_pretrained_path: str | None
    kd_distill_type: str
    kd_token_distill_type: str
    kd_temperature: float
    task_loss_weight: float | None
    distill_loss_weight: float | None


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """When training evaluates, in which batches, and what it calls the best."""

    val_interval: int
    validation_batch_size: int | None
    eval_metric: str


@dataclass(frozen=True)
class FolderOptions(Options):
    """Which folder a run has."""

    output: str
    experiment: str | None
    resume: str | None


@dataclass(frozen=True)
class KeepOptions(Options):
    """Which checkpoints are kept, and when one is written within an epoch."""

    checkpoint_hist: int
    recovery_interval: int


@dataclass(frozen=True)
class WatchOptions(Options):
    """What a person sees of a run, on the way and at its end."""

    log_interval: int
    report_mistakes: bool
    log_with: list[str]
    project_name: str


@dataclass(frozen=True)
class CompareOptions(Options):
    """The plain twin beside the model."""

    compare: bool
    compare_lr: float | None
    compare_epochs: int | None


@dataclass(frozen=True)
class SearchOptions(Options):
    """Short trainings over learning rates."""

    find_lr: list[float] | None
    find_updates: int


@dataclass(frozen=True)
class TrainOptions(Options):
    """All that train.py is told; `decor` is what the knobs say, for a model that is decorrelated."""

    model: str
    seed: int
    dist_timeout: float | None
    data: DataOptions
    split: SplitOptions
    image: ImageOptions
    loader: LoaderOptions
    augment: AugmentOptions
    label: LabelOptions
    create: CreateOptions
    start: StartOptions
    layer: LayerOptions
    decor: DecorConfig
    device: DeviceOptions
    optimizer: OptimizerOptions
    update: UpdateOptions
    schedule: ScheduleOptions
    loss: LossOptions
    distill: DistillOptions
    evaluation: EvaluationOptions
    folder: FolderOptions
    keep: KeepOptions
    watch: WatchOptions
    compare: CompareOptions
    search: SearchOptions


@dataclass(frozen=True)
class WeightOptions(Options):
    """Which weights validate.py evaluates."""

    checkpoint: list[str]
    pretrained: bool
    use_ema: bool


@dataclass(frozen=True)
class ResultOptions(Options):
    """What validate.py writes, and in which form."""

    results_file: str | None
    results_format: str | None
    json: bool
    confusion_matrix: str | None
    worst_images: str | None
    sample_images: str | None

    @property
    def pictures(self) -> dict[str, str]:
        """What shows single images or classes, by argument: the file."""
        named = {"--confusion-matrix": self.confusion_matrix, "--worst-images": self.worst_images}
        named |= {"--sample-images": self.sample_images}
        return {name: file for name, file in named.items() if file}


@dataclass(frozen=True)
class PredictOptions(Options):
    """All that predict is told."""

    weights: str
    paths: list[str]
    top: int
    output: str | None
    picture: str | None
    use_ema: bool | None
    model: str | None
    image: ImageOptions
    loader: LoaderOptions
    create: CreateOptions
    device: DeviceOptions


@dataclass(frozen=True)
class ExportOptions(Options):
    """All that export is told."""

    weights: str
    file: str
    images: list[str]
    use_ema: bool | None
    model: str | None
    image: ImageOptions
    create: CreateOptions


@dataclass(frozen=True)
class ValidateOptions(Options):
    """All that validate.py is told."""

    model: str | None
    seed: int
    dist_timeout: float | None
    split: str
    num_samples: int | None
    test_pool: bool
    use_train_size: bool
    data: DataOptions
    image: ImageOptions
    loader: LoaderOptions
    create: CreateOptions
    device: DeviceOptions
    weights: WeightOptions
    result: ResultOptions
