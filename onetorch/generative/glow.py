"""Glow (Kingma & Dhariwal 2018, arXiv:1807.03039): an invertible network from images to Gaussian noise, whose density is exact.

A pixel n of L levels becomes the number x = (n + u) / L - 1/2 with noise u uniform in [0, 1) (dequantisation; Theis et al. 2016), and

    ln p(x) = sum ln N(z) + ln |det dz / dx|        z = f(x)

is a sum over the steps of f, since each of them knows its own determinant:

    actnorm     y = exp(s) (x + b) by channel; s and b begin so that the first batch leaves with mean 0 and variance 1
    1x1         y = W x at every pixel, W = P L U with ln |det W| the sum of U's logarithmic diagonal
    coupling    half the channels as they are, y1 = x1; the others by what a network says of x1: y2 = (x2 + t) s, affine, or x2 + t, additive (Dinh et al. 2015)

A scale squeezes 2x2 pixels into channels, does `steps_per_scale` such steps, and all but the last scale take half of the channels out as noise, whose mean and
scale the other half tells (Dinh et al. 2017, multi-scale). An image whose sides cannot be halved `scales` times is padded below and on the right with pixels
of level 0: the bits counted are those of image and padding together, over the dimensions of the image, so that they can only be too many.

| symbol   | shape          | meaning                                             |
|----------|----------------|-----------------------------------------------------|
| x        | (B, C, H, W)   | dequantised pixels between -1/2 and 1/2              |
| z        | list of (B, …) | noise of each scale, the last scale last             |
| logdet   | (B,)           | ln |det dz / dx|                                     |

Bits per dimension are an average over draws of u, never below the truth; `bpd_iw` is the bound that takes the mean of the density and not of its logarithm
(Burda et al. 2016), which is tighter.
"""

import functools
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
from onetorch.generative.divergence import Divergence
from onetorch.generative.ema import EMA
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.plan import thread_counts
from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # .npy, .npz, a folder of images or hf:NAME; none: the embedded ones
    embedded: Literal["digits", "glyphs"] = "digits"  # scikit-learn's digits, or characters in the fonts of matplotlib
    shape: tuple[int, int, int] = (1, 8, 8)  # channels, height and width of an image
    levels: int = 17  # values that a pixel may have
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last fifth; or, to choose settings, on another that is not trained on either
    seed: int = 0  # of weights, batches and noise
    steps: int = 500  # optimizer steps
    batch: int = 64  # images in a step
    accumulate: int = 1  # parts that a batch is computed in, one after the other: the same gradient with less memory
    scales: int = 2  # times that the image is squeezed
    steps_per_scale: int = 8  # actnorm, 1x1 and coupling in each scale
    width: int = 64  # channels within a coupling's network
    coupling: Literal["affine", "additive"] = "affine"  # what a coupling does to its second half
    lr: float = 2e-3  # AdamW's step size
    weight_decay: float = 0.1  # of AdamW: convolutions of the couplings
    warmup: int = 50  # steps in which the rate rises from zero
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"  # course of the rate after the warm-up; wsd: constant, at last a line down
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rate of wsd falls to zero
    max_grad_norm: float = 50.0  # gradients are scaled down to this norm
    ema: float = 0.99  # rate of the weights' moving average, which is evaluated and ends the run
    ema_beside: tuple[float, ...] = ()  # more rates, whose averages are evaluated beside it
    temperature: float = 0.8  # of samples: what the noise's standard deviation is multiplied with
    eval_every: int = 250  # steps between two evaluations
    eval_samples: int = 400  # images sampled in them, of the averaged weights and of the raw ones: an image costs a third of what it costs in a step

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "scales", "steps_per_scale", "width", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        rates = (self.ema, *self.ema_beside)
        if not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"ema and ema_beside must be different rates of at least 0 and below 1, got {self.ema} and {self.ema_beside}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be channels (1 or 3), height and width, got {self.shape}")
        if 2 ** (self.scales - 1) >= max(self.shape[1:]):
            raise ValueError(f"scales: an image of {self.shape[1:]} cannot be halved so often, got {self.scales}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be 2 to 256, got {self.levels}")
        if self.eval_samples < 3:
            raise ValueError(f"eval_samples must be at least 3, got {self.eval_samples}")


# -- the steps -----------------------------------------------------------------------------------------------------------------------------------------


class ActNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Such that x (B, C, H, W) leaves with mean 0 and variance 1 in each channel."""
        self.shift.copy_(-x.mean((0, 2, 3), keepdim=True))
        self.log_scale.copy_(-(x.std((0, 2, 3), keepdim=True) + 1e-6).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + self.shift) * self.log_scale.exp(), self.log_scale.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.shift


class Conv1x1(nn.Module):
    """W = P L U, from a random rotation; P and the signs of U's diagonal stay."""

    permutation: Tensor  # (C, C)
    sign: Tensor  # (C,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())

    def weight(self) -> Tensor:
        """W (C, C)."""
        lower = self.lower.tril(-1) + torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        return self.permutation @ lower @ (self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.weight()[:, :, None, None]), self.log_diagonal.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight(), y.flatten(2)).view_as(y)


