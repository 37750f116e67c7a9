"""The MuJoCo tasks against Gymnasium's own, step by step and bit for bit, through resets; exact resumption; threads; and faults."""

from typing import Any

import numpy as np
import pytest
import torch

from onetorch.rl import envs, mujoco_tasks
from onetorch.rl.mujoco_tasks import MujocoEnvs
from onetorch.runs.errors import RunError, UsageError

mujoco = pytest.importorskip("mujoco")


def play(batch: envs.Envs, steps: int, seed: int) -> list[torch.Tensor]:
    """What every step gave, under actions that are sometimes beyond the bounds."""
    rng, out = torch.Generator().manual_seed(seed), []
    for t in range(steps):
        act = torch.randn(batch.num_envs, batch.spaces.act_dim, generator=rng) * (0.3 if t % 2 else 1.0)
        out += [*batch.step(act), batch.obs]
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("env", mujoco_tasks.TASKS)
def test_every_number_is_gymnasiums(env: str) -> None:
    """Observations before and after resets, rewards and both ends, as float32, are those of Gymnasium's environment under the same seeds, to the last bit."""
    steps = 1010 if env in ("HalfCheetah-v5", "Swimmer-v5") else 300  # where only the time limit ends an episode
    ours, theirs = envs.make(env, 2, 7, "native"), envs.make(env, 2, 7, "sync")
    assert torch.equal(ours.obs, theirs.obs)
    assert ours.spaces == theirs.spaces == envs.spaces(env)
    assert same(play(ours, steps, 0), play(theirs, steps, 0))
    assert ours.episodes.finished == theirs.episodes.finished
    assert ours.episodes.finished >= (1 if env != "Ant-v5" else 0)
    assert ours.episodes.recent == theirs.episodes.recent


@pytest.mark.parametrize("env", mujoco_tasks.TASKS)
def test_rewards_are_gymnasiums_in_double_precision(env: str) -> None:
    """Before the rounding to float32, through which a wrong small term could hide."""
    ours, one, rng = MujocoEnvs(env, 1, 3), envs.make_one(env), np.random.default_rng(0)
    one.reset(seed=envs.episode_seed(3, 0, 0))
    space: Any = one.action_space
    for _ in range(40):
        act = rng.uniform(space.low, space.high).astype(np.float32)
        obs, reward, terminated = ours.simulate(act[None])
        there, r, end, _, _ = one.step(act)
        np.testing.assert_allclose(obs[0], there, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(reward[0], float(r), rtol=1e-12, atol=1e-12)
        assert terminated[0] == end
        if end:
            break


@pytest.mark.parametrize("env", mujoco_tasks.TASKS)
def test_resume_continues_bit_for_bit(env: str) -> None:
    first, second = (envs.make(env, 3, seed, "native") for seed in (1, 2))
    play(first, 47, seed=0)
    play(second, 5, seed=9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.obs, second.obs)
    assert same(play(first, 60, seed=5), play(second, 60, seed=5))
    assert first.episodes.recent == second.episodes.recent
    assert np.array_equal(first.episodes.running, second.episodes.running)


def test_threads_give_the_same_bits() -> None:
    one, four = MujocoEnvs("Hopper-v5", 7, 0), MujocoEnvs("Hopper-v5", 7, 0, threads=4)
    assert same(play(one, 60, 0), play(four, 60, 0))
    assert one.episodes.finished > 0
    four.close()
    many = MujocoEnvs("Hopper-v5", 2, 0, threads=4)
    assert len(many.parts) == 2
    many.close()


def test_time_limit_is_truncation() -> None:
    batch = envs.make("Reacher-v5", 2, 0)
    for t in range(1, 52):
        next_obs, _, terminated, truncated = batch.step(torch.zeros(2, 2))
        assert not terminated.any()
        assert truncated.tolist() == [t == 50] * 2
        assert (not torch.equal(batch.obs, next_obs)) == (t == 50)


def test_what_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = MujocoEnvs("HalfCheetah-v5", 3, 0)
    batch.step(torch.zeros(3, 6))
    simulate = batch.simulate

    def broken(act: np.ndarray) -> Any:
        obs, reward, terminated = simulate(act)
        obs[1, 4] = np.nan
        return obs, reward, terminated

    monkeypatch.setattr(batch, "simulate", broken)
    told = r"HalfCheetah-v5 number 1 gave the observation \[.* nan .* at step 2 of episode 0: expected finite numbers \(it was given the action \[0. 0. .*\]\)"
    with pytest.raises(RunError, match=told) as caught:
        batch.step(torch.zeros(3, 6))
    assert "\n" not in str(caught.value)


def test_wrong_states() -> None:
    state = envs.make("Hopper-v5", 2, 0).state_dict()
    with pytest.raises(ValueError, match="2 environments were saved, 3 are here"):
        envs.make("Hopper-v5", 3, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved environments are Hopper-v5, these are Reacher-v5"):
        envs.make("Reacher-v5", 2, 0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"was saved by mujoco 1\.0, this is "):
        envs.make("Hopper-v5", 2, 0).load_state_dict(state | {"mujoco": "1.0"})


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mujoco", None)
    with pytest.raises(UsageError, match=r"HalfCheetah-v5 needs a package that is not installed .*: pip install 'onetorch\[rl\]'"):
        envs.make("HalfCheetah-v5", 1, 0)
