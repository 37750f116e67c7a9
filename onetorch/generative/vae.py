"""Hierarchical variational autoencoder, top-down (Sonderby et al. 2016, arXiv:1602.02282; Child 2020, vdvae, arXiv:2011.10650).

An encoder goes from the image to ever coarser features. The generator goes from a learned constant of the coarsest size to the image, block by block, and
each block draws a latent z_l given all before it: of the prior p(z_l | z_<l), or when an image is at hand of the posterior q(z_l | z_<l, x), which sees also
the encoder's features of that size. The last features tell the odds of every pixel's levels, so

    -ln P(x) <= E_q [ -ln P(x | z) + sum_l KL(q(z_l | z_<l, x), p(z_l | z_<l)) ]         the ELBO, which is trained
    -ln P(x) <= -E ln 1/K sum_k P(x | z_k) p(z_k) / q(z_k | x)                                             IWAE of K draws

The second (Burda et al. 2016, arXiv:1509.00519) is never above the first, and comes to the truth as K grows. Odds
of a pixel are a softmax over its levels (categorical), or a mixture of logistic densities whose mass between the middles of neighbouring levels is theirs,
the outermost taking the tails (logistics; Salimans et al. 2017); the channels of a pixel are independent given z.

| symbol   | shape            | meaning                                                  |
|----------|------------------|----------------------------------------------------------|
| x        | (B, C, H, W)     | pixels between -1 and 1                                    |
| h        | (B, width, h, w) | features at one of the sizes                               |
| z        | (B, latent, h, w)| a block's latent                                           |
| mean, log_std |             | of a block's prior p or posterior q, shaped as z           |

Against latents that say nothing (posterior collapse): the KL's weight rises from zero over the first `kl_warmup` steps (Sonderby et al. 2016), and
residual branches begin small, by 1 / sqrt of their number. `evaluate` counts the blocks that are in use. A step whose gradient is longer than
`skip_grad_norm` is left out (Child 2020).
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

IN_USE = 0.01  # nats for each of an image that a block's latent says at least, to count as in use


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # .npy, .npz, a folder of images or hf:NAME; none: the embedded ones
    embedded: Literal["digits", "glyphs"] = "digits"  # scikit-learn's digits, or characters in the fonts of matplotlib
    shape: tuple[int, int, int] = (1, 8, 8)  # channels, height and width of an image
    levels: int = 17  # values that a pixel may have
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last fifth; or, to choose settings, on another that is not trained on either
    seed: int = 0  # of weights, batches and noise
    steps: int = 400  # optimizer steps
    batch: int = 64  # images in a step
    accumulate: int = 1  # parts that a batch is computed in, one after the other: the same gradient with less memory
    blocks: tuple[int, ...] = (2, 2, 2)  # of the generator at each size, the coarsest first; each size is half the next, rounded up, and the last the image's
    width: int = 64  # channels of the features
    inner: int = 32  # channels within a residual branch
    latent: int = 8  # channels of each latent
    pixels: Literal["categorical", "logistics"] = "categorical"  # what odds a pixel's levels have
    mixtures: int = 5  # logistic densities of a pixel
    drop: float = 0.0  # part of the features left out at random before the odds in training
    lr: float = 2e-3  # AdamW's step size
    weight_decay: float = 0.05  # of AdamW
    warmup: int = 50  # steps in which the rate rises from zero
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"  # course of the rate after the warm-up; wsd: constant, at last a line down
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rate of wsd falls to zero
    kl_warmup: int = 200  # steps in which the weight of the KL rises to one
    max_grad_norm: float = 200.0  # gradients (of nats an image) are scaled down to this norm
    skip_grad_norm: float = 2000.0  # a step with a longer gradient is left out
    ema: float = 0.99  # rate of the weights' moving average, which is evaluated and ends the run
    ema_beside: tuple[float, ...] = ()  # more rates, whose averages are evaluated beside it
    temperature: float = 1.0  # of samples: what the priors' standard deviations are multiplied with
    eval_every: int = 200  # steps between two evaluations
    eval_samples: int = 400  # images sampled in them, of the averaged weights and of the raw ones: an image costs a third of what it costs in a step

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "width", "inner", "latent", "mixtures", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "kl_warmup", "weight_decay", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {self.drop}")
        rates = (self.ema, *self.ema_beside)
        if not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"ema and ema_beside must be different rates of at least 0 and below 1, got {self.ema} and {self.ema_beside}")
        if not self.skip_grad_norm >= self.max_grad_norm:
            raise ValueError(f"skip_grad_norm must be at least max_grad_norm = {self.max_grad_norm}, got {self.skip_grad_norm}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be channels (1 or 3), height and width, got {self.shape}")
        if not self.blocks or min(self.blocks) < 1 or 2 ** (len(self.blocks) - 1) >= 2 * max(self.shape[1:]):
            raise ValueError(f"blocks must be positive, and no more sizes than halvings of {self.shape[1:]}, got {self.blocks}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be 2 to 256, got {self.levels}")
        if self.eval_samples < 3:
            raise ValueError(f"eval_samples must be at least 3, got {self.eval_samples}")


# -- densities -----------------------------------------------------------------------------------------------------------------------------------------


def divergence(q_mean: Tensor, q_log_std: Tensor, p_mean: Tensor, p_log_std: Tensor) -> Tensor:
    """KL(q, p) of normal distributions, by element: ln(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2."""
    return p_log_std - q_log_std + 0.5 * ((2 * q_log_std).exp() + (q_mean - p_mean) ** 2) * (-2 * p_log_std).exp() - 0.5


def log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln N(z; mean, exp(log_std)^2), by element."""
    return -0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mean) * (-log_std).exp()) ** 2


