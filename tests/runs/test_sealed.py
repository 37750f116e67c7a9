"""Files that are checked before they are believed; safetensors against the library that defines them."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from onetorch.runs import sealed
from onetorch.runs.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([True, False, True]),
    "c": torch.tensor(3.5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 4, dtype=torch.float64),
    "e": torch.arange(5, dtype=torch.int64).flip(0),
    "f": torch.ones(2, 2).t().half(),
    "g": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64),
}


def content(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(bytes(piece) for piece in sealed.dump(tensors))


def view(data: bytes) -> memoryview:
    return np.frombuffer(bytearray(data), np.uint8).data


def test_the_library_reads_what_is_written_and_the_other_way_round() -> None:
    theirs = safetensors.torch.load(content(TENSORS))
    ours = sealed.parse(view(safetensors.torch.save({k: v.contiguous() for k, v in TENSORS.items()})), "x")
    for found in (theirs, ours, sealed.parse(view(content(TENSORS)), "x")):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_tensors_share_the_files_memory() -> None:
    data = view(content(TENSORS))
    found = sealed.parse(data, "x")
    first, size = torch.frombuffer(data, dtype=torch.uint8).data_ptr(), len(data)
    assert all(first <= t.data_ptr() < first + size for t in found.values() if t.numel())


def header(**entries: object) -> bytes:
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("text", "data", "why"),
    [
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}), b"1234567", "does not fill"),
        (header(a={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}), b"12345678", "does not fill"),
        (header(a={"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}), b"", "does not fill"),
        (header(a={"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}), b"12345678", "whole numbers"),
        (header(a={"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}), b"12345678", "whole numbers"),
        (header(a={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}), b"12345678", "whole numbers"),
        (header(a={"dtype": "OBJ", "shape": [2], "data_offsets": [0, 8]}), b"12345678", "needs dtype"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1}), b"12345678", "needs dtype"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), b"12345678", "gap"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), b"12345678", "fill 4 of 8"),
        (header(a={"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, b={"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}), b"12345678", "overlap"),
        (header(__metadata__={"a": 1}), b"", "__metadata__"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "twice"),
        (b"[]", b"", "JSON object"),
        (b'{"a":' * 5000, b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
    ],
)
def test_headers_that_do_not_account_for_every_byte_are_refused(text: bytes, data: bytes, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        sealed.parse(view(struct.pack("<Q", len(text)) + text + data), "weights")


def test_claims_of_size() -> None:
    for data in (b"", b"1234567", struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 3) + b"{}"):
        with pytest.raises(CheckpointError, match="weights is no safetensors file: it claims"):
            sealed.parse(view(data), "weights")
    with pytest.raises(CheckpointError, match="at most 64 are read"):
        sealed.parse(view(content(TENSORS)), "weights", header_limit=64)


def test_a_thousand_mutants_are_read_as_the_library_reads_them_or_refused() -> None:
    original, rng, read = content(TENSORS), random.Random(0), 0
    for _ in range(1000):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b'0123456789[]{},:"'))
        try:
            ours = sealed.parse(view(bytes(data)), "x")
        except CheckpointError:
            continue
        theirs = safetensors.torch.load(bytes(data))  # what is accepted here is accepted there, and is the same
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n].view(-1).view(torch.uint8), theirs[n].view(-1).view(torch.uint8)) for n in ours)
        read += 1
    assert 20 < read < 990


def test_read_compares_sizes_first(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    data, digest = sealed.read(path, 5)
    assert bytes(data) == b"12345"
    assert digest == "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"  # echo -n 12345 | sha256sum
    with pytest.raises(CheckpointError, match="5 bytes where the manifest says 4"):
        sealed.read(path, 4)
    with pytest.raises(CheckpointError, match="at most 4"):
        sealed.read(path, limit=4)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        sealed.read(tmp_path / "link")
