"""The rules as pure functions: what subspace iteration must share with a full eigendecomposition."""

import pytest
import torch

from timm_decor.moments import normalized
from timm_decor.shape import LayerShape
from timm_decor.structures import STRUCTURES
from timm_decor.structures.eigen import leading_eigenpairs


def activations_moment(channels: int, groups: int = 1) -> torch.Tensor:
    """Second moment with a large mean and a spectrum that falls as a power, as activations have it, (g, C, C)."""
    scale = torch.arange(1, channels + 1, dtype=torch.float64).pow(-0.7)
    basis = torch.linalg.qr(torch.randn(groups, channels, channels, dtype=torch.float64)).Q
    mean = torch.rand(groups, channels, 1, dtype=torch.float64)
    return (basis * scale.square()) @ basis.mT + 0.1 * mean @ mean.mT


def test_subspace_iteration_finds_the_leading_eigenpairs():
    sigma = normalized(activations_moment(600, groups=2))
    values, basis = leading_eigenpairs(sigma, 16)
    exact = torch.linalg.eigvalsh(sigma)[:, -16:]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16, dtype=torch.float64).expand(2, -1, -1))
    assert (values / exact > 0.98).all() and (values <= exact * (1 + 1e-12)).all()  # Ritz values never exceed
    torch.testing.assert_close(values, values.sort(-1).values)
    residual = sigma @ basis - basis * values[:, None]
    assert residual[..., 8:].norm(dim=1).max() < 0.05 * exact.max()


def test_subspace_iteration_goes_on_from_its_start():
    """From the last refresh's basis it is exact, and it finds a direction that the start has nothing of."""
    sigma = normalized(activations_moment(500))
    exact, basis = torch.linalg.eigh(sigma)
    values, _ = leading_eigenpairs(sigma, 16, start=basis[..., -16:])
    torch.testing.assert_close(values, exact[..., -16:])
    values, found = leading_eigenpairs(sigma, 16, start=basis[..., -17:-1])  # all but the largest
    assert (values[..., -1] / exact[..., -1]).item() == pytest.approx(1, abs=1e-6)
    assert (found[..., -1] * basis[..., -1]).sum().abs().item() == pytest.approx(1, abs=1e-6)


def test_subspace_iteration_is_the_same_everywhere():
    """Processes must agree on R: no random state is read or moved."""
    sigma = activations_moment(400)
    first = leading_eigenpairs(sigma, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    second = leading_eigenpairs(sigma, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("channels", [12, 100, 400])
def test_kronecker_whitening_against_the_full_eigenbasis(channels):
    """R^T R for leading directions is the damped inverse; the rest share the scale of their mean eigenvalue."""
    sigma, space = activations_moment(channels), torch.ones(1, 1, 1, dtype=torch.float64)
    rank = min(channels, 10)
    r = STRUCTURES["kronecker"].identity(LayerShape(1, channels, 1, 8), rank, sigma, False)
    factors = r.whitened({"channel": sigma, "space": space}, damping=0.5).tensors()
    values = torch.linalg.eigvalsh(normalized(sigma))
    torch.testing.assert_close(factors["gain"][..., 0], (values[:, -rank:] + 0.5).rsqrt(), rtol=5e-3, atol=0)
    if rank < channels:
        mean_rest = values[:, :-rank].mean(-1, keepdim=True)
        torch.testing.assert_close(factors["tail"], (mean_rest + 0.5).rsqrt(), rtol=5e-3, atol=0)


def test_dead_channels_do_not_spoil_subspace_iteration():
    sigma = torch.zeros(1, 300, 300)
    sigma[0, 7, 7] = 3.0  # one channel that ever fires
    values, basis = leading_eigenpairs(sigma, 8, start=torch.eye(300, 8)[None])
    assert torch.isfinite(basis).all()
    assert values[0, -1].item() == pytest.approx(3.0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8)[None], rtol=0, atol=1e-5)
