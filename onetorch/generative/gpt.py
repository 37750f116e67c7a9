"""GPT: a decoder-only transformer that predicts the next token of any text, byte or byte pair (`vocabulary.py`), or the next pixel of an image.

The model is that of Radford et al. (2019) with what has proved quick to train since: rotary positions (Su et al. 2021), normalized queries and keys (Henry
et al. 2020), squared ReLU (So et al. 2021), layer norms without gain, output projections that begin at zero, and embeddings of hashed n-grams beside
those of single tokens (as in Clark et al. 2022). Attention is dense or one of the Sparse Transformer's patterns (`attention.py`). Matrices are trained by Muon
(Jordan et al. 2024), which makes the update orthogonal, embeddings and head by Adam; the rate is constant and then falls linearly to zero (Zhai et al. 2022).
Weights are float32; the arithmetic may be in fewer bits (`precision.py`).

The learnt vocabulary is a buffer of the model, so that it is in every checkpoint and model folder, under their hashes. Whatever the tokens are, a text is
judged in bits per byte: nats of all tokens over ln 2 times their bytes. Of token shards the bytes are not known, and nats per token are all there is. An image
is a sequence of D = C H W pixels after a token that begins it; the bits per dimension are exact, each image is seen whole and by itself.

| symbol | shape     | meaning                                                    |
|--------|-----------|------------------------------------------------------------|
| B      |           | windows in a batch                                         |
| T      |           | tokens of context                                          |
| V      |           | tokens of the vocabulary, 256 where they are the bytes     |
| C      |           | width of the residual stream                               |
| H, D   |           | heads and their width, H D = C                             |
| x      | (B, T, C) | residual stream                                            |
| q k v  | (B,H,T,D) | queries, keys, values                                      |
| loss   |           | nats per token                                             |
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onetorch.generative import attention, corpus, data, fid, images, likelihood, ngram, precision, sampling, schedules
from onetorch.generative.counts import Counts
from onetorch.generative.divergence import Divergence
from onetorch.generative.ema import EMA
from onetorch.generative.muon import Muon
from onetorch.generative.precision import LossScale
from onetorch.generative.stream import Stream
from onetorch.generative.vocabulary import BYTES, Vocabulary
from onetorch.runs import distributed
from onetorch.runs.errors import RunError, UsageError
from onetorch.runs.plan import thread_counts
from onetorch.runs.run import Run

UNKNOWN = "nats per token only: the bytes of token shards are not known, and so no bits per byte"


@dataclass(frozen=True)
class Config:
    data: Path | None = None  # a text file or a folder of text files, or token shards; none: the source of Python's standard library
    images: Literal["digits", "glyphs", "data"] | None = None  # train on images, pixel after pixel: embedded ones, or those that data names
    dataset: str | None = None  # train on a dataset of Hugging Face's, read as a stream: NAME, NAME:CONFIG or a folder of its files
    column: str = "text"  # the text of a document in it
    vocabulary: int = 256  # tokens: 256 are the bytes, more are byte pairs learnt from the text trained on; of shards, above their largest number
    held_out: Literal["validation", "tuning"] = "validation"  # evaluate on the last tenth; or, to choose settings, on the tenth before it, untrained too
    seed: int = 0  # of weights and batches
    steps: int = 1000  # optimizer steps
    batch: int = 16  # windows in a step
    context: int = 256  # tokens in a window
    layers: int = 2  # transformer blocks
    heads: int = 3  # attention heads in a block
    width: int = 192  # of the residual stream; a multiple of 2 * heads
    ngram_orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # lengths of the n-grams of tokens that are embedded too
    ngram_rows: int = 131_072  # rows of the table of hashed n-grams, shared by all orders
    ngram_width: int = 32  # columns of it
    counts: int = 0  # bytes of the longest n-gram that is counted in the text trained on; the logits begin as its log-probabilities (0: none are, or 2 to 7)
    count_bytes: int = 1 << 20  # bytes of that text that are counted, the last ones; they are kept in the model
    attention: Literal["dense", "local", "strided", "fixed"] = "dense"  # what a token sees: all before it, or a pattern of the Sparse Transformer
    stride: int = 128  # of the sparse patterns, in tokens
    rotary_base: float = 1000.0  # longest wavelength of the rotary positions, in units of 2 pi tokens
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; all else is trained by Adam
    lr_matrix: float = 0.04  # its step size
    lr_embedding: float = 0.1  # Adam's step size: embeddings
    lr_head: float = 0.01  # Adam's step size: output layer
    momentum: float = 0.9  # Muon's, or the first beta of Adam for the matrices
    base_width: int | None = 192  # the rates are those of this width, and are carried over to `width` (mu-P); none: of whatever the width is
    base_batch: int | None = 16  # the rates are those of this batch, and grow with the root of the batch; none: of whatever the batch is
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"  # course of the rates after the warm-up; wsd: constant, at last a line down
    warmup: int = 5  # steps in which the rates rise from zero
    decay: float = 0.5  # fraction of the steps, the last ones, in which the rates of wsd fall
    lr_floor: float = 0.0  # what they fall to, as a fraction of themselves
    clip: float | None = None  # greatest norm of the gradient
    compile: bool = False  # compile the model: with bfloat16 on a processor a third less time for a step, after a minute or two of compiling
    accumulate: int = 1  # parts that a batch is computed in, one after the other: the same gradient with less memory
    batch_stages: tuple[float, ...] = (1.0,)  # fractions of the batch, each for an equal part of the steps
    context_stages: tuple[float, ...] = (1.0,)  # fractions of the context, likewise
    ema: tuple[float, ...] = ()  # rates of the weights' moving averages, which are evaluated beside the weights themselves
    final: Literal["raw", "ema"] = "raw"  # the weights that the run ends with: its own, or the average of the first rate
    eval_every: int = 200  # steps between two evaluations
    eval_windows: int = 64  # windows in them; the evaluation after training takes all
    eval_samples: int = 2  # samples of text at each, to media/
    eval_seconds: float = 1.0  # writing them stops after so long

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "layers", "heads", "width", "ngram_rows", "ngram_width", "count_bytes", "warmup", "eval_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr_matrix", "lr_embedding", "lr_head", "clip", "base_width", "base_batch"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("batch_stages", "context_stages"):
            if not getattr(self, name) or not all(0 < fraction <= 1 for fraction in getattr(self, name)):
                raise ValueError(f"{name} must be fractions above 0 and at most 1, got {getattr(self, name)}")
        if self.dataset is not None and (self.data is not None or self.images is not None):
            raise ValueError("dataset, data and images name different data; give one of them")
        if (self.images == "data") > (self.data is not None) or (self.images in ("digits", "glyphs") and self.data is not None):
            raise ValueError(f"images must be data where data names images, and only there; got {self.images} with data {self.data}")
        if not 2 <= self.vocabulary <= 1 << 20:
            raise ValueError(f"vocabulary must lie in 2 to {1 << 20}, got {self.vocabulary}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}")
        if self.attention != "dense" and not 64 <= self.stride <= self.context:
            raise ValueError(f"stride must lie in 64 to the context of {self.context}, got {self.stride}")
        if not all(2 <= n <= 6 for n in self.ngram_orders):
            raise ValueError(f"ngram_orders must lie in 2 to 6, got {self.ngram_orders}")
        if self.counts and not (2 <= self.counts <= 7 and self.vocabulary == 256 and self.images is None and self.dataset is None):
            raise ValueError(f"counts must be 0 or 2 to 7, the latter for bytes of a text alone (vocabulary 256, no images, no dataset), got {self.counts}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor must lie in 0 to 1, got {self.lr_floor}")
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}")
        if not all(0 <= rate < 1 for rate in self.ema):
            raise ValueError(f"ema must be rates of at least 0 and below 1, got {self.ema}")
        if self.final == "ema" and not self.ema:
            raise ValueError("final is ema, but ema names no rate; --ema 0.99 averages the weights")
        if self.eval_windows < 2:
            raise ValueError(f"eval_windows must be at least 2, got {self.eval_windows}")
        if self.eval_samples < 0 or self.eval_seconds < 0:
            raise ValueError(f"eval_samples and eval_seconds must be at least 0, got {self.eval_samples} and {self.eval_seconds}")


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])  # without gain; on a CPU faster than RMSNorm, and as good here


class Linear(nn.Linear):
    """A matrix kept in float32 and applied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, scale: float = 0.7) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=scale / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.qkv, self.out = Linear(C, 3 * C), Linear(C, C, scale=0.0)
        self.up, self.down = Linear(C, 4 * C), Linear(4 * C, C, scale=0.0)

    def forward(self, x: Tensor, rotary: Tensor, attend: Attend) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k = rotate(norm(qkv[:, :, :2]), rotary).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        v = qkv[:, :, 2].transpose(1, 2)
        scale = 1.4 / math.sqrt(q.size(-1))  # normalized queries cannot grow, so attention must be able to be sharp from the start
        y = attend(q, k, v, scale)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square())


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of (B, T, 2, H, D) by its position's angle; rotary holds cos and sin, (2, T, 1, 1, D)."""
    return torch.addcmul(x * rotary[0], x.roll(x.size(-1) // 2, -1), rotary[1])


class GPT(nn.Module):
    """Logits of the next token. `dtype` is that of the arithmetic and `path` the attention's way; the speed plan sets both, they are no part of the model."""

    rotary: Tensor  # (2, context, 1, 1, D)
    merges: Tensor  # (V - 256, 2) int32, of the vocabulary; -1 as long as none is known

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.dtype, self.path = config, torch.float32, paths(config)[0]
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.ngrams = nn.Embedding(config.ngram_rows, config.ngram_width)
        nn.init.normal_(self.ngrams.weight, std=0.02)
        self.mix = Linear(config.ngram_width, config.width)
        for p in (self.ngrams.weight, self.mix.weight):
            p.requires_grad_(bool(config.ngram_orders))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Linear(config.width, config.vocabulary, scale=0.0)
        D = config.width // config.heads
        angle = torch.arange(config.context)[:, None] * config.rotary_base ** -(torch.arange(D // 2) * 2 / D)  # (T, D / 2)
        cos_sin = torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], 1)])  # (2, T, D)
        if config.counts:
            self.counts = Counts(config.count_bytes, config.counts)
            self.trust = nn.Linear(config.width + config.counts, 1)  # what the log-probabilities of the counts are multiplied by
            nn.init.zeros_(self.trust.weight)
            nn.init.ones_(self.trust.bias)
        self.register_buffer("rotary", cos_sin[:, :, None, None], persistent=False)
        if config.vocabulary != BYTES:
            self.register_buffer("merges", torch.full((max(config.vocabulary - BYTES, 0), 2), -1, dtype=torch.int32))
        self._seen: dict[int, list[attention.Pattern]] = {}

    def vocabulary(self) -> Vocabulary | None:
        """What the tokens stand for; None where it is not known: of token shards, or not learnt yet."""
        if self.config.vocabulary == BYTES:
            return Vocabulary(np.zeros((0, 2), np.int32))
        known = self.merges.numel() and bool((self.merges >= 0).any())
        return Vocabulary(self.merges.cpu().numpy()) if known else None

    def hashed(self, tokens: Tensor) -> Tensor:
        """Rows (B, T, len(orders)) of the table for the n-grams that end at each token; a window begins as after tokens of a kind of their own."""
        key, rows, base = tokens + 1, [], (self.config.vocabulary + 1) | 1  # odd, so that no token is shifted out of the 64 bits
        for n in range(2, max(self.config.ngram_orders, default=1) + 1):
            key = key * base + F.pad(tokens + 1, (n - 1, 0))[:, : tokens.size(1)]
            if n in self.config.ngram_orders:
                rows.append((key * 0x9E3779B97F4A7C1 >> 20) % self.config.ngram_rows)  # multiplicative hashing; the product wraps
        return torch.stack(rows, -1)

    def seen(self, T: int) -> list[attention.Pattern]:
        """What each of T positions sees, for every layer."""
        if T not in self._seen or self._seen[T][0].layout.device != self.rotary.device:
            c = self.config
            self._seen[T] = [attention.pattern(c.attention, T, c.stride, i, c.heads).to(self.rotary.device) for i in range(c.layers)]
        return self._seen[T]

    def forward(self, tokens: Tensor, cache: attention.Cache | None = None, counted: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) float32 of the token after each of tokens (B, T) int64, T at most the context.

        With a cache the first `cache.length` tokens have been seen already, and the logits are those after the others. `counted` (B, T) are these, where they
        stand in the text that was counted (`counts.py`).
        """
        start, T = cache.length if cache else 0, tokens.size(1)
        x = self.tokens(tokens[:, start:]).to(self.dtype)  # (B, T, C)
        if self.config.ngram_orders:
            since = max(start + 1 - max(self.config.ngram_orders), 0)  # no n-gram reaches farther back
            x = x + self.mix(self.ngrams(self.hashed(tokens[:, since:])[:, start - since :]).sum(2).to(self.dtype))
        rotary = self.rotary[:, start:T].to(self.dtype)
        x = norm(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, functools.partial(self._attend, layer, start, cache))
        if cache:
            cache.length = T
        x = norm(x)
        logits = self.head(x).float()
        if not self.config.counts:
            return logits
        known, shares = self.counts(tokens, start, counted)
        return torch.addcmul(logits, self.trust(torch.cat([x.float(), shares], -1)), known)

    def _attend(self, layer: int, start: int, cache: attention.Cache | None, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if cache:
            k, v = cache.extend(layer, k, v, self.config.context)
        T, path = k.size(2), self.path if start == 0 else "explicit"
        mask = None
        if path == "explicit":
            at = torch.arange(T, device=q.device)
            allowed = at[start:, None] >= at if self.config.attention == "dense" else self.seen(self.config.context)[layer].allowed[..., start:T, :T]
            mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
        return attention.attend(q, k, v, path, scale, mask, self.seen(T)[layer] if path == "blocks" else None)


def paths(config: Config) -> tuple[str, ...]:
    """The ways to compute this attention that are worth a measurement."""
    if config.attention != "dense":
        return ("blocks",)
    return ("explicit", "sdpa") if config.context <= attention.LONG else ("blocks", "sdpa")


def nll(model: nn.Module, window: Tensor, counted: bool = False) -> Tensor:
    """-ln p (B, T) of each token of window (B, T + 1) but the first, given those before it in the window. Where the window was `counted` itself, it is not by
    its own counts."""
    logits = model(window[:, :-1], counted=window[:, 1:]) if counted else model(window[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none").view(logits.shape[:2])


def build(config: Config) -> GPT:
    return GPT(config)


def example(config: Config) -> Tensor:
    """A window of tokens (1, T) for the module to answer, when it is shared."""
    return torch.randint(config.vocabulary, (1, min(32, config.context)))


def optimizers(model: GPT, config: Config) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """One for the blocks' matrices (Muon or Adam), and Adam for the rest; `rate` is what the schedule's factor is applied to.

    Of all rates the head's alone depends on the width (mu-P, Yang et al. 2022): an Adam step changes a logit by the sum of C entries of one sign. Muon's steps
    have the same spectral norm at every width, and those of the embeddings the same size in every entry (Adam's for the matrices are as the head's). With the
    batch the rates grow as its root (Malladi et al. 2022).
    """
    grown = math.sqrt(config.batch / (config.base_batch or config.batch))
    narrowed = (config.base_width or config.width) / config.width
    matrices: dict[str, Any] = {"params": model.blocks.parameters(), "rate": config.lr_matrix * grown}
    tables = {"params": [model.tokens.weight, model.ngrams.weight], "rate": config.lr_embedding * grown}
    head = {"params": [model.head.weight], "rate": config.lr_head * grown * narrowed}
    mix: dict[str, Any] = {"params": [model.mix.weight], "rate": config.lr_head * grown}
    if config.counts:
        mix["params"] += model.trust.parameters()
    if config.optimizer == "muon":
        first: torch.optim.Optimizer = Muon([matrices], model.dtype, momentum=config.momentum, weight_decay=0.0)
    else:
        first = torch.optim.AdamW([matrices | {"rate": matrices["rate"] * narrowed}], betas=(config.momentum, 0.99), weight_decay=0.1, fused=True)
    return first, torch.optim.AdamW([tables, head, mix], betas=(0.8, 0.95), weight_decay=0.0, fused=True)


def flops(config: Config, T: int) -> float:
    """Floating point operations of a training step on one window of T tokens: two for each weight of a matrix and token forward, twice that backward, and for
    each pair of query and key that attention's mathematics asks for 4 D forward and 8 D backward. Table look-ups cost none."""
    weights = config.layers * 12 * config.width**2 + config.width * (config.vocabulary + config.ngram_width * bool(config.ngram_orders))
    seen = [None if config.attention == "dense" else attention.pattern(config.attention, T, config.stride, i, config.heads) for i in range(config.layers)]
    return 6.0 * weights * T + 12.0 * config.width / config.heads * sum(attention.pairs(p, T, config.heads) for p in seen)


