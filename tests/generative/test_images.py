import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import images, stream
from onetorch.generative.images import Images
from onetorch.runs.errors import UsageError

RANDOM = np.random.default_rng(0)


def some(n: int = 40, levels: int = 256, shape: tuple[int, ...] = (1, 4, 4), classes: int = 3) -> Images:
    pixels = np.random.default_rng(0).integers(levels, size=(n, *shape)).astype(np.uint8)
    return Images(pixels, levels, np.arange(n) % classes, tuple(map(str, range(classes))))


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (6, 5), mode: str = "L") -> None:
    from PIL import Image

    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        Image.fromarray(np.full(shape, i, np.uint8)).save(folder / name)


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    reference, ours = datasets.load_digits(), images.digits()
    assert (ours.pixels[:, 0] == reference.images).all()
    assert ours.labels is not None
    assert (ours.labels == reference.target).all()
    assert (ours.levels, ours.shape, len(ours)) == (17, (1, 8, 8), 1797)


@pytest.fixture(scope="module")
def glyphs() -> Images:
    pytest.importorskip("matplotlib")
    return images.glyphs()


def test_glyphs_are_whole_and_labelled(glyphs: Images) -> None:
    assert len(glyphs) == 62 * 21 * 8
    assert glyphs.shape == (1, 28, 28)
    assert glyphs.labels is not None
    assert (np.bincount(glyphs.labels) == 21 * 8).all()
    x = glyphs.pixels[:, 0]
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) > 0.999 * len(x)  # no rendering twice
    assert (x.reshape(len(x), -1).max(1) > 200).all()
    edge = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    assert (edge.max(1) > 64).mean() < 0.005  # hardly one is cut off
    ink = x.mean((1, 2))
    assert ink[glyphs.labels == images.CHARACTERS.index("W")].mean() > 1.5 * ink[glyphs.labels == images.CHARACTERS.index("l")].mean()


