"""Images as whole numbers: where they come from, the parts they are cut into, batches, and grids of samples as PNG.

    images = read(None, "digits")                              1797 images of 8x8 pixels with 17 grey levels, and which digit each shows
    train, held_out = parts(images, "validation")
    pixels, labels = batch(train, 64, generator)               (64, 1, 8, 8) uint8 and (64,) int64; the generator is the position in the data
    x = scale(pixels, images.levels)                           float32 between -1 and 1

The number of levels L a pixel may have is part of the data, because bits per dimension are counted from it: a model that knows nothing needs log2 L.

An image's part follows from the number of its group, and nothing else: neither a seed nor how many others there are. A group is what must not stand on
both sides: of the glyphs a character in one typeface family, in all its weights, slants and renderings; elsewhere each image is a group of its own.
"""

import gzip
import hashlib
import importlib.util
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetorch.generative import stream
from onetorch.runs.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
DATASET = "hf:"  # before the name of a dataset of Hugging Face's
PARTS = 5  # a fifth is held out, a fifth more is for tuning
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FAMILIES = {  # those of matplotlib's fonts that hold letters and digits; all files of a family are one design
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
                    "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern Roman": ("cmr10", "cmb10"),
    "Computer Modern Sans": ("cmss10",),
    "Computer Modern Typewriter": ("cmtt10",),
    "Computer Modern Math": ("cmmi10",),
}  # fmt: skip
GLYPH_SIZE = 28  # pixels
RENDERINGS = 8  # of each character in each font, by sizes, angles and places of their own


@dataclass(frozen=True, eq=False)
class Images:
    """N images of C channels, H by W pixels, each pixel one of `levels` values."""

    pixels: NDArray[np.uint8]  # (N, C, H, W), each below levels; may be mapped from a file
    levels: int = 256
    labels: NDArray[np.int64] | None = None  # (N,), each below len(names)
    names: tuple[str, ...] = ()  # of the classes
    groups: NDArray[np.int64] | None = None  # (N,); none: each image is one

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[1] not in (1, 3) or not self.pixels.size:
            raise ValueError(f"pixels must be a uint8 array (N, C, H, W) with C 1 or 3 and not empty, got {self.pixels.dtype} {self.pixels.shape}")
        for name, given in (("labels", self.labels), ("groups", self.groups)):
            if given is not None and (given.dtype != np.int64 or given.shape != self.pixels.shape[:1]):
                raise ValueError(f"{name} must be an int64 array ({len(self.pixels)},), got {given.dtype} {given.shape}")
        if not 2 <= self.levels <= 256 or (self.levels < 256 and int(self.pixels.max()) >= self.levels):
            raise ValueError(f"levels must be 2 to 256 and above every pixel (largest {self.pixels.max()}), got {self.levels}")
        if self.labels is not None and (self.labels.min() < 0 or self.labels.max() >= len(self.names)):
            raise ValueError(f"labels must lie in 0 to {len(self.names) - 1}, got {self.labels.min()} to {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.pixels.shape[1:]

    def take(self, index: NDArray[np.int64]) -> "Images":
        """Those at `index` (n,), as a copy in memory."""
        rest = (None if a is None else a[index] for a in (self.labels, self.groups))
        return Images(np.ascontiguousarray(self.pixels[index]), self.levels, next(rest), self.names, next(rest))

    def digest(self) -> str:
        """The first 16 hexadecimal digits of a sha-256 of all that is here, by which a resumed run knows its data."""
        found = hashlib.sha256(repr((self.shape, self.levels, self.names)).encode())
        for array in (self.pixels, self.labels, self.groups):
            for i in range(0, 0 if array is None else len(array), 4096):
                found.update(np.ascontiguousarray(array[i : i + 4096]).data)  # type: ignore[index]
        return found.hexdigest()[:16]


def read(path: Path | None, embedded: Literal["digits", "glyphs"] = "digits", size: int = 0) -> Images:
    """The images at `path`, or the embedded ones where it is None.

    path: `.npy`, mapped and not read: uint8 (256 levels) or bool (2), shaped (N, H, W), (N, C, H, W) or (N, H, W, C). `.npz`: such an array as `images`
    and, where they are, `labels` (N,) and `groups` (N,) of integers and `levels`. A folder: all images in it and its sub-folders; the label is the name of
    the sub-folder, or else the file's name up to its first "_" or "-". `hf:NAME` or `hf:NAME:CONFIG`: the training split of a dataset of Hugging Face's (extra
    `hf`), streamed into memory: its first column of images, and its first of class labels where there is one. With `size`, an image of a folder or a dataset
    is scaled to it by its shorter side and cut out in the middle; without, all must have one size.

    Raises UsageError naming the file that cannot be read or does not fit.
    """
    if path is None:
        return digits() if embedded == "digits" else glyphs()
    if str(path).startswith(DATASET):
        return _dataset(str(path).removeprefix(DATASET), size)
    if path.is_dir():
        return _folder(path, size)
    try:
        if path.suffix in (".npy", ".npz"):
            with path.open("rb") as file:
                if file.read(4) not in (b"\x93NUM", b"PK\x03\x04"):  # numpy takes anything else for a pickle, and advises to load it
                    raise ValueError(f"it does not begin as numpy's {path.suffix} files do")
        if path.suffix == ".npy":
            return Images(*_pixels(np.load(path, mmap_mode="r", allow_pickle=False)))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                if "images" not in arrays:
                    raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}; expected an array called images")
                pixels, levels = _pixels(arrays["images"])
                labels, groups = (arrays[name].astype(np.int64) if name in arrays else None for name in ("labels", "groups"))
                levels = int(arrays["levels"]) if "levels" in arrays else levels
                names = () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
                return Images(pixels, levels, labels, names, groups)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"data {path} cannot be read: {' '.join(str(error).split())}") from error
    what = "a file of another kind" if path.exists() else "nothing: it is not there"
    raise UsageError(f"data {path}: expected a folder of images, .npy, .npz or hf:NAME, got {what}")