@dataclass
class State:
    model: GPT
    muon: torch.optim.Optimizer  # of the matrices
    adam: torch.optim.Optimizer  # of the rest
    ema: EMA
    divergence: Divergence
    scale: LossScale
    generator: torch.Generator  # draws the batches: the position in the data
    stream: Stream | None  # its position, where the data are one
    text: str  # digest of the data
    tokens: int = 0  # seen so far
    iteration: int = 0


def train(config: Config, run: Run, given: corpus.Given = None) -> GPT:
    """Train on the data that the config names, or on those `given` in memory (see `corpus.read`)."""
    found = corpus.read(config, given)
    if config.compile and distributed.world() > 1:
        raise UsageError("compile is for one process")
    torch.manual_seed(config.seed)
    plan = run.plan(
        lambda choice: trial(config, choice),
        key=f"gpt {config.layers} {config.heads} {config.width} {config.context} {config.batch} {config.ngram_rows} {config.attention} {config.stride} "
        f"{config.vocabulary} {config.counts}",
        asked={"dtype": precision.ASKED},
        dtype=precision.kinds(),  # before attention: sdpa is the faster one in float32 and four times the slower one in bfloat16
        attention=paths(config),
        threads=thread_counts(),
    )
    model = prepare(build(config), plan)
    run.initialize(model)
    network = distributed.wrap(model, model.blocks)
    muon, adam = optimizers(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    state = run.restore(State(model, muon, adam, EMA(model, config.ema), Divergence(), LossScale(plan["dtype"]), generator, found.stream, found.digest))
    if state.text != found.digest:
        name = config.dataset or config.data or config.images or ""
        raise RunError(f"data {name}: the text is not the one this run was begun with (sha-256 {state.text}…, now {found.digest}…); put it back")
    train_tokens, held_out = corpus.spell(model, found, config)
    if model.vocabulary() is None and not found.images:
        run.say(UNKNOWN)
    if config.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    cost = functools.cache(functools.partial(flops, config))  # of a window, by its length

    for state.iteration in run.steps(state.iteration, config.steps):
        factor = schedules.factor(config.schedule, state.iteration, config.steps, config.warmup, config.decay, config.lr_floor)
        for group in muon.param_groups + adam.param_groups:
            group["lr"] = group["rate"] * factor
        rows = max(round(config.batch * schedules.staged(state.iteration, config.steps, config.batch_stages)), 1)
        T = max(round(config.context * schedules.staged(state.iteration, config.steps, config.context_stages)), 1)
        window = data.batch(train_tokens, rows, T, state.generator)[distributed.part(rows)].to(plan["device"])
        run.phase("batch")
        loss = distributed.mean(gradient(network, window, config.accumulate, bool(config.counts), state.scale.factor))
        state.scale.undo(model)
        grad_norm = distributed.plain(nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
        run.phase("gradient")
        taken = state.scale.take(grad_norm)
        run.finite(loss=loss, grad_norm=grad_norm if taken else 0.0)
        state.divergence.check(loss.item(), state.iteration, "lower --lr_matrix, --lr_embedding and --lr_head, or give a longer --warmup or --clip 1")
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, grad_norm)
        for optimizer in (muon, adam):
            if taken:
                optimizer.step()
            optimizer.zero_grad()
        if taken:
            state.ema.update()
        if state.iteration == config.steps and config.final == "ema":
            state.ema.keep(config.ema[0])
        state.tokens += rows * T
        run.phase("update")
        evaluated: dict[str, float] = {}
        if state.iteration % config.eval_every == 0 or state.iteration == config.steps:
            evaluated = validate(model, state.ema, held_out, run.media / f"samples-{state.iteration:08}", found.images and found.images[1].shape)
        run.phase("evaluation")
        run.log(state.iteration, flops=rows * cost(T), loss=loss, grad_norm=grad_norm if taken else None, tokens=state.tokens, **evaluated)
        run.checkpoint(state)
        run.phase("logging")
    return distributed.unwrap(model, lambda: prepare(build(config), plan))


def gradient(model: nn.Module, window: Tensor, accumulate: int, counted: bool = False, scale: float = 1.0) -> Tensor:
    """The mean loss of a batch of windows, computed in `accumulate` parts; its gradient times `scale` is left in the parameters. `counted`: see `nll`."""
    total, parts = torch.zeros((), device=window.device), window.chunk(accumulate)
    for i, part in enumerate(parts, 1):
        with distributed.local(model, i < len(parts)):
            loss = nll(model, part, counted).mean() * (len(part) / len(window))
            (loss * scale).backward()
        total += loss.detach()
    return total


def prepare(model: GPT, choice: dict) -> GPT:
    """The model on its device, computing as the speed plan says."""
    model.dtype, model.path = precision.dtype(choice["dtype"]), choice["attention"]
    if choice["dtype"] == "float8":
        precision.to_float8(model.blocks)
    return model.to(choice["device"])


def trial(config: Config, choice: dict):
    """A forward and a backward pass of a quarter of a batch under a choice of the speed plan."""
    model = prepare(build(config), choice)
    window = torch.randint(config.vocabulary, (-(-config.batch // 4), config.context + 1), device=choice["device"])
    return lambda: nll(model, window).mean().backward()


class Score(NamedTuple):
    loss: float  # nats per token
    loss_se: float
    tokens: int  # predicted
    bpb: float | None  # bits per byte; None where the tokens' bytes are not known
    bpb_se: float | None
    bytes: int | None
    pixels: bool = False  # the tokens are those of images, each a dimension

    def columns(self, prefix: str = "") -> dict[str, float]:
        """The loss, and with their error bits per byte or per dimension, or else the loss's error."""
        found: dict[str, float | None] = {"loss": self.loss}
        if self.pixels:
            found |= {"bpd": self.loss / math.log(2), "bpd_se": self.loss_se / math.log(2)}
        else:
            found |= {"loss_se": self.loss_se} if self.bpb is None else {"bpb": self.bpb, "bpb_se": self.bpb_se}
        return {prefix + name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def score(model: GPT, tokens: data.Tokens, count: int | None = None) -> Score:
    """Every token but the first is predicted, in windows that do not overlap, or in `count` of them, evenly spread; of images every pixel.

    The errors are those of batch means: windows are taken together in up to 40 runs of neighbours, whose likeness a window's own variance would hide. Bits
    per byte are a ratio of two sums, whose error is that of its windows' ratios, each weighted by its bytes.
    """
    pixels = isinstance(tokens, np.ndarray) and tokens.ndim == 2
    device, vocabulary = model.head.weight.device, None if pixels else model.vocabulary()
    rows = max(64 * 256 // model.config.context, 1)
    nats, sizes, lengths = [], [], []
    for window in data.windows(tokens, model.config.context, rows, count):
        losses = nll(model, window.to(device)).double().cpu()
        nats.append(losses.sum(1).numpy())
        sizes.append(np.full(len(losses), float(losses.size(1))))
        if vocabulary is not None:
            lengths.append(vocabulary.lengths[window[:, 1:].numpy()].sum(1).astype(float))
    n, t = np.concatenate(nats), np.concatenate(sizes)
    known: tuple[float | None, float | None, int | None] = (None, None, None)
    if vocabulary is not None:
        b = np.concatenate(lengths)
        known = (float(n.sum() / b.sum()) / math.log(2), data.block_standard_error(n / b, b) / math.log(2), int(b.sum()))
    return Score(float(n.sum() / t.sum()), data.block_standard_error(n / t, t), int(t.sum()), *known, pixels)


def validate(model: GPT, ema: EMA, held_out: data.Tokens, samples: Path, shape: tuple[int, int, int] | None = None) -> dict[str, float]:
    """The columns of an evaluation during training: of the weights themselves and of each of their averages.

    Samples of the weights and of their first average, begun with the same seed, go to a file called `samples` with an ending, as far as the seconds that the
    config grants suffice: text, or images of `shape` (C, H, W), in two rows. Of several processes the first does the work.
    """
    config, columns, texts, pictures = model.config, dict[str, float](), list[str](), []
    for rate in (None, *ema.rates):
        with ema.swapped(rate), distributed.whole(model):
            if distributed.rank():
                continue
            found = score(model, held_out, config.eval_windows).columns("val_")
            name, value = list(found.items())[-2]  # before the error
            columns |= found if rate is None else {f"{name}_ema_{rate:g}": value}
            if not config.eval_samples or rate not in (None, *ema.rates[:1]):
                continue
            generator, seconds = torch.Generator().manual_seed(config.seed), config.eval_seconds / (1 + bool(ema.rates))
            if shape:
                pictures.append(draw(model, shape, config.eval_samples, generator, seconds=seconds))
                continue
            written = write(model, "\n", 400, generator, config.eval_samples, temperature=0.8, seconds=seconds)
            by = f", average {rate:g}" if rate is not None else ""
            texts += [f"--- sample {i}{by} ---\n{t}\n" for i, t in enumerate(written, 1)]
    if pictures:
        images.write_grid(samples.with_suffix(".png"), np.concatenate(pictures), config.vocabulary - 1, columns=config.eval_samples)
    elif distributed.rank() == 0:
        samples.with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    return columns


def draw(model: GPT, shape: tuple[int, int, int], count: int, generator: torch.Generator, **how: Any) -> NDArray[np.uint8]:
    """Images (count, C, H, W), pixel after pixel; black from where the seconds in `how` (see `sampling.go_on`) were over."""
    levels, D = model.config.vocabulary - 1, math.prod(shape)
    found = np.array(sampling.go_on(model, [levels], D, generator, count, **how))[:, 1:]
    found = np.pad(found, ((0, 0), (0, D - found.shape[1])))
    return found.clip(max=levels - 1).reshape(count, *shape).astype(np.uint8)  # the token that begins an image stands in none


def generate(model: GPT, prompt: bytes, length: int, generator: torch.Generator, rows: int = 1, **how: Any) -> list[bytes]:
    """`rows` continuations of `prompt` (one byte at least) by `length` tokens, each returned with the prompt before it, as bytes; `how`: see `sampling.go_on`.

    ValueError where there is no prompt, or the model's tokens have no known bytes.
    """
    vocabulary = model.vocabulary()
    if vocabulary is None:
        raise ValueError("the bytes of this model's tokens are not known: sampling.go_on gives token numbers")
    if not prompt:
        raise ValueError("prompt must hold at least one byte, got none")
    start = vocabulary.encode(np.frombuffer(prompt, np.uint8)).tolist()
    return [vocabulary.decode(row) for row in sampling.go_on(model, start, length, generator, rows, **how)]


def write(model: GPT, prompt: str, length: int, generator: torch.Generator, rows: int, **how: Any) -> list[str]:
    """Samples to be looked at: text, or the numbers of tokens that follow token 0 where nobody knows what they stand for."""
    if model.vocabulary() is None:
        return [" ".join(map(str, row)) for row in sampling.go_on(model, [0], length, generator, rows, **how)]
    return [t.decode(errors="replace") for t in generate(model, prompt.encode(), length, generator, rows, **how)]


def evaluate(
    model: GPT,
    config: Config,
    given: corpus.Given = None,
    *,
    media: Path | None = None,
    windows: int | None = None,
    samples: int | None = None,
    length: int = 400,
    prompt: str = "\n",
    temperature: float | None = None,
    top_k: int = 40,
    top_p: float = 1.0,
    min_p: float = 0.0,
    baselines: bool = True,
) -> dict[str, float | int | str]:
    """Bits per byte on the held-out split with standard error, beside those of the count model; of token shards nats per token; of images bits per dimension
    and FID, beside those of plain models. Samples to media. The data are the config's, or those `given` in memory (see `corpus.read`).

    windows: how many are scored, evenly spread; none: all. samples: none: 4 texts, or 500 images for FID. length (tokens), prompt: of the text that is written.
    temperature: none: 0.8 of text, 1 of images. top_k, top_p, min_p: of what is sampled. baselines: measure the plain models too.
    Raises UsageError naming an option that is out of range.
    """
    for name, value, least in (("windows", windows, 2), ("samples", samples, 1), ("length", length, 1), ("prompt's length", len(prompt), 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    found = corpus.read(config, given)
    warmth = temperature if temperature is not None else 1.0 if found.images else 0.8
    how: dict[str, Any] = {"temperature": warmth, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    try:
        sampling.check(**how)
    except ValueError as error:
        raise UsageError(str(error)) from error
    scored = score(model, corpus.spell(model, found, config)[1], windows)
    columns = scored.columns()
    results: dict[str, float | int | str] = {name: columns[name] for name in columns if "loss" not in name}  # the bits first
    results |= {"loss": scored.loss, "loss_se": scored.loss_se, "tokens": scored.tokens}
    generator = torch.Generator().manual_seed(config.seed)
    if found.images:
        results |= compare(model, found.images, max(samples or 500, 2), generator, media, baselines, how)
    elif scored.bytes is None:
        results["note"] = UNKNOWN
    else:
        results["bytes"] = scored.bytes
        if baselines and found.texts:
            results["ngram_bpb"] = ngram.bits_per_byte(*found.texts)
    results["parameters"] = sum(p.numel() for p in model.parameters())
    if media is not None and not found.images:
        texts = write(model, prompt, length, generator, samples or 4, **how)
        written = "\n\n".join(f"--- sample {i} ---\n{t}" for i, t in enumerate(texts, 1))
        (media / "samples.txt").write_text(written + "\n", encoding="utf-8")
    return results


def compare(
    model: GPT, parts: tuple[images.Images, images.Images], count: int, generator: torch.Generator, media: Path | None, baselines: bool, how: dict[str, Any]
) -> dict[str, float | int | str]:
    """FID of `count` samples, a hundred of which go to media/samples.png, and what plain models of images reach."""
    train, held_out = parts
    pixels = draw(model, train.shape, count, generator, **how)
    if media is not None:
        images.write_grid(media / "samples.png", pixels[:100], train.levels, columns=10)
    results: dict[str, float | int | str] = {"images": len(held_out), **fid.columns(pixels, train, held_out, generator if baselines else None)}
    return results | (likelihood.baselines(train, held_out) if baselines else {})
