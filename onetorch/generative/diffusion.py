"""Diffusion and flow matching on images: a network that takes noise away, by three objectives, four samplers and two backbones.

Noise is added along a path x_t = alpha(t) x_0 + sigma(t) eps from the image (t = 0) to noise (t = 1), and the network predicts from x_t and t

    epsilon   eps                          alpha = cos(pi t / 2), sigma = sin(pi t / 2)      Ho et al. 2020; Nichol & Dhariwal 2021
    v         alpha eps - sigma x_0        the same path                                     Salimans & Ho 2022
    flow      eps - x_0 = dx/dt            alpha = 1 - t, sigma = t                          Lipman et al. 2023; Liu et al. 2023

Each of them gives both x_0 and eps, so that samplers and likelihood (paths.py) need not know which was learned:

    ancestral   x_s ~ q(x_s | x_t, x_0): noise at every step (Ho et al. 2020; for any path Kingma et al. 2021)
    ddim        x_s = alpha_s x_0 + sigma_s eps: none (Song, Meng & Ermon 2021)
    euler, heun the differential equation dx/dt = alpha' x_0 + sigma' eps by its method of first or second order (Song et al. 2021; Karras et al. 2022)

Bits per dimension are those of the variational bound (Kingma et al. 2021), and in `evaluate` with `flow_steps` also those of the differential equation.

| symbol   | shape        | meaning                                                             |
|----------|--------------|---------------------------------------------------------------------|
| x, eps   | (B, C, H, W) | an image between -1 and 1 with noise, and the noise                  |
| t        | (B,)         | how far along the path                                              |
| labels   | (B,)         | classes; the number of classes itself stands for none               |

Labels are left out at random in training, so that the network knows both the images of a class and all of them (Ho & Salimans 2021): with guidance w a
sample follows out + (w - 1) (out - out without label). The networks are in denoisers.py; the matrices of the transformer's blocks are trained by Muon (Jordan
et al. 2024).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from onetorch.generative import fid, images, likelihood, paths, precision, schedules
from onetorch.generative.denoisers import Transformer, UNet
from onetorch.generative.divergence import Divergence
from onetorch.generative.ema import EMA
from onetorch.generative.precision import LossScale
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.plan import thread_counts
from onetorch.runs.run import Run

Sampler = Literal["ancestral", "ddim", "euler", "heun"]


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # .npy, .npz, a folder of images or hf:NAME; none: the embedded ones
    embedded: Literal["digits", "glyphs"] = "digits"  # scikit-learn's digits, or characters in the fonts of matplotlib
    shape: tuple[int, int, int] = (1, 8, 8)  # channels, height and width of an image
    levels: int = 17  # values that a pixel may have
    classes: int = 10  # labels that the network is told; 0: none
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last fifth; or, to choose settings, on another that is not trained on either
    seed: int = 0  # of weights, batches and noise
    steps: int = 400  # optimizer steps
    batch: int = 128  # images in a step
    accumulate: int = 1  # parts that a batch is computed in, one after the other: the same gradient with less memory
    objective: Literal["epsilon", "v", "flow"] = "flow"  # what the network predicts, and the path
    backbone: Literal["transformer", "unet"] = "transformer"  # the network
    width: int = 192  # of the transformer's stream, or channels of the U-Net's first stage
    depth: int = 3  # blocks of the transformer; of each stage of the U-Net
    heads: int = 4  # of attention
    patch: int = 4  # pixels that a token of the transformer is wide and high
    stages: tuple[int, ...] = (1, 2, 2)  # the U-Net's channels at each halving of the image, in units of width
    drop_label: float = 0.15  # how often in training a label is left out
    lr: float = 1e-2  # AdamW's step size
    lr_matrix: float = 0.02  # Muon's step size: matrices of the transformer's blocks
    weight_decay: float = 0.0  # of both
    warmup: int = 20  # steps in which the rates rise from zero
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"  # course of the rates after the warm-up; wsd: constant, at last a line down
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rates of wsd fall to zero; 0: they stay
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    ema: float = 0.99  # rate of the weights' moving average, which samples and ends the run
    ema_beside: tuple[float, ...] = ()  # more rates, whose averages are evaluated beside it
    sampler: Sampler = "heun"  # of samples while training and in the end
    sample_steps: int = 10  # steps of the sampler
    guidance: float = 1.0  # w: above 1 samples are more like their class, and like each other
    eval_every: int = 200  # steps between two evaluations
    eval_samples: int = 400  # images sampled in them, of the averaged weights and of the raw ones
    eval_share: float = 0.2  # of the arithmetic between two evaluations, for their samples: where it does not suffice, they are fewer (but 50 of each)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "width", "depth", "heads", "patch", "sample_steps", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("classes", "warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "lr_matrix", "max_grad_norm", "eval_share"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.drop_label < 1:
            raise ValueError(f"drop_label must be at least 0 and below 1, got {self.drop_label}")
        rates = (self.ema, *self.ema_beside)
        if not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"ema and ema_beside must be different rates of at least 0 and below 1, got {self.ema} and {self.ema_beside}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be 0 to 1, got {self.decay}")
        if self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be channels (1 or 3), height and width, got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must be 2 to 256, got {self.levels}")
        if self.eval_samples < 3:
            raise ValueError(f"eval_samples must be at least 3, got {self.eval_samples}")
        if self.guidance < 0 or (self.guidance != 1 and not self.classes):
            raise ValueError(f"guidance must be at least 0, and 1 without classes, got {self.guidance}")
        if self.backbone == "transformer" and (self.shape[1] % self.patch or self.shape[2] % self.patch):
            raise ValueError(f"patch must divide height and width {self.shape[1:]}, got {self.patch}")
        if self.backbone == "transformer" and self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")
        if not self.stages or min(self.stages) < 1 or (self.backbone == "unet" and any(side % 2 ** (len(self.stages) - 1) for side in self.shape[1:])):
            raise ValueError(f"stages must be positive, and height and width {self.shape[1:]} even at every halving, got {self.stages}")
        if self.backbone == "unet" and (self.width % 8 or self.width * self.stages[-1] % self.heads):
            raise ValueError(f"width must be a multiple of 8, and by the last stage one of heads = {self.heads}, got {self.width}")


# -- the model -------------------------------------------------------------------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """The network, and how to ask it. `dtype` of the arithmetic, `sdpa` and `layout` are the speed plan's and no part of the model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype, self.sdpa, self.layout = config, torch.float32, False, torch.contiguous_format
        self.net: Transformer | UNet
        if config.backbone == "transformer":
            self.net = Transformer(config.shape, config.classes, config.width, config.depth, config.heads, config.patch)
        else:
            self.net = UNet(config.shape[0], config.classes, config.width, config.stages, config.depth, config.heads)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The objective's prediction (B, C, H, W) float32 at x (B, C, H, W), times t (B,), labels (B,) int64 (`classes` stands for none)."""
        return self.net(x.contiguous(memory_format=self.layout), t, labels, self.dtype, self.sdpa).float()

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """x_0 as the network sees it from x at time t (), with guidance."""
        times = t.expand(len(x))
        out = self(x, times, labels)
        if guidance != 1:
            out = torch.lerp(self(x, times, torch.full_like(labels, self.config.classes)), out, guidance)
        return paths.clean(self.config.objective, out, x, *paths.path(self.config.objective, t))


