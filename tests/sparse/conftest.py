import importlib
import os

import numpy as np
import pytest
import torch

from onetorch.sparse import costs, cpu, products

attention = importlib.import_module("onetorch.sparse.attention")  # the package's attribute of this name is the function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETED else ["compiled", "pytorch"])
def path(request, monkeypatch):
    """Every check runs on the C++ kernels, where this machine can build them, and on the PyTorch path; with
    TRITON_INTERPRET=1 on the Triton kernels (see test_gpu.py).
    """
    if request.param == "triton":
        for module in (products, attention):
            monkeypatch.setattr(module, "_kernels", lambda x: products._triton())
    elif request.param == "pytorch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(costs, "break_even", lambda *_: costs.NEVER)  # the sparse kernels themselves, on every machine
    return request.param


@pytest.fixture(scope="session", autouse=True)
def dot_of_bfloat16():
    """Triton's interpreter keeps bfloat16 as its bits in uint16 and multiplies these in tl.dot as if they were numbers: here they are widened."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, dot = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    yield
    builder.create_dot = dot


@pytest.fixture(autouse=True)
def one_thread():
    """The checks are small; on a shared machine threads that wait for each other make them ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
