"""PPO: its losses by hand, learning, and wrong inputs. What it shares with the others is in test_onpolicy."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from onetorch.rl import ppo
from onetorch.runs.run import Run

SMALL = ppo.Config(total_steps=2048, num_envs=8, batch_size=256, minibatches=2, epochs=2, hidden=(16,), normalize_reward=False)


def train(folder: Path, config: ppo.Config, **options: Any) -> tuple[ppo.ActorCritic, list[dict[str, Any]]]:
    fixed = {"threads": "1"} | options.pop("fixed", {})
    with Run(folder, config, quiet=True, fixed=fixed, **options) as run:
        model = ppo.train(config, run)
    return model, timeless(folder)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the columns that depend on time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def test_policy_loss_by_hand() -> None:
    ratio = torch.tensor([1.1, 1.5, 0.5, 1.5, 0.5])
    adv = torch.tensor([1.0, 2.0, 2.0, -1.0, -1.0])
    # eps = 0.2: min(1.1, 1.1), min(3, 2.4), min(1, 1.6), min(-1.5, -1.2), min(-0.5, -0.8): the mean of 1.1, 2.4, 1, -1.5, -0.8 is 0.44
    loss = ppo.policy_loss(ratio.log(), adv, clip=0.2)
    assert loss.item() == pytest.approx(-0.44, abs=1e-6)


def test_policy_loss_stops_paying_beyond_the_clip() -> None:
    log_ratio = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5])).requires_grad_()
    ppo.policy_loss(log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0]), clip=0.2).backward()
    assert log_ratio.grad is not None
    # clipped where the move already paid; a move in the wrong direction is always pulled back: the gradient is -ratio * adv / 4
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 0.0, 1.5 / 4, -0.5 / 4])


def test_value_loss_by_hand() -> None:
    value, old, ret = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0])
    assert ppo.value_loss(value, old, ret, None).item() == pytest.approx(0.5 * (1 + 1) / 2)
    # clip 0.5: the first may only have moved to 1.5, an error of 2.5
    assert ppo.value_loss(value, old, ret, 0.5).item() == pytest.approx(0.5 * (6.25 + 1) / 2)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_slopes_are_the_losses_derivatives(clip: float | None) -> None:
    """Against autograd in float64, at log-ratios, advantages and values on all sides of both clips."""
    generator = torch.Generator().manual_seed(0)
    log_ratio, adv, value, value_old, ret = torch.randn(5, 1000, generator=generator, dtype=torch.float64)
    log_ratio = (0.5 * log_ratio).requires_grad_()
    (by_logp,) = torch.autograd.grad(ppo.policy_loss(log_ratio, adv, 0.2), log_ratio)
    assert torch.allclose(ppo.policy_slope(log_ratio.detach(), adv, 0.2), by_logp, rtol=1e-12, atol=0)
    value.requires_grad_()
    (by_value,) = torch.autograd.grad(ppo.value_loss(value, value_old, ret, clip), value)
    slope = ppo.value_slope(value.detach(), value_old, ret, clip)
    assert torch.allclose(slope, by_value, rtol=1e-12, atol=1e-18)
    assert (slope == 0).any() == (clip is not None)


def test_slopes_keep_nan() -> None:
    """So that the guard before the step sees it."""
    one, nan = torch.ones(1), torch.full((1,), math.nan)
    assert ppo.policy_slope(nan, one, 0.2).isnan()
    assert ppo.policy_slope(one, nan, 0.2).isnan()
    for clip in (None, 0.2):
        assert all(ppo.value_slope(*args, clip).isnan() for args in ((nan, one, one), (one, one, nan)))


def test_learns_cartpole(tmp_path: Path) -> None:
    model, rows = train(tmp_path / "run", ppo.Config(total_steps=200_000), fixed={"backend": "native", "num_envs": "64"})
    assert max(row["return"] for row in rows if "return" in row) >= 475
    result = ppo.evaluate(model, ppo.Config(), episodes=10)
    assert float(result["return"]) >= 475
    assert result["episodes"] == 10


def test_learns_from_box_actions(tmp_path: Path) -> None:
    """Noisy-v0 pays its action, so the best return grows with the share of the action +1; its observations say nothing."""
    config = dataclasses.replace(SMALL, env="Noisy-v0", total_steps=256 * 40, lr=3e-3, normalize_obs=True)
    model, _ = train(tmp_path / "run", config, fixed={"backend": "sync"})
    assert (model.act(torch.randint(0, 256, (50, 6)).float(), None) == 2).all()


def test_target_kl_ends_the_epochs() -> None:
    config = dataclasses.replace(SMALL, epochs=50, clip=5.0, lr=3e-2)
    kl = {}
    for target in (None, 0.01):
        state = ppo.begin(config, 8, "native")
        kl[target] = ppo.update(dataclasses.replace(config, target_kl=target), state, ppo.rollout(config, state, 32))["kl"]
    assert 0.01 < (kl[0.01] or 0) < 0.5 * (kl[None] or 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_envs", 7), ("num_envs", -1), ("batch_size", 0), ("epochs", 0), ("minibatches", 9999)]
    + [("lr", 0.0), ("lr", math.inf), ("gamma", 1.5), ("clip", -0.1), ("value_coef", -1.0), ("entropy_coef", math.nan), ("hidden", (64, 0))],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ppo.Config(**{field: value})


def test_speed_plan_may_choose_the_number_of_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(SMALL, num_envs=0, batch_size=1024, total_steps=2048)
    _, rows = train(tmp_path / "run", config)
    assert [row["step"] for row in rows] == [1024, 2048]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["num_envs"] in (1, 2, 4, 8, 16)
