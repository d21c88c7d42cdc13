"""The rules that move R: pure functions on tensors, batched over groups.

Shapes: g groups (of one layer, or of several layers of equal shape), D the length of the vector that R acts on (for a
convolution one patch, C * S with S = kh * kw; for the `space` structure S alone). A second moment Sigma = <x x^T> is
the average over rows, not centred: the paper's C = <z z^T> is not centred either. Only `crgd` centres.

Nothing here raises or waits for a GPU because of what is in the statistics. Where they cannot be used (all zero, not
finite, singular without damping), that group's result is NaN and the other groups' are not touched; who keeps R looks
at it once for all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_SHARE = 4  # subspace iteration pays from about four times its number of columns
_OVERSAMPLING = 8
_ITERATIONS = 3
_NAN = float("nan")


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
    """Sigma in units of its mean eigenvalue: trace / D = 1, (g, D, D); NaN for a group without a positive trace."""
    mean = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
    return sigma / torch.where(mean > 0, mean, _NAN)[..., None, None]


def dbp(r: Tensor, sigma: Tensor, kappa: float, decor_lr: float) -> Tensor:
    """One step of decorrelated backpropagation's rule for R (arXiv 2405.02385, eq. 3).

    With z = R x: C = <z z^T> without its diagonal, V = diag(<z_i^2> - 1),
    R <- R - decor_lr ((1 - kappa) C + kappa V) R.

    Two things the paper leaves to the choice of decor_lr are made safe here: a step that could overshoot is shortened
    (see `_stable`), and an entry that never fires keeps its row of R, which would grow for ever.

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
    excess = torch.where(variance > 0, variance - 1, 0.0)
    # Both multiply from the left: V scales the rows of R.
    step = (1 - kappa) * correlation + torch.diag_embed(kappa * excess)
    return r - _stable(decor_lr, step) * (step @ r)


def crgd(r: Tensor, sigma: Tensor, mean: Tensor, decor_lr: float) -> Tensor:
    """One step of the rule of "Correlations Are Ruining Your Gradient Descent" (arXiv 2407.10780).

    The statistics are centred, Sigma_c = <x x^T> - <x> <x>^T; with z = R (x - <x>) and C = <z z^T> without its
    diagonal, R <- g R', R' = (I - decor_lr C) R, where the diagonal g keeps each entry's variance:
    <z_i^2> = <(x_i - <x_i>)^2> ("gain-preserving": it decorrelates and does not whiten). An entry that never varies
    keeps its row of R'.

    The layer itself goes on to see x, not x - <x>: an ordinary kernel has no place for the mean, and a BatchNorm behind
    the layer makes the gradient blind to it.

    Args:
        r: R, (g, D, D).
        sigma: <x x^T>, (g, D, D).
        mean: <x>, (g, 1, D).
        decor_lr: step size.

    Returns:
        The new R, (g, D, D).
    """
    centred = sigma - mean.mT @ mean
    zz = r @ centred @ r.mT
    correlation = zz - torch.diag_embed(zz.diagonal(dim1=-2, dim2=-1))
    r = r - _stable(decor_lr, correlation) * (correlation @ r)
    before = centred.diagonal(dim1=-2, dim2=-1)
    after = torch.einsum("gij,gjk,gik->gi", r, centred, r)
    varies = (before > 0) & (after > 0)
    gain = torch.where(varies, before / torch.where(varies, after, 1.0), 1.0).sqrt()
    return gain[..., None] * r


def _stable(decor_lr: float, step: Tensor) -> Tensor:
    """decor_lr, (g, 1, 1), or less where R <- R - decor_lr step R could diverge.

    That is where decor_lr times an eigenvalue of the symmetric `step` exceeds 2, of which the Frobenius norm knows.
    """
    return decor_lr / (decor_lr * torch.linalg.matrix_norm(step)).clamp_min(1)[..., None, None]


