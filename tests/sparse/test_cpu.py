"""Building the kernels: without a compiler, with one that fails, and once for all processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onetorch.sparse import Layout, cpu, dds, sdd

PRODUCT = """
import torch
from onetorch.sparse import Layout, dds
layout = Layout.from_mask(torch.tensor([[True, False], [True, True]]), 8)
x, values = torch.ones(3, 16), torch.ones(3, 8, 8)
print(dds(x, values, layout)[0, [0, 8]].tolist())
"""


def run(tmp_path, path):
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": str(path), "PYTHONPATH": str(Path(cpu.__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_compiler(tmp_path):
    result = run(tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[16.0, 8.0]\n"
    assert result.stderr == "onetorch.sparse: no C++ compiler found (g++, clang++): the products take their PyTorch path, several times slower\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
def test_with_a_compiler_that_fails(tmp_path):
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo fake 1.0; exit 0; }\necho "fatal error: no such instruction" >&2\nexit 1\n')
    fake.chmod(0o755)
    result = run(tmp_path, f"{tmp_path}:/bin:/usr/bin")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[16.0, 8.0]\n"
    assert "the products take their PyTorch path: fatal error: no such instruction" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_the_library_is_loaded_once_and_kept(monkeypatch):
    if cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    assert cpu.library() is cpu.library()
    monkeypatch.setattr(cpu, "_build", lambda *_: pytest.fail("built a second time"))
    assert cpu.built.__wrapped__(cpu.SOURCE) is not None


def test_strides_beyond_two_to_the_31():
    """Offsets are 64-bit. The memory is reserved and, but for the pages of two rows, never touched."""
    far = 2**31 + 8
    x = torch.empty(far + 16, dtype=torch.float32).as_strided((2, 16), (far, 1))
    x.copy_(torch.randn(2, 16))
    layout = Layout.from_mask(torch.tensor([[True, False], [True, True]]), 8)
    values = torch.randn(3, 8, 8)
    assert torch.equal(dds(x, values, layout), dds(x.clone(), values, layout))
    assert torch.equal(sdd(x, x, layout, transpose_a=True), sdd(x.clone(), x.clone(), layout, transpose_a=True))


def test_memory_of_dense_weights_comes_back_only_when_nobody_holds_it():
    if cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    layout = Layout.from_mask(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 128)
    values = torch.randn(1, *layout.values_shape)
    first = cpu.fill(values, layout.index, layout.grid, layout.shape)
    part, address = first[0, 128:], first.data_ptr()
    del first
    second = cpu.fill(-values, layout.index, layout.grid, layout.shape)
    assert second.data_ptr() != address  # a view still holds the first
    assert torch.equal(part, layout.to_dense(values[0])[128:])
    del part
    third = cpu.fill(2 * values, layout.index, layout.grid, layout.shape)
    assert third.data_ptr() == address
    assert torch.equal(third[0], layout.to_dense(2 * values[0]))
    assert torch.equal(second[0], layout.to_dense(-values[0]))
    assert second.data_ptr() % 64 == third.data_ptr() % 64 == 0


def test_blocks_of_a_large_matrix_come_back(monkeypatch):
    """So large that it is written past the caches; memory that would be more than is kept goes back to the system."""
    if cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(cpu, "_pieces", [])
    monkeypatch.setattr(cpu, "KEPT", 3 << 20)
    for shape in ((1024, 1024), (1000, 1008), (1000, 1000)):  # the lines of the last are not whole lines of memory
        layout = Layout.from_mask(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 128, shape)
        dense = torch.arange(1.0, shape[0] * shape[1] + 1).view(1, *shape)
        values = cpu.take(dense, layout.index, layout.grid, layout.block)
        assert torch.equal(values[0], layout.from_dense(dense[0]))
        assert torch.equal(cpu.fill(values, layout.index, layout.grid, shape)[0], layout.to_dense(values[0]))
        assert sum(map(len, cpu._pieces)) <= cpu.KEPT
    del values
    assert [len(piece) > 1 << 20 for piece in cpu._pieces] == [True]