class Zero(nn.Module):
    """A convolution that begins as zero, its outputs scaled by exp(3 s) with s learned."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv, self.log_scale = nn.Conv2d(inner, outer, 3, padding=1), nn.Parameter(torch.zeros(1, outer, 1, 1))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (3 * self.log_scale).exp()


class Coupling(nn.Module):
    def __init__(self, channels: int, width: int, affine: bool) -> None:
        super().__init__()
        self.kept, self.affine, self.dtype, changed = channels // 2, affine, torch.float32, channels - channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(self.kept, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), Zero(width, changed * (1 + affine))
        )  # fmt: skip

    def parts(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """(t, ln s) of x1; the logarithm lies between -2 and 2, so that no image outside the training set can blow up."""
        with torch.autocast(x1.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.net(x1).to(x1.dtype)
        if not self.affine:
            return out, torch.zeros_like(out)
        t, raw = out.chunk(2, 1)
        return t, 2 * torch.tanh(raw / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.tensor_split([self.kept], 1)
        t, log_s = self.parts(x1)
        return torch.cat([x1, (x2 + t) * log_s.exp()], 1), log_s.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.tensor_split([self.kept], 1)
        t, log_s = self.parts(y1)
        return torch.cat([y1, y2 * (-log_s).exp() - t], 1)


def squeeze(x: Tensor) -> Tensor:
    """(B, C, 2 H, 2 W) to (B, 4 C, H, W)."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(y: Tensor) -> Tensor:
    return F.pixel_shuffle(y, 2)


