"""What a path holds, as the generative models would see it: `onetorch data PATH`."""

import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from onetorch.generative import data, images
from onetorch.runs.errors import UsageError

LOOKED_AT = 1 << 20  # bytes of a text by which it is compressed, from its middle


def describe(path: Path | None) -> list[tuple[str, str]]:
    """Lines (what, finding) on a text, token shards, images, or a folder of one of these; None is the standard library's source.

    UsageError names the file that is missing, cannot be read or does not fit.
    """
    if path is not None and str(path).startswith(images.DATASET):
        return _images(path)
    if path is not None and not path.exists():
        raise UsageError(f"data {path}: there is no such file or folder")
    shards = data.shards(path)
    if shards is not None:
        return _shards(shards, path)
    if path is not None and (path.suffix in (".npy", ".npz") or (path.is_dir() and _pictures(path))):
        return _images(path)
    return _text(path)


def _pictures(folder: Path) -> bool:
    """Whether most of a folder's files are pictures."""
    kinds = Counter(p.suffix.lower() in images.SUFFIXES for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return kinds[True] > kinds[False]


def _text(path: Path | None) -> list[tuple[str, str]]:
    text = data.read(path)
    rows = [("kind", "text, for gpt" if path is not None else "text, for gpt: the source of Python's standard library")]
    if path is not None and path.is_dir():
        files = data._files(path)
        binary = [p for p in files if b"\0" in p.read_bytes()]
        rows.append(("files", f"{len(files) - len(binary):,}"))
        if binary:
            names = ", ".join(str(p.relative_to(path)) for p in binary[:3])
            rows.append(("left out", f"{len(binary):,} that hold a zero byte: {names}{' …' * (len(binary) > 3)}"))
    lines = int(np.count_nonzero(text == ord("\n")))
    rows.append(("bytes", f"{text.size:,} in {lines:,} lines; {len(np.unique(text)):,} different ones"))
    try:
        text.tobytes().decode("utf-8")
        rows.append(("encoding", "UTF-8"))
    except UnicodeDecodeError as error:
        rows.append(("encoding", f"not UTF-8: {error.reason} at byte {error.start:,}; it is trained on as bytes all the same"))
    middle = text[max(text.size - LOOKED_AT, 0) // 2 :][:LOOKED_AT].tobytes()
    rows.append(("zlib", f"{8 * len(zlib.compress(middle, 9)) / len(middle):.2f} bits per byte, of {len(middle):,} bytes in the middle"))
    rows.append(("sha-256", data.digest(text) + "…"))
    longest = (text.size // data.FRACTION - 1) // 2
    if longest < 1:
        raise UsageError(f"data {path}: too short, {text.size:,} bytes; even --context 1 needs {data.FRACTION * 3}")
    cut = data.split(text, 1, path)
    rows.append(("parts", f"{cut.train.size:,} bytes to train on, {cut.tuning.size:,} for tuning, {cut.validation.size:,} for validation"))
    rows.append(("context", f"at most {longest:,}"))
    return rows


def _shards(found: data.Shards, path: Path | None) -> list[tuple[str, str]]:
    dtypes = ", ".join(sorted({str(a.dtype) for a in found.arrays}))
    largest = found.largest()
    rows = [("kind", "token shards, for gpt; what the tokens stand for is not known, so losses are nats per token")]
    rows.append(("tokens", f"{found.size:,} in {len(found.arrays)} file{'s' * (len(found.arrays) > 1)}, {dtypes}"))
    # 256 says that tokens are bytes.
    rows.append(("vocabulary", f"the largest token is {largest:,}: --vocabulary {largest + 1 + (largest == 255)} or more"))
    rows.append(("sha-256", data.digest(found) + "…"))
    cut = data.split(found, 1, path)
    named = "by the names of the files" if found.held_out else "the last tenth"
    rows.append(("parts", f"{cut.train.size:,} tokens to train on, {cut.tuning.size:,} for tuning, {cut.validation.size:,} for validation ({named})"))
    rows.append(("context", f"at most {(min(part.size for part in cut) - 1) // 2:,}"))
    return rows


def _images(path: Path) -> list[tuple[str, str]]:
    found = images.read(path)
    C, H, W = found.shape
    rows = [("kind", "images, for diffusion and the other families of images"), ("images", f"{len(found):,} of {W} x {H} pixels, {C} channel{'s' * (C > 1)}")]
    rows.append(("levels", f"{found.levels}; bits per dimension of a model that knows nothing: {np.log2(found.levels):.2f}"))
    rows.append(("for gpt", f"--images data --context {C * H * W} --vocabulary {found.levels + 1}, pixel after pixel"))
    if found.labels is not None:
        count = np.bincount(found.labels, minlength=len(found.names))
        named = ", ".join(f"{name} {n:,}" for name, n in list(zip(found.names, count, strict=True))[:10])
        rows.append(("labels", f"{len(found.names)}: {named}{' …' * (len(found.names) > 10)}"))
    rows.append(("sha-256", found.digest() + "…"))
    train, held_out = images.parts(found, "validation", path)
    rows.append(("parts", f"{len(train):,} to train on (a fifth of all for tuning among them), {len(held_out):,} for validation"))
    return rows
