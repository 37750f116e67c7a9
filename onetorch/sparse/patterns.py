"""Named layouts, and a report of what a layout connects.

Weights: `dense`, `random`, `balanced_random`, `barabasi_albert`, `watts_strogatz`, `watts_strogatz_2d`, `banded`, `block_diagonal`, `butterfly`.
They take the matrix in elements (rows = outputs, columns = inputs, as nn.Linear) and the block; `density`, `degree` and `width` count blocks.
Random ones take a torch.Generator.

Attention: `causal`, `local`, `strided`, `fixed`, `dilated`, `global_tokens`, `document`, `prefix_lm`, `axial`, `neighbourhood_2d`. They take the
sequence and all other sizes in tokens and keep every block that holds an allowed pair of query and key. What a block holds besides is for
`causal`, `groups` and `mask` of `attention` to cut out.

The small-world and scale-free weights follow openai/blocksparse's examples (Gray, Radford, Kingma: GPU Kernels for Block-Sparse Weights, 2017), the
strided and fixed patterns Child, Gray, Radford, Sutskever: Generating Long Sequences with Sparse Transformers, 2019, the butterfly Dao et al.:
Pixelated Butterfly, 2021.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from onetorch.sparse.layout import Layout, _pair

Size = int | tuple[int, int]


def report(layout: Layout, most: int = 64) -> dict[str, float | int | None]:
    """What the layout connects.

    density       kept blocks over all blocks
    row_min, row_max, column_min, column_max      kept blocks in a block row and in a block column (over all heads)
    mixing        how many layers of this layout until every input reaches every output; None where they never do. A matrix that is not square
                  alternates with its transpose, as the two halves of an MLP block do. Of several heads, each layer uses the union.
    """
    if not isinstance(layout, Layout):
        raise ValueError(f"layout: expected a Layout, got {type(layout).__name__}")
    _count("most", most, 1, 2**31 - 1)
    mask = layout.mask if layout.heads is None else layout.mask.any(0)
    per_row, per_column = layout.mask.sum(-1), layout.mask.sum(-2)
    step = mask.float()
    reach, mixing = step, None
    for layers in range(1, most + 1):
        if bool((reach > 0).all()):
            mixing = layers
            break
        grown = ((step if mask.shape[0] == mask.shape[1] or layers % 2 == 0 else step.T) @ reach > 0).float()
        if layers > 2 * max(mask.shape) or (mask.shape[0] == mask.shape[1] and torch.equal(grown, reach)):
            break
        reach = grown
    return {
        "density": layout.density,
        "row_min": int(per_row.min()),
        "row_max": int(per_row.max()),
        "column_min": int(per_column.min()),
        "column_max": int(per_column.max()),
        "mixing": mixing,
    }


def _grid(shape: Size, block: Size) -> tuple[int, int]:
    (rows, columns), (br, bc) = _pair("shape", shape), _pair("block", block)
    if min(rows, columns, br, bc) < 1:
        raise ValueError(f"shape, block: expected positive sizes, got {(rows, columns)} in blocks of {(br, bc)}")
    return -(-rows // br), -(-columns // bc)


def _square(name: str, shape: Size, block: Size) -> int:
    R, C = _grid(shape, block)
    if R != C:
        raise ValueError(f"shape: {name} is a graph on one set of nodes, expected as many block rows as block columns, got {R} x {C}")
    return R


def _between(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}: expected a value in {low}..{high}, got {value!r}")


def _count(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int:
        raise ValueError(f"{name}: expected an int, got {value!r}")
    _between(name, value, low, high)


# Weights --------------------------------------------------------------------------------------------------------------------------------------------


def dense(shape: Size, block: Size) -> Layout:
    """Every block."""
    return Layout.from_mask(torch.ones(_grid(shape, block), dtype=torch.bool), block, shape)


def random(shape: Size, block: Size, density: float, generator: torch.Generator | None = None) -> Layout:
    """round(density R C) blocks, every set of them equally likely."""
    _between("density", density, 0, 1)
    R, C = _grid(shape, block)
    mask = torch.zeros(R * C, dtype=torch.bool)
    mask[torch.randperm(R * C, generator=generator)[: round(density * R * C)]] = True
    return Layout.from_mask(mask.view(R, C), block, shape)


def balanced_random(shape: Size, block: Size, density: float, generator: torch.Generator | None = None, rounds: int = 32) -> Layout:
    """The same number of blocks in every row, round(density C), and the same number in every column to within one.

    Starts from consecutive runs that go round the columns, and shuffles by the curveball trade (Strona et al. 2014): random pairs of rows redistribute
    between them the
    columns that only one of the two holds, `rounds` times over all rows.
    """
    _between("density", density, 0, 1)
    R, C = _grid(shape, block)
    per_row = round(density * C)
    start = torch.arange(R) * per_row
    mask = torch.zeros(R, C, dtype=torch.bool).scatter_(1, (start[:, None] + torch.arange(per_row)) % C, True)
    for _ in range(rounds):
        first, second = torch.randperm(R, generator=generator)[: R // 2 * 2].view(2, -1)
        a, b = mask[first], mask[second]
        traded = a ^ b
        key = torch.rand(a.shape, generator=generator).masked_fill(~traded, 2.0)
        rank = key.argsort(1).argsort(1)
        to_a = traded & (rank < (a & ~b).sum(1, keepdim=True))
        mask[first], mask[second] = (a & b) | to_a, (a & b) | (traded & ~to_a)
    return Layout.from_mask(mask, block, shape)


def barabasi_albert(shape: Size, block: Size, degree: int, generator: torch.Generator | None = None) -> Layout:
    """Scale-free: nodes arrive one by one and link to `degree` earlier ones, a node as likely as it has links (Barabasi, Albert 1999). Symmetric, with
    the diagonal and a dense core of the first `degree`.
    """
    n = _square("barabasi_albert", shape, block)
    _count("degree", degree, 1, n)
    mask = torch.eye(n, dtype=torch.bool)
    mask[:degree, :degree] = True
    links = torch.zeros(n)
    links[:degree] = 1.0  # the core: every one equally likely at first
    for node in range(degree, n):
        chosen = torch.multinomial(links[:node], degree, generator=generator)
        mask[node, chosen] = True
        mask[chosen, node] = True
        links[chosen] += 1.0
        links[node] = degree
    return Layout.from_mask(mask, block, shape)


def _rewire(mask: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Each undirected link moves one end to a random node with probability p, keeping their number; the diagonal is added."""
    n = mask.shape[0]
    mask = mask.clone().fill_diagonal_(False)
    for i, j in mask.triu(1).nonzero().tolist():
        if float(torch.rand((), generator=generator)) < p:
            free = (~mask[i]).nonzero().view(-1)
            free = free[free != i]
            if free.numel():
                k = int(free[torch.randint(free.numel(), (), generator=generator)])
                mask[i, j] = mask[j, i] = False
                mask[i, k] = mask[k, i] = True
    return mask | torch.eye(n, dtype=torch.bool)


