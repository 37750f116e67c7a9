"""The path from an image to noise, x_t = alpha(t) x_0 + sigma(t) eps, and what a denoiser gives along it: samples and bits.

    path            alpha, sigma
    epsilon, v      cos(pi t / 2), sin(pi t / 2)        Nichol & Dhariwal 2021, arXiv:2102.09672
    flow            1 - t, t                            Lipman et al. 2023, arXiv:2210.02747

A denoiser is any function denoise(x, t) -> E[x_0 | x_t = x]; whether a network learned it as eps, v or flow is no matter here. `solve` goes from noise to
images by one of four samplers. Two ways lead to bits per dimension. `bits` is the variational bound in continuous time (Kingma et al. 2021, arXiv:2107.00630):
with l = ln(alpha^2 / sigma^2) from l_1 at t = 1 to l_0 near t = 0, where a level of the image is told from the next by its noise,

    -ln P(x) <= KL(q(x_1 | x), N(0, I)) - E ln P(x | x_{t_0}) + (l_0 - l_1) / 2 E_{l uniform} |eps - eps^|^2

`flow_bits` is the likelihood of the differential equation that euler and heun solve (the probability flow, Song et al. 2021, arXiv:2011.13456), whose samples
have a density that is exact but for the steps of the integration. In y = x_t / alpha, which is x_0 with noise of standard deviation s = sigma / alpha,

    dy / d ln s = y - x_0^(y, s)        ln p(y_0) = ln p(y_1) + integral of tr(d/dy (y - x_0^)) d ln s

with the trace taken exactly or by random vectors u, E u^T J u (Hutchinson 1989; Grathwohl et al. 2019, arXiv:1810.01367).
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onetorch.generative import images

Denoise = Callable[[Tensor, Tensor], Tensor]
Sampler = Literal["ancestral", "ddim", "euler", "heun"]

T_LAST = 0.999  # where sampling begins: at t = 1 no x_0 can be had from eps


def path(objective: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) and sigma(t)."""
    return (1 - t, t) if objective == "flow" else (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t))


def path_rate(objective: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """d alpha / dt and d sigma / dt."""
    if objective == "flow":
        return -torch.ones_like(t), torch.ones_like(t)
    return -math.pi / 2 * torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)


def time_of(objective: str, log_snr: Tensor) -> Tensor:
    """The t at which ln(alpha^2 / sigma^2) is log_snr."""
    return torch.sigmoid(-log_snr / 2) if objective == "flow" else torch.atan(torch.exp(-log_snr / 2)) * 2 / math.pi


