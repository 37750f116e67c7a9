"""GPT on bytes: a decoder-only transformer that predicts the next byte of any text.

The model is that of Radford et al. (2019) with what has proved quick to train since: rotary positions (Su et al. 2021), normalized queries and keys (Henry
et al. 2020), squared ReLU (So et al. 2021), layer norms without gain, output projections that begin at zero, and embeddings of hashed byte n-grams beside
those of single bytes (as in Clark et al. 2022). Matrices are trained by Muon (Jordan et al. 2024), which makes the update orthogonal, embeddings and head
by Adam; the rate is constant and then falls linearly to zero (Zhai et al. 2022). Weights are float32; the arithmetic may be bfloat16.

| symbol | shape     | meaning                                     |
|--------|-----------|---------------------------------------------|
| B      |           | windows in a batch                          |
| T      |           | bytes of context                            |
| C      |           | width of the residual stream                |
| H, D   |           | heads and their width, H D = C              |
| x      | (B, T, C) | residual stream                             |
| q k v  | (B,H,T,D) | queries, keys, values                       |
| loss   |           | nats per byte; bits per byte = loss / ln 2  |
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.generative import data, ngram, sampling
from onetorch.runs import provenance
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.run import Run

BYTES = 256


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # a text file or a folder of text files; none: the source of Python's standard library
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last tenth; or, to choose settings, on the tenth before it, untrained too
    seed: int = 0  # of weights and batches
    steps: int = 1000  # optimizer steps
    batch: int = 16  # windows in a step
    context: int = 256  # bytes in a window
    layers: int = 2  # transformer blocks
    heads: int = 3  # attention heads in a block
    width: int = 192  # of the residual stream; a multiple of 2 * heads
    ngram_orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # lengths of the byte n-grams that are embedded too
    ngram_rows: int = 131_072  # rows of the table of hashed n-grams, shared by all orders
    ngram_width: int = 32  # columns of it
    rotary_base: float = 1000.0  # longest wavelength of the rotary positions, in units of 2 pi bytes
    lr_matrix: float = 0.04  # Muon's step size: matrices of the blocks
    lr_embedding: float = 0.1  # Adam's step size: embeddings
    lr_head: float = 0.01  # Adam's step size: output layer
    momentum: float = 0.9  # Muon's
    warmup: int = 5  # steps in which the rates rise from zero
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rates fall to zero
    eval_every: int = 200  # steps between two evaluations
    eval_windows: int = 64  # windows in them; the evaluation after training takes all

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "layers", "heads", "width", "ngram_rows", "ngram_width", "warmup", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}")
        for name in ("lr_matrix", "lr_embedding", "lr_head"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not all(2 <= n <= 6 for n in self.ngram_orders):
            raise ValueError(f"ngram_orders must lie in 2 to 6, got {self.ngram_orders}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}")
        if self.eval_windows < 2:
            raise ValueError(f"eval_windows must be at least 2, got {self.eval_windows}")


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])  # without gain; on a CPU faster than RMSNorm, and as good here


class Linear(nn.Linear):
    """A matrix kept in float32 and applied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, scale: float = 0.7) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=scale / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.qkv, self.out = Linear(C, 3 * C), Linear(C, C, scale=0.0)
        self.up, self.down = Linear(C, 4 * C), Linear(4 * C, C, scale=0.0)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor, sdpa: bool) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k = rotate(norm(qkv[:, :, :2]), rotary).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        v = qkv[:, :, 2].transpose(1, 2)
        scale = 1.4 / math.sqrt(q.size(-1))  # normalized queries cannot grow, so attention must be able to be sharp from the start
        if sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            y = torch.softmax(q @ (k * scale).transpose(-2, -1) + mask, dim=-1) @ v  # scores (B, H, T, T)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square())


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of (B, T, 2, H, D) by its position's angle; rotary holds cos and sin, (2, T, 1, 1, D)."""
    return torch.addcmul(x * rotary[0], x.roll(x.size(-1) // 2, -1), rotary[1])


class GPT(nn.Module):
    """Logits of the next byte. `dtype` is that of the arithmetic and `sdpa` the attention's path; the speed plan sets both, they are no part of the model."""

    rotary: Tensor  # (2, context, 1, 1, D)
    mask: Tensor  # (context, context)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype, self.sdpa = config, torch.float32, False
        self.bytes = nn.Embedding(BYTES, config.width)
        self.ngrams = nn.Embedding(config.ngram_rows, config.ngram_width)
        nn.init.normal_(self.ngrams.weight, std=0.02)
        self.mix = Linear(config.ngram_width, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Linear(config.width, BYTES, scale=0.0)
        D = config.width // config.heads
        angle = torch.arange(config.context)[:, None] * config.rotary_base ** -(torch.arange(D // 2) * 2 / D)  # (T, D / 2)
        cos_sin = torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], 1)])  # (2, T, D)
        self.register_buffer("rotary", cos_sin[:, :, None, None], persistent=False)
        self.register_buffer("mask", torch.full((config.context, config.context), float("-inf")).triu(1), persistent=False)

    def hashed(self, tokens: Tensor) -> Tensor:
        """Rows (B, T, len(orders)) of the table for the n-grams that end at each byte; a window begins as after bytes of a kind of their own."""
        key, rows = tokens + 1, []
        for n in range(2, max(self.config.ngram_orders, default=1) + 1):
            key = key * (BYTES + 1) + F.pad(tokens + 1, (n - 1, 0))[:, : tokens.size(1)]
            if n in self.config.ngram_orders:
                rows.append((key * 0x9E3779B97F4A7C1 >> 20) % self.config.ngram_rows)  # multiplicative hashing; the product wraps
        return torch.stack(rows, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 256) float32 of the byte after each of tokens (B, T) int64, T at most the context."""
        T = tokens.size(1)
        x = self.bytes(tokens).to(self.dtype)  # (B, T, C)
        if self.config.ngram_orders:
            x = x + self.mix(self.ngrams(self.hashed(tokens)).sum(2).to(self.dtype))
        rotary, mask = self.rotary[:, :T].to(self.dtype), self.mask[:T, :T].to(self.dtype)
        x = norm(x)
        for block in self.blocks:
            x = block(x, rotary, mask, self.sdpa)
        return self.head(norm(x)).float()


def nll(model: GPT, window: Tensor) -> Tensor:
    """-ln p (B, T) of each byte of window (B, T + 1) but the first, given those before it in the window."""
    logits = model(window[:, :-1])  # (B, T, 256)
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none").view(logits.shape[:2])


def build(config: Config) -> GPT:
    return GPT(config)


def example(config: Config) -> Tensor:
    """A window of bytes (1, T) for the module to answer, when it is shared."""
    return torch.randint(BYTES, (1, min(32, config.context)))


def optimizers(model: GPT, config: Config) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for the rest; `rate` is what the schedule's factor is applied to."""
    matrices = {"params": model.blocks.parameters(), "rate": config.lr_matrix}
    tables = {"params": [model.bytes.weight, model.ngrams.weight], "rate": config.lr_embedding}
    dense = {"params": [model.head.weight, model.mix.weight], "rate": config.lr_head}
    muon = torch.optim.Muon([matrices], momentum=config.momentum, weight_decay=0.0)
    return muon, torch.optim.AdamW([tables, dense], betas=(0.8, 0.95), weight_decay=0.0, fused=True)


def schedule(step: int, config: Config) -> float:
    """The factor of all rates in step 1 … steps: up in `warmup` steps, constant, down to zero just after the last."""
    return min(1.0, step / config.warmup, (config.steps + 1 - step) / (config.decay * config.steps))


@dataclass
class State:
    model: GPT
    muon: torch.optim.Optimizer
    adam: torch.optim.Optimizer
    generator: torch.Generator  # draws the batches: the position in the data
    text: str  # digest of the text
    iteration: int = 0


def train(config: Config, run: Run) -> GPT:
    text = data.read(config.data)
    train_text, held_out = data.parts(text, config.context, config.held_out, config.data)
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"gpt {config.layers} {config.heads} {config.width} {config.context} {config.batch} {config.ngram_rows}",
        dtype=("float32", "bfloat16"),
        threads=tuple(n for n in (1, 2, 4) if n <= provenance.cores()),
        attention=("explicit", "sdpa"),
    )
    model = prepare(build(config), plan)
    muon, adam = optimizers(model, config)
    digest = data.digest(text)
    state = run.restore(State(model, muon, adam, torch.Generator().manual_seed(config.seed), digest))
    if state.text != digest:
        raise RunError(f"data {config.data}: the text is not the one this run was begun with (sha-256 {state.text}…, now {digest}…); put it back")

    for state.iteration in run.steps(state.iteration, config.steps):
        for group in muon.param_groups + adam.param_groups:
            group["lr"] = group["rate"] * schedule(state.iteration, config)
        window = data.batch(train_text, config.batch, config.context, state.generator).to(plan["device"])
        loss = nll(model, window).mean()
        loss.backward()
        grad_norm = nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        run.finite(loss=loss, grad_norm=grad_norm)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        evaluated: dict[str, float] = {}
        if state.iteration % config.eval_every == 0 or state.iteration == config.steps:
            val_loss, val_se, _ = score(model, held_out, config.eval_windows)
            evaluated = {"val_loss": val_loss, "val_bpb": val_loss / math.log(2), "val_bpb_se": val_se / math.log(2)}
        run.log(state.iteration, loss=loss, grad_norm=grad_norm, **evaluated)
        run.checkpoint(state)
    return model


