"""Diffusion and flow matching on images: a network that takes noise away, by three objectives, four samplers and two backbones.

Noise is added along a path x_t = alpha(t) x_0 + sigma(t) eps from the image (t = 0) to noise (t = 1), and the network predicts from x_t and t

    epsilon   eps                          alpha = cos(pi t / 2), sigma = sin(pi t / 2)      Ho et al. 2020; Nichol & Dhariwal 2021
    v         alpha eps - sigma x_0        the same path                                     Salimans & Ho 2022
    flow      eps - x_0 = dx/dt            alpha = 1 - t, sigma = t                          Lipman et al. 2023; Liu et al. 2023

Each of them gives both x_0 and eps, so that samplers and likelihood need not know which was learned:

    ancestral   x_s ~ q(x_s | x_t, x_0): noise at every step (Ho et al. 2020; for any path Kingma et al. 2021)
    ddim        x_s = alpha_s x_0 + sigma_s eps: none (Song, Meng & Ermon 2021)
    euler, heun the differential equation dx/dt = alpha' x_0 + sigma' eps by its method of first or second order (Song et al. 2021; Karras et al. 2022)

Bits per dimension are those of the variational bound in continuous time (Kingma et al. 2021, arXiv:2107.00630): with l = ln(alpha^2 / sigma^2) from l_1 at
t = 1 to l_0 near t = 0, where a level of the image is told from the next by its noise,

    -ln P(x) <= KL(q(x_1 | x), N(0, I)) - E ln P(x | x_{t_0}) + (l_0 - l_1) / 2 E_{l uniform} |eps - eps^|^2

| symbol   | shape        | meaning                                                             |
|----------|--------------|---------------------------------------------------------------------|
| x, eps   | (B, C, H, W) | an image between -1 and 1 with noise, and the noise                  |
| t        | (B,)         | how far along the path                                              |
| labels   | (B,)         | classes; the number of classes itself stands for none               |

Labels are left out at random in training, so that the network knows both the images of a class and all of them (Ho & Salimans 2021): with guidance w a
sample follows out + (w - 1) (out - out without label). The transformer is that of Peebles & Xie 2023 (DiT), its matrices trained by Muon (Jordan et al. 2024).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onetorch.generative import fid, images, likelihood, schedules
from onetorch.generative.ema import EMA
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.plan import thread_counts
from onetorch.runs.run import Run

T_LAST = 0.999  # where sampling begins: at t = 1 no x_0 can be had from eps
Sampler = Literal["ancestral", "ddim", "euler", "heun"]


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # .npy, .npz or a folder of images; none: the embedded ones
    embedded: Literal["digits", "glyphs"] = "digits"  # scikit-learn's digits, or characters in the fonts of matplotlib
    shape: tuple[int, int, int] = (1, 8, 8)  # channels, height and width of an image
    levels: int = 17  # values that a pixel may have
    classes: int = 10  # labels that the network is told; 0: none
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last fifth; or, to choose settings, on another that is not trained on either
    seed: int = 0  # of weights, batches and noise
    steps: int = 800  # optimizer steps
    batch: int = 128  # images in a step
    objective: Literal["epsilon", "v", "flow"] = "flow"  # what the network predicts, and the path
    backbone: Literal["transformer", "unet"] = "transformer"  # the network
    width: int = 128  # of the transformer's stream, or channels of the U-Net's first stage
    depth: int = 6  # blocks of the transformer; of each stage of the U-Net
    heads: int = 4  # of attention
    patch: int = 2  # pixels that a token of the transformer is wide and high
    stages: tuple[int, ...] = (1, 2, 2)  # the U-Net's channels at each halving of the image, in units of width
    drop_label: float = 0.15  # how often in training a label is left out
    lr: float = 2e-3  # AdamW's step size
    lr_matrix: float = 0.02  # Muon's step size: matrices of the transformer's blocks
    weight_decay: float = 0.0  # of both
    warmup: int = 50  # steps in which the rates rise from zero
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rates fall to zero
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    ema: float = 0.99  # rate of the weights' moving average, which samples and ends the run
    sampler: Sampler = "heun"  # of samples while training and in the end
    sample_steps: int = 20  # steps of the sampler
    guidance: float = 1.0  # w: above 1 samples are more like their class, and like each other
    eval_every: int = 400  # steps between two evaluations
    eval_samples: int = 400  # images sampled in them

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "width", "depth", "heads", "patch", "sample_steps", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("classes", "warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "lr_matrix", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("drop_label", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be channels (1 or 3), height and width, got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be 2 to 256, got {self.levels}")
        if self.eval_samples < 2:
            raise ValueError(f"eval_samples must be at least 2, got {self.eval_samples}")
        if self.guidance < 0 or (self.guidance != 1 and not self.classes):
            raise ValueError(f"guidance must be at least 0, and 1 without classes, got {self.guidance}")
        if self.backbone == "transformer" and (self.shape[1] % self.patch or self.shape[2] % self.patch):
            raise ValueError(f"patch must divide height and width {self.shape[1:]}, got {self.patch}")
        if self.backbone == "transformer" and self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")
        if not self.stages or min(self.stages) < 1 or (self.backbone == "unet" and any(side % 2 ** (len(self.stages) - 1) for side in self.shape[1:])):
            raise ValueError(f"stages must be positive, and height and width {self.shape[1:]} even at every halving, got {self.stages}")
        if self.backbone == "unet" and self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")


# -- the path ------------------------------------------------------------------------------------------------------------------------------------------


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


# -- the networks --------------------------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A matrix kept in float32 and applied in the dtype of its input: autocast takes every norm back to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, sdpa: bool) -> Tensor:
    """Attention of (B, heads, T, D). torch's own is slow on a CPU in the backward pass where sequences are short: there the speed plan says not `sdpa`."""
    if sdpa:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ (k * k.size(-1) ** -0.5).transpose(-2, -1), -1) @ v


