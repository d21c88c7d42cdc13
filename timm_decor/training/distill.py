"""Knowledge distillation from a timm model, with timm's arguments and its losses.

timm has classes for this (`timm.task`) since 1.0.24, but they own student and loss; the sums here are the same
(tests/test_distillation.py), work with every timm that we do, and renormalise images by --mean and --std.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional

from timm_decor.errors import UserError
from timm_decor.text import near
from timm_decor.training import build
from timm_decor.training.keeping.metadata import CheckpointMetadata
from timm_decor.training.options import DistillOptions


class Distillation(nn.Module):
    """Adds a teacher's opinion to the loss.

    loss = task_weight * task_loss + distill_weight * distill_loss. Without either weight both are 1; with only the
    task's, the other is 1 - it; with only the other, the task's is 1 (timm's rule).

    Args:
        teacher: evaluated as it is; must give logits of the student's classes.
        options: which of the two losses, and how they are weighed.
        data_config: by which the student's images were normalised: mean, std, input_size.
        accelerator: its device and precision are used.
        channels_last: memory layout of the images.
        order: the teacher's class that each of the student's is; None where they are numbered alike.

    Raises:
        UserError: the teacher does not take such images.
    """

    def __init__(
        self,
        teacher: nn.Module,
        options: DistillOptions,
        data_config: dict[str, Any],
        accelerator: Accelerator,
        channels_last: bool = False,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.teacher = build.place(teacher.eval().requires_grad_(False), accelerator.device, channels_last)
        self._autocast = accelerator.autocast
        self._by_token, self._hard = options.kd_distill_type == "token", options.kd_token_distill_type == "hard"
        self._temperature = options.kd_temperature
        task, distill = options.task_loss_weight, options.distill_loss_weight
        self.task_weight = 1.0 if task is None else task
        self.distill_weight = distill if distill is not None else 1.0 if task is None else 1.0 - task
        theirs = _seen_by(teacher, options.kd_pretrained_path, data_config)
        factor, offset = _renormalisation(data_config, theirs)
        self._factor, self._offset = factor.to(accelerator.device), offset.to(accelerator.device)
        self._device = accelerator.device
        self._order = None if order is None else torch.tensor(order, device=self._device)
        self.check_images([data_config["input_size"]])

    def check_images(self, sizes: Iterable[Sequence[int]]) -> None:
        """Refuse a teacher that does not take images of one of these sizes (C, H, W).

        Raises:
            UserError: see above.
        """
        for size in sizes:
            build.check_images(self.teacher, size, self._device, self._autocast, "--kd-model-name: it")

    def forward(self, task_loss: Tensor, output: Tensor | tuple[Tensor, ...], images: Tensor) -> Tensor:
        """The whole loss.

        Args:
            task_loss: of the labels.
            output: the student's logits (N, classes), or with --kd-distill-type token the pair (head, distillation
                head).
            images: as the student saw them, (N, C, H, W).
        """
        student = output[1] if self._by_token else output
        with torch.no_grad(), self._autocast():
            teacher = self.teacher(images * self._factor + self._offset).float()  # a softmax wants more than bfloat16
            teacher = teacher if self._order is None else teacher[:, self._order]
        assert isinstance(student, Tensor)
        if self._by_token and self._hard:
            distill_loss = functional.cross_entropy(student, teacher.argmax(1))
        else:
            t = self._temperature
            ours, theirs = functional.log_softmax(student / t, 1), functional.log_softmax(teacher / t, 1)
            distill_loss = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * t**2
        return self.task_weight * task_loss + self.distill_weight * distill_loss


def make_distillation(
    options: DistillOptions,
    student: nn.Module,
    name: str,
    data_config: dict[str, Any],
    class_names: Sequence[str],
    accelerator: Accelerator,
    channels_last: bool,
) -> Distillation | None:
    """The distillation that the arguments ask for, or None; prepares the student for --kd-distill-type token.

    Args:
        options: of distillation.
        student: the model to train.
        name: of the student, for messages.
        data_config: by which the student's images were normalised.
        class_names: of the student's classes; empty where they are not known.
        accelerator: of the student.
        channels_last: memory layout of the images.

    Raises:
        UserError: an unknown teacher, weights that do not load, other classes than the student's, by number or by the
            names in the teacher's checkpoint, a student without a distillation head, or images that the teacher does
            not take.
    """
    if not options.kd_model_name:
        return None
    if options.kd_distill_type == "token":
        if not hasattr(student, "set_distilled_training"):
            raise UserError(f"--kd-distill-type token: {name} has no distillation head; deit_*_distilled_* have")
        student.set_distilled_training(True)  # type: ignore[operator]
    classes, channels = build.class_count(student), data_config["input_size"][0]
    teacher = _teacher(options.kd_model_name, options.kd_pretrained_path, classes, channels)
    order = _order(options.kd_pretrained_path, class_names)
    return Distillation(teacher, options, data_config, accelerator, channels_last, order)


def _teacher(name: str, path: str | None, classes: int, channels: int) -> nn.Module:
    build.check_model_name(name)
    own = getattr(get_pretrained_cfg(name, allow_unregistered=True), "num_classes", classes)
    if not path:
        _check_classes(name, own, classes)
    size: dict[str, Any] = {"num_classes": classes} if path else {}  # timm would make a new head, which teaches noise
    try:
        with build.weights_only():
            teacher = timm.create_model(name, pretrained=not path, in_chans=channels, **size, **_arguments(name, path))
    except build.CREATION_ERRORS as error:
        raise UserError(f"cannot create teacher {name}: {build.reason(error)}") from error
    if path:
        build.load_weights(teacher, path, use_ema=None)
    else:
        _check_classes(name, build.class_count(teacher), classes)  # of hf-hub:... nothing is known before
    return teacher


def _check_classes(name: str, own: int, classes: int) -> None:
    if own != classes:
        raise UserError(
            f"teacher {name} knows {own} classes, not these {classes}: --kd-pretrained-path takes one that does"
        )


def _order(path: str | None, names: Sequence[str]) -> list[int] | None:
    """The teacher's class that each of `names` is, by the names in its checkpoint."""
    saved = CheckpointMetadata.read(path or "")
    theirs = list(saved.label_names) if saved else []
    if not theirs or not names or theirs == list(names):
        return None
    missing = next((name for name in names if name not in theirs), None)
    if missing is not None or len(set(theirs)) < len(theirs):
        odd = f"does not know class '{missing}'{near(missing, theirs)}" if missing else "has a class name twice"
        raise UserError(f"--kd-pretrained-path {path}: the teacher {odd}, so that its classes are not the student's")
    return [theirs.index(name) for name in names]