def whiten(sigma: Tensor, damping: float, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Damped whitening by a Cholesky factor: R = L^-1 with L L^T = strength Sigma / mean-eigenvalue + damping I.

    R^T R = (strength Sigma / mean-eigenvalue + damping I)^-1, all that SGD and Muon see of R, at the cost of D^3 / 3.

    Args:
        sigma: <x x^T>, (g, D, D).
        damping: in units of the mean eigenvalue.
        strength: in [0, 1]; below 1 during a warm-up, where R is on its way from a multiple of the identity.

    Returns:
        R and R^-1 = L, both (g, D, D), lower triangular.
    """
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    lower, info = torch.linalg.cholesky_ex(strength * normalized(sigma) + damping * eye)
    lower = torch.where(info[..., None, None] == 0, lower, _NAN)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False), lower


def whiten_symmetric(sigma: Tensor, damping: float, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Damped whitening by the symmetric root: R = (strength Sigma / mean-eigenvalue + damping I)^-1/2.

    Args and what is returned as for `whiten`; R is symmetric. For small D (an eigendecomposition).
    """
    values, basis = _eigh(normalized(sigma))
    scale = (strength * values + damping).rsqrt()
    return (basis * scale[..., None, :]) @ basis.mT, (basis / scale[..., None, :]) @ basis.mT


def whiten_kronecker(
    sigma_c: Tensor,
    sigma_s: Tensor,
    damping: float,
    rank: int,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> KroneckerFactors:
    """Damped whitening of Sigma_c (x) Sigma_s, damped jointly: the symmetric root in the product's eigenbasis.

    Direction (i, j) is scaled by (strength l_c[i] l_s[j] + damping)^-1/2, eigenvalues in units of their factor's mean.
    The C - rank smallest channel eigenvalues are replaced by their mean (activations have few large eigenvalues, and
    damping makes the small ones alike), so that R is `space (x) identity` plus a term of that rank.

    Where C is much larger than the rank the leading eigenvectors come from subspace iteration, at C^2 rank instead of
    C^3 (for a ViT-B's 3072 hidden channels milliseconds instead of seconds).

    Args:
        sigma_c: channel factor, (g, C, C).
        sigma_s: space factor, (g, S, S).
        damping: in units of the mean eigenvalue of the product.
        rank: channel eigenvectors kept, 1 <= rank <= C.
        start: (g, C, r), where subspace iteration begins: the eigenvectors of the last refresh.
        strength: as for `whiten`.
    """
    channel_values, channel_basis = leading_eigenpairs(normalized(sigma_c), rank, start)
    space_values, space_basis = _eigh(normalized(sigma_s))
    gain = (strength * channel_values[..., None] * space_values[..., None, :] + damping).rsqrt()
    rest = sigma_c.shape[-1] - rank
    if rest:
        # The eigenvalues sum to C, the trace of the normalised factor.
        mean_rest = ((sigma_c.shape[-1] - channel_values.sum(-1)) / rest).clamp_min(0)
        tail = (strength * mean_rest[..., None] * space_values + damping).rsqrt()
    else:  # no direction is left for the tail; 1 keeps it invertible
        tail = torch.ones_like(space_values)
    return KroneckerFactors(channel_basis.contiguous(), space_basis, gain, tail)


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
    size = sigma.shape[-1]
    if size <= _EXACT_SHARE * (rank + _OVERSAMPLING):
        values, basis = _eigh(sigma)
        return values[..., size - rank :], basis[..., size - rank :]
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(size, _OVERSAMPLING if start is not None else rank + _OVERSAMPLING, generator=generator)
    fresh = fresh.to(sigma).expand(len(sigma), -1, -1)
    basis = fresh if start is None else torch.cat([start, fresh], -1)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(sigma @ basis).Q
    values, turn = _eigh(basis.mT @ sigma @ basis)
    kept = values.shape[-1] - rank
    return values[..., kept:], (basis @ turn)[..., kept:]


def _eigh(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` that gives NaN for a matrix without a decomposition, and the others' in spite of it."""
    usable = torch.isfinite(sigma).all(-1).all(-1)[..., None, None]
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    values, basis = _eigh_of_finite(torch.where(usable, sigma, eye))
    return torch.where(usable[..., 0], values.clamp_min(0), _NAN), basis


def _eigh_of_finite(sigma: Tensor) -> tuple[Tensor, Tensor]:
    # In float32 the iteration can fail, or silently give NaN, on moments of few rows: many eigenvalues equal zero.
    for precision in dict.fromkeys((sigma.dtype, torch.float64)):
        try:
            values, basis = torch.linalg.eigh(sigma.to(precision))
        except torch.linalg.LinAlgError:
            continue
        if bool(torch.isfinite(values).all()):
            return values.to(sigma.dtype), basis.to(sigma.dtype)
    if len(sigma) == 1:
        return torch.full_like(sigma[..., 0], _NAN), torch.full_like(sigma, _NAN)
    pairs = [_eigh_of_finite(one) for one in sigma.split(1)]  # one that fails must not cost the others theirs
    return torch.cat([values for values, _ in pairs]), torch.cat([basis for _, basis in pairs])
