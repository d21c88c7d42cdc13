"""Eigenpairs of second moments that never raise: what cannot be decomposed is NaN, and the others are not touched."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_SHARE = 4  # subspace iteration pays from about four times its number of columns
_OVERSAMPLING = 8
_ITERATIONS = 3
_WITHOUT_SOLVERS = ("mps",)  # no float64; whether it has eigh and qr depends on torch
_NAN = float("nan")


def leading_eigenpairs(sigma: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a second moment, and their eigenvectors.

    Exact where the rank is a fair share of D. Elsewhere randomised subspace iteration (Halko, Martinsson, Tropp,
    arXiv 0909.4061, algorithm 4.4): a few products with Sigma, from `start` and a few random directions more, which
    find what `start` has nothing of. The random directions are the same on every call, so that processes agree.

    Args:
        sigma: (g, D, D), symmetric, no eigenvalue below zero.
        rank: 1 <= rank <= D.
        start: (g, D, r) or None.

    Returns:
        Values (g, rank), ascending, and orthonormal columns (g, D, rank); NaN where no decomposition was found.
    """
    if sigma.device.type in _WITHOUT_SOLVERS:
        found = leading_eigenpairs(sigma.cpu(), rank, None if start is None else start.cpu())
        return found[0].to(sigma.device), found[1].to(sigma.device)
    size = sigma.shape[-1]
    if size <= _EXACT_SHARE * (rank + _OVERSAMPLING):
        values, basis = eigenpairs(sigma)
        return values[..., size - rank :], basis[..., size - rank :]
    generator = torch.Generator("cpu").manual_seed(0)  # whatever torch.set_default_device says
    width = _OVERSAMPLING if start is not None else rank + _OVERSAMPLING
    fresh = torch.randn(size, width, generator=generator, device="cpu")
    fresh = fresh.to(sigma).expand(len(sigma), -1, -1)
    basis = fresh if start is None else torch.cat([start, fresh], -1)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(sigma @ basis).Q
    values, turn = eigenpairs(basis.mT @ sigma @ basis)
    kept = values.shape[-1] - rank
    return values[..., kept:], (basis @ turn)[..., kept:]


def leading_work(size: int, rank: int) -> int:
    """Operations of `leading_eigenpairs` for one matrix, about: what it costs beside others'."""
    if size <= _EXACT_SHARE * (rank + _OVERSAMPLING):
        return 9 * size**3
    return 2 * _ITERATIONS * size**2 * (rank + _OVERSAMPLING)


def eigenpairs(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of a second moment: values (g, D), ascending and none below zero, and columns (g, D, D).

    NaN for a matrix without a decomposition. On a GPU only torch's own check of the solver waits for the device.
    """
    if sigma.device.type in _WITHOUT_SOLVERS:
        values, basis = eigenpairs(sigma.cpu())
        return values.to(sigma.device), basis.to(sigma.device)
    usable = torch.isfinite(sigma).all(-1).all(-1)[..., None, None]
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    values, basis = _of_finite(torch.where(usable, sigma, eye))
    return torch.where(usable[..., 0], values.clamp_min(0), _NAN), basis


def _of_finite(sigma: Tensor) -> tuple[Tensor, Tensor]:
    # In float32 the iteration can fail, or silently give NaN, on moments of few rows: many eigenvalues equal zero.
    for precision in dict.fromkeys((sigma.dtype, torch.float64)):
        try:
            values, basis = torch.linalg.eigh(sigma.to(precision))
        except torch.linalg.LinAlgError:
            continue
        # Only where a look costs nothing. On a GPU a silent NaN is a skipped refresh, which is counted and told.
        if sigma.device.type != "cpu" or bool(torch.isfinite(values).all()):
            return values.to(sigma.dtype), basis.to(sigma.dtype)
    if len(sigma) == 1:
        return torch.full_like(sigma[..., 0], _NAN), torch.full_like(sigma, _NAN)
    pairs = [_of_finite(one) for one in sigma.split(1)]  # one that fails must not cost the others theirs
    return torch.cat([values for values, _ in pairs]), torch.cat([basis for _, basis in pairs])
