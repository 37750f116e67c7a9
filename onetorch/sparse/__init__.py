"""Block-sparse kernels: layouts, patterns, products, attention and layers. Imports torch only."""

from onetorch.sparse import patterns
from onetorch.sparse.attention import attention
from onetorch.sparse.layout import Layout
from onetorch.sparse.products import dds, dsd, sdd

__all__ = ["Layout", "attention", "dds", "dsd", "patterns", "sdd"]
