"""PPO: its losses by hand, time limits, exact resumption in a fresh process, learning, and wrong inputs."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_tasks
import torch
from safetensors.torch import load_file

from onetorch.rl import ppo
from onetorch.rl.returns import gae
from onetorch.runs.errors import NonFinite, RunError, UsageError
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


def test_rollout_values_the_final_observation_at_a_time_limit() -> None:
    config = dataclasses.replace(SMALL, env="Pendulum-v1", num_envs=3, batch_size=3 * 250, gamma=0.9, lam=0.8)
    state, twin = ppo.begin(config, 3, "sync"), ppo.begin(config, 3, "sync")
    torch.manual_seed(1)
    batch = {name: x.unflatten(0, (250, 3)) for name, x in ppo.rollout(config, state, 250).items()}
    torch.manual_seed(1)
    noise, steps = twin.model.noise(250, 3), []
    with torch.no_grad():
        for t in range(250):
            obs, act = twin.envs.obs, twin.model.act(twin.envs.obs, noise[t])
            next_obs, reward, terminated, truncated = twin.envs.step(act)
            steps.append((reward, twin.model.value(obs), twin.model.value(next_obs), terminated, truncated))
            assert torch.equal(batch["obs"][t], obs)
            torch.testing.assert_close(batch["logp"][t], twin.model.logp(obs, act)[0])
    reward, value, next_value, terminated, truncated = (torch.stack(x) for x in zip(*steps, strict=True))
    assert truncated.sum() == 3
    adv = gae(reward, value, next_value, terminated, truncated, 0.9, 0.8)
    torch.testing.assert_close(batch["ret"], adv + value, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(batch["adv"], (adv - adv.mean()) / adv.std(), atol=1e-4, rtol=1e-4)


def test_time_limit_is_not_taken_for_an_end(tmp_path: Path) -> None:
    """Reward 1 for ever, cut every 5 steps: the value is 1 / (1 - 0.9) = 10. Taken for an end it would be worth 1 + 0.9 + … at most, 4.1."""
    assert rl_tasks.LIMIT == 5
    config = dataclasses.replace(SMALL, env="Trap-v0", gamma=0.9, lr=1e-2, anneal=False, total_steps=256 * 60)
    model, _ = train(tmp_path / "run", config, fixed={"backend": "sync"})
    assert model.value(torch.ones(1, 1)).item() == pytest.approx(10.0, abs=0.3)


RESUMED = {
    "native": (SMALL, "native"),
    "sync": (dataclasses.replace(SMALL, env="Pendulum-v1", normalize_obs=True, normalize_reward=True, value_clip=0.2, entropy_coef=0.01), "sync"),
    "processes": (dataclasses.replace(SMALL, env="Noisy-v0", num_envs=4, target_kl=0.001), "processes"),
}
CHILD = """
import os, sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
import test_ppo
from onetorch.rl import ppo
from onetorch.runs.run import Run
for name, (config, backend) in test_ppo.RESUMED.items():
    run = Run(Path({folder!r}) / name, config, quiet=True, fixed=dict(threads="1", backend=backend), checkpoint_seconds=0, resume={resume})
    if {resume}:
        with run:
            ppo.train(config, run)
        continue
    save = run.checkpoint
    class Enough(Exception): pass
    def checkpoint(state):
        save(state)
        if state.iteration == 4: raise Enough
    run.checkpoint = checkpoint
    try:
        ppo.train(config, run)
    except Enough:
        run.close("stopped")
"""


def test_resumed_in_a_fresh_process_is_bit_identical(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for name, (config, backend) in RESUMED.items():
        _, rows = train(straight / name, config, fixed={"backend": backend})
        assert rows[-1]["step"] == 2048
    for resume in (False, True):
        child = CHILD.format(path=[p for p in sys.path if p], folder=str(broken), resume=resume)
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for name in RESUMED:
            rows, length = timeless(straight / name), 8 if resume else 4
            assert len(rows) == 8
            assert timeless(broken / name) == rows[:length]
    for name in RESUMED:
        a, b = ({k: v for k, v in saved(d / name).items() if not k.startswith(OTHERS)} for d in (straight, broken))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


OTHERS = ("generators.numpy", "generators.python")  # global generators that PPO neither seeds nor uses


def saved(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "00000008"
    return load_file(last / "model.safetensors") | load_file(last / "state.safetensors")


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_gradients_reach_every_weight(env: str) -> None:
    config = dataclasses.replace(SMALL, env=env, entropy_coef=0.01, lr=1e-2)
    state = ppo.begin(config, 8, "native" if env == "CartPole-v1" else "sync")
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    ppo.update(config, state, ppo.rollout(config, state, 32))
    assert all(not torch.equal(p, before[name]) for name, p in state.model.named_parameters())


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


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, total_steps=256)
    state = ppo.begin(config, 8, "native")
    batch = ppo.rollout(config, state, 32)
    batch["adv"][7] = math.nan
    before = [p.clone() for p in state.model.parameters()]
    with Run(tmp_path / "run", config, quiet=True) as run:
        with pytest.raises(NonFinite, match="loss is nan"):
            ppo.update(dataclasses.replace(config, minibatches=1), state, batch, 1.0, run)
        assert all(torch.equal(p, q) for p, q in zip(before, state.model.parameters(), strict=True))


def test_nan_from_an_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"NaNObservation-v0 number 0 gave the observation .* at step 3"):
        train(tmp_path / "run", dataclasses.replace(SMALL, env="NaNObservation-v0"), fixed={"backend": "sync", "num_envs": "8"})


def test_unknown_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nearest: CartPole-v1"):
        train(tmp_path / "run", dataclasses.replace(SMALL, env="CartPoel-v1"))


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
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["num_envs"] in (8, 16)


def test_episodes_are_evaluated_without_training_state() -> None:
    torch.manual_seed(0)
    model = ppo.build(SMALL)
    results = [ppo.evaluate(model, SMALL, episodes=30, deterministic=False) for _ in range(2)]
    assert results[0] == results[1]
    assert 10 < float(results[0]["return"]) < 40
    assert float(results[0]["return_min"]) <= float(results[0]["return"]) - float(results[0]["return_ci95"])