class Condition(nn.Module):
    """A vector (B, width) of the time t and the label."""

    frequencies: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 32)), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(labels))


class Block(nn.Module):
    """A transformer block whose norms are shifted and scaled, and its two branches gated, by the condition; the gates begin at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Linear(width, 6 * width)
        self.qkv, self.out = Linear(width, 3 * width, bias=False), Linear(width, width, bias=False)
        self.up, self.down = Linear(width, 4 * width, bias=False), Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, sdpa: bool) -> Tensor:
        B, T, C = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, 2)  # each (B, 1, C)
        qkv = self.qkv(torch.addcmul(shift1, F.layer_norm(x, (C,)), 1 + scale1)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D)
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        y = attend(q, k, v, sdpa).transpose(1, 2).reshape(B, T, C)
        x = torch.addcmul(x, gate1, self.out(y))
        h = F.relu(self.up(torch.addcmul(shift2, F.layer_norm(x, (C,)), 1 + scale2))).square()
        return torch.addcmul(x, gate2, self.down(h))


class Transformer(nn.Module):
    """Patches to tokens, blocks, and back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        (C, H, W), p, width = config.shape, config.patch, config.width
        self.patch, self.grid = p, (H // p, W // p)
        self.condition = Condition(width, config.classes)
        self.enter = Linear(C * p * p, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, H * W // p**2, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.modulation = Linear(width, 2 * width)
        self.leave = Linear(width, C * p * p)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, dtype: torch.dtype, sdpa: bool) -> Tensor:
        (B, C, _, _), p, (h, w) = x.shape, self.patch, self.grid
        condition = self.condition(t, labels).to(dtype)
        tokens = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p).to(dtype)
        y = self.enter(tokens) + self.place.to(dtype)  # (B, h w, width)
        for block in self.blocks:
            y = block(y, condition, sdpa)
        shift, scale = self.modulation(condition)[:, None].chunk(2, 2)
        y = self.leave(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:]), 1 + scale))
        return y.view(B, h, w, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class Residual(nn.Module):
    """Two convolutions beside the identity; the condition scales and shifts between them."""

    def __init__(self, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, sdpa: bool) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4).unbind(1)
        y = attend(q, k, v, sdpa).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(y)


