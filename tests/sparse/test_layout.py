import pytest
import torch
from safetensors.torch import load_file, save_file

from onetorch.sparse import Layout, dds

# three block rows, four block columns:   x . x .
#                                         . . . .
#                                         x x . .
MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()


def test_index_by_hand():
    layout = Layout.from_mask(MASK, 8)
    assert (layout.kept, layout.grid, layout.shape, layout.heads, layout.values_shape) == (4, (3, 4), (24, 32), None, (4, 8, 8))
    assert layout.density == 4 / 12
    row_offsets, columns = [0, 2, 2, 4], [0, 2, 0, 1]
    column_offsets, transposed_rows, order, rows = [0, 2, 3, 4, 4], [0, 2, 2, 0], [0, 2, 3, 1], [0, 0, 2, 2]
    assert layout.index.tolist() == row_offsets + columns + column_offsets + transposed_rows + order + rows


def test_index_of_heads_counts_through_all_heads():
    layout = Layout.from_mask(torch.stack([MASK, ~MASK]), (8, 16), (20, 50))
    H, R, C, kept = 2, 3, 4, 12
    row_offsets, rest = layout.index[: H * R + 1], layout.index[H * R + 1 :]
    columns, rest = rest[:kept], rest[kept:]
    column_offsets, rest = rest[: H * C + 1], rest[H * C + 1 :]
    rows_t, order, rows = rest[:kept], rest[kept : 2 * kept], rest[2 * kept :]
    flat = torch.cat(list(layout.mask)).sum(1)  # kept blocks of each row, heads below each other
    assert row_offsets.tolist() == [0, *flat.cumsum(0).tolist()]
    assert column_offsets.tolist() == [0, *layout.mask.sum(1).view(-1).cumsum(0).tolist()]
    assert [(int(r), int(c)) for r, c in zip(rows, columns, strict=True)] == [(h * R + r, h * C + c) for h, r, c in layout.mask.nonzero().tolist()]
    assert torch.equal(rows[order.long()], rows_t)
    assert torch.equal(columns[order.long()].sort().values, columns[order.long()])


def test_dense_and_back():
    layout = Layout.from_mask(MASK, (8, 16), (20, 50))
    dense = torch.arange(1000.0).view(20, 50)
    values = layout.from_dense(dense)
    assert values.shape == (4, 8, 16)
    assert torch.equal(values[0], dense[:8, :16])
    assert torch.equal(values[2][:4], dense[16:20, :16])
    assert torch.equal(values[2][4:], torch.zeros(4, 16))  # beyond the edge
    assert torch.equal(layout.to_dense(values), dense * layout.element_mask())
    assert torch.equal(layout.to_dense(values.expand(2, 3, -1, -1, -1))[1, 2], dense * layout.element_mask())
    heads = Layout.from_mask(torch.stack([MASK, ~MASK]), (8, 16), (20, 50))
    both = torch.stack([dense, -dense])
    assert torch.equal(heads.to_dense(heads.from_dense(both)), both * heads.element_mask())


def test_sets():
    a, b = Layout.from_mask(MASK, 8), Layout.from_mask(MASK.flip(0), 8)
    assert (a | b).mask.tolist() == [[True, True, True, False], [False] * 4, [True, True, True, False]]
    assert (a & b).mask.tolist() == [[True, False, False, False], [False] * 4, [True, False, False, False]]
    assert a == Layout.from_mask(MASK.clone(), 8)
    assert hash(a) == hash(Layout.from_mask(MASK.clone(), 8))
    assert a != b
    assert a != Layout.from_mask(MASK, 16)
    assert a != "layout"
    assert len({a, b, Layout.from_mask(MASK, 8)}) == 2
    with pytest.raises(ValueError, match="other: expected block"):
        a | Layout.from_mask(MASK, 16)
    with pytest.raises(ValueError, match="other: expected a Layout"):
        a & MASK


def test_transpose_and_permute():
    layout = Layout.from_mask(MASK, (8, 16))
    values = torch.randn(4, 8, 16)
    turned = layout.transpose()
    assert turned.shape == layout.shape[::-1]
    assert torch.equal(turned.to_dense(layout.transpose_values(values)), layout.to_dense(values).T)
    assert turned.transpose() == layout
    moved = layout.permute(rows=torch.tensor([2, 0, 1]), columns=torch.tensor([3, 2, 1, 0]))
    assert torch.equal(moved.mask, MASK[[2, 0, 1]][:, [3, 2, 1, 0]])
    with pytest.raises(ValueError, match="rows: expected a permutation"):
        layout.permute(rows=torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="columns: block 3 reaches over the edge"):
        Layout.from_mask(MASK, (8, 16), (24, 60)).permute(columns=torch.tensor([3, 2, 1, 0]))


