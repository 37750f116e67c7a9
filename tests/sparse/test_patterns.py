import pytest
import torch

from onetorch.sparse import patterns


def seeded():
    return torch.Generator().manual_seed(0)


def test_dense_and_diagonal_by_hand():
    assert patterns.dense((40, 64), 16).mask.tolist() == [[True] * 4] * 3
    assert patterns.block_diagonal(64, 8, 4).mask.int().tolist() == [[int(i // 2 == j // 2) for j in range(8)] for i in range(8)]
    assert patterns.banded(64, 8, 1).mask.int().tolist() == [[int(abs(i - j) <= 1) for j in range(8)] for i in range(8)]
    assert patterns.butterfly(32, 8).mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    assert patterns.butterfly(32, 8, stride=1).mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_random_counts():
    assert patterns.random((320, 640), 32, 0.25, seeded()).kept == 50
    layout = patterns.balanced_random((2048, 1024), 32, 0.2, seeded())  # 64 x 32 blocks, 6 a row, 384 in 32 columns: 12 each
    report = patterns.report(layout)
    assert (report["row_min"], report["row_max"], report["column_min"], report["column_max"]) == (6, 6, 12, 12)
    uneven = patterns.report(patterns.balanced_random((7 * 32, 10 * 32), 32, 0.3, seeded()))  # 21 blocks in 10 columns
    assert (uneven["row_min"], uneven["row_max"], uneven["column_min"], uneven["column_max"]) == (3, 3, 2, 3)
    other = patterns.balanced_random((2048, 1024), 32, 0.2, torch.Generator().manual_seed(1))
    assert other != layout
    assert patterns.balanced_random((2048, 1024), 32, 0.2, seeded()) == layout


def test_graphs():
    n = 64
    for layout, links in (
        (patterns.barabasi_albert(n * 8, 8, 3, seeded()), 3 * (n - 3) + 3),  # three per arriving node, and the core of three among themselves
        (patterns.watts_strogatz(n * 8, 8, 6, 0.3, seeded()), n * 3),
        (patterns.watts_strogatz_2d(n * 8, 8, 4, 0.3, seeded()), n * 2),
    ):
        assert torch.equal(layout.mask, layout.mask.T)
        assert bool(layout.mask.diagonal().all())
        assert int(layout.mask.triu(1).sum()) == links
    ring = patterns.watts_strogatz(80, 8, 2, p=0.0).mask
    assert ring.int().tolist() == [[int((i - j) % 10 in (0, 1, 9)) for j in range(10)] for i in range(10)]
    torus = patterns.watts_strogatz_2d(72, 8, 4, p=0.0).mask  # 3 x 3: node 0 is next to 1, 2 (around), 3, 6 (around)
    assert torus[0].nonzero().view(-1).tolist() == [0, 1, 2, 3, 6]
    hubs = patterns.report(patterns.barabasi_albert(n * 8, 8, 3, seeded()))
    assert hubs["row_max"] > 3 * hubs["row_min"]


def test_mixing():
    assert patterns.report(patterns.dense(64, 8))["mixing"] == 1
    assert patterns.report(patterns.block_diagonal(64, 8, 2))["mixing"] is None
    assert patterns.report(patterns.banded(64, 8, 1))["mixing"] == 7  # one block a layer over a distance of 7
    assert patterns.report(patterns.butterfly(512, 8))["mixing"] == 6  # log2 of 64 blocks
    assert patterns.report(patterns.block_diagonal((64, 32), 8, 2))["mixing"] is None
    assert patterns.report(patterns.dense((64, 32), 8))["mixing"] == 1


def elements(sequence, block, allowed):
    """The blocks that hold an allowed pair, by looking at every pair."""
    n = -(-sequence // block)
    kept = torch.zeros(n, n, dtype=torch.bool)
    for i in range(sequence):
        for j in range(sequence):
            if allowed(i, j):
                kept[i // block, j // block] = True
    return kept


@pytest.mark.parametrize(
    ("layout", "allowed"),
    [
        (patterns.causal(60, 8), lambda i, j: j <= i),
        (patterns.local(60, 8, 11), lambda i, j: i - 11 < j <= i),
        (patterns.local(60, 8, 11, causal=False), lambda i, j: abs(i - j) < 11),
        (patterns.fixed(60, 8, 20, 4), lambda i, j: j <= i and (i // 20 == j // 20 or j % 20 >= 16)),
        (patterns.global_tokens(60, 8, 3, 9), lambda i, j: j <= i and (i < 3 or j < 3 or i - j < 9)),
        (patterns.document([13, 30, 17], 8), lambda i, j: j <= i and (i < 13) == (j < 13) and (i < 43) == (j < 43)),
        (patterns.prefix_lm(60, 8, 19), lambda i, j: j <= i or j < 19),
        (patterns.axial(6, 10, 8), lambda i, j: i // 10 == j // 10 or i % 10 == j % 10),
        (patterns.neighbourhood_2d(6, 10, 8, 1), lambda i, j: abs(i // 10 - j // 10) <= 1 and abs(i % 10 - j % 10) <= 1),
    ],
)
def test_attention_patterns_keep_the_blocks_that_are_needed_and_no_other(layout, allowed):
    assert layout.shape == (60, 60)
    assert torch.equal(layout.mask, elements(60, 8, allowed))


def test_strided_is_block_diagonal_in_its_order():
    order = patterns.strided_order(12, 4)
    assert order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    layout = patterns.strided(512, 32, 8)  # groups of 64 tokens: two blocks, causal
    assert torch.equal(layout.mask, torch.block_diag(*[torch.ones(2, 2).tril()] * 8).bool())
    assert patterns.strided_groups(6, 4).tolist() == [0, 1, 2, 3, 0, 1]


def test_fixed_summaries_differ_between_heads():
    layout = patterns.fixed(64, 8, 32, 8, heads=4)  # four places of summary in a segment of four blocks
    last = [layout.mask[h, 7].nonzero().view(-1).tolist() for h in range(4)]
    assert last == [[3, 4, 5, 6, 7], [2, 4, 5, 6, 7], [1, 4, 5, 6, 7], [0, 4, 5, 6, 7]]


def test_dilated_by_hand():
    assert patterns.dilated(64, 8, window=24, dilation=2).mask[7].int().tolist() == [0, 0, 0, 1, 0, 1, 0, 1]
    assert patterns.dilated(64, 8, window=16, dilation=3, causal=False).mask[3].int().tolist() == [1, 0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.random(64, 8, 1.5), "density: expected a value in 0..1, got 1.5"),
        (lambda: patterns.barabasi_albert((64, 32), 8, 2), "shape: barabasi_albert is a graph"),
        (lambda: patterns.watts_strogatz(64, 8, 3), r"degree: expected an even number in 2..7, got 3"),
        (lambda: patterns.butterfly(64, 8, stride=3), "stride: expected a power of two, got 3"),
        (lambda: patterns.local(64, 8, 0), "window: expected an int, at least 1 token, got 0"),
        (lambda: patterns.fixed(64, 8, 16, 20), "summary: expected a value in 1..16, got 20"),
        (lambda: patterns.document([4, 0], 8), r"lengths\[1\]: expected an int, at least 1 token, got 0"),
        (lambda: patterns.dilated(64, (8, 16), 8, 2), "block: dilated counts distances in blocks"),
        (lambda: patterns.dense(0, 8), "shape, block: expected positive sizes"),
        (lambda: patterns.banded(64, 8, -1), "width: expected a value in 0"),
        (lambda: patterns.banded(64, 8, 1.5), "width: expected an int, got 1.5"),
        (lambda: patterns.prefix_lm(64, 8, -1), "prefix: expected a value in 0"),
        (lambda: patterns.neighbourhood_2d(8, 8, 8, -1), "radius: expected a value in 0"),
        (lambda: patterns.local((64, 64), 8, 8), r"sequence: expected an int, at least 1 token, got \(64, 64\)"),
        (lambda: patterns.document([], 8), r"lengths: expected a list of at least one length, got \[\]"),
        (lambda: patterns.random(64, 8, None), r"density: expected a value in 0\.\.1, got None"),
        (lambda: patterns.report(64), "layout: expected a Layout, got int"),
        (lambda: patterns.block_diagonal(64, 8, 9), "groups: expected a value in 1..8, got 9"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