def watts_strogatz(shape: Size, block: Size, degree: int, p: float = 0.2, generator: torch.Generator | None = None) -> Layout:
    """Small world on a ring: each node linked to its `degree` (even) nearest, each link rewired with probability p (Watts, Strogatz 1998). Symmetric,
    with the diagonal.
    """
    n = _square("watts_strogatz", shape, block)
    _between("p", p, 0, 1)
    if type(degree) is not int or degree % 2 or not 2 <= degree < n:
        raise ValueError(f"degree: expected an even number in 2..{n - 1}, got {degree}")
    at = torch.arange(n)
    gap = (at[:, None] - at).abs()
    return Layout.from_mask(_rewire(torch.minimum(gap, n - gap) <= degree // 2, p, generator), block, shape)


def watts_strogatz_2d(shape: Size, block: Size, degree: int, p: float = 0.2, generator: torch.Generator | None = None) -> Layout:
    """Small world on a torus of a x b nodes, a and b the most even factors: each node linked to at least its `degree` nearest (all at the last distance
    are taken), then rewired.
    """
    n = _square("watts_strogatz_2d", shape, block)
    _between("p", p, 0, 1)
    _count("degree", degree, 1, n - 1)
    a = next(d for d in range(int(n**0.5), 0, -1) if n % d == 0)
    b = n // a
    row, column = torch.arange(n) // b, torch.arange(n) % b
    dr, dc = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    distance = torch.minimum(dr, a - dr) ** 2 + torch.minimum(dc, b - dc) ** 2
    cutoff = distance[0].sort().values[degree]  # entry 0 is the node itself
    return Layout.from_mask(_rewire(distance <= cutoff, p, generator), block, shape)


def _scaled(R: int, C: int) -> tuple[Tensor, Tensor]:
    """Block rows and columns on one scale, for bands of matrices that are not square: the column that stands across from a row."""
    return torch.arange(R)[:, None] * C // R, torch.arange(C)[None]


def banded(shape: Size, block: Size, width: int) -> Layout:
    """Blocks at most `width` block columns from the diagonal."""
    row, column = _scaled(*_grid(shape, block))
    _count("width", width, 0, 2**31 - 1)
    return Layout.from_mask((row - column).abs() <= width, block, shape)


def block_diagonal(shape: Size, block: Size, groups: int) -> Layout:
    """`groups` dense squares along the diagonal, as even as the blocks allow."""
    R, C = _grid(shape, block)
    _count("groups", groups, 1, min(R, C))
    return Layout.from_mask(torch.arange(R)[:, None] * groups // R == torch.arange(C)[None] * groups // C, block, shape)


def butterfly(shape: Size, block: Size, stride: int | None = None) -> Layout:
    """Flat block butterfly: the diagonal and the blocks whose row and column differ in one bit, up to `stride` (a power of two; left out: all). log2 n +
    1 blocks a row; mixes in log2 n layers.
    """
    R, C = _grid(shape, block)
    n = min(R, C)
    if stride is not None and (type(stride) is not int or stride < 1 or stride & (stride - 1)):
        raise ValueError(f"stride: expected a power of two, got {stride}")
    row, column = torch.arange(R)[:, None] * n // R, torch.arange(C)[None] * n // C  # a matrix that is not square stretches the smaller square
    differ = row ^ column
    return Layout.from_mask((differ & (differ - 1) == 0) & (differ <= (stride or n)), block, shape)


# Attention ------------------------------------------------------------------------------------------------------------------------------------------


def _attention(sequence: int, block: Size, allowed: Callable[[Tensor, Tensor], Tensor], heads: int | None = None) -> Layout:
    """Keep the blocks that hold a pair (query i, key j) with allowed(i (S, 1), j (1, S)); with `heads` it gives (heads, S, S). One block row at a time,
    so that memory stays O(block S).
    """
    _positive(sequence=sequence)
    br, bc = _pair("block", block)
    C = _grid(sequence, block)[1]
    key = torch.arange(sequence)[None]
    rows = []
    for start in range(0, sequence, br):
        query = torch.arange(start, min(start + br, sequence))[:, None]
        hit = allowed(query, key).any(-2)  # ([heads,] S)
        rows.append(torch.nn.functional.pad(hit, (0, C * bc - sequence)).unflatten(-1, (C, bc)).any(-1))
    return Layout.from_mask(torch.stack(rows, -2), block, sequence)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: expected an int, at least 1 token, got {size!r}")


def causal(sequence: int, block: Size) -> Layout:
    """Every key up to the query."""
    _positive(sequence=sequence)
    br, bc = _pair("block", block)
    R, C = _grid(sequence, block)
    return Layout.from_mask(torch.arange(C)[None] * bc < (torch.arange(R)[:, None] + 1) * br, block, sequence)


def local(sequence: int, block: Size, window: int, *, causal: bool = True) -> Layout:
    """The `window` keys up to and with the query; not causal: `window` to each side."""
    _positive(window=window)
    return _attention(sequence, block, lambda i, j: (j <= i) & (j > i - window) if causal else (i - j).abs() < window)


def strided_order(sequence: int, stride: int) -> Tensor:
    """(S,) int64: the permutation of the tokens that puts those of equal position modulo `stride` together, in order. `strided` is block-diagonal in it;
    pass it to `attention` as `order`.
    """
    _positive(sequence=sequence, stride=stride)
    at = torch.arange(sequence)
    return (at % stride * sequence + at // stride).argsort()


def strided(sequence: int, block: Size, stride: int, *, causal: bool = True) -> Layout:
    """The keys whose distance to the query is a multiple of `stride`, in the token order of `strided_order(sequence, stride)`: a group of S / stride
    tokens sees itself.

    In the natural order 2 % of the elements touch most of the blocks; in this order they are S / stride / block of them. Groups that do not fill whole
    blocks share a block at their border: give `attention` `groups=strided_groups(...)` to keep them apart.
    """
    order = strided_order(sequence, stride)
    return _attention(sequence, block, lambda i, j: (order[i] % stride == order[j] % stride) & ((order[j] <= order[i]) if causal else True))


def strided_groups(sequence: int, stride: int) -> Tensor:
    """(S,) int64: the group of each token, for `attention`'s `groups`: tokens of different groups do not see each other."""
    _positive(sequence=sequence, stride=stride)
    return torch.arange(sequence) % stride


def fixed(sequence: int, block: Size, stride: int, summary: int, heads: int | None = None, *, causal: bool = True) -> Layout:
    """The query's own segment of `stride` tokens, and the last `summary` tokens of every segment.

    With `heads`, head h summarises through positions stride - (h % n + 1) summary ... of each segment, n = stride // summary: distinct summaries per
    head, as in the Sparse Transformer.
    """
    _positive(stride=stride, summary=summary, **({} if heads is None else {"heads": heads}))
    _count("summary", summary, 1, stride)

    def allowed(i: Tensor, j: Tensor) -> Tensor:
        head = torch.arange(heads or 1)[:, None, None] % (stride // summary)
        place = j % stride
        hit = (i // stride == j // stride) | ((place >= stride - (head + 1) * summary) & (place < stride - head * summary))
        hit = hit & (j <= i) if causal else hit
        return hit if heads else hit[0]

    return _attention(sequence, block, allowed)


def dilated(sequence: int, block: Size, window: int, dilation: int, *, causal: bool = True) -> Layout:
    """`window` keys, `dilation` blocks apart: block distances 0, dilation, 2 dilation ... (in blocks, since dilation inside a block saves nothing)."""
    _positive(sequence=sequence, window=window, dilation=dilation)
    br, bc = _pair("block", block)
    if br != bc:
        raise ValueError(f"block: dilated counts distances in blocks, expected a square block, got {(br, bc)}")
    gap = torch.arange(_grid(sequence, block)[0])[:, None] - torch.arange(_grid(sequence, block)[1])
    gap = gap if causal else gap.abs()
    return Layout.from_mask((gap >= 0) & (gap % dilation == 0) & (gap // dilation * bc < window), block, sequence)


def global_tokens(sequence: int, block: Size, count: int, window: int, *, causal: bool = True) -> Layout:
    """The first `count` tokens see all and are seen by all; the others see a local window as well (Longformer)."""
    _positive(count=count, window=window)
    return _attention(sequence, block, lambda i, j: ((i < count) | (j < count) | ((i - j).abs() < window)) & ((j <= i) if causal else True))


def document(lengths: list[int], block: Size, *, causal: bool = True) -> Layout:
    """Documents of the given lengths packed into one sequence; each sees itself. `document_groups(lengths)` keeps them apart inside a block."""
    group = document_groups(lengths)
    return _attention(len(group), block, lambda i, j: (group[i] == group[j]) & ((j <= i) if causal else True))


def document_groups(lengths: list[int]) -> Tensor:
    """(S,) int64: the document of each token, for `attention`'s `groups`."""
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise ValueError(f"lengths: expected a list of at least one length, got {lengths!r}")
    _positive(**{f"lengths[{n}]": length for n, length in enumerate(lengths)})
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def prefix_lm(sequence: int, block: Size, prefix: int) -> Layout:
    """Every key up to the query, and the first `prefix` tokens for all."""
    _count("prefix", prefix, 0, 2**31 - 1)
    return _attention(sequence, block, lambda i, j: (j <= i) | (j < prefix))


def axial(height: int, width: int, block: Size, *, causal: bool = False) -> Layout:
    """Tokens of an image in row-major order: each sees its row and its column."""
    _positive(height=height, width=width)
    return _attention(height * width, block, lambda i, j: ((i // width == j // width) | (i % width == j % width)) & ((j <= i) if causal else True))


def neighbourhood_2d(height: int, width: int, block: Size, radius: int, *, causal: bool = False) -> Layout:
    """Tokens of an image in row-major order: each sees those at most `radius` rows and columns away."""
    _positive(height=height, width=width)
    _count("radius", radius, 0, 2**31 - 1)
    return _attention(
        height * width,
        block,
        lambda i, j: ((i // width - j // width).abs() <= radius) & ((i % width - j % width).abs() <= radius) & ((j <= i) if causal else True),
    )