def test_immutable():
    mask = MASK.clone()
    layout = Layout.from_mask(mask, 8)
    mask.fill_(True)
    assert layout.kept == 4
    assert int(layout.mask.sum()) == 4
    with pytest.raises(AttributeError):
        layout.kept = 5


def test_save_and_load(tmp_path):
    for layout in (Layout.from_mask(MASK, (8, 32), (20, 100)), Layout.from_mask(torch.stack([MASK, ~MASK]), 16)):
        save_file(layout.state(), tmp_path / "layout.safetensors")
        again = Layout.from_state(load_file(tmp_path / "layout.safetensors"))
        assert again == layout
        assert torch.equal(again.index, layout.index)
    with pytest.raises(ValueError, match="state: expected mask, block and shape"):
        Layout.from_state({"mask": MASK})


def test_from_indices():
    made = Layout.from_indices(torch.tensor([2, 0, 2, 0]), torch.tensor([1, 2, 0, 0]), (3, 4), 8)
    assert made == Layout.from_mask(MASK, 8)
    heads = Layout.from_indices(torch.tensor([1, 0]), torch.tensor([0, 3]), (2, 3, 4), 8, heads=torch.tensor([1, 0]))
    assert heads.mask.nonzero().tolist() == [[0, 0, 3], [1, 1, 0]]
    with pytest.raises(ValueError, match=r"columns: expected indices in 0\.\.3, got 4 at position 1"):
        Layout.from_indices(torch.tensor([0, 1]), torch.tensor([0, 4]), (3, 4), 8)
    with pytest.raises(ValueError, match=r"rows: expected indices in 0\.\.2, got -1 at position 0"):
        Layout.from_indices(torch.tensor([-1, 1]), torch.tensor([0, 3]), (3, 4), 8)
    with pytest.raises(ValueError, match=r"block \(1, 3\) stands 2 times"):
        Layout.from_indices(torch.tensor([1, 0, 1]), torch.tensor([3, 0, 3]), (3, 4), 8)
    with pytest.raises(ValueError, match="columns: expected a 1-D tensor of int32 or int64, got"):
        Layout.from_indices(torch.tensor([1]), torch.tensor([1.0]), (3, 4), 8)
    with pytest.raises(ValueError, match="columns: expected \\(1,\\)"):
        Layout.from_indices(torch.tensor([1]), torch.tensor([1, 2]), (3, 4), 8)
    with pytest.raises(ValueError, match="grid: expected"):
        Layout.from_indices(torch.tensor([1]), torch.tensor([1]), (2, 3, 4), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MASK.float(), 8), "mask: expected a bool tensor, got torch.float32"),
        (([[True]], 8), "mask: expected a bool tensor, got list"),
        ((MASK[0], 8), r"mask: expected .* got shape \(4,\)"),
        ((MASK[:0], 8), r"mask: expected .* got shape \(0, 4\)"),
        ((MASK, 24), r"block: expected sizes among \(8, 16, 32, 64, 128\), got \(24, 24\)"),
        ((MASK, (8, 8, 8)), "block: expected an int or a pair of ints"),
        ((MASK, 8, (25, 32)), r"shape: 3 x 4 blocks of 8 x 8 cover \(17..24, 25..32\) elements, got \(25, 32\)"),
        ((MASK, 8, (24, 24)), "shape: 3 x 4 blocks"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout.from_mask(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: Layout.from_mask(p.mask, 8.0), r"block: expected an int or a pair of ints, got 8\.0"),
        (lambda p: Layout.from_mask(p.mask, 8, None.__class__), "shape: expected an int or a pair of ints, got <class"),
        (lambda p: Layout.from_mask(p.mask.to("meta"), 8), "mask: expected a strided tensor that has values, got torch.strided on meta"),
        (lambda p: Layout.from_mask(p.mask.to_sparse(), 8), "mask: expected a strided tensor that has values, got torch.sparse_coo"),
        (lambda p: Layout.from_indices(torch.tensor([0]), torch.tensor([0]), 4, 8), "grid: expected positive ints, got 4"),
        (lambda p: Layout.from_indices(torch.tensor([0]), torch.tensor([0]), (2**20, 2**20), 8), "grid: .* more than the 32-bit index can count"),
        (lambda p: p.to("nowhere"), "device: expected a torch.device or its name, got 'nowhere'"),
        (lambda p: p.to("meta").to("cpu"), "device: expected meta, where this layout is and has no blocks to move, got cpu"),
        (lambda p: p.permute([0, 1]), "rows: expected int64 indices, got list"),
        (lambda p: p.permute(torch.tensor([0.0, 1.0])), "rows: expected int64 indices, got torch.float32"),
        (lambda p: p.crop(1.5, 8), r"rows, columns: expected 1\.\.16 and 1\.\.24"),
        (lambda p: p.picture(0), "width: expected an int, at least 1 character, got 0"),
        (lambda p: p.with_mask([True], 1), r"mask: expected \(2, 3\) bool on cpu, got list"),
        (lambda p: p.to_dense([1.0]), r"values: expected \(\.\.\., 3, 8, 8\), got list"),
        (lambda p: p.to_dense(torch.zeros(3, 8, 8, device="meta")), r"values: expected \(\.\.\., 3, 8, 8\), strided, on cpu"),
        (lambda p: p.from_dense(torch.zeros(16, 24, device="meta")), r"dense: expected \(\.\.\., 16, 24\), strided, on cpu"),
        (lambda p: p.transpose_values(torch.zeros(3, 8, 9)), r"values: expected \(\.\.\., 3, 8, 8\), got \(3, 8, 9\)"),
        (lambda p: Layout.from_state({"mask": p.mask, "block": torch.tensor(8), "shape": torch.tensor([16, 24])}), "state: expected block as"),
    ],
)
def test_wrong_kinds_of_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(Layout.from_mask(torch.tensor([[True, False, True], [False, True, False]]), 8))


