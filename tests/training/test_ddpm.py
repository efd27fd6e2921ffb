"""DiT's objective against torch's own distributions, and against the chain written out step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowaccel.training.ddpm import DIT, Diffusion

CHANNELS = 2
BETAS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def batch(times: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data within [-1, 1], noise, a network's output, and times."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(times), CHANNELS, 3, 3)
    data = 1.9 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.95
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    predicted = noise + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    share = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return data, noise, torch.cat([predicted, share], 1), torch.tensor(times)


def posterior(t: int, data: Tensor, state: Tensor) -> Normal:
    """q(x_(t-1) | x_t, x_0) by Bayes' rule: the product of q(x_(t-1) | x_0) and q(x_t | x_(t-1)) in x_(t-1)."""
    kept = float((1 - BETAS[:t]).prod())
    beta = float(BETAS[t])
    precision = 1 / (1 - kept) + (1 - beta) / beta
    mean = (math.sqrt(kept) * data / (1 - kept) + math.sqrt(1 - beta) * state / beta) / precision
    return Normal(mean, torch.full_like(mean, precision**-0.5))


def test_the_linear_chain_of_dit() -> None:
    """x_t follows the product of the steps, up to the last, which is nearly noise."""
    data, noise = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    signal = DIT.noised(data, noise, torch.tensor([0, 500, 999])).flatten().tolist()
    assert DIT.steps == 1000
    for value, t in zip(signal, (0, 500, 999), strict=True):
        assert value == pytest.approx(math.exp(0.5 * sum(math.log1p(-beta) for beta in betas[: t + 1])), rel=1e-9)
    assert signal[-1] < 0.01


def test_variance_is_kept() -> None:
    t = torch.arange(4)
    one, none = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    chain = Diffusion(BETAS)
    total = chain.noised(one, none, t).square() + chain.noised(none, one, t).square()
    torch.testing.assert_close(total, one)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_bound_is_the_divergence_from_the_true_posterior(t: int) -> None:
    data, noise, output, times = batch([t, t])
    chain = Diffusion(BETAS)
    state = chain.noised(data, noise, times)
    kept = float((1 - BETAS[: t + 1]).prod())
    predicted, share = output.chunk(2, dim=1)
    guess = (state - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
    true, mean = posterior(t, data, state), posterior(t, guess, state).mean
    upper, lower = float(BETAS[t]), true.variance
    variance = torch.exp((share + 1) / 2 * math.log(upper) + (1 - share) / 2 * lower.log())
    expected = kl_divergence(true, Normal(mean, variance.sqrt())).flatten(1).mean(1) / math.log(2)
    terms = chain.terms(output, data, noise, times)
    torch.testing.assert_close(terms.vb, expected)
    torch.testing.assert_close(terms.mse, (predicted - noise).square().mean((1, 2, 3)))
    torch.testing.assert_close(terms.loss, terms.mse + terms.vb)


def test_bound_at_the_first_step_is_the_likelihood_of_rounded_data() -> None:
    """256 bins, the outer ones without end; the normal distribution function is an approximation, hence 1%."""
    data, noise, output, times = batch([0, 0])
    data[0, 0, 0, 0], data[1, 1, 2, 2] = -1.0, 1.0
    chain = Diffusion(BETAS)
    state = chain.noised(data, noise, times)
    predicted, share = output.chunk(2, dim=1)
    mean = (state - math.sqrt(0.1) * predicted) / math.sqrt(0.9)  # of x_0, which x_1 and the noise tell
    lower = posterior(1, data, state).variance  # in place of the first step's, which is 0
    variance = torch.exp((share + 1) / 2 * math.log(0.1) + (1 - share) / 2 * lower.log())
    model = Normal(mean, variance.sqrt())
    above, below = model.cdf(data + 1 / 255), model.cdf(data - 1 / 255)
    mass = torch.where(data == 1, 1 - below, torch.where(data == -1, above, above - below))
    expected = -mass.log().flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(chain.terms(output, data, noise, times).vb, expected, rtol=1e-2, atol=0)


def test_rows_do_not_affect_each_other() -> None:
    data, noise, output, times = batch([3, 0, 1])
    together = Diffusion(BETAS).terms(output, data, noise, times).loss
    for i in range(3):
        alone = Diffusion(BETAS).terms(*(value[i : i + 1] for value in (output, data, noise, times))).loss
        torch.testing.assert_close(alone, together[i : i + 1])


@pytest.mark.parametrize("t", [0, 2])
def test_bound_trains_the_variance_alone(t: int) -> None:
    data, noise, output, times = batch([t])
    output.requires_grad_()
    Diffusion(BETAS).terms(output, data, noise, times).vb.sum().backward()
    assert output.grad is not None
    of_noise, of_variance = output.grad.chunk(2, dim=1)
    assert not of_noise.any()
    assert of_variance.all()


def test_right_noise_and_least_variance_cost_nothing() -> None:
    data, noise, _, times = batch([1, 2, 3])
    terms = Diffusion(BETAS).terms(torch.cat([noise, -torch.ones_like(noise)], 1), data, noise, times)
    assert terms.mse.tolist() == [0, 0, 0]
    torch.testing.assert_close(terms.vb, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_half_precision_outputs_are_judged_in_the_type_of_the_data() -> None:
    data, noise, output, times = (value.float() if value.is_floating_point() else value for value in batch([2]))
    terms = DIT.terms(output.bfloat16(), data, noise, times)
    assert terms.mse.dtype == terms.vb.dtype == torch.float32


def test_wrong_use_is_refused() -> None:
    data, noise, output, times = batch([1])
    with pytest.raises(ValueError, match=r"noise and variance channels, shape \(1, 4, 3, 3\).*got \(1, 2, 3, 3\)"):
        DIT.terms(output[:, :CHANNELS], data, noise, times)
    for betas in (torch.tensor([0.1]), torch.tensor([0.0, 0.1]), torch.tensor([0.1, 1.0]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="betas must be at least two variances"):
            Diffusion(betas)
