import pytest
import torch
from torch import Tensor, nn

from onetorch.generative import denoisers


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        denoisers.Transformer(shape=(3, 4, 8), classes=2, width=16, depth=2, heads=2, patch=2),
        denoisers.UNet(channels=3, classes=2, width=8, stages=(1, 2), depth=1, heads=2),
    ]


def asked(net: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, sdpa: bool = False) -> Tensor:
    return net(x, torch.tensor([0.3, 0.9]), torch.tensor([1, 2]), dtype, sdpa)


@pytest.mark.parametrize("i", [0, 1])
def test_a_new_network_answers_zero_and_a_trained_one_alike_on_every_path(i: int) -> None:
    """Attention written out equals torch's own, and bfloat16 is near float32."""
    net, x = networks()[i], torch.randn(2, 3, 4, 8, generator=gen())
    assert (asked(net, x) == 0).all()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen(1)))
    out = asked(net, x)
    assert out.shape == x.shape
    assert out.std() > 0.01
    assert torch.allclose(asked(net, x, sdpa=True), out, atol=1e-5)
    assert torch.allclose(asked(net, x, torch.bfloat16).float(), out, atol=0.05 * out.abs().max().item())


def test_patches_are_put_back_where_they_were() -> None:
    torch.manual_seed(0)
    net = denoisers.Transformer(shape=(3, 4, 6), classes=0, width=16, depth=1, heads=2, patch=2)
    nn.init.normal_(net.leave.weight)
    x = torch.randn(1, 3, 4, 6, generator=gen(), requires_grad=True)
    net.blocks = nn.ModuleList()  # without blocks a token sees its own patch alone
    net(x, torch.tensor([0.5]), torch.tensor([0]), torch.float32, False)[0, 0, 2, 4].backward()
    assert x.grad is not None
    seen = (x.grad[0] != 0).any(0)
    assert seen.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
