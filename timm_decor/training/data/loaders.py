"""From a source of images to batches on the device.

All of the data's randomness (order, augmentation, erasing, mixup) is a function of seed, epoch and batch alone. It does
not depend on worker processes, on what else draws random numbers, or on which model trains: so twins see the same
batches, and a resumed run goes on with the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset

from timm_decor.errors import UserError, first_line
from timm_decor.training.data.batches import Batches, BySize, Transform
from timm_decor.training.data.progressive import Progression
from timm_decor.training.data.sources import Source
from timm_decor.training.data.streams import Stream, shards_of
from timm_decor.training.keeping.stopping import spare_worker
from timm_decor.training.options import AugmentOptions, LabelOptions, LoaderOptions
from timm_decor.training.runtime import available_cpus, seed_everything

WORKER_TIMEOUT = 600  # seconds for a batch: more than any disk needs, and less than forever
T = TypeVar("T")


def _as_is(batch: Any) -> Any:
    return batch


def train_loader(
    options: LoaderOptions,
    augment: AugmentOptions,
    label: LabelOptions,
    source: Source,
    data_config: dict[str, Any],
    progression: Progression,
    num_classes: int,
    seed: int,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """The training batches: images (N, C, H, W), labels (N,) or soft labels (N, classes) with mixup or cutmix.

    Args:
        options: of the batches.
        augment: what happens to an image.
        label: what makes labels soft.
        source: the training images.
        data_config: timm's: mean, std, interpolation, crop_pct.
        progression: the images' size in each epoch.
        num_classes: of the model.
        seed: of the order and of every other random choice.
        accelerator: shards the batches over its processes and moves them to its device.

    Raises:
        UserError: fewer images than one global batch, or a transform that timm refuses.
    """
    wanted = options.batch_size * accelerator.num_processes
    if len(source) < wanted:
        raise UserError(f"--batch-size {options.batch_size} on {accelerator.num_processes} process(es) takes {wanted} "
                        f"images a step; the training split has {len(source)}")  # fmt: skip
    transform = partial(
        _transform,
        is_training=True,
        no_aug=augment.no_aug,
        train_crop_mode=augment.train_crop_mode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        color_jitter_prob=augment.color_jitter_prob,
        grayscale_prob=augment.grayscale_prob or 0.0,
        gaussian_blur_prob=augment.gaussian_blur_prob or 0.0,
        auto_augment=augment.aa,
        interpolation=data_config["interpolation"] if augment.no_aug else augment.train_interpolation,
        mean=data_config["mean"],
        crop_pct=data_config["crop_pct"],
    )
    dataset = Batches(
        source,
        BySize({size: transform(input_size=size) for size in progression.input_sizes}, progression),
        data_config["mean"],
        data_config["std"],
        num_classes,
        seed,
        erase=_erasing(augment),
        mixup=_mixup(label, options.batch_size, num_classes, [size[-1] for size in progression.input_sizes]),
        mixup_off_epoch=label.mixup_off_epoch,
    )
    seed_everything(seed)  # Accelerate's sampler takes its seed from torch's generator
    return _loader(dataset, options, accelerator, shuffle=True, seed=seed)


def eval_loader(
    options: LoaderOptions,
    source: Source,
    data_config: dict[str, Any],
    num_classes: int,
    seed: int,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """Every image of an evaluation split once, in the order of its `dataset.source`; arguments as for `train_loader`.

    Of a stream the last batches may be made up with `NO_IMAGE`s.
    """
    size = data_config["input_size"]
    transform = _transform(
        input_size=size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
    )
    transforms = BySize({size: transform}, Progression.of(None, size, 0))
    dataset = Batches(source, transforms, data_config["mean"], data_config["std"], num_classes, seed)
    return _loader(dataset, options, accelerator, shuffle=False, seed=seed)


def _mixup(label: LabelOptions, batch_size: int, num_classes: int, sizes: Iterable[int]) -> Mixup | None:
    if not label.mixes:
        return None
    if batch_size % 2:
        raise UserError(f"--mixup and --cutmix pair images up: --batch-size must be even, not {batch_size}")
    low, high = label.cutmix_minmax or (0.0, 1.0)
    narrow = next((size for size in sizes if int(size * low) >= int(size * high)), None)
    if narrow:
        raise UserError(f"--cutmix-minmax {low:g} {high:g} leaves no pixel to choose from in images of {narrow} px")
    return Mixup(
        mixup_alpha=label.mixup,
        cutmix_alpha=label.cutmix,
        cutmix_minmax=label.cutmix_minmax,
        prob=label.mixup_prob,
        switch_prob=label.mixup_switch_prob,
        mode=label.mixup_mode,
        label_smoothing=label.smoothing,
        num_classes=num_classes,
    )


def _erasing(augment: AugmentOptions) -> RandomErasing | None:
    if not augment.reprob or augment.no_aug:
        return None
    return RandomErasing(augment.reprob, mode=augment.remode, max_count=augment.recount, device="cpu")


def _transform(**kwargs: Any) -> Transform:
    try:
        # use_prefetcher: leave out conversion to float and normalisation, which are cheaper on the whole batch
        transform: Transform = create_transform(use_prefetcher=True, **kwargs)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"timm cannot make that transform: {first_line(error)}") from error
    return transform


def _loader(
    dataset: Batches, options: LoaderOptions, accelerator: Accelerator, shuffle: bool, seed: int
) -> DataLoader[Any]:
    shards, size = shards_of(dataset.source), options.batch_size
    if shards is None:
        loader = _torch_loader(dataset, options, accelerator, batch_size=size, shuffle=shuffle, drop_last=shuffle)
        return accelerator.prepare_data_loader(loader)
    processes, process = accelerator.num_processes, accelerator.process_index
    stream = Stream(dataset, shards, size, worker_count(options), processes, process, shuffle, seed)
    loader = _torch_loader(stream, options, accelerator, batch_size=None)
    # As of one process: the stream has shared its batches out, which Accelerate would do by reading all on each
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def worker_count(options: LoaderOptions) -> int:
    """Loader processes of one training process."""
    return default_workers() if options.workers is None else options.workers


def _torch_loader(
    dataset: Dataset[Any], options: LoaderOptions, accelerator: Accelerator, **more: Any
) -> DataLoader[Any]:
    workers = worker_count(options)
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda" if options.pin_mem is None else options.pin_mem,
        collate_fn=_as_is,
        worker_init_fn=spare_worker,
        timeout=WORKER_TIMEOUT if workers else 0,
        **more,
    )


def of_epoch(loader: DataLoader[Any], epoch: int, done: int) -> DataLoader[Any]:
    """A training loader with an epoch's batches, from the `done`-th on."""
    loader.set_epoch(epoch)  # type: ignore[attr-defined]
    # Accelerate's loader passes this on by itself, but not on several processes
    loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
    if isinstance(loader.dataset, Stream):
        loader.dataset.skip(done)
        _wait(loader, WORKER_TIMEOUT * (1 + done))  # what is left out is read all the same, before the first batch
    elif done:
        is_non_blocking = loader._non_blocking  # type: ignore[attr-defined]
        loader = skip_first_batches(loader, done)
        loader._non_blocking = is_non_blocking  # type: ignore[attr-defined]  # Accelerate does not pass it on
        loader.set_epoch(epoch)  # type: ignore[attr-defined]  # it counts epochs on its own
    return loader


def _wait(loader: DataLoader[Any], seconds: float) -> None:
    """How long to wait for a batch of this epoch, where workers make them."""
    if not loader.num_workers:
        return
    torchs = getattr(loader, "base_dataloader", loader)  # Accelerate's has torch's within
    torchs.timeout = seconds
    if torchs._iterator is not None:  # persistent workers are asked by the same one
        torchs._iterator._timeout = seconds


def told(loader: Iterable[T]) -> Iterator[T]:
    """A loader's batches, with one line for a data worker that died or stands still.

    Raises:
        UserError: see above.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # torch has no class of its own for these
            text = str(error)
            if "timed out" in text:
                why = f"gave nothing for {WORKER_TIMEOUT} seconds: is the disk there?"
            elif "DataLoader worker" in text:
                why = "was ended from outside, as a machine does that has no memory left: try fewer --workers"
            else:
                raise
            raise UserError(f"a data worker {why}; --resume goes on") from error
        yield batch


def default_workers() -> int:
    """Loader processes where none are asked for: all CPUs but two, at most 8.

    On two CPUs that is none: a worker would take its time from the arithmetic.
    """
    return max(0, min(8, available_cpus() - 2))
