"""The rules that move R: pure functions on tensors, batched over groups.

Shapes: g groups, D the length of the vector that R acts on (for a convolution one patch, C * S with S = kh * kw; for
the `space` structure S alone). A second moment Sigma = <x x^T> is the average over rows, never centred: the layer's
bias absorbs no mean here, and the paper's C = <z z^T> is not centred either.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor


class DegenerateMoment(ValueError):
    """The statistics are zero, not finite or not positive: R keeps its value and the refresh counts as skipped."""


class KroneckerFactors(NamedTuple):
    """R in the product eigenbasis: sum over j of [U (gain_j - tail_j) U^T + tail_j I_C] (x) v_j v_j^T.

    Attributes:
        channel_basis: U, (g, C, r), orthonormal columns: the leading eigenvectors of the channel factor.
        space_basis: V, (g, S, S), orthonormal columns v_j: the eigenvectors of the space factor.
        gain: (g, r, S), the scale of direction u_i (x) v_j.
        tail: (g, S), the scale of every channel direction outside U, along v_j.
    """

    channel_basis: Tensor
    space_basis: Tensor
    gain: Tensor
    tail: Tensor


def normalized(sigma: Tensor) -> Tensor:
    """Sigma in units of its mean eigenvalue: trace / D = 1. Shape (g, D, D).

    Raises:
        DegenerateMoment: the trace of a group is zero, negative or not finite.
    """
    mean = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((torch.isfinite(mean) & (mean > 0)).all()):
        raise DegenerateMoment("the layer's inputs are all zero or not finite")
    return sigma / mean[..., None, None]


def dbp(r: Tensor, sigma: Tensor, kappa: float, decor_lr: float) -> Tensor:
    """One step of decorrelated backpropagation's rule for R (arXiv 2405.02385, eq. 3).

    With z = R x: C = <z z^T> without its diagonal, V = diag(<z_i^2> - 1),
    R <- R - decor_lr ((1 - kappa) C + kappa V) R.

    Args:
        r: R, (g, D, D).
        sigma: <x x^T>, (g, D, D).
        kappa: weight of the unit-variance term, in [0, 1].
        decor_lr: step size.

    Returns:
        The new R, (g, D, D).
    """
    zz = r @ sigma @ r.mT
    variance = zz.diagonal(dim1=-2, dim2=-1)
    correlation = zz - torch.diag_embed(variance)
    # V multiplies from the left: it scales the rows of R.
    return r - decor_lr * ((1 - kappa) * (correlation @ r) + kappa * (variance - 1)[..., None] * r)


def whiten(sigma: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damped whitening by a Cholesky factor: R = L^-1 with L L^T = Sigma / mean-eigenvalue + damping I.

    R^T R = (Sigma / mean-eigenvalue + damping I)^-1, all that SGD and Muon see of R, at the cost of D^3 / 3.

    Args:
        sigma: <x x^T>, (g, D, D).
        damping: in units of the mean eigenvalue.

    Returns:
        R and R^-1 = L, both (g, D, D), lower triangular.

    Raises:
        DegenerateMoment: sigma is zero or not finite, or the damped sigma is not positive definite.
    """
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    lower, info = torch.linalg.cholesky_ex(normalized(sigma) + damping * eye)
    if bool((info != 0).any()):
        raise DegenerateMoment(f"the second moment is singular with damping {damping}")
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), lower


def whiten_symmetric(sigma: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damped whitening by the symmetric root: R = (Sigma / mean-eigenvalue + damping I)^-1/2.

    Args and what is returned and raised as for `whiten`; R is symmetric. For small D (an eigendecomposition).
    """
    values, basis = _eigh(normalized(sigma))
    scale = _damped_rsqrt(values, damping)
    return (basis * scale[..., None, :]) @ basis.mT, (basis / scale[..., None, :]) @ basis.mT


def whiten_kronecker(sigma_c: Tensor, sigma_s: Tensor, damping: float, rank: int) -> KroneckerFactors:
    """Damped whitening of Sigma_c (x) Sigma_s, damped jointly: the symmetric root in the product's eigenbasis.

    Direction (i, j) is scaled by (l_c[i] l_s[j] + damping)^-1/2, eigenvalues in units of their factor's mean. The
    C - rank smallest channel eigenvalues are replaced by their mean (activations have few large eigenvalues, and
    damping makes the small ones alike), so that R is `space (x) identity` plus a term of that rank.

    Args:
        sigma_c: channel factor, (g, C, C).
        sigma_s: space factor, (g, S, S).
        damping: in units of the mean eigenvalue of the product.
        rank: channel eigenvectors kept, 1 <= rank <= C.

    Raises:
        DegenerateMoment: a factor is zero, not finite or cannot be decomposed.
    """
    channel_values, channel_basis = _eigh(normalized(sigma_c))
    space_values, space_basis = _eigh(normalized(sigma_s))
    split = channel_values.shape[-1] - rank  # eigh sorts ascending
    tail_value = channel_values[..., :split].mean(-1) if split else torch.zeros_like(channel_values[..., 0])
    gain = _damped_rsqrt(channel_values[..., split:, None] * space_values[..., None, :], damping)
    # With every eigenvector kept no direction is left for the tail; 1 keeps it invertible.
    tail = _damped_rsqrt(tail_value[..., None] * space_values, damping) if split else torch.ones_like(space_values)
    return KroneckerFactors(channel_basis[..., split:].contiguous(), space_basis, gain, tail)


def _eigh(sigma: Tensor) -> tuple[Tensor, Tensor]:
    # In float32 the iteration can fail, or silently give NaN, on moments of few rows: many eigenvalues equal zero.
    for precision in dict.fromkeys((sigma.dtype, torch.float64)):
        with contextlib.suppress(torch.linalg.LinAlgError):
            values, basis = torch.linalg.eigh(sigma.to(precision))
            if bool(torch.isfinite(values).all()):
                return values.clamp_min(0).to(sigma.dtype), basis.to(sigma.dtype)
    raise DegenerateMoment("the second moment has no eigendecomposition")


def _damped_rsqrt(values: Tensor, damping: float) -> Tensor:
    scale = (values + damping).rsqrt()
    if not bool(torch.isfinite(scale).all()):
        raise DegenerateMoment(f"the second moment is singular with damping {damping}")
    return scale
