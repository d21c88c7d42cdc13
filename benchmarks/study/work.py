"""The arithmetic of a piece of code on any device, on tensors with or without values.

Products are counted by torch's own formulas. Factorisations (eigh, QR, Cholesky) are counted in matrices: those of a
refresh are small and narrow, so that their time is not that of their operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
_FACTORISATIONS = (
    aten._linalg_eigh,
    aten.linalg_qr,
    aten.linalg_cholesky_ex,
    aten.linalg_inv_ex,
    aten._linalg_solve_ex,
)


class Work(NamedTuple):
    """Arithmetic.

    Attributes:
        flops: of products: two for each multiplication and addition.
        matrices: that were factorised.
    """

    flops: int
    matrices: int

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.flops + other.flops, self.matrices + other.matrices)

    def __sub__(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.matrices - other.matrices)

    def __mul__(self, factor: object) -> Work:
        assert isinstance(factor, int)
        return Work(self.flops * factor, self.matrices * factor)


class Meter:
    """Counts what is done while it is on.

    with Meter() as meter:
        optimizer.step()
    meter.work
    """

    def __enter__(self) -> Meter:
        self._matrices, self._flops = _Matrices(), FlopCounterMode(display=False, custom_mapping=_MORE)
        self._flops.__enter__()
        self._matrices.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._matrices.__exit__(*error)
        self._flops.__exit__(*error)

    @property
    def work(self) -> Work:
        """All of it."""
        return Work(self._flops.get_total_flops(), self._matrices.count)


class _Matrices(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _FACTORISATIONS:
            self.count += args[0].shape[:-2].numel()
        elif ("mm" in packet.__name__ or "linalg" in packet.__name__) and not _is_counted(packet):
            raise NotImplementedError(f"{func.name()}: nobody has said what it costs")
        return func(*args, **(kwargs or {}))


def _in_place(shape: Any, a: Any, b: Any, **_: Any) -> int:
    """baddbmm_, of which torch counts only the form that makes a new tensor."""
    return 2 * int(torch.Size(a).numel()) * b[-1]


def _triangular(matrix: Any, rows: Any, **_: Any) -> int:
    """solve_triangular: a multiplication and an addition for each element of half a matrix and each column."""
    return int(torch.Size(rows).numel()) * matrix[-1]


_MORE = {aten.baddbmm_: _in_place, aten.linalg_solve_triangular: _triangular}
_NORMS = ("linalg_vector_norm", "linalg_matrix_norm")  # no products


def _is_counted(packet: Any) -> bool:
    return packet in flop_registry or packet in _MORE or packet.__name__ in _NORMS