def test_a_glyph_has_the_pixels_of_another_rasteriser(glyphs: Images) -> None:
    """The same outline under the same map, drawn by matplotlib's Agg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    for label, character in ((6, "6"), (11, "B"), (52, "q")):
        assert images.CHARACTERS[label] == character
        font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        path = TextPath((0, 0), character, size=1, prop=FontProperties(fname=font))
        affine = images._placements(np.array([label * 8]), images._flatten(np.asarray(path.vertices), np.asarray(path.codes)))[0]
        placed = path.vertices @ affine[:, :2].T + affine[:, 2]
        canvas = FigureCanvasAgg(Figure(figsize=(28, 28), dpi=1))
        axes = canvas.figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 28), ylim=(28, 0))
        axes.axis("off")
        axes.add_patch(PathPatch(Outline(placed, path.codes), facecolor="black", linewidth=0))
        canvas.draw()
        other = 255 - np.asarray(canvas.buffer_rgba())[..., 0].astype(float)
        ours = glyphs.pixels[label * 8, 0].astype(float)
        assert np.abs(ours - other).max() < 40
        assert np.abs(ours - other).mean() < 2
        assert ours.sum() == pytest.approx(other.sum(), rel=0.02)


def test_a_square_covers_what_it_covers() -> None:
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    lines = np.stack([square, np.roll(square, -1, 0)], 1)
    affine = np.array([[[2.5, 0.0, 3.25], [0.0, -2.0, 12.0]]])  # x 3.25 to 5.75, y 10 to 12
    picture = images._render(lines, affine)[0]
    assert picture[10:12, 3:6].tolist() == [[191, 255, 191], [191, 255, 191]]  # 0.75 of 255
    assert picture.sum() == 2 * (191 + 255 + 191)
    twice = images._render(np.concatenate([lines, lines]), affine)[0]  # one upon the other: inside is inside
    assert (twice[10:12, 4] == 255).all()
    assert twice.sum() == twice[10:12, 3:6].sum()
    turned = images._render(lines[:, ::-1], affine)[0]  # the other way round
    assert (turned == picture).all()


def test_groups_stand_on_one_side_only(glyphs: Images) -> None:
    train, held_out = images.parts(glyphs, "validation")
    rest, tuning = images.parts(glyphs, "tuning")
    assert len(train) + len(held_out) == len(glyphs)
    assert len(rest) + len(tuning) == len(train)
    groups = [set(p.groups.tolist()) for p in (held_out, tuning, rest)]  # type: ignore[union-attr]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert [round(len(p) / len(glyphs), 1) for p in (held_out, tuning, rest)] == [0.2, 0.2, 0.6]
    assert len(np.unique(train.labels)) == 62  # type: ignore[arg-type]


def test_an_images_part_does_not_depend_on_those_after_it() -> None:
    many, few = some(1000), some(1000).take(np.arange(400))
    held = [images.parts(x, "validation")[1] for x in (many, few)]
    assert (held[0].pixels[: len(held[1])] == held[1].pixels).all()
    part = [(i * 0x9E3779B97F4A7C15 % 2**64) / 2**64 for i in range(400)]  # the fractional part of i times the golden ratio
    assert len(held[1]) == sum(u < 0.2 for u in part)
    assert part[1] == pytest.approx((math.sqrt(5) - 1) / 2)
    with pytest.raises(UsageError, match="too few, 3 images"):
        images.parts(some(3), "validation")


def test_batches_are_drawn_from_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    first = images.batch(some(), 7, generator)
    state = generator.get_state()
    second = images.batch(some(), 7, generator)
    torch.manual_seed(99)
    generator.set_state(state)
    again = images.batch(some(), 7, generator)
    assert (again[0] == second[0]).all()
    assert (again[1] == second[1]).all()
    assert not (first[0] == second[0]).all()
    assert first[0].shape == (7, 1, 4, 4)
    assert first[0].dtype == torch.uint8
    data = some()
    i = (data.pixels == first[0][0].numpy()).all((1, 2, 3)).nonzero()[0].item()
    assert data.labels is not None
    assert data.labels[i] == first[1][0]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_quantize_is_the_inverse_of_scale(levels: int) -> None:
    x = torch.arange(levels, dtype=torch.uint8)
    y = images.scale(x, levels)
    assert y[0] == -1
    assert y[-1] == 1
    assert (images.quantize(y, levels) == x).all()
    assert (images.quantize(y + 0.9 / (levels - 1), levels) == x).all()
    assert images.quantize(torch.tensor([-7.0, 7.0]), levels).tolist() == [0, levels - 1]


def test_arrays_are_mapped_and_may_have_their_channels_last(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(256, size=(10, 5, 4, 3)).astype(np.uint8)
    for name, a in {"plain": array[..., 0], "last": array, "first": array.transpose(0, 3, 1, 2), "bits": array[..., 0] > 9}.items():
        np.save(tmp_path / name, a)
    read = {name: images.read(tmp_path / f"{name}.npy") for name in ("plain", "last", "first", "bits")}
    assert read["plain"].shape == (1, 5, 4)
    assert (read["last"].pixels == read["first"].pixels).all()
    assert (read["last"].pixels[:, 1] == array[..., 1]).all()
    assert read["bits"].levels == 2
    mapped = read["last"].pixels
    while isinstance(mapped, np.ndarray) and not isinstance(mapped, np.memmap):
        mapped = mapped.base  # type: ignore[assignment]
    assert isinstance(mapped, np.memmap)
    assert read["last"].digest() == read["first"].digest() != read["plain"].digest()


def test_named_arrays_carry_labels_levels_and_groups(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(6, 2, 2) % 5
    np.savez(tmp_path / "a.npz", images=array, labels=np.array([0, 1, 2, 0, 1, 2], np.uint8), levels=5, groups=np.array([1, 1, 2, 2, 3, 3]))
    read = images.read(tmp_path / "a.npz")
    assert read.levels == 5
    assert read.names == ("0", "1", "2")
    assert read.groups is not None
    assert read.groups.tolist() == [1, 1, 2, 2, 3, 3]
    assert (read.pixels[:, 0] == array).all()


def test_a_folder_is_labelled_by_sub_folder_or_by_name(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_images(tmp_path / "a", ["cat/0.png", "dog/1.png", "cat/2.png", "dog/3.png"])
    read = images.read(tmp_path / "a")
    assert read.names == ("cat", "dog")
    assert read.labels is not None
    assert read.labels.tolist() == [0, 0, 1, 1]
    assert read.pixels[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    assert read.shape == (1, 5, 6)
    write_images(tmp_path / "b", ["ant_0.png", "bee-1.png", "ant_2.png", "bee_3.png"], mode="RGB")
    read = images.read(tmp_path / "b")
    assert (read.names, read.shape) == (("ant", "bee"), (3, 5, 6))
    write_images(tmp_path / "c", ["0.png", "1.png", "2.png"])
    assert images.read(tmp_path / "c").labels is None
    write_images(tmp_path / "c", ["wide.png"], size=(9, 4))
    with pytest.raises(UsageError, match=r"wide\.png has 9x4 pixels, 0\.png has 6x5; .*--size"):
        images.read(tmp_path / "c")
    assert images.read(tmp_path / "c", size=4).shape == (1, 4, 4)


def test_a_dataset_is_streamed_into_memory(tmp_path: Path) -> None:
    """Of Hugging Face's library, here a folder of pictures of its own format: the same as the folder read by ourselves."""
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for i in range(24):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((5, 7), 10 * i, np.uint8)).save(tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png")
    found, ours = images.read(Path(f"hf:{tmp_path}"), size=4), images.read(tmp_path / "train", size=4)
    assert found.shape == (1, 4, 4)
    assert found.names == ours.names == ("a", "b")
    order = [np.argsort(x.pixels[:, 0, 0, 0]) for x in (found, ours)]
    assert (found.pixels[order[0]] == ours.pixels[order[1]]).all()
    assert found.labels is not None
    assert ours.labels is not None
    assert (found.labels[order[0]] == ours.labels[order[1]]).all()


class Source:
    """What a dataset gives, with features of these names' types."""

    def __init__(self, rows: list[dict], **kinds: str) -> None:
        self.rows, self.features = rows, {name: type(kind, (), {"names": ["x", "y"]})() for name, kind in kinds.items()}

    def __iter__(self) -> Iterator[dict]:
        yield from self.rows


def test_a_dataset_without_images_or_of_several_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    rows = [{"picture": image.new("RGB", (4 + i % 2, 4), (i, 0, 0)), "kind": i % 2} for i in range(6)]
    found: dict[str, Source] = {
        "text": Source([], text="Value"),
        "sizes": Source(rows, picture="Image", kind="ClassLabel"),
        "good": Source(rows[::2], picture="Image", kind="ClassLabel"),
        "unlabelled": Source([r | {"kind": -1} for r in rows[::2]], picture="Image", kind="ClassLabel"),
    }
    monkeypatch.setattr(stream, "dataset", lambda name: found[name])
    with pytest.raises(UsageError, match=r"dataset text: expected a column of images, it has text \(Value\)"):
        images.read(Path("hf:text"))
    with pytest.raises(UsageError, match="dataset sizes: expected images of one size, got 4x4, 5x4"):
        images.read(Path("hf:sizes"))
    good = images.read(Path("hf:good"))
    assert good.pixels[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert good.names == ("x", "y")
    assert images.read(Path("hf:unlabelled")).labels is None
    assert images.read(Path("hf:sizes"), size=2).shape == (3, 2, 2)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_images(tmp_path / "a", ["0.png", "1.png"])
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"1\.png cannot be read"):
        images.read(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "float.npy", np.zeros((3, 4, 4)))
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "b.npz", pictures=np.zeros((2, 2, 2), np.uint8))
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.uint8))
    for name, complaint in {
        "empty": "no image stands in this folder", "float.npy": "expected uint8.*got float64", "text.npy": "cannot be read", "b.npz": "holds pictures",
        "flat.npy": r"\(N, C, H, W\)", "absent.npy": "cannot be read.*No such file", "a/0.png": "of another kind",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=complaint) as caught:
            images.read(tmp_path / name)
        assert Path(name).name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_of_other_images_is_told_the_flags() -> None:
    images.check(some(levels=17), (1, 4, 4), 17, 3)
    images.check(some(levels=17), (1, 4, 4), 17, 0)
    with pytest.raises(UsageError, match=r"--shape 1,4,4 --levels 17 --classes 3"):
        images.check(some(levels=17), (1, 8, 8), 17, 10)


