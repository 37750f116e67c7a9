"""The Triton kernels without a GPU: the checks of the products and of attention once more, through Triton's interpreter.

The interpreter must be chosen before Triton is first imported, so they run in a process of their own; conftest.py puts the kernels in. It takes
milliseconds for what a GPU does in microseconds, so of the tables only random cases are taken.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onetorch.sparse import patterns

HERE = Path(__file__).parent
CHECKS = {
    "test_products.py": "triton and (random_cases or never_read or empty or autocast or in_one_piece or vmap)",
    "test_tma.py": "tma",
    "test_attention.py": "triton and (random_cases or never_read or empty or anything or strided or merge or overflow or (test_dropout and None))",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA builds of torch or the extra `triton`")
@pytest.mark.parametrize("file", CHECKS)
def test_kernels_through_the_interpreter(file):
    root = HERE.parent.parent
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-k", CHECKS[file], "-p", "no:cacheprovider", "-p", "no:xdist"]
    # numpy, on which the interpreter runs, warns of each NaN that a check puts in
    done = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning"], cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


class Compiled:
    """Stands for a kernel: instead of a launch, it is compiled for an H100 (compute capability 9.0), which needs no GPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.call

    def call(self, *arguments, **named):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.tools.tensor_descriptor import TensorDescriptor

        values = dict(zip([p.name for p in self.kernel.params], arguments, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values.pop(parameter.name)
            if parameter.is_constexpr or (type(value) is int and value == 1):  # as a launch does, which knows a stride of 1 for what it is
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(i,)] = f"*{POINTERS[value.dtype]}", [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        made = triton.compile(ASTSource(self.kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options=values)
        assert made.metadata.shared <= 227 * 1024  # bytes of shared memory that a block of threads may have there
        ASSEMBLY.append(made.asm["ptx"])


POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
ASSEMBLY: list[str] = []


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA builds of torch or the extra `triton`")
@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 128), (torch.bfloat16, 16), (torch.float32, 64)], ids=str)
def test_kernels_compile_for_hopper(dtype, block, monkeypatch):
    from onetorch.sparse import gpu

    for name in [name for name in vars(gpu) if name.endswith("_kernel")]:
        monkeypatch.setattr(gpu, name, Compiled(getattr(gpu, name)))
    ASSEMBLY.clear()
    layout = patterns.causal(8 * block, block)
    values, x = torch.zeros(1, *layout.values_shape, dtype=dtype), torch.zeros(1, 1, 512, 8 * block, dtype=dtype)
    gpu.dds(x, values, layout.index, None, layout.grid, 8 * block, True)
    gpu.dds(x, values, layout.index, x[0, 0, 0], layout.grid, 8 * block, False)
    gpu.sdd(x.mT, x, layout.index, layout.grid, layout.block, True)
    q = torch.zeros(1, 2, 8 * block, 64, dtype=dtype)
    place, padding = torch.zeros(8 * block, dtype=torch.int32), torch.ones(1, 8 * block, dtype=torch.bool)
    mask, seed = torch.ones(layout.values_shape, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    for restrictions in ((None, None, None, None, 0.0, None), (place, place, padding, mask, 0.1, seed)):
        out, lse = gpu.attention(q, q, q, layout.index, layout.grid, layout.block, 1, 0.125, True, *restrictions)
        gpu.attention_backward(q, q, q, out, lse, out, None, layout.index, layout.grid, layout.block, 1, 0.125, True, *restrictions)
    assert len(ASSEMBLY) == 9
    if dtype == torch.bfloat16:
        assert all("mma" in text for text in ASSEMBLY)  # the tensor cores multiply
        assert not any("ld.global.b16" in text for text in ASSEMBLY[:3])  # and what they multiply is not loaded number by number


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA builds of torch or the extra `triton`")
@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 32)], ids=str)
def test_products_compile_to_tma(dtype, block, monkeypatch, tmp_path):
    """To the instructions that bring whole tiles into shared memory, those of a warp group on the tensor cores, and no number kept outside registers."""
    import triton

    from onetorch.sparse import gpu

    for name in ("_dds_tma_kernel", "_sdd_tma_kernel"):
        monkeypatch.setattr(gpu, name, Compiled(getattr(gpu, name)))
    monkeypatch.setattr(gpu, "_hopper", lambda device: ("an H100", 132))
    ASSEMBLY.clear()
    layout = patterns.causal(8 * block, block)
    values, x = torch.zeros(1, *layout.values_shape, dtype=dtype), torch.zeros(1, 1, 512, 8 * block, dtype=dtype)
    turned = x.mT.contiguous().mT
    for operand, transpose in ((x, False), (x, True), (turned, False), (turned, True)):
        gpu.dds_tma(operand, values, layout.index, x[0, 0, 0], layout.grid, 8 * block, transpose)
    for a, b in ((x.mT, x), (x.mT, turned), (turned.mT, x), (turned.mT, turned)):
        gpu.sdd_tma(a, b, layout.index, layout.grid, layout.block, True)
    assert len(ASSEMBLY) == 8
    for i, text in enumerate(ASSEMBLY):
        assert "cp.async.bulk.tensor" in text
        assert "wgmma.mma_async" in text or (i >= 4 and block < 64)  # a warp group multiplies 64 rows; sdd has as many as the block
        (tmp_path / "kernel.ptx").write_text(text)
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [ptxas, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        assert " 0 bytes spill stores" in subprocess.run(command, capture_output=True, text=True, check=True).stderr