class UNet(nn.Module):
    """Stages of residual blocks at ever coarser pixels and back, each stage seeing on the way back what it was on the way there."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, widths = config.width, [config.width * m for m in config.stages]
        self.condition = Condition(4 * width, config.classes)
        self.enter = nn.Conv2d(config.shape[0], width, 3, padding=1)
        self.descent, self.ascent, self.halve, self.enlarge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inner, kept = width, [width]
        for i, outer in enumerate(widths):
            self.descent.append(nn.ModuleList(Residual(inner if j == 0 else outer, outer, 4 * width) for j in range(config.depth)))
            kept += [outer] * config.depth
            self.halve.append(nn.Conv2d(outer, outer, 3, stride=2, padding=1) if i + 1 < len(widths) else nn.Identity())
            inner = outer
        self.middle = nn.ModuleList([Residual(inner, inner, 4 * width), Attention(inner, config.heads), Residual(inner, inner, 4 * width)])
        for i, outer in reversed(list(enumerate(widths))):
            self.ascent.append(nn.ModuleList(Residual((inner if j == 0 else outer) + kept.pop(), outer, 4 * width) for j in range(config.depth)))
            self.enlarge.append(nn.Conv2d(outer, outer, 3, padding=1) if i else nn.Identity())
            inner = outer
        self.norm, self.leave = nn.GroupNorm(8, inner), nn.Conv2d(inner, config.shape[0], 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, dtype: torch.dtype, sdpa: bool) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self._forward(x, t, labels, sdpa)

    def _forward(self, x: Tensor, t: Tensor, labels: Tensor, sdpa: bool) -> Tensor:
        condition = self.condition(t, labels)
        y, kept = self.enter(x), []
        for stage, halve in zip(self.descent, self.halve, strict=True):
            for block in stage.children():
                y = block(y, condition)
                kept.append(y)
            y = halve(y)
        first, attention, last = self.middle
        y = last(attention(first(y, condition), sdpa), condition)
        for i, (stage, enlarge) in enumerate(zip(self.ascent, self.enlarge, strict=True)):
            for block in stage.children():
                y = block(torch.cat([y, kept.pop()], 1), condition)
            y = enlarge(F.interpolate(y, scale_factor=2.0) if i + 1 < len(self.ascent) else y)
        return self.leave(F.silu(self.norm(y)))


class Diffusion(nn.Module):
    """The network, and how to ask it. `dtype` of the arithmetic, `sdpa` and `layout` are the speed plan's and no part of the model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype, self.sdpa, self.layout = config, torch.float32, False, torch.contiguous_format
        self.net = Transformer(config) if config.backbone == "transformer" else UNet(config)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The objective's prediction (B, C, H, W) float32 at x (B, C, H, W), times t (B,), labels (B,) int64 (`classes` stands for none)."""
        return self.net(x.contiguous(memory_format=self.layout), t, labels, self.dtype, self.sdpa).float()

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """x_0 as the network sees it from x at time t (), with guidance."""
        times = t.expand(len(x))
        out = self(x, times, labels)
        if guidance != 1:
            out = torch.lerp(self(x, times, torch.full_like(labels, self.config.classes)), out, guidance)
        return clean(self.config.objective, out, x, *path(self.config.objective, t))


# -- sampling ------------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, objective: str, sampler: Sampler, steps: int, generator: torch.Generator) -> Tensor:
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


def sample(
    model: Diffusion, labels: Tensor, generator: torch.Generator, sampler: Sampler = "heun", steps: int = 20, guidance: float = 1.0, rows: int = 250
) -> Tensor:
    """Images (N, C, H, W) uint8 of the classes `labels` (N,) int64, of which `classes` stands for any; x_0 is kept between -1 and 1."""
    config, device, found = model.config, next(model.parameters()).device, []
    for part in labels.to(device).split(rows):

        def denoise(x: Tensor, t: Tensor, part: Tensor = part) -> Tensor:
            return model.denoise(x, t, part, guidance).clamp(-1, 1)

        noise = torch.randn(len(part), *config.shape, generator=generator).to(device)
        x = solve(denoise, noise, config.objective, sampler, steps, generator)
        found.append(images.quantize(x.cpu(), config.levels))
    return torch.cat(found)


