"""Text that is read as it comes, from a dataset of Hugging Face's (extra `hf`): nothing is downloaded beforehand or kept, be it more than a disk holds.

The documents, each followed by an empty line, are joined to chunks, and windows are cut from random places of a chunk until as many tokens were drawn as it
has; then the next chunk is read. After the last the first comes again. The position is therefore where the chunk began, as `datasets` says it, and how much
was drawn from it. Who goes on from it reads that chunk once more. Every process of a run reads every chunk and takes its part of each batch, so that the
position is the same for any number of them.

What a run is judged by comes first: the documents of the first million bytes are the validation split, those of the next are for tuning, and training begins
after the one or both.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetorch.runs.errors import UsageError

CHUNK = 1 << 22  # bytes of text that windows are drawn from at a time
HELD_OUT = 1_000_000  # bytes of the validation split, and of the tuning split
BETWEEN = b"\n\n"  # documents

Text = NDArray[np.uint8]


def dataset(name: str) -> Any:
    """The training split of a dataset as a stream: NAME, NAME:CONFIG, or a folder of files that `datasets` knows (.parquet, .jsonl, .txt …).

    UsageError when the library is not there, or there is no such dataset.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UsageError("a dataset of Hugging Face's needs their library: pip install 'onetorch[hf]'") from error
    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split="train", streaming=True)
    except Exception as error:  # of many kinds: of the hub, of the network, of the files
        raise UsageError(f"dataset {name} cannot be read: {' '.join(str(error).split())[:300]}") from error


class Stream:
    """Windows of a stream of documents. `state_dict` and `load_state_dict` make it fit for a run's State.

    Args:
        source: gives documents, dicts, and its position as state_dict() and load_state_dict(); `datasets.IterableDataset` does.
        column: the text of a document.
        context: the most tokens that are asked for in a window.
        held_out: with "validation" the tuning split is trained on.
        name: of the dataset, for errors.

    `held_out` is the split that was asked for, as bytes. `spell` turns bytes into tokens, and is the identity until it is set.
    """

    def __init__(self, source: Any, column: str, context: int, held_out: Literal["validation", "tuning"] = "validation", name: str = "") -> None:
        self.source, self.column, self.context, self.name = source, column, context, name
        self.spell: Callable[[Text], NDArray[np.unsignedinteger]] = lambda text: text
        for _ in ("validation", "tuning")[: 1 + (held_out == "tuning")]:
            self.held_out = self._read(HELD_OUT)
        self._first = self._place = self._next = source.state_dict()
        self._chunk: NDArray[np.unsignedinteger] | None = None
        self._drawn = 0

    def _read(self, size: int) -> Text:
        """Documents from where the source stands until they have `size` bytes; fewer at its end."""
        found, length = list[bytes](), 0
        try:
            for document in self.source:
                text = document.get(self.column)
                if not isinstance(text, str):
                    raise UsageError(f"dataset {self.name}: a document has no text in the column {self.column!r}; it has {', '.join(document)} (--column)")
                found.append(text.encode("utf-8") + BETWEEN)
                length += len(found[-1])
                if length >= size:
                    break
        except UsageError:
            raise
        except Exception as error:  # of the network or of a file, whatever kind the library has for it
            raise UsageError(f"dataset {self.name} cannot be read further: {' '.join(str(error).split())[:300]}") from error
        # The next reading begins where this one ended.
        self.source.load_state_dict(self.source.state_dict())
        return np.frombuffer(b"".join(found), np.uint8)

    def sample(self) -> Text:
        """The text that training begins with: what a vocabulary is learnt from. Asked for before the first batch."""
        self.source.load_state_dict(self._first)
        return self._read(CHUNK)

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        """`size` windows of `context` + 1 tokens as an int64 tensor (size, context + 1)."""
        if self._chunk is None:
            self._chunk = self._fill()
        if self._drawn >= self._chunk.size:
            self._place, self._drawn = self._next, 0
            self._chunk = self._fill()
        starts = torch.randint(self._chunk.size - context, (size, 1), generator=generator).numpy()
        self._drawn += size * context
        return torch.from_numpy(self._chunk[starts + np.arange(context + 1)].astype(np.int64))

    def _fill(self) -> NDArray[np.unsignedinteger]:
        """The tokens of the chunk that begins at `_place`, or of the first one where the dataset ends there."""
        for place in (self._place, self._first):
            self.source.load_state_dict(place)
            chunk = self.spell(self._read(CHUNK))
            if chunk.size > self.context:
                self._place, self._next = place, self.source.state_dict()
                return chunk
        raise UsageError(f"dataset {self.name}: too short, {chunk.size:,} tokens to train on after the held-out documents, the context is {self.context:,}")

    def state_dict(self) -> dict[str, Any]:
        """Where the chunk began, and the tokens drawn from it."""
        return {"place": self._place, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; its chunk is read when the next batch is asked for."""
        self._place, self._drawn, self._chunk = state["place"], state["drawn"], None