def test_load_is_read_check_and_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.arange(50 * 16, dtype=np.uint8).reshape(50, 4, 4) % 5, labels=np.arange(50) % 2, levels=5)
    train, held_out = images.load(tmp_path / "a.npz", "digits", (1, 4, 4), 5, 2, "tuning")
    for part, expected in zip((train, held_out), images.parts(images.read(tmp_path / "a.npz"), "tuning"), strict=True):
        assert (part.pixels == expected.pixels).all()
    with pytest.raises(UsageError, match="--levels 5"):
        images.load(tmp_path / "a.npz", "digits", (1, 4, 4), 256, 2, "tuning")


@pytest.mark.parametrize("wrong", [
    {"pixels": np.zeros((2, 4, 4), np.uint8)}, {"pixels": np.zeros((2, 1, 4, 4))}, {"labels": np.zeros(3, np.int64)}, {"levels": 1}, {"levels": 4},
    {"labels": np.array([0, 5])}, {"groups": np.zeros(2, np.int32)},
])  # fmt: skip
def test_wrong_images_are_named(wrong: dict) -> None:
    good = {"pixels": np.full((2, 1, 4, 4), 4, np.uint8), "levels": 5, "labels": np.zeros(2, np.int64), "names": ("a", "b")}
    Images(**good)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Images(**good | wrong)


def test_a_grid_is_a_png_with_every_pixel(tmp_path: Path) -> None:
    data = some(5, levels=17, shape=(3, 4, 2))
    images.write_grid(tmp_path / "g.png", data.pixels, 17, columns=3, zoom=2)
    content = (tmp_path / "g.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (3 * 5 + 1, 2 * 9 + 1)
    start = content.index(b"IDAT") + 4
    size = struct.unpack(">I", content[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(content[start : start + size]), np.uint8).reshape(height, 1 + 3 * width)
    canvas = rows[:, 1:].reshape(height, width, 3)
    fourth = canvas[10:18:2, 1:5:2].transpose(2, 0, 1)  # second row, first column
    assert (fourth == np.rint(data.pixels[3] * (255 / 16))).all()
    pil = pytest.importorskip("PIL.Image")
    with pil.open(tmp_path / "g.png") as image:
        assert (np.asarray(image) == canvas).all()
