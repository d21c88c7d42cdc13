"""What every test stands on: one thread a worker, fixed seeds, and the data that may be absent."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by the command lines that tests start: the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from local_hub import LocalHub

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps device and precision for the whole process: no test inherits another's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def cifar10_dir() -> Path:
    """Folder with CIFAR-10's parquet files beside the checkout; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    return folder


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    """A Hugging Face Hub on loopback. ``environment`` or ``use_in_process`` turns the real client to it."""
    with LocalHub() as hub:
        yield hub