def _pixels(array: NDArray) -> tuple[NDArray[np.uint8], int]:
    """(N, C, H, W) and the number of levels, as a view where the array is uint8."""
    levels = {"uint8": 256, "bool": 2}.get(str(array.dtype))
    if levels is None:
        raise ValueError(f"expected uint8 (or bool), got {array.dtype}; floats between 0 and 1 become such by (x * 255).round().astype('uint8')")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    return array.view(np.uint8), levels


def _folder(folder: Path, size: int) -> Images:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise UsageError("a folder of images needs Pillow: pip install 'onetorch[data]'") from error
    files = sorted((p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()), key=lambda p: p.relative_to(folder).parts)
    if not files:
        raise UsageError(f"data {folder}: no image stands in this folder (looked for {', '.join(SUFFIXES)})")
    found: list[NDArray[np.uint8]] = []
    for file in files:
        try:
            with Image.open(file) as opened:
                found.append(_picture(opened, size))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UsageError(f"data {file} cannot be read: {' '.join(str(error).split())}") from error
        if found[-1].shape[:2] != found[0].shape[:2]:
            sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (found[0], found[-1])]
            raise UsageError(f"data {file} has {sizes[1]} pixels, {files[0].name} has {sizes[0]}; scale and cut all of them with --size")
    pixels = _stack(found)
    relative = [p.relative_to(folder) for p in files]
    if all(len(p.parts) > 1 for p in relative):
        words = [p.parts[0] for p in relative]
    else:
        words = [p.stem.replace("-", "_").split("_")[0] for p in relative]
    names = tuple(sorted(set(words)))
    if not 1 < len(names) <= len(files) // 2:
        return Images(pixels)  # the names tell no classes
    return Images(pixels, 256, np.array([names.index(w) for w in words], np.int64), names)


