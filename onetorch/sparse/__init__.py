"""Block-sparse kernels: layouts, patterns, products, attention and layers. Imports torch only."""

from onetorch.sparse import convert, patterns
from onetorch.sparse.attention import KeyValueCache, attention, decode
from onetorch.sparse.blocks import softmax, sss
from onetorch.sparse.conv import Conv1d, Conv2d, Conv3d, EdgeBias
from onetorch.sparse.convert import from_bsr, to_bsr
from onetorch.sparse.costs import choice
from onetorch.sparse.dynamic import DynamicSparsity
from onetorch.sparse.layers import MLP, Linear, Projection
from onetorch.sparse.layout import Layout
from onetorch.sparse.multihead import MultiheadAttention
from onetorch.sparse.products import dds, dsd, sdd

__all__ = [
    "MLP",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DynamicSparsity",
    "EdgeBias",
    "KeyValueCache",
    "Layout",
    "Linear",
    "MultiheadAttention",
    "Projection",
    "attention",
    "choice",
    "convert",
    "dds",
    "decode",
    "dsd",
    "from_bsr",
    "patterns",
    "sdd",
    "softmax",
    "sss",
    "to_bsr",
]