def target(objective: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall predict."""
    return {"epsilon": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[objective]


def clean(objective: str, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 from a prediction at x = alpha x_0 + sigma eps."""
    if objective == "epsilon":
        return (x - sigma * out) / alpha
    return alpha * x - sigma * out if objective == "v" else x - sigma * out


def posterior(x: Tensor, x0: Tensor, alpha: tuple[Tensor, Tensor], sigma: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t = x, x_0) for s before t; alpha and sigma are those at (t, s).

    With a = alpha_t / alpha_s and b = sigma_t^2 - a^2 sigma_s^2 the mean is (a sigma_s^2 x + alpha_s b x_0) / sigma_t^2, the variance b sigma_s^2 / sigma_t^2.
    """
    a = alpha[0] / alpha[1]
    b = sigma[0] ** 2 - a**2 * sigma[1] ** 2
    return (a * sigma[1] ** 2 * x + alpha[1] * b * x0) / sigma[0] ** 2, b * sigma[1] ** 2 / sigma[0] ** 2


# -- samples -----------------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(denoise: Denoise, noise: Tensor, objective: str, sampler: Sampler, steps: int, generator: torch.Generator) -> Tensor:
    """Images from noise (B, C, H, W) by `steps` steps, evenly spaced in t. denoise(x, t) -> x_0 is asked once a step, by heun twice but in the last."""
    x = noise
    times = torch.linspace(T_LAST, 0, steps + 1, device=x.device)
    for t, s in itertools.pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = path(objective, t), path(objective, s)
        x0 = denoise(x, t)
        if sampler == "ancestral":
            mean, variance = posterior(x, x0, (alpha, alpha_s), (sigma, sigma_s))
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator).to(x.device)
        elif sampler == "ddim":
            x = alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)
        else:
            slope = velocity(objective, x, x0, t)
            ahead = x + (s - t) * slope
            if sampler == "heun" and s > 0:
                slope = (slope + velocity(objective, ahead, denoise(ahead, s), s)) / 2
                ahead = x + (s - t) * slope
            x = ahead
    return x


def velocity(objective: str, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the path through x at time t that ends in x_0."""
    (alpha, sigma), (alpha_rate, sigma_rate) = path(objective, t), path_rate(objective, t)
    return alpha_rate * x0 + sigma_rate * (x - alpha * x0) / sigma


# -- likelihood ----------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(denoise: Denoise, pixels: Tensor, levels: int, objective: str, generator: torch.Generator, times: int = 32) -> Tensor:
    """The variational bound (B,) in bits per dimension of images (B, C, H, W) uint8. denoise(x, t) -> x_0 takes times t (B, 1, 1, 1).

    The integral over l is an average of `times` stratified draws for each image.
    """
    x0 = images.scale(pixels, levels)
    B, D = len(x0), x0[0].numel()
    s0 = finest(levels)
    t1, t0 = torch.tensor(T_LAST), time_of(objective, torch.tensor(-2 * math.log(s0)))
    low, high = (2 * (a.log() - s.log()) for a, s in (path(objective, t) for t in (t1, t0)))

    def noise() -> Tensor:
        return torch.randn(x0.shape, generator=generator).to(x0.device)

    a1, s1 = path(objective, t1)
    prior = 0.5 * (a1**2 * x0**2 + s1**2 - 1 - 2 * s1.log()).flatten(1).sum(1)
    decoder = -decode(x0 + s0 * noise(), pixels, levels)
    integral = torch.zeros(B, device=x0.device)
    for k in range(times):
        u = (k + torch.rand(B, 1, 1, 1, generator=generator).to(x0.device)) / times
        t = time_of(objective, low + (high - low) * u)
        alpha, sigma = path(objective, t)
        eps = noise()
        x = alpha * x0 + sigma * eps
        integral += (alpha / sigma * (x0 - denoise(x, t))).square().flatten(1).sum(1)  # eps - eps^ = alpha / sigma (x_0^ - x_0)
    return (prior + decoder + 0.5 * (high - low) * integral / times) / D / math.log(2)


@torch.no_grad()
def flow_bits(
    denoise: Denoise, pixels: Tensor, levels: int, objective: str, generator: torch.Generator, steps: int = 25, probes: int = 1, draws: int = 1
) -> Tensor:
    """Bits per dimension (B,) of images (B, C, H, W) uint8 under the probability flow. denoise(x, t) -> x_0, differentiable in x, takes t (B, 1, 1, 1).

    Levels become numbers by the path's own first noise (dequantisation by q(y | x) = N(x, s_0^2), with s_0 a quarter of the gap between levels), and numbers
    levels as in the variational bound: -ln P(x) <= -E_q [ln p(y) + ln P(x | y) - ln q(y | x)], or with several `draws` of y the bound of their mean weight
    (Burda et al. 2016), which is tighter. steps, probes: see `log_density`.
    """
    x0, s0 = images.scale(pixels, levels), finest(levels)
    D, weights = x0[0].numel(), []
    for _ in range(draws):
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        y = x0 + s0 * noise
        q = -(0.5 * noise**2 + math.log(s0) + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        weights.append(log_density(denoise, y, s0, objective, generator, steps, probes) + decode(y, pixels, levels) - q)
    return (math.log(draws) - torch.logsumexp(torch.stack(weights), 0)) / D / math.log(2)


@torch.no_grad()
def log_density(denoise: Denoise, y: Tensor, s: float, objective: str, generator: torch.Generator, steps: int = 25, probes: int = 1) -> Tensor:
    """ln p(y) (B,) of images with noise of standard deviation s, y (B, C, H, W), under the probability flow from N(0, I) at T_LAST.

    steps: of the Runge-Kutta method of fourth order, evenly spaced in ln s; each asks the denoiser and its derivative four times. probes: random vectors of
    +-1 for the trace, one set for the whole way; the mean over them is unbiased. 0: the exact trace, by as many derivatives as an image has pixels.
    """
    D = y[0].numel()
    u = [torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1 for _ in range(probes)]
    alpha1, sigma1 = path(objective, torch.tensor(T_LAST, dtype=torch.float64))
    grid = torch.linspace(math.log(s), math.log(sigma1 / alpha1), steps + 1, dtype=torch.float64).tolist()

    def slope(z: Tensor, at: float) -> tuple[Tensor, Tensor]:
        """dz / d ln s and its divergence (B,), with z = y / sqrt(1 + s^2), which stays of one size: z / (1 + s^2) - x_0^ / sqrt(1 + s^2)."""
        r = math.sqrt(1 + math.exp(2 * at))
        t = time_of(objective, torch.full((len(z), 1, 1, 1), -2 * at, dtype=z.dtype, device=z.device))
        with torch.enable_grad():
            y = (r * z).requires_grad_()
            x0 = denoise(path(objective, t)[0] * y, t)
            if u:
                trace = torch.stack([(v * torch.autograd.grad(x0, y, v, retain_graph=v is not u[-1])[0]).flatten(1).sum(1) for v in u]).mean(0)
            else:
                rows = (torch.autograd.grad(x0.flatten(1)[:, i].sum(), y, retain_graph=i < D - 1)[0].flatten(1)[:, i] for i in range(D))
                trace = torch.stack(list(rows)).sum(0)
        return z / r**2 - x0.detach() / r, D / r**2 - trace

    z, divergence = y / math.sqrt(1 + s**2), torch.zeros(len(y), dtype=y.dtype, device=y.device)
    for a, b in itertools.pairwise(grid):
        h = b - a
        k1, d1 = slope(z, a)
        k2, d2 = slope(z + h / 2 * k1, a + h / 2)
        k3, d3 = slope(z + h / 2 * k2, a + h / 2)
        k4, d4 = slope(z + h * k3, b)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        divergence = divergence + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    size = math.hypot(alpha1, sigma1)  # x = size z in the end
    prior = -0.5 * ((size * z) ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
    return prior + D * math.log(size) + divergence - 0.5 * D * math.log(1 + s**2)


def finest(levels: int) -> float:
    """sigma / alpha at t_0, where likelihoods begin: a quarter of the gap between levels."""
    return 0.5 / (levels - 1)


def decode(y: Tensor, pixels: Tensor, levels: int) -> Tensor:
    """ln P(x | y) (B,) of levels (B, C, H, W) uint8: for each pixel of y, the image with noise of t_0, the odds that its value there gives to every level."""
    values = images.scale(torch.arange(levels, device=y.device), levels)
    odds = -0.5 * ((y[..., None] - values) / finest(levels)) ** 2  # (B, C, H, W, L)
    return -F.cross_entropy(odds.flatten(0, 3), pixels.flatten().long(), reduction="none").view(len(y), -1).sum(1)