def _picture(image: Any, size: int) -> NDArray[np.uint8]:
    """(H, W) of a grey image of Pillow's, else (H, W, 3); with `size` scaled and cut to a square."""
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if size:
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), 3)  # 3: bicubic
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def _stack(found: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(N, C, H, W) of images of one size, grey where all of them are."""
    if all(a.ndim == 2 for a in found):
        return np.stack(found)[:, None]
    return np.ascontiguousarray(np.stack([a if a.ndim == 3 else np.repeat(a[:, :, None], 3, 2) for a in found]).transpose(0, 3, 1, 2))


def _dataset(name: str, size: int) -> Images:
    source = stream.dataset(name)
    kinds = {column: type(kind).__name__ for column, kind in (source.features or {}).items()}
    column, label = (next((c for c, kind in kinds.items() if kind == wanted), None) for wanted in ("Image", "ClassLabel"))
    if column is None:
        columns = ", ".join(f"{c} ({kind})" for c, kind in kinds.items())
        raise UsageError(f"dataset {name}: expected a column of images, it has {columns or 'none that is known'}")
    found: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    try:
        for row in source:
            found.append(_picture(row[column], size))
            if label is not None:
                labels.append(int(row[label]))
    except Exception as error:  # of the network or of a file, whatever kind the library has for it
        raise UsageError(f"dataset {name} cannot be read further than {len(found)} images: {' '.join(str(error).split())[:300]}") from error
    sizes = {f"{a.shape[1]}x{a.shape[0]}" for a in found}
    if len(sizes) != 1:
        some = ", ".join(sorted(sizes)[:5])
        raise UsageError(f"dataset {name}: expected images of one size, got {some or 'none'}; a square --shape scales and cuts them")
    if label is None or min(labels) < 0:  # -1 stands for none
        return Images(_stack(found))
    return Images(_stack(found), 256, np.array(labels, np.int64), tuple(source.features[label].names))


def digits() -> Images:
    """1797 handwritten digits, 8x8 pixels with 17 levels: the test set of Alpaydin and Kaynak (1998), as scikit-learn carries it (extra `data`)."""
    found = importlib.util.find_spec("sklearn")  # its file is read and not its code imported, which takes longer than many a run's first hundred steps
    if found is None or found.origin is None:
        raise UsageError("the digits are scikit-learn's: pip install 'onetorch[data]', or name images with --data")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",").astype(np.int64)  # (1797, 65)
    except OSError as error:
        raise UsageError(f"data {path} cannot be read: {error}") from error
    return Images(table[:, :64].reshape(-1, 1, 8, 8).astype(np.uint8), 17, table[:, 64].copy(), tuple("0123456789"))


def glyphs() -> Images:
    """10,416 images, 28x28 pixels with 256 levels: 62 characters in 21 fonts that matplotlib ships (extra `data`), each rendered 8 times.

    A rendering has a size, an angle, a slant and a place of its own, drawn by a fixed low-discrepancy sequence. A pixel is the part of it that the outline
    covers (unhinted; measured along 4 lines), so that the images depend on the fonts alone and not on a rasteriser. A group is a character in a family.
    """
    try:
        import matplotlib
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath
    except ModuleNotFoundError as error:
        raise UsageError("the glyphs are of matplotlib's fonts: pip install 'onetorch[data]', or name images with --data") from error
    place = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    groups: list[int] = []
    for family, fonts in enumerate(FAMILIES.values()):
        for font in fonts:
            properties = FontProperties(fname=place / f"{font}.ttf")
            for label, character in enumerate(CHARACTERS):
                path = TextPath((0, 0), character, size=1, prop=properties)
                lines = _flatten(np.asarray(path.vertices), np.asarray(path.codes))
                first = len(labels) * RENDERINGS
                pixels.append(_render(lines, _placements(np.arange(first, first + RENDERINGS), lines)))
                labels.append(label)
                groups.append(label * len(FAMILIES) + family)
    repeated = (np.repeat(np.array(a, np.int64), RENDERINGS) for a in (labels, groups))
    return Images(np.concatenate(pixels)[:, None], 256, next(repeated), tuple(CHARACTERS), next(repeated))


def _flatten(vertices: NDArray[np.float64], codes: NDArray[np.uint8], pieces: int = 6) -> NDArray[np.float64]:
    """The straight lines (E, 2, 2) of an outline in matplotlib's codes; a curve is `pieces` chords. 1 moves, 2 is a line, 3 and 4 are Beziers, 79 closes."""
    t = np.linspace(0, 1, pieces + 1)[1:, None]
    points: list[NDArray[np.float64]] = []
    lines, i = [], 0
    while i < len(codes):
        code, steps = codes[i], {3: 2, 4: 3}.get(int(codes[i]), 1)
        p, q = vertices[i : i + steps], points[-1] if points else vertices[i]
        if code == 1:
            points = [p[0]]
        elif code == 2:
            points.append(p[0])
        elif code == 3:
            points += list((1 - t) ** 2 * q + 2 * (1 - t) * t * p[0] + t**2 * p[1])
        elif code == 4:
            points += list((1 - t) ** 3 * q + 3 * (1 - t) ** 2 * t * p[0] + 3 * (1 - t) * t**2 * p[1] + t**3 * p[2])
        i += steps
        if code == 79 or i == len(codes) or codes[i] == 1:
            ring = np.array(points)
            lines.append(np.stack([ring, np.roll(ring, -1, 0)], 1))
    return np.concatenate(lines)


def _placements(number: NDArray[np.int64], lines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Affine maps (V, 2, 3) from an outline in ems, y upwards, to pixels, y downwards, its box in the middle but for a shift."""
    u = (number[:, None] * np.array([0.8566748838545029, 0.733891856627126, 0.6287067210378087, 0.5385972572236101, 0.46140201]) + 0.5) % 1  # (V, 5)
    size, angle, slant = 19 + 6 * u[:, 0], np.radians(8) * (2 * u[:, 1] - 1), 0.15 * (2 * u[:, 2] - 1)
    sin, cos = np.sin(angle), np.cos(angle)
    linear = size[:, None, None] * np.stack([np.stack([cos, slant * cos - sin], 1), -np.stack([sin, slant * sin + cos], 1)], 1)  # (V, 2, 2)
    middle = (lines.reshape(-1, 2).max(0) + lines.reshape(-1, 2).min(0)) / 2
    shift = GLYPH_SIZE / 2 + 1.5 * (2 * u[:, 3:5] - 1) - linear @ middle
    return np.concatenate([linear, shift[:, :, None]], 2)


def _render(lines: NDArray[np.float64], affine: NDArray[np.float64], fine: int = 4) -> NDArray[np.uint8]:
    """Pixels (V, S, S) of an outline under V affine maps: along each of S * fine lines of sight the covered length of every pixel, by the winding number."""
    V, S, R = len(affine), GLYPH_SIZE, GLYPH_SIZE * fine
    ends = np.einsum("vij,epj->vepi", affine[:, :, :2], lines) + affine[:, None, None, :, 2]  # (V, E, 2, 2)
    (x0, y0), (x1, y1) = np.moveaxis(ends[:, :, 0], 2, 0), np.moveaxis(ends[:, :, 1], 2, 0)  # each (V, E)
    sight = (np.arange(R) + 0.5) / fine
    cross = (y0[..., None] <= sight) != (y1[..., None] <= sight)  # (V, E, R)
    v, e, r = np.nonzero(cross)
    x = x0[v, e] + (sight[r] - y0[v, e]) / (y1[v, e] - y0[v, e]) * (x1[v, e] - x0[v, e])
    turn = np.where(y1[v, e] > y0[v, e], 1.0, -1.0)
    x = x.clip(0, S)
    column = np.minimum(x.astype(np.int64), S - 1)
    part = x - column  # of its pixel this crossing leaves the part right of x inside
    row = (v * R + r) * (S + 1) + column
    change = np.bincount(row, turn * (1 - part), V * R * (S + 1)) + np.bincount(row + 1, turn * part, V * R * (S + 1))
    winding = change.reshape(V, S, fine, S + 1)[..., :S].cumsum(-1)
    return np.rint(np.abs(winding).clip(0, 1).mean(2) * 255).astype(np.uint8)


def parts(images: Images, held_out: Literal["validation", "tuning"], name: Path | str | None = None) -> tuple[Images, Images]:
    """(what to train on, what to evaluate on): all but the held-out fifth and that fifth, or, for tuning, three fifths and a fifth, neither of them held out.

    The part of group g is the fifth in which the fractional part of g times the golden ratio lies: even over any stretch of numbers.
    Raises UsageError when a part has fewer than two images.
    """
    group = np.arange(len(images), dtype=np.uint64) if images.groups is None else images.groups.astype(np.uint64)
    fifth = ((group * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) * np.uint64(PARTS) >> np.uint64(32)  # 0 held out, 1 tuning
    chosen = (fifth != 0, fifth == 0) if held_out == "validation" else (fifth > 1, fifth == 1)
    train, rest = (np.flatnonzero(c) for c in chosen)
    if min(len(train), len(rest)) < 2:
        raise UsageError(f"{f'data {name}' if name else 'embedded images'}: too few, {len(images)} images; a fifth of them must be at least two")
    return images.take(train), images.take(rest)


def check(images: Images, shape: tuple[int, ...], levels: int, classes: int | None, name: Path | str | None = None) -> None:
    """UsageError with the flags to give where the images are not what a config says; classes: 0 for a model told no labels, None for one that knows none."""
    if images.shape != shape or images.levels != levels or classes not in (None, 0, len(images.names)):
        said, flag = ("", "") if classes is None else (f", {classes} classes", f" --classes {len(images.names)}")
        fits = f"--shape {','.join(map(str, images.shape))} --levels {images.levels}{flag}"
        raise UsageError(f"{f'data {name}' if name else 'embedded images'}: the config is for {shape}, {levels} levels{said}; for these images give {fits}")


def load(
    path: Path | None,
    embedded: Literal["digits", "glyphs"],
    shape: tuple[int, int, int],
    levels: int,
    classes: int | None,
    held_out: Literal["validation", "tuning"],
) -> tuple[Images, Images]:
    """(what to train on, what to evaluate on) as a config says: `read`, `check` and `parts`; pictures of a folder are scaled to `shape` where it is square."""
    found = read(path, embedded, shape[1] if shape[1] == shape[2] else 0)
    check(found, shape, levels, classes, path)
    return parts(found, held_out, path)


def batch(images: Images, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`size` images at random, (size, C, H, W) uint8, and their labels (size,) int64, zero where there are none; draws from `generator` alone."""
    index = torch.randint(len(images), (size,), generator=generator).numpy()
    labels = np.zeros(size, np.int64) if images.labels is None else images.labels[index]
    return torch.from_numpy(images.pixels[index]), torch.from_numpy(labels)


def scale(pixels: Tensor, levels: int) -> Tensor:
    """Levels 0 to L - 1 as float32 between -1 and 1."""
    return pixels.float() * (2 / (levels - 1)) - 1


def quantize(x: Tensor, levels: int) -> Tensor:
    """The nearest level to each value of x, uint8: the inverse of `scale`."""
    return ((x.float() + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.uint8)


def write_grid(path: Path, pixels: NDArray[np.uint8], levels: int, columns: int = 0, zoom: int = 0) -> None:
    """Write images (N, C, H, W) as one PNG, row by row, with a line of grey between; each pixel `zoom` wide, or so that an image has about 56."""
    N, C, H, W = pixels.shape
    columns = columns or math.ceil(math.sqrt(N))
    zoom = zoom or max(1, round(56 / max(H, W)))
    rows = -(-N // columns)
    bright = np.rint(pixels * (255 / (levels - 1))).astype(np.uint8).repeat(zoom, 2).repeat(zoom, 3).transpose(0, 2, 3, 1)  # (N, h, w, C)
    h, w = H * zoom + 1, W * zoom + 1
    canvas = np.full((rows * h + 1, columns * w + 1, C), 96, np.uint8)
    for i, image in enumerate(bright):
        y, x = i // columns * h + 1, i % columns * w + 1
        canvas[y : y + h - 1, x : x + w - 1] = image
    lines = b"".join(b"\0" + line.tobytes() for line in canvas)  # no filter
    head = struct.pack(">IIBBBBB", canvas.shape[1], canvas.shape[0], 8, 0 if C == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks))
