import pytest

from onetorch.sparse import cpu


@pytest.fixture(params=["compiled", "pytorch"])
def path(request, monkeypatch):
    """Every check runs on the C++ kernels, where this machine can build them, and on the PyTorch path."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    return request.param
