"""Block-sparse matrices and masks of other libraries, to and from (values, layout).

torch's BSR, scipy's BSR, FlexAttention's BlockMask, and the weights of openai/blocksparse. Of these only torch is imported. `Linear.from_linear` and
`Linear.to_linear` do the same for dense layers.
"""

from typing import Any

import torch
from torch import Tensor

from onetorch.sparse.layout import Layout, _with_values
from onetorch.sparse.products import _check_layout, _check_restriction, _check_values


def _whole(layout: Layout, what: str) -> None:
    _check_layout(layout)
    if layout.heads is not None or layout.shape[0] % layout.block[0] or layout.shape[1] % layout.block[1]:
        raise ValueError(f"layout: {what} needs one matrix of whole blocks, got {layout!r}")


def _check_one_set(values: Tensor, layout: Layout) -> None:
    _check_values(values, layout)
    if values.ndim != 3:
        raise ValueError(f"values: expected {layout.values_shape}, one set, got {tuple(values.shape)}")


def to_bsr(values: Tensor, layout: Layout) -> Tensor:
    """(kept, br, bc) -> torch's sparse BSR tensor of shape (rows, columns). Whole blocks and no heads: ValueError otherwise."""
    _whole(layout, "BSR")
    _check_one_set(values, layout)
    R, C = layout.grid
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # a layout keeps them; torch 2.11 warns of the argument that says the same
        return torch.sparse_bsr_tensor(layout.index[: R + 1].long(), layout.columns.long() % C, values, size=layout.shape)


