import math

import pytest
import torch
from torch import Tensor

from onetorch.generative import images, paths

OBJECTIVES = ["epsilon", "v", "flow"]
SAMPLERS = ["ancestral", "ddim", "euler", "heun"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the path ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_tells_the_image_and_the_noise(objective: str) -> None:
    x0, eps = torch.randn(2, 6, 1, 3, 3, generator=gen(), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)[:, None, None, None]
    alpha, sigma = paths.path(objective, t)
    x = alpha * x0 + sigma * eps
    out = paths.target(objective, x0, eps, alpha, sigma)
    assert torch.allclose(paths.clean(objective, out, x, alpha, sigma), x0)
    assert torch.allclose((x - alpha * x0) / sigma, eps)


def test_v_and_flow_are_the_paths_velocity() -> None:
    """dx/dt by central differences; v is that of the cosine path by 2 / pi."""
    x0, eps = torch.randn(2, 5, 1, 1, 1, generator=gen(), dtype=torch.float64)
    t, h = torch.full((5, 1, 1, 1), 0.3, dtype=torch.float64), 1e-5
    for objective, factor in (("v", 2 / math.pi), ("flow", 1.0)):
        ahead, behind = (a * x0 + s * eps for a, s in (paths.path(objective, t + d) for d in (h, -h)))
        alpha, sigma = paths.path(objective, t)
        expected = (ahead - behind) / (2 * h)
        assert torch.allclose(paths.velocity(objective, alpha * x0 + sigma * eps, x0, t), expected, atol=1e-7)
        assert torch.allclose(paths.target(objective, x0, eps, alpha, sigma), factor * expected, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_time_of_is_the_inverse_of_the_signal_to_noise_ratio(objective: str) -> None:
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    alpha, sigma = paths.path(objective, t)
    assert torch.allclose(paths.time_of(objective, 2 * (alpha / sigma).log()), t)


def test_the_posterior_is_bayes() -> None:
    """From the products of two Gaussians: q(x_s | x_0) has precision 1 / sigma_s^2, x_t given x_s has mean a x_s and variance sigma_t^2 - a^2 sigma_s^2."""
    alpha, sigma = (0.6, 0.9), (0.8, 0.4)
    x, x0, a = 0.3, -0.7, 0.6 / 0.9
    b = 0.8**2 - a**2 * 0.4**2
    precision = 1 / 0.4**2 + a**2 / b
    mean = (0.9 * x0 / 0.4**2 + a * x / b) / precision
    found = paths.posterior(torch.tensor(x), torch.tensor(x0), tuple(map(torch.tensor, alpha)), tuple(map(torch.tensor, sigma)))  # type: ignore[arg-type]
    assert found[0].item() == pytest.approx(mean)
    assert found[1].item() == pytest.approx(1 / precision)


def test_the_posterior_is_that_of_ddpm() -> None:
    """Ho et al. 2020, equation 7, for three betas: alpha_bar is the product of 1 - beta."""
    beta = torch.tensor([0.1, 0.2, 0.4])
    bar = (1 - beta).cumprod(0)
    x, x0 = torch.tensor(0.5), torch.tensor(0.25)
    mean, variance = paths.posterior(x, x0, (bar[2].sqrt(), bar[1].sqrt()), ((1 - bar[2]).sqrt(), (1 - bar[1]).sqrt()))
    assert variance == pytest.approx(((1 - bar[1]) / (1 - bar[2]) * beta[2]).item())
    expected = bar[1].sqrt() * beta[2] / (1 - bar[2]) * x0 + (1 - beta[2]).sqrt() * (1 - bar[1]) / (1 - bar[2]) * x
    assert mean == pytest.approx(expected.item())


# -- sampling and likelihood, where the best denoiser is known -------------------------------------------------------------------------------------------


def gaussian_denoiser(objective: str, mean: float, std: float):
    """E[x_0 | x_t] for x_0 of a normal distribution."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = paths.path(objective, t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_recovers_a_gaussian(objective: str, sampler: paths.Sampler) -> None:
    noise = torch.randn(20_000, 1, 1, 1, generator=gen(1), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    x = paths.solve(gaussian_denoiser(objective, 0.4, 0.3), noise, objective, sampler, {"heun": 100}.get(sampler, 400), gen(2))
    assert x.mean().item() == pytest.approx(0.4, abs=0.01)
    assert x.std().item() == pytest.approx(0.3, rel=0.03)
    if sampler != "ancestral":  # without noise of their own the samples are a straight line of the noise, as they must
        assert torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1] == pytest.approx(1)


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    """Half the step, a quarter and half the error: against the exact map from noise to image, x = m + s / sqrt(alpha^2 s^2 + sigma^2) (x_T - alpha m)."""
    noise = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    mean, std, last = 0.4, 0.5, torch.tensor(paths.T_LAST, dtype=torch.float64)
    for objective in ("v", "flow"):
        alpha, sigma = paths.path(objective, last)
        exact = mean + std / (alpha**2 * std**2 + sigma**2).sqrt() * (noise - alpha * mean)
        for sampler, ratio in (("euler", 2.0), ("heun", 4.0)):
            errors = [
                (paths.solve(gaussian_denoiser(objective, mean, std), noise, objective, sampler, n, gen()) - exact).abs().max().item()  # type: ignore[arg-type]
                for n in (100, 200)
            ]
            assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)


def test_ddim_is_euler_on_the_straight_path() -> None:
    noise = torch.randn(5, 1, 2, 2, generator=gen())
    found = [paths.solve(gaussian_denoiser("flow", 0.1, 0.2), noise, "flow", sampler, 7, gen()) for sampler in ("ddim", "euler")]  # type: ignore[arg-type]
    assert torch.allclose(found[0], found[1], atol=1e-5)


def coin_denoiser(objective: str, odds: float):
    """E[x_0 | x_t] for x_0 = 1 with probability `odds`, else -1."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = paths.path(objective, t)
        return torch.tanh(alpha * x / sigma**2 + 0.5 * math.log(odds / (1 - odds)))

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_likelihood_and_samples_are_of_the_same_distribution(objective: str) -> None:
    """Pixels that are 1 of two levels with probability 0.8: the bound is their entropy, and samples have that frequency."""
    odds, n = 0.8, 1000
    denoise = coin_denoiser(objective, odds)
    pixels = (torch.rand(n, 1, 2, 2, generator=gen(3)) < odds).to(torch.uint8)
    found = paths.bits(denoise, pixels, 2, objective, gen(), times=60)
    ones = pixels.float().mean().item()
    exact = -ones * math.log2(odds) - (1 - ones) * math.log2(1 - odds)
    error = found.std().item() / math.sqrt(n)
    assert found.mean().item() == pytest.approx(exact, abs=4 * error + 0.005)
    for sampler in ("ancestral", "heun"):
        noise = torch.randn(n, 1, 2, 2, generator=gen(4))
        x = paths.solve(denoise, noise, objective, sampler, 100, gen(5))  # type: ignore[arg-type]
        drawn = images.quantize(x, 2).float()
        assert drawn.mean().item() == pytest.approx(odds, abs=0.03)
        assert x.abs().mean().item() == pytest.approx(1, abs=0.02)


def test_a_worse_denoiser_costs_more_bits() -> None:
    pixels = (torch.rand(500, 1, 2, 2, generator=gen(3)) < 0.8).to(torch.uint8)
    right, wrong = (paths.bits(coin_denoiser("flow", odds), pixels, 2, "flow", gen(), times=30).mean() for odds in (0.8, 0.3))
    assert wrong > right + 0.2
    assert paths.bits(lambda x, t: torch.zeros_like(x), pixels, 2, "flow", gen()).mean() > 1


# -- the probability flow ------------------------------------------------------------------------------------------------------------------------------------

COVARIANCE = torch.tensor([[0.5, 0.3, 0.0], [0.3, 0.4, -0.1], [0.0, -0.1, 0.2]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def correlated_denoiser(objective: str):
    """E[x_0 | x_t] for images (B, 1, 1, 3) of a normal distribution with MEAN and COVARIANCE: m + a C (a^2 C + s^2 I)^-1 (x - a m)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (z.view(-1, 1, 1) for z in paths.path(objective, t))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(3))
        return MEAN.view(1, 1, 1, 3) + (gain @ (x.view(-1, 3, 1) - alpha * MEAN.view(1, 3, 1))).view(x.shape)

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("probes", [0, 4])
def test_the_density_of_the_flow_is_the_gaussian_that_the_denoiser_knows(objective: str, probes: int) -> None:
    """The data's density with noise s in closed form, N(m, C + s^2 I); with random vectors on average, for the flow's Jacobian is not diagonal."""
    s, n = 0.1, 400
    law = torch.distributions.MultivariateNormal(MEAN, COVARIANCE + s**2 * torch.eye(3))
    torch.manual_seed(0)
    y = law.sample((n,))
    found = paths.log_density(correlated_denoiser(objective), y.view(n, 1, 1, 3), s, objective, gen(7), 60, probes)
    off = found - law.log_prob(y)
    if probes:
        assert off.std() > 0.05
        assert off.mean().abs() < 4 * off.std() / math.sqrt(n)
    else:
        assert off.abs().max() < 0.02  # the flow begins with variance 1 at T_LAST, and the path of `flow` has 0.998 there: up to 0.001 |z|^2


def test_the_integration_is_of_fourth_order() -> None:
    y = torch.tensor([[0.2, -0.5, 0.3], [1.0, 0.4, -0.2]], dtype=torch.float64).view(2, 1, 1, 3)
    found = [paths.log_density(correlated_denoiser("flow"), y, 0.05, "flow", gen(), n, 0) for n in (20, 40, 320)]
    ratio = (found[0] - found[2]).abs().max() / (found[1] - found[2]).abs().max()
    assert 10 < ratio < 25


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_flow_and_the_bound_have_the_bits_of_a_coin(objective: str) -> None:
    """Where the denoiser is exact both are the entropy, and no bound may lie below it but by its error."""
    odds, n = 0.8, 600
    denoise = coin_denoiser(objective, odds)
    pixels = (torch.rand(n, 1, 2, 2, generator=gen(3)) < odds).to(torch.uint8)
    ones = pixels.float().mean().item()
    exact = -ones * math.log2(odds) - (1 - ones) * math.log2(1 - odds)
    flow, error = (f(paths.flow_bits(denoise, pixels, 2, objective, gen(), 100)) for f in (torch.mean, torch.std))
    bound = paths.bits(denoise, pixels, 2, objective, gen(), times=60)
    assert flow.item() == pytest.approx(exact, abs=4 * error.item() / math.sqrt(n) + 0.01)
    assert bound.mean().item() >= exact - 4 * bound.std().item() / math.sqrt(n)
    tight = paths.flow_bits(denoise, pixels, 2, objective, gen(), 100, draws=3)
    assert exact - 0.02 < tight.mean().item() <= flow.item() + 0.02


def test_a_worse_denoiser_costs_more_bits_of_the_flow_too() -> None:
    pixels = (torch.rand(300, 1, 2, 2, generator=gen(3)) < 0.8).to(torch.uint8)
    right, wrong = (paths.flow_bits(coin_denoiser("flow", odds), pixels, 2, "flow", gen(), 60).mean() for odds in (0.8, 0.3))
    assert wrong > right + 0.2
