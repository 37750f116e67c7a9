"""Modules from weights, watched."""

import threading

import pytest
import torch
from torch import nn

from onetorch.runs.errors import CheckpointError
from onetorch.share.rebuild import Watch, difference, outputs, rebuild


def test_weights_share_memory_and_ties_stay() -> None:
    def build(config: None) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        return model

    weights = {name: torch.randn_like(t) for name, t in build(None).state_dict().items()}
    weights["2.weight"] = weights["0.weight"]
    model = rebuild(build, None, weights, "config.json", watched=True)
    assert model[2].weight is model[0].weight
    assert model[0].weight.data_ptr() == weights["0.weight"].data_ptr()
    assert model[0].weight.requires_grad


def test_other_threads_are_initialised_while_one_is_not() -> None:
    seen = []

    def build(config: None) -> nn.Module:
        other = threading.Thread(target=lambda: seen.append(nn.init.ones_(torch.zeros(3))))
        other.start()
        other.join()
        seen.append(nn.init.ones_(torch.zeros(3)))
        return nn.Linear(1, 1)

    rebuild(build, None, nn.Linear(1, 1).state_dict(), "config.json", watched=False)
    assert seen[0].tolist() == [1, 1, 1]
    assert seen[1].tolist() == [0, 0, 0]
    assert nn.init.ones_(torch.zeros(3)).tolist() == [1, 1, 1]


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = rebuild(lambda config: nn.Linear(8, 8), None, nn.Linear(8, 8).state_dict(), "config.json", watched=True)
    torch.set_rng_state(before)
    outputs(model, [torch.zeros(1, 8)], 1e6, "x")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "greedy",
    [
        lambda: torch.zeros(1 << 21),
        lambda: torch.arange(1 << 21),
        lambda: torch.ones(2048, 1) * torch.ones(1, 2048),
        lambda: torch.ones(2048, 1) @ torch.ones(1, 2048),
        lambda: torch.eye(2048),
        lambda: torch.ones(2048).outer(torch.ones(2048)),
        lambda: torch.ones(64).repeat(1 << 16),
        lambda: torch.ones(1).expand(1 << 21).clone(),
        lambda: nn.functional.embedding(torch.zeros(2048, dtype=torch.long), torch.zeros(2, 2048)),
        lambda: nn.functional.one_hot(torch.arange(2048)),
        lambda: nn.functional.pad(torch.ones(4), (0, 1 << 21)),
        lambda: torch.cdist(torch.ones(2048, 1), torch.ones(2048, 1)),
        lambda: [torch.zeros(1 << 18) for _ in range(8)],
    ],
)
def test_what_goes_beyond_the_limit_is_refused(greedy) -> None:
    with pytest.raises(CheckpointError, match="more memory than the weights explain"), Watch("config.json", touched=4 << 20, reserved=4 << 20):
        greedy()


def test_memory_that_was_given_back_is_not_counted() -> None:
    with Watch("config.json", touched=4 << 20, reserved=4 << 20):
        for _ in range(50):
            torch.zeros(1 << 18).add(1)  # twice a mebibyte


def test_too_many_operations_are_refused() -> None:
    weights = nn.Linear(1, 1).state_dict()
    with pytest.raises(CheckpointError, match="more memory"):
        rebuild(lambda config: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**9))), None, weights, "config.json", watched=True)


def test_a_failing_build_is_explained() -> None:
    def build(config: None) -> nn.Module:
        raise ZeroDivisionError("by zero")

    with pytest.raises(CheckpointError, match=r"config.json: build\(config\) fails: ZeroDivisionError: by zero"):
        rebuild(build, None, {}, "config.json", watched=True)
    with pytest.raises(CheckpointError, match=r"the weights are not those of build\(config\): bias is missing"):
        rebuild(lambda config: nn.Linear(2, 2), None, {"weight": torch.zeros(2, 2)}, "config.json", watched=True)


def test_difference() -> None:
    one = {"output": torch.tensor([1.0, -100.0])}
    assert difference(one, {"output": torch.tensor([1.0, -100.0])}) == (None, 0.0)
    problem, off = difference(one, {"output": torch.tensor([1.005, -100.0])})  # 0.005 of 100
    assert problem is None
    assert off == pytest.approx(5e-5, rel=1e-2)
    assert difference(one, {"output": torch.tensor([1.02, -100.0])})[0] == "output differs by 0.0002 of its largest value, more than 0.0001"
    assert difference(one, {"output": torch.tensor([1.0, float("nan")])})[0] is not None
    masked = {"output": torch.tensor([1.0, -torch.inf])}
    assert difference(masked, {"output": torch.tensor([1.0, -torch.inf])}) == (None, 0.0)
    assert difference(masked, one)[0] is not None
    assert difference({"output": torch.tensor([1])}, {"output": torch.tensor([2])})[0] == "output differs"
    assert difference(one, {"other": one["output"]})[0] == "the module answers other, not output"
    assert difference(one, {"output": torch.zeros(3)})[0] == "output is (3,) float32, not (2,) float32"
    assert difference({"output": torch.zeros(2)}, {"output": torch.tensor([0.0, 1e-30])})[0] is not None