def test_permutation_of_32_bits():
    layout = Layout.from_mask(torch.tensor([[True, False], [False, False]]), 8)
    assert layout.permute(torch.tensor([1, 0], dtype=torch.int32)).mask.tolist() == [[False, False], [True, False]]


def test_made_in_inference_mode_it_trains():
    with torch.inference_mode():
        layout = Layout.from_mask(torch.eye(2, dtype=torch.bool), 8)
        turned = layout.with_mask(layout.mask.flip(0), 2)
    for one in (layout, turned):
        x = torch.ones(1, 16, requires_grad=True)
        dds(x, torch.ones(2, 8, 8, requires_grad=True), one).sum().backward()
        assert x.grad.tolist() == [[8.0] * 16]


def test_words_and_picture():
    layout = Layout.from_mask(MASK, 8)
    assert repr(layout) == "Layout(24 x 32, 3 x 4 blocks of 8 x 8, 4 kept, density 0.3333, cpu)"
    assert layout.picture() == "█·█·\n····\n██··"
    assert layout.picture(width=2) == "░░\n█·"  # squares of 2 x 2 blocks: 1 of 4, 1 of 4; the last line averages the one row that is there


def test_moves_to_another_device():
    layout = Layout.from_mask(MASK, 8).to("meta")
    assert layout.device.type == layout.index.device.type == "meta"
    assert layout.kept == 4


def test_file(tmp_path):
    path = tmp_path / "layout.safetensors"
    for layout in (Layout.from_mask(MASK, (8, 32), (20, 100)), Layout.from_mask(torch.stack([MASK, ~MASK]), 16)):
        layout.save(path)
        assert Layout.load(path) == layout
        theirs = load_file(path)  # the library reads ours, and we read what it writes
        assert {name: tensor.tolist() for name, tensor in theirs.items()} == {name: tensor.tolist() for name, tensor in layout.state().items()}
        save_file(theirs, path, metadata={"by": "safetensors"})
        assert Layout.load(path) == layout
    raw = path.read_bytes()
    for cut in (0, 7, 8, 40, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match=r"layout.safetensors: expected a layout in safetensors format"):
            Layout.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"layout.safetensors: expected a layout in safetensors format"):
        Layout.load(path)


def test_crop_and_with_mask():
    layout = Layout.from_mask(MASK, (8, 16), (22, 60))
    assert torch.equal(layout.crop(9, 33).element_mask(), layout.element_mask()[:9, :33])
    assert layout.crop(22, 60) == layout
    with pytest.raises(ValueError, match=r"rows, columns: expected 1\.\.22 and 1\.\.60, got \(23, 1\)"):
        layout.crop(23, 1)
    other = layout.with_mask(~MASK, 8)
    assert other == Layout.from_mask(~MASK, (8, 16), (22, 60))
    assert torch.equal(other.index, Layout.from_mask(~MASK, (8, 16), (22, 60)).index)
    with pytest.raises(ValueError, match=r"mask: expected \(3, 4\) bool on cpu"):
        layout.with_mask(MASK.float(), 4)