def log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln N(z; mean, exp(log_std)^2) (B,), summed over all but the first dimension."""
    return (-0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mean) * (-log_std).exp()) ** 2).flatten(1).sum(1)


class Glow(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        C, H, W = config.shape
        unit = 2**config.scales
        self.padded = (C, -(-H // unit) * unit, -(-W // unit) * unit)
        self.flows, self.priors = nn.ModuleList(), nn.ModuleList()
        channels = C
        for scale in range(config.scales):
            channels *= 4
            flow = nn.ModuleList()
            for _ in range(config.steps_per_scale):
                flow.extend([ActNorm(channels), Conv1x1(channels), Coupling(channels, config.width, config.coupling == "affine")])
            self.flows.append(flow)
            last = scale + 1 == config.scales
            self.priors.append(Zero(channels if last else channels // 2, 2 * channels if last else channels))
            channels = channels if last else channels // 2

    def prior(self, scale: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the noise of a scale, told by h; of the last scale by nothing (h is zero)."""
        mean, log_std = self.priors[scale](h).chunk(2, 1)
        return mean, log_std

    def forward(self, x: Tensor, initialise: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
        """(z, logdet (B,), ln p(z) (B,)) of padded x; with `initialise` every actnorm first fits itself to what comes to it."""
        z: list[Tensor] = []
        logdet = prior = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        h = x
        for scale, flow in enumerate(self.flows):
            h = squeeze(h)
            for layer in flow.children():
                if initialise and isinstance(layer, ActNorm):
                    layer.initialise(h)
                h, change = layer(h)
                logdet = logdet + change
            if scale + 1 < len(self.flows):
                h, out = h.chunk(2, 1)
                mean, log_std = self.prior(scale, h)
            else:
                out, (mean, log_std) = h, self.prior(scale, torch.zeros_like(h))
            prior = prior + log_normal(out, mean, log_std)
            z.append(out)
        return z, logdet, prior

    def inverse(self, z: list[Tensor]) -> Tensor:
        """The x (B, C, H, W), padded, of which forward makes z."""
        h = z[-1]
        for scale in reversed(range(len(self.flows))):
            if scale + 1 < len(self.flows):
                h = torch.cat([h, z[scale]], 1)
            for layer in reversed(list(self.flows[scale].children())):
                h = layer.inverse(h)  # type: ignore[operator]
            h = unsqueeze(h)
        return h

    def log_density(self, x: Tensor) -> Tensor:
        """ln p(x) (B,) of padded x."""
        _, logdet, prior = self(x)
        return logdet + prior

    def draw(self, count: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Samples x (count, C, H, W), padded, with noise of so many standard deviations."""
        p = next(self.parameters())
        unit = 2**self.config.scales
        channels = self.config.shape[0] * 4 * 2 ** (self.config.scales - 1)  # each scale makes four of one and, but for the last, takes half out
        h = torch.zeros(count, channels, self.padded[1] // unit, self.padded[2] // unit, dtype=p.dtype, device=p.device)
        for scale in reversed(range(len(self.flows))):
            mean, log_std = self.prior(scale, h)
            out = mean + temperature * log_std.exp() * torch.randn(mean.shape, generator=generator).to(mean)
            h = out if scale + 1 == len(self.flows) else torch.cat([h, out], 1)
            for layer in reversed(list(self.flows[scale].children())):
                h = layer.inverse(h)  # type: ignore[operator]
            h = unsqueeze(h)
        return h


# -- images, likelihood and samples ------------------------------------------------------------------------------------------------------------------------


def dequantise(pixels: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """x (B, C, H', W') between -1/2 and 1/2, padded, of levels (B, C, H, W) uint8."""
    unit = 2**config.scales
    below, right = -pixels.shape[2] % unit, -pixels.shape[3] % unit
    whole = F.pad(pixels, (0, right, 0, below)).float()
    return (whole + torch.rand(whole.shape, generator=generator).to(whole.device)) / config.levels - 0.5


def quantise(x: Tensor, config: Config) -> Tensor:
    """Levels (B, C, H, W) uint8 of padded x: the inverse of `dequantise`; numbers outside go to the nearest level."""
    _, H, W = config.shape
    return ((x[:, :, :H, :W] + 0.5) * config.levels).floor().clamp(0, config.levels - 1).to(torch.uint8)


def nats(model: Glow, x: Tensor) -> Tensor:
    """-ln p (B,) of the levels with their noise: in units of a level, a density is smaller by the number of levels in each dimension."""
    return x[0].numel() * math.log(model.config.levels) - model.log_density(x)


@torch.no_grad()
def score(model: Glow, data: images.Images, generator: torch.Generator, draws: int = 1, rows: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Bits per dimension (N,) of the images, averaged over draws of the noise; and of the mean density of these draws, which is a tighter bound."""
    config, device = model.config, next(model.parameters()).device
    parts = []
    for part in torch.from_numpy(data.pixels).split(rows):
        parts.append(torch.stack([nats(model, dequantise(part.to(device), config, generator)) for _ in range(draws)]).double())
    found = torch.cat(parts, 1) / math.prod(config.shape) / math.log(2)  # (draws, N)
    scale = math.prod(config.shape) * math.log(2)
    tight = (math.log(draws) - torch.logsumexp(-found * scale, 0)) / scale
    return found.mean(0).cpu().numpy(), tight.cpu().numpy()


@torch.no_grad()
def sample(model: Glow, count: int, generator: torch.Generator, temperature: float = 1.0, rows: int = 500) -> Tensor:
    """Images (count, C, H, W) uint8."""
    return torch.cat([quantise(model.draw(min(rows, count - i), generator, temperature).cpu(), model.config) for i in range(0, count, rows)])


# -- training ------------------------------------------------------------------------------------------------------------------------------------------


def build(config: Config) -> Glow:
    return Glow(config)


def example(config: Config) -> tuple[Tensor]:
    """Two dequantised images for the module to answer, when it is shared."""
    return (torch.rand(2, *Glow(config).padded) - 0.5,)


def optimizer_of(model: Glow, config: Config) -> torch.optim.Optimizer:
    """AdamW, with weight decay for the convolutions within couplings alone."""
    decayed = [p for n, p in model.named_parameters() if ".net." in n and p.ndim == 4 and "log_scale" not in n]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=config.lr, fused=True)


@dataclass
class State:
    model: Glow
    optimizer: torch.optim.Optimizer
    ema: EMA
    divergence: Divergence
    generator: torch.Generator  # draws batches and noise: the position in the data
    data: str  # digest of the images
    iteration: int = 0


def train(config: Config, run: Run) -> Glow:
    data, held_out = load(config)
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"glow {config.scales} {config.steps_per_scale} {config.width} {config.coupling} {config.shape} {config.batch}",
        asked={"dtype": ("bfloat16",)},  # not measured: densities are what this is for, and the last digits of one are lost
        dtype=("float32",),
        threads=thread_counts(),
    )
    device = plan["device"]
    model, generator, digest = prepare(build(config), plan), torch.Generator().manual_seed(config.seed), data.digest()
    initialise(model, data, generator)
    state = run.restore(State(model, optimizer_of(model, config), EMA(model, (config.ema, *config.ema_beside)), Divergence(), generator, digest))
    if state.data != digest:
        raise RunError(f"data {config.data}: the images are not those this run was begun with (sha-256 {state.data}…, now {digest}…); put them back")
    work, D = flops(model), math.prod(config.shape)

    for state.iteration in run.steps(state.iteration, config.steps):
        for group in state.optimizer.param_groups:
            group["lr"] = config.lr * schedules.factor(config.schedule, state.iteration, config.steps, config.warmup, config.decay)
        x = dequantise(images.batch(data, config.batch, state.generator)[0], config, state.generator).to(device)
        bpd = torch.zeros((), device=device)
        for some in x.chunk(config.accumulate):
            share = nats(model, some).mean() / D / math.log(2) * (len(some) / config.batch)
            share.backward()
            bpd += share.detach()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        run.finite(loss=bpd, grad_norm=grad_norm)
        state.divergence.check(bpd.item(), state.iteration, "lower --lr, or give a longer --warmup or a smaller --max_grad_norm")
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update()
        last = state.iteration == config.steps
        evaluated: dict[str, float] = {}
        if last or state.iteration % config.eval_every == 0:
            grid = run.media / f"samples-{state.iteration:08}.png"
            evaluated = state.ema.compare(functools.partial(validate, model, data, held_out), grid)
        if last:
            state.ema.keep(config.ema)
        seen = state.iteration * config.batch
        run.log(state.iteration, flops=work * config.batch, loss=bpd, grad_norm=grad_norm, images=seen, **evaluated)
        run.checkpoint(state)
    return model


