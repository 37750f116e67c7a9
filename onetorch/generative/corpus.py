"""What GPT is trained on and judged by, in its tokens: a text, token shards, images pixel by pixel, or a stream."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onetorch.generative import data, images, stream
from onetorch.generative.images import Images
from onetorch.generative.stream import Stream
from onetorch.generative.vocabulary import BYTES, Vocabulary, learn
from onetorch.runs.errors import UsageError

Given = NDArray[np.unsignedinteger] | Images | None


@dataclass(frozen=True)
class Corpus:
    """The data of a config as they were found."""

    train: Any  # bytes, shards, rows of pixels, or a stream
    held_out: Any  # of the same kind; of a stream, bytes
    digest: str  # by which a resumed run knows its data
    images: tuple[Images, Images] | None = None  # what the rows of pixels show

    @property
    def stream(self) -> Stream | None:
        """What has a position of its own."""
        return self.train if isinstance(self.train, Stream) else None

    @property
    def texts(self) -> tuple[Any, Any] | None:
        """The bytes of both parts, where there are such."""
        return None if self.images or isinstance(self.train, Stream | data.Shards) else (self.train, self.held_out)


def read(config: Any, given: Given = None) -> Corpus:
    """The data that a gpt.Config names, or those `given` in memory instead: bytes as uint8 (N,), tokens as uint16 or uint32 (N,), or images.

    UsageError where they are not there, or the config's vocabulary or context is not made for them; ValueError for an array of another kind.
    """
    if isinstance(given, Images):
        return _images(config, given)
    if given is not None:
        if given.ndim != 1 or given.dtype not in (np.uint8, np.uint16, np.uint32):
            raise ValueError(f"expected bytes as uint8 (N,), tokens as uint16 or uint32 (N,), or Images, got an array of {given.dtype} {given.shape}")
        return _text(config, given) if given.dtype == np.uint8 else _shards(config, data.Shards([given]))
    if config.images is not None:
        return _images(config, images.read(config.data) if config.images == "data" else images.read(None, config.images))
    if config.dataset is not None:
        if config.vocabulary < BYTES:
            raise UsageError(f"vocabulary must be at least {BYTES} for a text, got {config.vocabulary}")
        found = Stream(stream.dataset(config.dataset), config.column, config.context, config.held_out, config.dataset)
        return Corpus(found, found.held_out, hashlib.sha256(f"{config.dataset} {data.digest(found.held_out)}".encode()).hexdigest()[:16])
    shards = data.shards(config.data)
    return _text(config, data.read(config.data)) if shards is None else _shards(config, shards)


def _text(config: Any, text: data.Text) -> Corpus:
    if config.vocabulary < BYTES:
        raise UsageError(f"vocabulary must be at least {BYTES} for a text, got {config.vocabulary}")
    return Corpus(*data.parts(text, config.context, config.held_out, config.data), data.digest(text))


def _shards(config: Any, shards: data.Shards) -> Corpus:
    name, largest = "data given" if config.data is None else f"data {config.data}", shards.largest()
    if config.vocabulary == BYTES:
        raise UsageError(f"{name} are token shards, with numbers up to {largest:,}: give their vocabulary with --vocabulary (256 is for bytes)")
    if largest >= config.vocabulary:
        raise UsageError(f"{name}: the largest token is {largest:,}; --vocabulary must be above it, got {config.vocabulary:,}")
    return Corpus(*data.parts(shards, config.context, config.held_out, config.data), data.digest(shards))


def _images(config: Any, found: Images) -> Corpus:
    D = found.pixels[0].size
    if config.context != D or config.vocabulary != found.levels + 1:
        shown = f"{' x '.join(map(str, found.shape))} pixels of {found.levels} levels"
        raise UsageError(f"images {config.data or config.images or 'given'}: for images of {shown} give --context {D} --vocabulary {found.levels + 1}")
    parts = images.parts(found, config.held_out, config.data)
    return Corpus(data.pixels(parts[0]), data.pixels(parts[1]), found.digest(), parts)


def spell(model: Any, corpus: Corpus, config: Any) -> tuple[Any, Any]:
    """(what to train on, what is held out) in the model's tokens. A model that has no vocabulary or no counts yet takes them from what is trained on."""
    if corpus.images or isinstance(corpus.train, data.Shards):
        return corpus.train, corpus.held_out
    if config.counts and not model.counts.length:
        model.counts.count(corpus.train)
    vocabulary = model.vocabulary()
    if vocabulary is None:
        try:
            merges = learn(corpus.stream.sample() if corpus.stream else corpus.train, config.vocabulary)
        except ValueError as error:
            raise UsageError(f"vocabulary: {error}") from error
        model.merges.copy_(torch.from_numpy(merges))
        vocabulary = Vocabulary(merges)
    held_out = vocabulary.encode(corpus.held_out)
    if corpus.stream:
        corpus.stream.spell = vocabulary.encode
        train: Any = corpus.stream
    else:
        train = vocabulary.encode(corpus.train)
    if min(p.size for p in (train, held_out) if isinstance(p, np.ndarray)) < 2 * config.context + 1:
        name = config.dataset or config.data or ""
        raise UsageError(f"data {name}: too short, {held_out.size:,} tokens held out; {2 * config.context + 1:,} hold two windows of the context")
    return train, held_out