# -- likelihood ----------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(denoise: Callable[[Tensor, Tensor], Tensor], pixels: Tensor, levels: int, objective: str, generator: torch.Generator, times: int = 32) -> Tensor:
    """The variational bound (B,) in bits per dimension of images (B, C, H, W) uint8. denoise(x, t) -> x_0 takes times t (B, 1, 1, 1).

    The integral over l is an average of `times` stratified draws for each image. P(x | x_{t_0}) takes for each pixel the levels with the odds that its value
    there gives them.
    """
    x0 = images.scale(pixels, levels)
    B, D = len(x0), x0[0].numel()
    gap = 2 / (levels - 1)
    t1, t0 = torch.tensor(T_LAST), time_of(objective, torch.tensor(2 * math.log(4 / gap)))  # at t_0 the noise is a quarter of the gap between levels
    low, high = (2 * (a.log() - s.log()) for a, s in (path(objective, t) for t in (t1, t0)))

    def noise() -> Tensor:
        return torch.randn(x0.shape, generator=generator).to(x0.device)

    (a1, s1), (a0, s0) = path(objective, t1), path(objective, t0)
    prior = 0.5 * (a1**2 * x0**2 + s1**2 - 1 - 2 * s1.log()).flatten(1).sum(1)
    seen = x0 + s0 / a0 * noise()
    values = images.scale(torch.arange(levels, device=x0.device), levels)
    odds = -0.5 * ((seen[..., None] - values) / (s0 / a0)) ** 2  # (B, C, H, W, L)
    decoder = F.cross_entropy(odds.flatten(0, 3), pixels.flatten().long(), reduction="none").view(B, D).sum(1)
    integral = torch.zeros(B, device=x0.device)
    for k in range(times):
        u = (k + torch.rand(B, 1, 1, 1, generator=generator).to(x0.device)) / times
        t = time_of(objective, low + (high - low) * u)
        alpha, sigma = path(objective, t)
        eps = noise()
        x = alpha * x0 + sigma * eps
        integral += (alpha / sigma * (x0 - denoise(x, t))).square().flatten(1).sum(1)  # eps - eps^ = alpha / sigma (x_0^ - x_0)
    return (prior + decoder + 0.5 * (high - low) * integral / times) / D / math.log(2)