def load(config: Config) -> tuple[images.Images, images.Images]:
    """(what to train on, what to evaluate on)."""
    return images.load(config.data, config.embedded, config.shape, config.levels, None, config.held_out)


@torch.no_grad()
def initialise(model: Glow, data: images.Images, generator: torch.Generator, count: int = 512) -> None:
    """Fit the actnorms to `count` training images."""
    pixels, _ = images.batch(data, count, generator)
    model(dequantise(pixels, model.config, generator).to(next(model.parameters()).device), initialise=True)


def prepare(model: Glow, choice: dict) -> Glow:
    """The model on its device; the networks in its couplings, the same forward and inverse, compute as the speed plan says."""
    for module in model.modules():
        if isinstance(module, Coupling):
            module.dtype = getattr(torch, choice["dtype"])
    return model.to(choice["device"])


def trial(config: Config, choice: dict) -> Callable[[], None]:
    """A forward and a backward pass of a quarter of a batch under a choice of the speed plan."""
    model = prepare(build(config), choice)
    x = torch.rand(-(-config.batch // 4), *model.padded).to(choice["device"]) - 0.5
    return lambda: nats(model, x).mean().backward()


def flops(model: Glow) -> float:
    """Floating point operations of a step for each image: forward, and twice that backward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.padded, device=next(model.parameters()).device))
    return 3.0 * counter.get_total_flops()


def validate(model: Glow, data: images.Images, held_out: images.Images, grid: Path) -> dict[str, float]:
    """Bits per dimension of the held-out images and FID of samples, a hundred of which go to the file `grid`."""
    config, generator = model.config, torch.Generator().manual_seed(model.config.seed)
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator)[0])
    pixels = sample(model, config.eval_samples, generator, config.temperature).numpy()
    images.write_grid(grid, pixels[:100], config.levels, columns=10)
    return {"val_bpd": bpd, "val_bpd_se": bpd_se} | fid.columns(pixels, data, held_out)


def evaluate(
    model: Glow,
    config: Config,
    *,
    media: Path | None = None,
    samples: int = 500,
    temperature: float | None = None,
    draws: int = 16,
    seed: int = 0,
    baselines: bool = True,
) -> dict[str, float | int | str]:
    """Bits per dimension and FID on the held-out images with standard errors, beside those of plain models; samples to media/samples.png.

    samples: images for FID. temperature: none: the config's. draws: of the dequantising noise for each image. baselines: also the bits of a histogram of each
    pixel and of a PCA-Gaussian, and the FID of training images as many as held-out ones.
    Raises UsageError naming an option that is out of range.
    """
    warm = config.temperature if temperature is None else temperature
    for name, value, least in (("samples", samples, 2), ("draws", draws, 1), ("temperature", warm, 0)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    data, held_out = load(config)
    generator = torch.Generator().manual_seed(seed)
    mean, tight = score(model, held_out, generator, draws)
    (bpd, bpd_se), (iw, iw_se) = likelihood.mean_and_error(mean), likelihood.mean_and_error(tight)
    pixels = sample(model, samples, generator, warm).numpy()
    if media is not None:
        images.write_grid(media / "samples.png", pixels[:100], config.levels, columns=10)
    results: dict[str, float | int | str] = {"images": len(held_out), "bpd": bpd, "bpd_se": bpd_se, "bpd_iw": iw, "bpd_iw_se": iw_se}
    results |= fid.columns(pixels, data, held_out, generator if baselines else None) | (likelihood.baselines(data, held_out) if baselines else {})
    return results