def _arguments(name: str, path: str | None) -> dict[str, Any]:
    """What else the teacher's checkpoint says that it was made with."""
    saved = CheckpointMetadata.read(path or "")
    if saved is None or build.architecture(saved.architecture) != build.architecture(name):
        return {}
    return saved.model_kwargs


def _renormalisation(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Factor and offset, (1, C, 1, 1), from one normalisation of images to another."""
    mean, std = torch.tensor(ours["mean"]), torch.tensor(ours["std"])
    their_mean, their_std = torch.tensor(theirs["mean"]), torch.tensor(theirs["std"])
    return (std / their_std).view(1, -1, 1, 1), ((mean - their_mean) / their_std).view(1, -1, 1, 1)


def _seen_by(teacher: nn.Module, path: str | None, data_config: dict[str, Any]) -> dict[str, Any]:
    """Mean and std of the teacher's images: its checkpoint's where that says so, timm's, or else the student's."""
    saved = CheckpointMetadata.read(path or "")
    channels = data_config["input_size"][0]
    for known in (saved.data_config if saved else {}, getattr(teacher, "pretrained_cfg", {}), data_config):
        mean, std = known.get("mean") or (), known.get("std") or ()
        if len(mean) == len(std) in (channels, 3):
            return {"mean": build.per_channel(mean, channels), "std": build.per_channel(std, channels)}
    return data_config