def score(model: Diffusion, data: images.Images, generator: torch.Generator, count: int | None = None, times: int = 32) -> np.ndarray:
    """Bits per dimension (N,) of the images, or of `count` of them, evenly spread: those of a model that is told no labels."""
    device, config = next(model.parameters()).device, model.config
    index = np.arange(len(data)) if count is None or count >= len(data) else np.linspace(0, len(data) - 1, count).round().astype(np.int64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out = model(x, t.flatten(), torch.full((len(x),), config.classes, device=device))
        return clean(config.objective, out, x, *path(config.objective, t)).clamp(-1, 1)

    parts = (torch.from_numpy(data.pixels[i]).to(device) for i in np.array_split(index, max(1, len(index) // 250)))
    return torch.cat([bits(denoise, p, config.levels, config.objective, generator, times) for p in parts]).double().cpu().numpy()


# -- training ------------------------------------------------------------------------------------------------------------------------------------------


def build(config: Config) -> Diffusion:
    return Diffusion(config)


def example(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy images, times and labels for the module to answer, when it is shared."""
    return torch.randn(2, *config.shape), torch.tensor([0.3, 0.8]), torch.tensor([0, config.classes])


def losses(model: Diffusion, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error (B,) of the prediction at x_t."""
    alpha, sigma = path(model.config.objective, t[:, None, None, None])
    out = model(alpha * x0 + sigma * eps, t, labels)
    return (out - target(model.config.objective, x0, eps, alpha, sigma)).square().flatten(1).mean(1)


def optimizers(model: Diffusion, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of a transformer's blocks; `rate` is what the schedule's factor is applied to."""
    matrices = [p for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2 and "modulation" not in n]
    chosen = {id(p) for p in matrices}
    rest = {"params": [p for p in model.parameters() if id(p) not in chosen], "rate": config.lr}
    adam = torch.optim.AdamW([rest], betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
    if not matrices:
        return [adam]
    return [adam, torch.optim.Muon([{"params": matrices, "rate": config.lr_matrix}], weight_decay=config.weight_decay)]


@dataclass
class State:
    model: Diffusion
    optimizers: list[torch.optim.Optimizer]
    ema: EMA
    generator: torch.Generator  # draws batches, times and noise: the position in the data
    data: str  # digest of the images
    iteration: int = 0


def train(config: Config, run: Run) -> Diffusion:
    data, held_out = load(config)
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"diffusion {config.backbone} {config.width} {config.depth} {config.patch} {config.stages} {config.shape} {config.batch}",
        dtype=("float32", "bfloat16"),
        threads=thread_counts(),
        attention=("explicit", "sdpa"),
        layout=("contiguous_format", "channels_last") if config.backbone == "unet" else ("contiguous_format",),
    )
    model, device = prepare(build(config), plan), plan["device"]
    digest = data.digest()
    state = run.restore(State(model, optimizers(model, config), EMA(model, (config.ema,)), torch.Generator().manual_seed(config.seed), digest))
    if state.data != digest:
        raise RunError(f"data {config.data}: the images are not those this run was begun with (sha-256 {state.data}…, now {digest}…); put them back")
    work = flops(model)

    for state.iteration in run.steps(state.iteration, config.steps):
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * schedules.factor("wsd", state.iteration, config.steps, config.warmup, config.decay)
        x0, t, eps, labels = (z.to(device) for z in draw(data, config, state.generator))
        run.phase("batch")
        loss = losses(model, x0, t, eps, labels).mean()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        run.finite(loss=loss, grad_norm=grad_norm)
        run.phase("gradient")
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.ema.update()
        run.phase("update")
        last = state.iteration == config.steps
        evaluated: dict[str, float] = {}
        if last or state.iteration % config.eval_every == 0:
            with state.ema.swapped(config.ema):
                evaluated = validate(model, data, held_out, run.media / f"samples-{state.iteration:08}.png")
        if last:
            state.ema.keep(config.ema)
        run.phase("evaluation")
        run.log(state.iteration, flops=work * config.batch, loss=loss, grad_norm=grad_norm, **evaluated)
        run.checkpoint(state)
        run.phase("logging")
    return model


def load(config: Config) -> tuple[images.Images, images.Images]:
    """(what to train on, what to evaluate on)."""
    found = images.read(config.data, config.embedded, config.shape[1] if config.shape[1] == config.shape[2] else 0)
    images.check(found, config.shape, config.levels, config.classes, config.data)
    return images.parts(found, config.held_out, config.data)


def draw(data: images.Images, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch (x_0, t, eps, labels): times stratified over (0, 1), a label left out now and then."""
    pixels, labels = images.batch(data, config.batch, generator)
    t = (torch.arange(config.batch) + torch.rand(config.batch, generator=generator)) / config.batch
    eps = torch.randn(pixels.shape, generator=generator)
    dropped = torch.rand(config.batch, generator=generator) < config.drop_label
    none = torch.full_like(labels, config.classes)
    return images.scale(pixels, config.levels), t, eps, torch.where(dropped, none, labels) if config.classes else none


def prepare(model: Diffusion, choice: dict) -> Diffusion:
    """The model on its device, computing as the speed plan says."""
    model.dtype, model.sdpa = getattr(torch, choice["dtype"]), choice["attention"] == "sdpa"
    model.layout = getattr(torch, choice["layout"])  # of activations; weights stay as they are, for a fused optimizer takes their state to lie as they do
    return model.to(choice["device"])


def trial(config: Config, choice: dict) -> Callable[[], None]:
    """A forward and a backward pass of a quarter of a batch under a choice of the speed plan."""
    model, B = prepare(build(config), choice), -(-config.batch // 4)
    x, t, labels = torch.randn(B, *config.shape), torch.rand(B), torch.zeros(B, dtype=torch.int64)
    x, t, labels = (z.to(choice["device"]) for z in (x, t, labels))
    return lambda: losses(model, x, t, x, labels).mean().backward()


def flops(model: Diffusion) -> float:
    """Floating point operations of a step for each image: forward, and twice that backward."""
    device = next(model.parameters()).device
    x, t, labels = (z[:1].to(device) for z in (torch.zeros(1, *model.config.shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, t, labels)
    return 3.0 * counter.get_total_flops()


def drawn_labels(data: images.Images, classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Labels (count,) with the frequencies that they have in the data; `classes` where there are none."""
    if not classes or data.labels is None:
        return torch.full((count,), classes)
    return torch.from_numpy(data.labels)[torch.randint(len(data), (count,), generator=generator)]


def validate(model: Diffusion, data: images.Images, held_out: images.Images, grid: Path) -> dict[str, float]:
    """Bits per dimension of up to 250 held-out images and FID of samples, a hundred of which go to the file `grid`."""
    config, generator = model.config, torch.Generator().manual_seed(model.config.seed)
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator, count=250, times=8))
    labels = drawn_labels(data, config.classes, config.eval_samples, generator)
    pixels = sample(model, labels, generator, config.sampler, config.sample_steps, config.guidance).numpy()
    images.write_grid(grid, pixels[:100], config.levels, columns=10)
    network = fid.features(data)
    found = fid.distance(network.embed(pixels), network.embed(held_out.pixels))
    return {"val_bpd": bpd, "val_bpd_se": bpd_se, "fid": found.fid, "fid_se": found.error}


def evaluate(
    model: Diffusion,
    config: Config,
    *,
    media: Path | None = None,
    samples: int = 1000,
    sampler: Sampler | None = None,
    sample_steps: int | None = None,
    guidance: float | None = None,
    times: int = 32,
    seed: int = 0,
    baselines: bool = True,
) -> dict[str, float | int | str]:
    """Bits per dimension and FID on the held-out images with standard errors, beside those of plain models; samples to media/samples.png.

    samples: images for FID. sampler, sample_steps, guidance: none: the config's. times: draws of the likelihood's integral for each image. baselines: also
    the bits of a histogram of each pixel and of a PCA-Gaussian, and the FID of training images as many as held-out ones.
    Raises UsageError naming an option that is out of range.
    """
    steps, w = sample_steps or config.sample_steps, config.guidance if guidance is None else guidance
    for name, value, least in (("samples", samples, 2), ("sample_steps", steps, 1), ("times", times, 1), ("guidance", w, 0)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if w != 1 and not config.classes:
        raise UsageError(f"guidance needs a model that is told labels; this one has no classes, got {w}")
    data, held_out = load(config)
    generator = torch.Generator().manual_seed(seed)
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator, times=times))
    pixels = sample(model, drawn_labels(data, config.classes, samples, generator), generator, sampler or config.sampler, steps, w).numpy()
    network = fid.features(data)
    reference = network.embed(held_out.pixels)
    found = fid.distance(network.embed(pixels), reference)
    results: dict[str, float | int | str] = {"bpd": bpd, "bpd_se": bpd_se, "fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}
    if baselines:
        some = torch.randperm(len(data), generator=generator)[: min(samples, len(data))].numpy()
        apart = fid.distance(network.embed(data.pixels[some]), reference)
        results |= {"train_fid": apart.fid, "train_fid_se": apart.error, "uniform_bpd": likelihood.uniform(config.levels)}
        results["histogram_bpd"] = float(likelihood.histogram(data, held_out).mean())
        results["gaussian_bpd"] = float(likelihood.pca_gaussian(data, held_out)[0].mean())
    results |= {"images": len(held_out), "samples": samples, "parameters": sum(p.numel() for p in model.parameters())}
    if media is not None:
        images.write_grid(media / "samples.png", pixels[:100], config.levels, columns=10)
    return results
