"""Batches of shards that are read from front to back, by several processes with several workers each.

timm's readers hand whole shards to workers and even them out by repeats. Here lengths are known, so the images are
shared out by their number: in the order of an epoch, which is one of the shards (shuffled by seed and epoch), every
worker of every process has a piece of whole batches, that may begin and end within a shard. So each image comes once,
all processes take the same number of steps, and a shard more or less, or of another length, changes nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from timm_decor.training.data.batches import Batches
from timm_decor.training.data.names import Renumbered
from timm_decor.training.data.shards import Sample, Shards
from timm_decor.training.data.sources import Source
from timm_decor.training.runtime import mixed_seed

NO_IMAGE = -1  # label of what makes up a batch of an evaluation that would be smaller than another process's


def shards_of(source: Source) -> Shards | None:
    """What a source reads from front to back; None where it has its images at hand in any order."""
    if isinstance(source, Renumbered):
        return shards_of(source.source)
    return source if isinstance(source, Shards) else None


class Stream(IterableDataset[Any]):
    """Finished batches of one process.

    Args:
        batches: makes them, of a source in shards.
        shards: those.
        batch_size: images of a batch.
        workers: of the loader.
        processes: that share an epoch.
        process: which of them this is.
        shuffle: shards and images in an order of each epoch's own, and whole batches only; otherwise the shards' order,
            and every image.
        seed: of the order.
    """

    def __init__(
        self,
        batches: Batches,
        shards: Shards,
        batch_size: int,
        workers: int,
        processes: int,
        process: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._batches, self._shards, self._batch_size = batches, shards, batch_size
        self._lanes, self._processes, self._process = max(1, workers), processes, process
        self._shuffle, self._seed = shuffle, seed
        whole, rest = divmod(len(shards), batch_size * processes)
        self._length = whole + bool(rest and not shuffle)
        # shared memory, because persistent workers hold their own copy of this object
        self._done = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Batches of this process."""
        return self._length

    @property
    def plan(self) -> dict[str, int]:
        """What the order depends on beside batch size, processes, seed and epoch."""
        return {"workers": self._lanes}

    @property
    def source(self) -> Source:
        """The images as they come out of an evaluation, when all processes' batches stand behind one another."""
        places = [
            np.arange(first, min(first + self._batch_size, len(self._shards)))
            for batch in range(self._length)
            for process in range(self._processes)
            for first in [self._place(process, batch)]
        ]
        return _Ordered(self._batches.source, np.concatenate(places))

    def work(self, epoch: int) -> float:
        """See `Progression.work`."""
        return self._batches.work(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._batches.set_epoch(epoch)

    def skip(self, done: int) -> None:
        """Leave out so many batches of an epoch, until told otherwise. They are read, but not decoded."""
        self._done.fill_(done)

    def _of_lane(self, lane: int, batches: int) -> int:
        """How many of the first `batches` a lane has: torch takes one from each worker in turn."""
        return len(range(lane, batches, self._lanes))

    def _place(self, process: int, batch: int) -> int:
        """Where a process's batch begins in the order of the shards."""
        lane, number = batch % self._lanes, batch // self._lanes
        before = sum(self._of_lane(other, self._length) for other in range(lane))
        return (process * self._length + before + number) * self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info, epoch, done = get_worker_info(), self._batches.epoch, int(self._done)
        # the first batch to come is the first worker's
        lane = (done + (info.id if info else 0)) % self._lanes
        mine = self._of_lane(lane, self._length)
        if not mine:
            return
        first = self._place(self._process, lane)
        order, turned = self._order(epoch)
        samples = self._in_order(
            order, turned + first, turned + min(first + mine * self._batch_size, len(self._shards))
        )
        if self._shuffle:
            numbers = random.Random(mixed_seed(self._seed, epoch, self._process, lane))
            samples = _shuffled(samples, *self._shards.shuffle_size, numbers)
        for number in range(mine):
            taken = list(itertools.islice(samples, self._batch_size))
            if number >= self._of_lane(lane, done):
                yield self._finished(taken, epoch)

    def _order(self, epoch: int) -> tuple[np.ndarray, int]:
        """An epoch's order of the shards, and the image in it that is the first.

        Of one shard, or of few, the order alone would give each worker the same images in every epoch, and leave the
        same ones out.
        """
        order = np.arange(len(self._shards.names))
        if not self._shuffle:
            return order, 0
        numbers = np.random.default_rng([self._seed, epoch])
        numbers.shuffle(order)
        return order, int(numbers.integers(len(self._shards)))

    def _in_order(self, order: np.ndarray, start: int, stop: int) -> Iterator[Sample]:
        """The images from one place to another, in an order of the shards that begins anew after its last image."""
        for shard in (*order, *order):
            length = int(self._shards.starts[shard + 1] - self._shards.starts[shard])
            if start < length and stop > 0:
                samples = self._shards.samples(int(shard), max(start, 0))
                yield from itertools.islice(samples, stop - max(start, 0)) if stop < length else samples
            start, stop = start - length, stop - length

    def _finished(self, samples: list[Sample], epoch: int) -> tuple[Tensor, Tensor]:
        self._shards.hold(samples)
        if samples:
            images, labels = self._batches.__getitems__([sample.index for sample in samples])
        else:
            images, labels = torch.zeros(0, *self._batches.input_size(epoch)), torch.zeros(0, dtype=torch.int64)
        missing = self._batch_size - len(samples)
        if self._processes == 1 or not missing:
            return images, labels
        # what is gathered from all processes must have one size on all of them
        nothing = images.new_zeros(missing, *images.shape[1:])
        return torch.cat([images, nothing]), torch.cat([labels, labels.new_full((missing,), NO_IMAGE)])


def _shuffled(samples: Iterator[Sample], size: int, initial: int, numbers: random.Random) -> Iterator[Sample]:
    """webdataset's shuffle: each time any one of up to `size` that have been read."""
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        if len(held) < size and (more := next(samples, None)) is not None:
            held.append(more)
        if len(held) >= min(initial, size):
            yield _picked(held, numbers)
    while held:
        yield _picked(held, numbers)


def _picked(held: list[Sample], numbers: random.Random) -> Sample:
    chosen = numbers.randrange(len(held))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held.pop()


class _Ordered:
    """A source's images in another order."""

    def __init__(self, source: Source, order: np.ndarray) -> None:
        self._source, self._order = source, order
        self.num_classes, self.class_names, self.notes = source.num_classes, source.class_names, source.notes
        self.labels: np.ndarray | None = None if source.labels is None else source.labels[order]

    def __len__(self) -> int:
        return len(self._order)

    def image(self, index: int) -> Image.Image:
        return self._source.image(int(self._order[index]))

    def label(self, index: int) -> int:
        return self._source.label(int(self._order[index]))

    def where(self, index: int) -> str:
        return self._source.where(int(self._order[index]))
