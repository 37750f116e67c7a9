"""Block-sparse kernels: layouts, patterns, products, attention and layers. Imports torch only."""

from onetorch.sparse import patterns
from onetorch.sparse.attention import KeyValueCache, attention, decode
from onetorch.sparse.costs import choice
from onetorch.sparse.dynamic import DynamicSparsity
from onetorch.sparse.layers import Linear, from_bsr, to_bsr
from onetorch.sparse.layout import Layout
from onetorch.sparse.multihead import MultiheadAttention
from onetorch.sparse.products import dds, dsd, sdd

__all__ = [
    "DynamicSparsity",
    "KeyValueCache",
    "Layout",
    "Linear",
    "MultiheadAttention",
    "attention",
    "choice",
    "dds",
    "decode",
    "dsd",
    "from_bsr",
    "patterns",
    "sdd",
    "to_bsr",
]
