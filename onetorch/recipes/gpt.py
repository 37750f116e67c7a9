"""Recipes of GPT."""

from typing import Any

from onetorch.recipes import recipe


@recipe("gpt", reaches="1.65 bits per byte on the source of Python 3.11's standard library (count model: 1.75) in 4 CPU-minutes")
def gpt(Config: Any) -> Any:
    """GPT on bytes of any text; by default of the source of Python's standard library."""
    return Config()


@recipe("gpt", reaches="with tinyshakespeare 1.81 to 1.87 nats per byte in windows of 64 (nanoGPT's CPU recipe: 1.90 to 1.92) in 10 CPU-seconds")
def gpt_shakespeare(Config: Any) -> Any:
    """A small GPT for a short text such as tinyshakespeare, given by --data: windows of 64 bytes, 0.8 million parameters."""
    return Config(
        steps=80, batch=24, context=64, heads=4, width=128, ngram_rows=10_000, ngram_orders=(2, 3, 4), rotary_base=100.0, base_batch=24, base_width=128,
    )  # fmt: skip


@recipe("gpt", reaches="with tinyshakespeare 1.57 to 1.59 nats per byte in windows of 256 (5 seeds; count model: 1.52) in 62 CPU-seconds on one core")
def gpt_shakespeare_256(Config: Any) -> Any:
    """The same for a few minutes of a core: windows of 256 bytes, 3.1 million parameters, most of them in the table of n-grams."""
    return Config(steps=300, batch=16, context=256, heads=4, width=192, ngram_rows=65_536, rotary_base=300.0)


@recipe("gpt", reaches="with tinyshakespeare 1.49 nats per byte in windows of 256 (5 seeds; count model: 1.52) in 66 to 97 CPU-seconds on one core")
def gpt_shakespeare_counts(Config: Any) -> Any:
    """The same on top of the count model: what n-grams of up to 6 bytes say is added to the logits, and a network of 0.9 million parameters learns the rest."""
    return Config(
        counts=6, steps=600, batch=8, context=256, heads=4, width=192, ngram_orders=(), ngram_rows=1, rotary_base=300.0, lr_matrix=0.02, lr_head=0.005,
        base_batch=8,
    )  # fmt: skip


@recipe("gpt", reaches="")
def gpt_nanogpt_char(Config: Any) -> Any:
    """The set-up of nanoGPT's CPU recipe under our code: its sizes, batches, Adam with a cosine; the first rung of benchmarks/ladder.py."""
    return Config(
        steps=2000, batch=12, context=64, layers=4, heads=4, width=128, ngram_orders=(), ngram_rows=1, rotary_base=100.0, optimizer="adamw", lr_matrix=1e-3,
        lr_embedding=1e-3, lr_head=1e-3, base_batch=None, base_width=None, schedule="cosine", warmup=100, lr_floor=0.1, clip=1.0,
    )  # fmt: skip


@recipe("gpt", reaches="1.79 to 1.81 bits per dimension on the digits, exact (histogram: 2.42, PCA-Gaussian: 2.91; 3 seeds), in 17 CPU-seconds")
def gpt_digits(Config: Any) -> Any:
    """GPT on scikit-learn's digits, pixel after pixel: exact bits per dimension, to be held beside Glow's and the VAE's."""
    return Config(
        images="digits", vocabulary=18, context=64, batch=32, steps=200, width=64, heads=4, layers=3, ngram_orders=(), ngram_rows=1, rotary_base=100.0,
        base_batch=32, base_width=64, ema=(0.99,), final="ema", eval_every=50, eval_windows=360, eval_samples=20,
    )  # fmt: skip
