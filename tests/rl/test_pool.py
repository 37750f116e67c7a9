"""EnvPool's environments: what a step gives, ends and time limits, resuming, wrong inputs. Skipped where the extra is missing."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from onetorch.rl import dqn, envs, ppo
from onetorch.runs.errors import UsageError
from onetorch.runs.run import Run


@pytest.fixture
def envpool() -> None:
    pytest.importorskip("envpool", reason="the extra envpool is not installed (600 MB)")


@pytest.mark.usefixtures("envpool")
def test_cartpole_steps_as_gymnasiums() -> None:
    """From the same states, under the same actions: next observation, reward, end; an ended one begins anew near 0, and its last observation is kept."""
    pool, one, ended = envs.make("envpool/CartPole-v1", 3, seed=0), gymnasium.make("CartPole-v1").unwrapped, 0
    assert pool.spaces == envs.spaces("envpool/CartPole-v1") == envs.spaces("CartPole-v1")
    for t in range(100):
        before, act = pool.obs, torch.tensor([0, 1, t % 2])
        one.reset()
        next_obs, reward, terminated, truncated = pool.step(act)
        assert not truncated.any()
        for i in range(3):
            one.state = before[i].double().numpy()
            want, paid, over, _, _ = one.step(int(act[i]))
            np.testing.assert_allclose(next_obs[i].numpy(), want, atol=1e-6)
            assert (reward[i].item(), terminated[i].item()) == (paid, over)
            one.reset()
        assert torch.equal(pool.obs[~terminated], next_obs[~terminated])
        assert (pool.obs[terminated].abs() <= 0.05).all()
        ended += int(terminated.sum())
    assert pool.episodes.finished == ended > 20
    assert pool.episodes.recent[0] == pytest.approx(9, abs=2)  # steps to one side


@pytest.mark.usefixtures("envpool")
def test_a_time_limit_is_no_end() -> None:
    pool = envs.make("envpool/MountainCar-v0", 2, seed=0)
    for t in range(200):
        _, _, terminated, truncated = pool.step(torch.ones(2, dtype=torch.int64))
        assert not terminated.any()
        assert truncated.tolist() == [t == 199] * 2
    assert pool.episodes.recent == [-200.0, -200.0]


@pytest.mark.usefixtures("envpool")
def test_seeds_differ_and_a_saved_state_goes_on_bit_for_bit() -> None:
    name = "envpool/HalfCheetah-v5"
    acts = torch.rand(30, 2, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, other = envs.make(name, 2, seed=0), envs.make(name, 2, seed=1)
    assert not torch.equal(first.obs[0], first.obs[1])
    assert not torch.equal(first.obs, other.obs)
    for act in acts[:20]:
        first.step(act)
    other.load_state_dict(first.state_dict())
    for act in acts[20:]:
        assert all(torch.equal(a, b) for a, b in zip(first.step(act), other.step(act), strict=True))
    state = first.state_dict()
    with pytest.raises(ValueError, match="2 environments were saved, 3 are here"):
        envs.make(name, 3, seed=0).load_state_dict(state)
    state["actions"] = state["actions"][:-1]
    with pytest.raises(ValueError, match="did not come back to its saved observations"):
        other.load_state_dict(state)


@pytest.mark.usefixtures("envpool")
def test_ppo_learns_on_it(tmp_path: Path) -> None:
    config = ppo.Config(env="envpool/CartPole-v1", total_steps=40_000, num_envs=16)
    with Run(tmp_path / "run", config, quiet=True, fixed={"threads": "1"}) as run:
        model = ppo.train(config, run)
    assert float(ppo.evaluate(model, config)["return"]) > 150


@pytest.mark.usefixtures("envpool")
def test_atari_is_pictures() -> None:
    config = dqn.Config(env="envpool/Pong-v5")
    pool = envs.make(config.env, 2, seed=0)
    assert pool.spaces == envs.Spaces(0, 6, discrete=True, image=(4, 84, 84))
    assert (pool.obs.shape, pool.obs.dtype) == ((2, 4, 84, 84), torch.uint8)
    assert dqn.build(config)(pool.obs).shape == (2, 6)


@pytest.mark.usefixtures("envpool")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: envs.make("envpool/Pongg-v5", 1, 0), r"unknown environment 'envpool/Pongg-v5'; nearest: envpool/Pong-v5"),
        (lambda: envs.make("envpool/CartPole-v1", 1, 0, "sync"), r"backend of envpool/CartPole-v1 must be one of envpool, got 'sync'"),
        (lambda: envs.make_one("envpool/CartPole-v1"), r"comes from EnvPool, which makes batches and no single environment"),
        (lambda: envs.spaces("envpool/Pong-v5"), r"has pictures \(C, H, W\) = \(4, 84, 84\) for observations; this algorithm takes vectors"),
    ],
)
def test_wrong_inputs(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        call()


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UsageError, match=r"envpool/Pong-v5 needs a package that is not installed \(.*\): pip install 'onetorch\[envpool\]'"):
        envs.make("envpool/Pong-v5", 1, 0)
