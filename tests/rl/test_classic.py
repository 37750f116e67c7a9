"""The classic control tasks against Gymnasium's, bit for bit, with their first states, their limits, and exact resumption."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from onetorch.rl import classic, envs
from onetorch.rl.classic import Classic


def balance(obs: torch.Tensor) -> torch.Tensor:
    """A controller that keeps the pole up for more than 500 steps."""
    return (obs @ torch.tensor([0.05, 0.2, 1.0, 0.4]) > 0).long()


def swing(obs: torch.Tensor) -> torch.Tensor:
    """A controller that swings the acrobot up within some hundred steps: torque along the motion of the second joint."""
    return 1 + obs[:, 5].sign().long()


def rock(obs: torch.Tensor) -> torch.Tensor:
    """A controller that gets the car out of the valley: push along the motion."""
    return 1 + obs[:, 1].sign().long()


def steady(obs: torch.Tensor) -> torch.Tensor:
    """Damps the pendulum and sometimes asks for more torque than there is."""
    return 3 * torch.sin(obs[:, 2:] + obs[:, 1:2])


# what good actions are, and how often half of six environments end in 1100 steps under them, while random ones act in the other half
PLAYED: dict[str, tuple[Any, dict[str, int]]] = {
    "CartPole-v1": (balance, {"terminated": 50, "truncated": 6}),
    "Pendulum-v1": (steady, {"terminated": 0, "truncated": 30}),
    "Acrobot-v1": (swing, {"terminated": 10, "truncated": 2}),
    "MountainCar-v0": (rock, {"terminated": 20, "truncated": 10}),
}


@pytest.mark.parametrize("env", classic.TASKS)
def test_every_number_has_the_bits_of_gymnasium(env: str) -> None:
    N, (policy, least) = 6, PLAYED[env]
    ours, theirs = Classic(env, N, seed=3), [gymnasium.make(env) for _ in range(N)]
    rng = torch.Generator().manual_seed(0)
    to_env = envs.ActionMap(theirs[0].action_space)

    def take_over(i: int) -> None:
        theirs[i].reset(seed=0)
        theirs[i].unwrapped.state = ours.state[:, i].copy()  # type: ignore[attr-defined]

    for i in range(N):
        take_over(i)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(1100):
        act = policy(ours.obs)
        act[:3] = torch.randint(ours.spaces.act_dim, (3,), generator=rng) if ours.spaces.discrete else 1.2 * torch.randn(3, 1, generator=rng)
        actions = to_env(act)
        next_obs, reward, terminated, truncated = ours.step(act)
        for i, one in enumerate(theirs):
            obs, r, term, trunc, _ = one.step(actions[i])
            assert next_obs[i].numpy().tobytes() == obs.tobytes()
            assert (reward[i].item(), terminated[i].item(), truncated[i].item()) == (np.float32(r), term, trunc)
            if term or trunc:
                ends["terminated" if term else "truncated"] += 1
                take_over(i)
    assert ends["terminated"] >= least["terminated"]
    assert ends["truncated"] >= least["truncated"]
    assert ours.episodes.finished == sum(ends.values())
    if env == "CartPole-v1":
        assert ours.episodes.recent.count(500.0) == 6  # three environments, twice 500 steps


# lowest and highest first observations, as Gymnasium's documentation gives them
BEGIN = {
    "CartPole-v1": ([-0.05] * 4, [0.05] * 4),
    "Pendulum-v1": ([-1, -1, -1], [1, 1, 1]),
    "Acrobot-v1": ([np.cos(0.1), -np.sin(0.1), np.cos(0.1), -np.sin(0.1), -0.1, -0.1], [1, np.sin(0.1), 1, np.sin(0.1), 0.1, 0.1]),
    "MountainCar-v0": ([-0.6, 0], [-0.4, 0]),
}


@pytest.mark.parametrize("env", classic.TASKS)
def test_first_states_fill_their_range(env: str) -> None:
    obs = Classic(env, 50_000, seed=0).obs
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in BEGIN[env])
    torch.testing.assert_close(obs.amin(0), low, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(obs.amax(0), high, atol=1e-4, rtol=1e-3)
    assert ((obs >= low - 1e-7) & (obs <= high + 1e-7)).all()


def test_cartpole_begins_uniformly() -> None:
    obs = Classic("CartPole-v1", 50_000, seed=0).obs
    torch.testing.assert_close(obs.mean(0), torch.zeros(4), atol=6e-4, rtol=0)  # 4 standard errors: 0.1 / sqrt(12) / sqrt(50000) * 4
    torch.testing.assert_close(obs.std(0), torch.full((4,), 0.1 / 12**0.5), atol=3e-4, rtol=0)


def random_actions(batch: Any, rng: torch.Generator) -> torch.Tensor:
    n, spaces = batch.num_envs, batch.spaces
    return torch.randint(spaces.act_dim, (n,), generator=rng) if spaces.discrete else torch.randn(n, spaces.act_dim, generator=rng)


def test_cartpole_lives_as_long_as_gymnasiums() -> None:
    """The same policy lives as long in both (they draw different beginnings)."""

    def mean_length(backend: str) -> float:
        batch, rng = envs.make("CartPole-v1", 16, 0, backend), torch.Generator().manual_seed(0)
        for _ in range(600):
            batch.step(random_actions(batch, rng))
        assert batch.episodes.finished > 300
        return batch.episodes.mean_return() or 0.0

    assert mean_length("native") == pytest.approx(22.2, abs=4)  # random play lasts 22.2 steps, with a standard deviation of 12 an episode
    assert mean_length("sync") == pytest.approx(22.2, abs=4)


@pytest.mark.parametrize("env", classic.TASKS)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_resume_continues_bit_for_bit(env: str, device: str | None) -> None:
    first, second = (Classic(env, 5, seed, device) for seed in (1, 2))
    rng = torch.Generator().manual_seed(0)
    for _ in range(460 if env == "Acrobot-v1" else 190):
        first.step(random_actions(first, rng))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.obs, second.obs)
    for _ in range(60):
        act = random_actions(first, rng)
        for a, b in zip((*first.step(act), first.obs), (*second.step(act), second.obs), strict=True):
            assert torch.equal(a, b)
    assert first.episodes.finished == second.episodes.finished > 0
    assert first.episodes.recent == second.episodes.recent


@pytest.mark.parametrize("env", classic.TASKS)
def test_torch_gives_the_numbers_of_numpy(env: str) -> None:
    """What runs on a GPU, run here on the CPU, from the same states: equal up to the last bits of sine and cosine."""
    N, rng = 64, torch.Generator().manual_seed(0)
    ours, torchs = Classic(env, N, 0), Classic(env, N, 1, device="cpu")
    ends = 0
    for _ in range(510 if env == "Acrobot-v1" else 260):
        torchs.state = torch.from_numpy(ours.state.copy())
        torchs.length = torch.from_numpy(ours.episodes.length.copy())
        torchs.obs = ours.obs
        act = random_actions(ours, rng)
        a, b = ours.step(act), torchs.step(act)
        torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-5)
        assert all(x.dtype == y.dtype for x, y in zip(a, b, strict=True))
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])
        done = a[2] | a[3]
        ends += int(done.sum())
        assert torch.equal((torchs.obs != b[0]).any(1), done)  # ended ones, and only they, began anew
    assert ends > 0


def test_devices() -> None:
    """"cpu:0" is another name of the CPU, as a device of its own here."""
    assert isinstance(envs.make("Pendulum-v1", 1, 0, device="cpu:0"), Classic)
    for device, kind in (("cpu", envs.GymEnvs), ("cpu:0", envs.Moved)):
        assert isinstance(envs.make("Pendulum-v1", 1, 0, "sync", device=device), kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("env", classic.TASKS)
def test_everything_stays_on_the_gpu(env: str) -> None:
    batch, rng = envs.make(env, 32, 0, device="cuda"), torch.Generator().manual_seed(0)
    for _ in range(250):
        assert all(x.is_cuda for x in (*batch.step(random_actions(batch, rng).cuda()), batch.obs))
    assert batch.episodes.finished > 0 or env == "Acrobot-v1"


def test_wrong_states() -> None:
    with pytest.raises(ValueError, match="3 environments were saved, 2 are here"):
        Classic("Pendulum-v1", 2, 0).load_state_dict(Classic("Pendulum-v1", 3, 0).state_dict())
    with pytest.raises(ValueError, match="the saved environments are Pendulum-v1, these are MountainCar-v0"):
        Classic("MountainCar-v0", 2, 0).load_state_dict(Classic("Pendulum-v1", 2, 0).state_dict())
