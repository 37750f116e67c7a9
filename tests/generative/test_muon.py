import pytest
import torch

from onetorch.generative.muon import Muon, orthogonalize

HOW = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_step_written_out_is_torchs_step(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    theirs, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    reference, muon = torch.optim.Muon([theirs], **HOW), Muon([ours], **HOW)
    for _ in range(3):
        theirs.grad = torch.randn(shape)
        reference.step()
        with torch.no_grad():
            muon._step(ours, theirs.grad, muon.param_groups[0])  # what a sharded matrix gets; in one process nothing is gathered
        assert torch.equal(ours, theirs)
    assert torch.equal(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])
    assert not torch.allclose(ours, start, atol=1e-2)


def test_the_iteration_changes_singular_values_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 8, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    expected = s / s.square().sum().sqrt()
    for _ in range(5):
        expected = COEFFICIENTS[0] * expected + COEFFICIENTS[1] * expected**3 + COEFFICIENTS[2] * expected**5
    assert torch.allclose(orthogonalize(x, COEFFICIENTS, 5), u @ torch.diag(expected) @ v)
    assert torch.allclose(orthogonalize(x.T, COEFFICIENTS, 5), (u @ torch.diag(expected) @ v).T)
    assert ((expected > 0.6) & (expected < 1.3)).all()


def test_in_float32_a_gradients_last_digits_stay_last_digits() -> None:
    def after(dtype: torch.dtype, noise: float) -> torch.Tensor:
        torch.manual_seed(2)
        p = torch.zeros(64, 192, requires_grad=True)
        muon = Muon([p], dtype=dtype, lr=1.0, weight_decay=0.0)
        p.grad = torch.randn(64, 192) * (1 + noise * torch.randn(64, 192))
        muon.step()
        return p.detach()

    assert (after(torch.float32, 1e-6) - after(torch.float32, 0.0)).abs().max() < 1e-5
    assert (after(torch.bfloat16, 1e-6) - after(torch.bfloat16, 0.0)).abs().max() > 1e-4  # which is why
    assert torch.allclose(after(torch.bfloat16, 0.0), after(torch.float32, 0.0), atol=0.05)
