"""Block-sparse kernels: layouts, patterns, products, attention and layers. Imports torch only."""

from onetorch.sparse import patterns
from onetorch.sparse.layout import Layout
from onetorch.sparse.products import dds, dsd, sdd

__all__ = ["Layout", "dds", "dsd", "patterns", "sdd"]
