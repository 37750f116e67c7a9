"""Recipes of the byte-level GPT."""

from typing import Any

from onetorch.recipes import recipe


@recipe("gpt", reaches="TO BE MEASURED")
def gpt_shakespeare(Config: Any) -> Any:
    """A small GPT for a short text such as tinyshakespeare, given by --data: windows of 64 bytes, 0.8 million parameters."""
    return Config(
        steps=80, batch=24, context=64, layers=2, heads=4, width=128, ngram_rows=10_000, ngram_orders=(2, 3, 4), rotary_base=100.0
    )