def importance(log_weights: Tensor) -> Tensor:
    """ln 1/K sum_k w_k (B,) of log-weights (K, B): the bound of K draws on ln P(x)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def log_odds(out: Tensor, config: Config) -> Tensor:
    """Log-probabilities (B, C, L, H, W) of the levels of each pixel from the generator's outputs (B, C n, H, W)."""
    C, H, W = config.shape
    out = out.view(len(out), C, -1, H, W)
    if config.pixels == "categorical":
        return F.log_softmax(out, 2)
    weight, mean, log_scale = (part.unsqueeze(3) for part in out.chunk(3, 2))  # each (B, C, M, 1, H, W)
    L = config.levels
    middles = ((torch.arange(L - 1, device=out.device, dtype=out.dtype) + 0.5) * (2 / (L - 1)) - 1).view(1, 1, 1, -1, 1, 1)
    below = (middles - mean) * (-log_scale.clamp(-7, 7)).exp()
    log_below, log_above = F.logsigmoid(below), F.logsigmoid(-below)
    # mass between a < b is s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)), which loses no digits where both are near 0 or 1
    gap = (below[:, :, :, 1:] - below[:, :, :, :-1]).clamp(min=1e-12)
    inside = log_below[:, :, :, 1:] + log_above[:, :, :, :-1] + (-torch.expm1(-gap)).log()
    levels = torch.cat([log_below[:, :, :, :1], inside, log_above[:, :, :, -1:]], 3)  # (B, C, M, L, H, W)
    return torch.logsumexp(F.log_softmax(weight, 2) + levels, 2)


# -- the network ---------------------------------------------------------------------------------------------------------------------------------------