# -- sampling ------------------------------------------------------------------------------------------------------------------------------------------


def sample(
    model: Diffusion, labels: Tensor, generator: torch.Generator, sampler: Sampler = "heun", steps: int = 20, guidance: float = 1.0, rows: int = 250
) -> Tensor:
    """Images (N, C, H, W) uint8 of the classes `labels` (N,) int64, of which `classes` stands for any; x_0 is kept between -1 and 1."""
    config, device, found = model.config, next(model.parameters()).device, []
    for part in labels.to(device).split(rows):

        def denoise(x: Tensor, t: Tensor, part: Tensor = part) -> Tensor:
            return model.denoise(x, t, part, guidance).clamp(-1, 1)

        noise = torch.randn(len(part), *config.shape, generator=generator).to(device)
        x = paths.solve(denoise, noise, config.objective, sampler, steps, generator)
        found.append(images.quantize(x.cpu(), config.levels))
    return torch.cat(found)


# -- likelihood ----------------------------------------------------------------------------------------------------------------------------------------


def score(
    model: Diffusion,
    data: images.Images,
    generator: torch.Generator,
    count: int | None = None,
    times: int = 32,
    flow_steps: int = 0,
    probes: int = 1,
) -> np.ndarray:
    """Bits per dimension (N,) of the images, or of `count` of them, evenly spread: those of a model that is told no labels.

    By the variational bound with `times` draws for each image; with `flow_steps` by the probability flow in so many steps and with so many random vectors.
    """
    device, config = next(model.parameters()).device, model.config
    index = np.arange(len(data)) if count is None or count >= len(data) else np.linspace(0, len(data) - 1, count).round().astype(np.int64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out = model(x, t.flatten(), torch.full((len(x),), config.classes, device=device))
        return paths.clean(config.objective, out, x, *paths.path(config.objective, t)).clamp(-1, 1)

    found = []
    for i in np.array_split(index, max(1, len(index) // 250)):
        pixels = torch.from_numpy(data.pixels[i]).to(device)
        if flow_steps:
            found.append(paths.flow_bits(denoise, pixels, config.levels, config.objective, generator, flow_steps, probes))
        else:
            found.append(paths.bits(denoise, pixels, config.levels, config.objective, generator, times))
    return torch.cat(found).double().cpu().numpy()


# -- training ------------------------------------------------------------------------------------------------------------------------------------------


def build(config: Config) -> Diffusion:
    return Diffusion(config)


def example(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy images, times and labels for the module to answer, when it is shared."""
    return torch.randn(2, *config.shape), torch.tensor([0.3, 0.8]), torch.tensor([0, config.classes])


def losses(model: Diffusion, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error (B,) of the prediction at x_t."""
    alpha, sigma = paths.path(model.config.objective, t[:, None, None, None])
    out = model(alpha * x0 + sigma * eps, t, labels)
    return (out - paths.target(model.config.objective, x0, eps, alpha, sigma)).square().flatten(1).mean(1)


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
    divergence: Divergence
    scale: LossScale
    generator: torch.Generator  # draws batches, times and noise: the position in the data
    data: str  # digest of the images
    iteration: int = 0


def train(config: Config, run: Run) -> Diffusion:
    data, held_out = load(config)
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"diffusion {config.backbone} {config.width} {config.depth} {config.patch} {config.stages} {config.shape} {config.batch}",
        asked={"dtype": precision.ASKED if config.backbone == "transformer" else ("float16",)},
        dtype=precision.kinds(),
        threads=thread_counts(),
        attention=("explicit", "sdpa"),
        layout=("contiguous_format", "channels_last") if config.backbone == "unet" else ("contiguous_format",),
    )
    model, device = prepare(build(config), plan), plan["device"]
    digest, generator, ema = data.digest(), torch.Generator().manual_seed(config.seed), EMA(model, (config.ema, *config.ema_beside))
    state = run.restore(State(model, optimizers(model, config), ema, Divergence(), LossScale(plan["dtype"]), generator, digest))
    if state.data != digest:
        raise RunError(f"data {config.data}: the images are not those this run was begun with (sha-256 {state.data}…, now {digest}…); put them back")
    work = flops(model)

    for state.iteration in run.steps(state.iteration, config.steps):
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                kind: schedules.Kind = config.schedule if config.decay or config.schedule != "wsd" else "constant"
                group["lr"] = group["rate"] * schedules.factor(kind, state.iteration, config.steps, config.warmup, config.decay)
        x0, t, eps, labels = (z.to(device) for z in draw(data, config, state.generator))
        run.phase("batch")
        loss = torch.zeros((), device=device)
        for part in zip(*(z.chunk(config.accumulate) for z in (x0, t, eps, labels)), strict=True):
            share = losses(model, *part).mean() * (len(part[0]) / config.batch)
            (share * state.scale.factor).backward()
            loss += share.detach()
        state.scale.undo(model)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        taken = state.scale.take(grad_norm)
        run.finite(loss=loss, grad_norm=grad_norm if taken else 0.0)
        state.divergence.check(loss.item(), state.iteration, "lower --lr and --lr_matrix, or give a longer --warmup or a smaller --max_grad_norm")
        run.phase("gradient")
        for optimizer in state.optimizers:
            if taken:
                optimizer.step()
            optimizer.zero_grad()
        state.ema.update()
        run.phase("update")
        last = state.iteration == config.steps
        evaluated: dict[str, float] = {}
        if last or state.iteration % config.eval_every == 0:
            grid = run.media / f"samples-{state.iteration:08}.png"
            evaluated = state.ema.compare(functools.partial(validate, model, data, held_out), grid)
        if last:
            state.ema.keep(config.ema)
        run.phase("evaluation")
        seen, norm = state.iteration * config.batch, grad_norm if taken else None
        run.log(state.iteration, flops=work * config.batch, loss=loss, grad_norm=norm, images=seen, **evaluated)
        run.checkpoint(state)
        run.phase("logging")
    return model


def load(config: Config) -> tuple[images.Images, images.Images]:
    """(what to train on, what to evaluate on)."""
    return images.load(config.data, config.embedded, config.shape, config.levels, config.classes, config.held_out)


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
    model.dtype, model.sdpa = precision.dtype(choice["dtype"]), choice["attention"] == "sdpa"
    if choice["dtype"] == "float8":
        precision.to_float8(model.net.blocks)  # type: ignore[arg-type]
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


def affordable(config: Config) -> int:
    """Images that an evaluation samples of each weights, so that all take `eval_share` of the arithmetic of the steps since the last one at most."""
    asked = config.sample_steps * (2 if config.sampler == "heun" else 1) * (2 if config.guidance != 1 else 1)  # times that the network sees an image
    trained = 3 * config.eval_every * config.batch  # a step's backward pass is as much work as two times forward
    return min(config.eval_samples, max(50, int(config.eval_share * trained / asked / (2 + len(config.ema_beside)))))


def validate(model: Diffusion, data: images.Images, held_out: images.Images, grid: Path) -> dict[str, float]:
    """Bits per dimension of up to 250 held-out images and FID of samples, a hundred of which go to the file `grid`."""
    config, generator = model.config, torch.Generator().manual_seed(model.config.seed)
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator, count=250, times=8))
    labels = drawn_labels(data, config.classes, affordable(config), generator)
    pixels = sample(model, labels, generator, config.sampler, config.sample_steps, config.guidance).numpy()
    images.write_grid(grid, pixels[:100], config.levels, columns=10)
    return {"val_bpd": bpd, "val_bpd_se": bpd_se} | fid.columns(pixels, data, held_out)


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
    flow_steps: int = 0,
    probes: int = 1,
    seed: int = 0,
    baselines: bool = True,
) -> dict[str, float | int | str]:
    """Bits per dimension and FID on the held-out images with standard errors, beside those of plain models; samples to media/samples.png.

    samples: images for FID. sampler, sample_steps, guidance: none: the config's. times: draws of the bound's integral for each image. flow_steps: also
    flow_bpd, the bits of the probability flow, integrated in so many steps (on the digits 25 come within 0.003 of what 100 give). probes: random vectors for
    its trace; 0: exactly, by as many derivatives as an image has pixels. baselines: also the bits of a histogram of each pixel and of a PCA-Gaussian, and the
    FID of training images.
    Raises UsageError naming an option that is out of range.
    """
    steps, w = sample_steps or config.sample_steps, config.guidance if guidance is None else guidance
    least = {"samples": (samples, 2), "sample_steps": (steps, 1), "times": (times, 1), "flow_steps": (flow_steps, 0), "probes": (probes, 0), "guidance": (w, 0)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise UsageError(f"{name} must be at least {lowest}, got {value}")
    if w != 1 and not config.classes:
        raise UsageError(f"guidance needs a model that is told labels; this one has no classes, got {w}")
    data, held_out = load(config)
    generator = torch.Generator().manual_seed(seed)
    bpd, bpd_se = likelihood.mean_and_error(score(model, held_out, generator, times=times))
    pixels = sample(model, drawn_labels(data, config.classes, samples, generator), generator, sampler or config.sampler, steps, w).numpy()
    results: dict[str, float | int | str] = {"bpd": bpd, "bpd_se": bpd_se}
    if flow_steps:
        flow = score(model, held_out, generator, flow_steps=flow_steps, probes=probes)
        results["flow_bpd"], results["flow_bpd_se"] = likelihood.mean_and_error(flow)
    results |= fid.columns(pixels, data, held_out, generator if baselines else None) | (likelihood.baselines(data, held_out) if baselines else {})
    results |= {"images": len(held_out), "samples": samples, "parameters": sum(p.numel() for p in model.parameters())}
    if media is not None:
        images.write_grid(media / "samples.png", pixels[:100], config.levels, columns=10)
    return results