def _from_rows(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Layout]:
    block = (values.shape[1], values.shape[2])
    grid = (shape[0] // block[0], shape[1] // block[1])
    rows = torch.repeat_interleave(torch.arange(grid[0], device=values.device), offsets.diff())
    layout = Layout.from_indices(rows, columns, grid, block)
    return values[(rows * grid[1] + columns).argsort()], layout


def from_bsr(tensor: Tensor) -> tuple[Tensor, Layout]:
    """A torch sparse BSR matrix -> (values, layout). The blocks must have a size of `layout.BLOCKS`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensor: expected a sparse BSR matrix, got {type(tensor).__name__}")
    if tensor.layout != torch.sparse_bsr or tensor.ndim != 2:
        raise ValueError(f"tensor: expected a sparse BSR matrix, got {tensor.ndim} dimensions, {tensor.layout}")
    return _from_rows(tensor.crow_indices(), tensor.col_indices(), tensor.values(), (tensor.shape[0], tensor.shape[1]))


def to_scipy(values: Tensor, layout: Layout) -> tuple[Any, Any, Any]:
    """(kept, br, bc) -> the numpy arrays (data, indices, indptr) of `scipy.sparse.bsr_array(to_scipy(values, layout), shape=layout.shape)`.

    Data share the memory of values where these are on the CPU. Whole blocks and no heads: ValueError otherwise.
    """
    _whole(layout, "BSR")
    _check_one_set(values, layout)
    _with_values("values", values)
    if values.dtype == torch.bfloat16:
        raise ValueError("values: numpy has no bfloat16; expected one of float32, float64, float16")
    R, C = layout.grid
    return values.detach().cpu().numpy(), (layout.columns % C).cpu().numpy(), layout.index[: R + 1].cpu().numpy()


def from_scipy(matrix: Any) -> tuple[Tensor, Layout]:
    """A scipy.sparse.bsr_array or bsr_matrix -> (values, layout), on the CPU. Blocks that stand twice are added up, as scipy means them."""
    if getattr(matrix, "format", None) != "bsr":
        raise ValueError(f"matrix: expected a scipy BSR matrix, got {type(matrix).__name__}; matrix.tobsr(blocksize) makes one")
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    offsets, columns = torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long()
    return _from_rows(offsets, columns, torch.from_numpy(matrix.data), (matrix.shape[0], matrix.shape[1]))


def to_block_mask(layout: Layout, *, causal: bool = False, mask: Tensor | None = None) -> Any:
    """The BlockMask with which `torch.nn.attention.flex_attention` attends as `attention(q, k, v, layout, causal=causal, mask=mask)` does."""
    from torch.nn.attention.flex_attention import BlockMask

    _check_layout(layout)
    _check_restriction("mask", mask, layout.values_shape, (torch.bool,), layout.device)
    (br, bc), blocks = layout.block, layout.mask.view(layout.heads or 1, *layout.grid)
    number = (blocks.flatten().cumsum(0) - 1).view(blocks.shape)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        head = h if layout.heads else torch.zeros_like(h)
        keep = blocks[head, q // br, k // bc]
        if mask is not None and layout.kept:
            keep = keep & mask[number[head, q // br, k // bc].clamp_min(0), q % br, k % bc]
        return keep & (q >= k) if causal else keep

    count = blocks.sum(2, dtype=torch.int32)[None]
    order = blocks.sort(dim=2, descending=True, stable=True).indices.to(torch.int32)[None]
    return BlockMask.from_kv_blocks(count, order, BLOCK_SIZE=layout.block, mask_mod=allowed, seq_lengths=layout.shape)


def from_block_mask(block_mask: Any) -> tuple[Layout, Tensor]:
    """A BlockMask of one batch -> (layout, mask), for `attention(q, k, v, layout, mask=mask)`.

    mask (kept, br, bc) bool is the BlockMask's mask function at every pair of a block that is not marked as full. The function must do with a batch index
    of 0. ValueError for a BlockMask that differs between the elements of a batch.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not issubclass(type(block_mask), BlockMask):
        raise ValueError(f"block_mask: expected a BlockMask, got {type(block_mask).__name__}")
    blocks = block_mask.to_dense().bool()  # (B, H, R, C)
    if (blocks != blocks[:1]).any():
        raise ValueError(f"block_mask: expected the same blocks for the whole batch, got {blocks.shape[0]} that differ")
    blocks = blocks[0]
    layout = Layout.from_mask(blocks if blocks.shape[0] > 1 else blocks[0], tuple(block_mask.BLOCK_SIZE), tuple(block_mask.seq_lengths))
    H, (R, C), (br, bc) = blocks.shape[0], layout.grid, layout.block
    rows, columns, device = layout.rows.long(), layout.columns.long(), layout.device
    q = ((rows % R * br)[:, None, None] + torch.arange(br, device=device)[:, None]).expand(-1, br, bc)
    k = ((columns % C * bc)[:, None, None] + torch.arange(bc, device=device)).expand(-1, br, bc)
    h = (rows // R)[:, None, None].expand(-1, br, bc)
    exists = (q < layout.shape[0]) & (k < layout.shape[1])
    places = (t.flatten() for t in (h, q.clamp_max(layout.shape[0] - 1), k.clamp_max(layout.shape[1] - 1)))
    mask = torch.func.vmap(block_mask.mask_mod, in_dims=(None, 0, 0, 0))(torch.zeros((), dtype=torch.int64, device=device), *places).view(h.shape)
    if block_mask.full_kv_indices is not None:
        listed = torch.arange(C, device=device) < block_mask.full_kv_num_blocks[0, :, :, None]
        full = torch.zeros(H, R, C, dtype=torch.int32, device=device).scatter_add(2, block_mask.full_kv_indices[0].long(), listed.int()) > 0
        mask = mask | full.view(-1)[rows * C + columns % C][:, None, None]
    return layout, mask & exists


def _blocksparse_order(layout: Layout, z_order: bool) -> Tensor:
    """(kept,) int64: which of our blocks stands at each place of their weight."""
    inputs, outputs = layout.columns.long(), layout.rows.long()
    if not z_order:
        return (outputs * layout.grid[1] + inputs).argsort()
    key = torch.zeros_like(inputs)
    for bit in range(max(layout.grid).bit_length()):  # Morton order: the bits of the input's index and the output's in turn
        key = key | ((inputs >> bit & 1) << 2 * bit) | ((outputs >> bit & 1) << (2 * bit + 1))
    return key.argsort()


def to_blocksparse(values: Tensor, layout: Layout, *, z_order: bool = True) -> tuple[Tensor, Tensor]:
    """(kept, b, b) as `Linear` has it -> (weight, layout) of openai/blocksparse's BlocksparseMatMul.

    Theirs is the transposed matrix, (inputs, outputs): weight (kept, b, b) with inputs down, layout (C, R) int32, blocks in Morton order, or with
    z_order=False by output and then input, as scipy.sparse.find listed them at its time. Square blocks, whole, no heads: ValueError otherwise.
    """
    _whole(layout, "openai/blocksparse")
    _check_one_set(values, layout)
    if layout.block[0] != layout.block[1]:
        raise ValueError(f"layout: openai/blocksparse has square blocks, got {layout!r}")
    return values[_blocksparse_order(layout, z_order)].mT.contiguous(), layout.mask.T.to(torch.int32)


def from_blocksparse(weight: Tensor, their_layout: Tensor, *, z_order: bool = True) -> tuple[Tensor, Layout]:
    """The weight (kept, b, b) and layout (C, R), input by output blocks, of openai/blocksparse's BlocksparseMatMul -> (values, layout) as `Linear` has them."""
    for name, tensor in (("weight", weight), ("their_layout", their_layout)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        _with_values(name, tensor)
    if weight.device != their_layout.device:
        raise ValueError(f"their_layout: expected it on {weight.device} as weight is, got {their_layout.device}")
    if their_layout.ndim != 2 or weight.ndim != 3 or weight.shape[0] != int((their_layout != 0).sum()) or weight.shape[1] != weight.shape[2]:
        raise ValueError(f"weight: expected (kept, b, b) for the blocks of a layout (C, R), got {tuple(weight.shape)} and {tuple(their_layout.shape)}")
    layout = Layout.from_mask(their_layout.T != 0, weight.shape[1])
    values = torch.empty_like(weight)
    values[_blocksparse_order(layout, z_order)] = weight.mT
    return values, layout