def prepare(model: GPT, choice: dict) -> GPT:
    """The model on its device, computing as the speed plan says."""
    model.dtype, model.sdpa = getattr(torch, choice["dtype"]), choice["attention"] == "sdpa"
    return model.to(choice["device"])


def trial(config: Config, choice: dict):
    """A forward and a backward pass of a quarter of a batch under a choice of the speed plan."""
    model = prepare(build(config), choice)
    window = torch.randint(BYTES, (-(-config.batch // 4), config.context + 1), device=choice["device"])
    return lambda: nll(model, window).mean().backward()


@torch.no_grad()
def score(model: GPT, text: data.Text, count: int | None = None) -> tuple[float, float, int]:
    """(loss, its standard error, bytes predicted) over the text's windows, or over `count` of them, evenly spread; nats per byte.

    The error is that of batch means: windows are taken together in up to 40 runs of neighbours, whose likeness a window's own variance would hide.
    """
    device = model.head.weight.device
    losses = [nll(model, w.to(device)).double().cpu() for w in data.windows(text, model.config.context, count=count)]
    means = np.concatenate([x.mean(1).numpy() for x in losses])
    sizes = np.concatenate([np.full(len(x), float(x.size(1))) for x in losses])
    return float(means @ sizes / sizes.sum()), data.block_standard_error(means, sizes), int(sizes.sum())


@torch.no_grad()
def generate(model: GPT, prompt: bytes, length: int, generator: torch.Generator, rows: int = 1, temperature: float = 1.0, top_k: int = 0) -> list[bytes]:
    """`rows` continuations of `prompt` (one byte at least) by `length` bytes, each returned with the prompt before it."""
    if not prompt:
        raise ValueError("prompt must hold at least one byte, got none")
    device = model.head.weight.device
    tokens = torch.tensor(list(prompt), device=device).repeat(rows, 1)  # (rows, bytes so far)
    for _ in range(length):
        logits = model(tokens[:, -model.config.context :])[:, -1]  # (rows, 256)
        tokens = torch.cat([tokens, sampling.sample(logits.cpu(), generator, temperature, top_k).to(device)[:, None]], 1)
    return [bytes(row) for row in tokens.tolist()]


def evaluate(
    model: GPT,
    config: Config,
    *,
    media: Path | None = None,
    windows: int | None = None,
    samples: int = 4,
    length: int = 400,
    prompt: str = "\n",
    temperature: float = 0.8,
    top_k: int = 40,
    count_model: bool = True,
) -> dict[str, float | int | str]:
    """Bits per byte on the held-out split with standard error, beside those of the count model; samples to media/samples.txt.

    windows: how many are scored, evenly spread; none: all. samples, length (bytes), prompt, temperature, top_k: of the text that is written.
    Raises UsageError naming an option that is out of range.
    """
    for name, value, least in (("windows", windows, 2), ("samples", samples, 1), ("length", length, 1), ("prompt's length", len(prompt), 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    try:
        sampling.check(temperature, top_k)
    except ValueError as error:
        raise UsageError(str(error)) from error
    text = data.read(config.data)
    train_text, held_out = data.parts(text, config.context, config.held_out, config.data)
    loss, se, count = score(model, held_out, windows)
    results: dict[str, float | int | str] = {"bpb": loss / math.log(2), "bpb_se": se / math.log(2), "loss": loss}
    if count_model:
        results["ngram_bpb"] = ngram.bits_per_byte(train_text, held_out)
    results |= {"bytes": count, "parameters": sum(p.numel() for p in model.parameters())}
    if media is not None:
        generator = torch.Generator().manual_seed(config.seed)
        texts = generate(model, prompt.encode(), length, generator, samples, temperature, top_k)
        written = "\n\n".join(f"--- sample {i} ---\n{t.decode(errors='replace')}" for i, t in enumerate(texts, 1))
        (media / "samples.txt").write_text(written + "\n", encoding="utf-8")
    return results
