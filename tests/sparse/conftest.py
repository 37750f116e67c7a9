import pytest
import torch

from onetorch.sparse import costs, cpu


@pytest.fixture(params=["compiled", "pytorch"])
def path(request, monkeypatch):
    """Every check runs on the C++ kernels, where this machine can build them, and on the PyTorch path."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(costs, "break_even", lambda *_: costs.NEVER)  # the sparse kernels themselves, on every machine
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """The checks are small; on a shared machine threads that wait for each other make them ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