def convolution(inner: int, outer: int, size: tuple[int, int], scale: float = 1.0) -> nn.Conv2d:
    """3x3, or 1x1 where the picture is too small for it; its first weights multiplied with `scale`."""
    side = 3 if min(size) > 2 else 1
    layer = nn.Conv2d(inner, outer, side, padding=side // 2)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer


def branch(enter: int, inner: int, leave: int, size: tuple[int, int], scale: float = 1.0) -> nn.Sequential:
    """1x1, two of 3x3, 1x1 as in vdvae."""
    return nn.Sequential(
        nn.GELU(), nn.Conv2d(enter, inner, 1), nn.GELU(), convolution(inner, inner, size), nn.GELU(), convolution(inner, inner, size), nn.GELU(),
        convolution(inner, leave, (1, 1), scale),
    )  # fmt: skip


class Block(nn.Module):
    """A latent of the generator and a residual branch after it."""

    def __init__(self, config: Config, size: tuple[int, int], scale: float) -> None:
        super().__init__()
        width, inner, self.latent = config.width, config.inner, config.latent
        self.prior = branch(width, inner, 2 * config.latent + width, size, 0.1)
        self.posterior = branch(2 * width, inner, 2 * config.latent, size, 0.1)
        self.enter = nn.Conv2d(config.latent, width, 1)
        self.after = branch(width, inner, width, size, scale)

    def forward(self, h: Tensor, seen: Tensor | None, noise: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(h, KL (B,), ln p(z) - ln q(z) (B,)); without features seen of an image, z is the prior's and both are zero."""
        p_mean, p_log_std, more = self.prior(h).to(h.dtype).split([self.latent, self.latent, h.shape[1]], 1)
        kl = ratio = torch.zeros(len(h), device=h.device)
        if seen is None:
            z = p_mean + temperature * p_log_std.exp() * noise
        else:
            q_mean, q_log_std = self.posterior(torch.cat([h, seen], 1)).to(h.dtype).chunk(2, 1)
            z = q_mean + q_log_std.exp() * noise
            kl = divergence(q_mean, q_log_std, p_mean, p_log_std).flatten(1).sum(1)
            ratio = (log_normal(z, p_mean, p_log_std) - log_normal(z, q_mean, q_log_std)).flatten(1).sum(1)
        h = h + more + self.enter(z)
        return h + self.after(h), kl, ratio


class VAE(nn.Module):
    """`dtype` is that of the convolutions where an image is given; the speed plan sets it, it is no part of the model. Densities are in float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32
        C, H, W = config.shape
        sizes = [(H, W)]
        for _ in config.blocks[1:]:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        self.sizes = sizes[::-1]  # coarsest first, as blocks
        width, total = config.width, sum(config.blocks)
        scale = 1 / math.sqrt(total)
        self.enter = nn.Conv2d(C, width, 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.ModuleList(branch(width, config.inner, width, size, scale) for _ in range(n)) for size, n in zip(sizes, config.blocks[::-1], strict=True)
        )
        self.constant = nn.Parameter(torch.zeros(1, width, *self.sizes[0]))
        self.places = nn.ParameterList(nn.Parameter(torch.zeros(1, width, *size)) for size in self.sizes[1:])
        self.blocks = nn.ModuleList(nn.ModuleList(Block(config, size, scale) for _ in range(n)) for size, n in zip(self.sizes, config.blocks, strict=True))
        outputs = C * (config.levels if config.pixels == "categorical" else 3 * config.mixtures)
        self.leave = nn.Conv2d(width, outputs, 1)
        self.dropout = nn.Dropout2d(config.drop)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of x (B, C, H, W) at each size, the coarsest first."""
        h, found = self.enter(x).to(x.dtype), []
        for i, stage in enumerate(self.encoder):
            if i:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            for layer in stage.children():
                h = h + layer(h)
            found.append(h)
        return found[::-1]

    def noise(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """A standard normal number for every latent."""
        shapes = [(count, self.config.latent, *size) for size, n in zip(self.sizes, self.config.blocks, strict=True) for _ in range(n)]
        return [torch.randn(shape, generator=generator).to(self.constant.device) for shape in shapes]

    def generate(self, seen: list[Tensor] | None, noise: list[Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(log-odds (B, C, L, H, W), KL of each block (blocks, B), ln p(z) - ln q(z) (B,))."""
        count, drawn = len(noise[0]), iter(noise)
        h, kls, ratios = self.constant.repeat(count, 1, 1, 1), [], torch.zeros(count, device=noise[0].device)
        for i, stage in enumerate(self.blocks):
            if i:
                h = F.interpolate(h, size=self.sizes[i]) + self.places[i - 1]
            for block in stage.children():
                h, kl, ratio = block(h, None if seen is None else seen[i], next(drawn), temperature)
                kls.append(kl)
                ratios = ratios + ratio
        return log_odds(self.leave(self.dropout(F.gelu(h))).to(h.dtype), self.config), torch.stack(kls), ratios

    def forward(self, pixels: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ln P(x | z) (B,), KL of each block (blocks, B), ln p(z) - ln q(z) (B,)) of levels (B, C, H, W) uint8 at one draw of the latents."""
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            odds, kls, ratio = self.generate(self.encode(images.scale(pixels, self.config.levels)), list(noise))
        return odds.gather(2, pixels.long().unsqueeze(2)).flatten(1).sum(1), kls, ratio


# -- likelihood and samples --------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: VAE, data: images.Images, generator: torch.Generator, draws: int = 1, rows: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits per dimension (N,) by the ELBO, averaged over draws of the latents, and by IWAE with all of them; and the mean KL of each block in nats."""
    scale = math.prod(model.config.shape) * math.log(2)
    device = next(model.parameters()).device
    bounds, tight, kls = [], [], []
    for part in torch.from_numpy(data.pixels).to(device).split(rows):
        found = [model(part, *model.noise(len(part), generator)) for _ in range(draws)]
        bounds.append(torch.stack([told - kl.sum(0) for told, kl, _ in found]).double().mean(0))
        tight.append(importance(torch.stack([told + ratio for told, _, ratio in found]).double()))
        kls.append(torch.stack([kl for _, kl, _ in found]).double().mean(0))
    elbo, iwae, kl = -torch.cat(bounds) / scale, -torch.cat(tight) / scale, torch.cat(kls, 1).mean(1)
    return elbo.cpu().numpy(), iwae.cpu().numpy(), kl.cpu().numpy()


@torch.no_grad()
def sample(model: VAE, count: int, generator: torch.Generator, temperature: float = 1.0, rows: int = 500) -> Tensor:
    """Images (count, C, H, W) uint8: latents of the priors with so many standard deviations, and levels by their odds."""
    found = []
    for i in range(0, count, rows):
        odds = model.generate(None, model.noise(min(rows, count - i), generator), temperature)[0].cpu().movedim(2, -1)  # (B, C, H, W, L)
        found.append(torch.multinomial(odds.exp().flatten(0, 3), 1, generator=generator).view(odds.shape[:4]).to(torch.uint8))
    return torch.cat(found)


# -- training ------------------------------------------------------------------------------------------------------------------------------------------


def build(config: Config) -> VAE:
    return VAE(config)


def example(config: Config) -> tuple[Tensor, ...]:
    """Two images and the noise of their latents for the module to answer, when it is shared."""
    return torch.zeros(2, *config.shape, dtype=torch.uint8), *VAE(config).noise(2, torch.Generator())


@dataclass
class State:
    model: VAE
    optimizer: torch.optim.Optimizer
    ema: EMA
    divergence: Divergence
    generator: torch.Generator  # draws batches and noise: the position in the data
    data: str  # digest of the images
    skipped: int = 0  # steps left out for their gradient
    iteration: int = 0


def train(config: Config, run: Run) -> VAE:
    data, held_out = load(config)
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"vae {config.blocks} {config.width} {config.inner} {config.latent} {config.pixels} {config.shape} {config.batch}",
        asked={"dtype": ("bfloat16",)},  # not measured: densities are what this is for, and the last digits of one are lost
        dtype=("float32",),
        threads=thread_counts(),
    )
    model, device, digest = prepare(build(config), plan), plan["device"], data.digest()
    work = flops(model)  # dropout draws from the generators that the next lines bring back
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    state = run.restore(State(model, optimizer, EMA(model, (config.ema, *config.ema_beside)), Divergence(), torch.Generator().manual_seed(config.seed), digest))
    if state.data != digest:
        raise RunError(f"data {config.data}: the images are not those this run was begun with (sha-256 {state.data}…, now {digest}…); put them back")
    scale = math.prod(config.shape) * math.log(2)

    for state.iteration in run.steps(state.iteration, config.steps):
        for group in state.optimizer.param_groups:
            group["lr"] = config.lr * schedules.factor(config.schedule, state.iteration, config.steps, config.warmup, config.decay)
        pixels = images.batch(data, config.batch, state.generator)[0].to(device)
        weight = min(1.0, state.iteration / config.kl_warmup) if config.kl_warmup else 1.0
        told, kl = torch.zeros((), device=device), torch.zeros((), device=device)
        for some, *noise in zip(*(z.chunk(config.accumulate) for z in (pixels, *model.noise(config.batch, state.generator))), strict=True):
            part_told, kls, _ = model(some, *noise)
            share, part_told, part_kl = len(some) / config.batch, part_told.mean(), kls.sum(0).mean()
            ((weight * part_kl - part_told) * share).backward()
            told, kl = told + part_told.detach() * share, kl + part_kl.detach() * share
        bpd = (kl - told) / scale
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        run.finite(loss=bpd, grad_norm=grad_norm)
        if grad_norm <= config.skip_grad_norm:
            if state.iteration > config.kl_warmup:  # before, the loss is another one in every step
                state.divergence.check(bpd.item(), state.iteration, "lower --lr, or give a longer --warmup or a smaller --skip_grad_norm")
            state.optimizer.step()
            state.ema.update()
        else:
            state.skipped += 1
        state.optimizer.zero_grad()
        last = state.iteration == config.steps
        evaluated: dict[str, float] = {}
        if last or state.iteration % config.eval_every == 0:
            grid = run.media / f"samples-{state.iteration:08}.png"
            evaluated = state.ema.compare(functools.partial(validate, model, data, held_out), grid)
        if last:
            state.ema.keep(config.ema)
        seen = state.iteration * config.batch
        run.log(state.iteration, flops=work * config.batch, loss=bpd, kl=kl / scale, grad_norm=grad_norm, images=seen, skipped=state.skipped, **evaluated)
        run.checkpoint(state)
    model.eval()
    return model


def load(config: Config) -> tuple[images.Images, images.Images]:
    """(what to train on, what to evaluate on)."""
    return images.load(config.data, config.embedded, config.shape, config.levels, None, config.held_out)


def prepare(model: VAE, choice: dict) -> VAE:
    """The model on its device, computing as the speed plan says."""
    model.dtype = getattr(torch, choice["dtype"])
    return model.to(choice["device"])


def trial(config: Config, choice: dict) -> Callable[[], None]:
    """A forward and a backward pass of a quarter of a batch under a choice of the speed plan."""
    model, count = prepare(build(config), choice), -(-config.batch // 4)
    pixels = torch.zeros(count, *config.shape, dtype=torch.uint8, device=choice["device"])
    noise = model.noise(count, torch.Generator())

    def work() -> None:
        told, kls, _ = model(pixels, *noise)
        (kls.sum(0) - told).mean().backward()

    return work


def flops(model: VAE) -> float:
    """Floating point operations of a step for each image: forward, and twice that backward."""
    pixels = torch.zeros(1, *model.config.shape, dtype=torch.uint8, device=model.constant.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, *model.noise(1, torch.Generator()))
    return 3.0 * counter.get_total_flops()


def validate(model: VAE, data: images.Images, held_out: images.Images, grid: Path) -> dict[str, float]:
    """Bits per dimension of the held-out images and FID of samples, a hundred of which go to the file `grid`."""
    config, generator = model.config, torch.Generator().manual_seed(model.config.seed)
    model.eval()
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator)[0])
    pixels = sample(model, config.eval_samples, generator, config.temperature).numpy()
    model.train()
    images.write_grid(grid, pixels[:100], config.levels, columns=10)
    return {"val_bpd": bpd, "val_bpd_se": bpd_se} | fid.columns(pixels, data, held_out)


def evaluate(
    model: VAE,
    config: Config,
    *,
    media: Path | None = None,
    samples: int = 500,
    temperature: float | None = None,
    draws: int = 64,
    seed: int = 0,
    baselines: bool = True,
) -> dict[str, float | int | str]:
    """Bits per dimension (bpd by IWAE, elbo_bpd by the ELBO) and FID on the held-out images with standard errors, beside those of plain models.

    samples: images for FID, also written to media/samples.png. temperature: none: the config's. draws: of the latents for each image, IWAE's K. baselines:
    also the bits of a histogram of each pixel and of a PCA-Gaussian, and the FID of training images as many as held-out ones.
    Raises UsageError naming an option that is out of range.
    """
    warm = config.temperature if temperature is None else temperature
    for name, value, least in (("samples", samples, 2), ("draws", draws, 1), ("temperature", warm, 0)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    data, held_out = load(config)
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    elbo, iwae, kl = score(model, held_out, generator, draws)
    (bpd, bpd_se), (bound, bound_se) = likelihood.mean_and_error(iwae), likelihood.mean_and_error(elbo)
    pixels = sample(model, samples, generator, warm).numpy()
    if media is not None:
        images.write_grid(media / "samples.png", pixels[:100], config.levels, columns=10)
    results: dict[str, float | int | str] = {"images": len(held_out), "bpd": bpd, "bpd_se": bpd_se, "elbo_bpd": bound, "elbo_bpd_se": bound_se}
    results |= {"kl_bpd": float(kl.sum()) / math.prod(config.shape) / math.log(2), "blocks_in_use": int((kl > IN_USE).sum()), "blocks": len(kl)}
    results |= fid.columns(pixels, data, held_out, generator if baselines else None) | (likelihood.baselines(data, held_out) if baselines else {})
    return results
