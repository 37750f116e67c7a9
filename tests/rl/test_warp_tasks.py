"""The MuJoCo tasks in MuJoCo Warp, on the processor: a step and a rollout against MuJoCo's (which are Gymnasium's), ends, resets, resumption, faults.

Skipped where the extra is missing. The first run on a machine compiles Warp's kernels, which takes minutes; they are kept in Warp's cache.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onetorch.rl import envs, mujoco_tasks, ppo, sac
from onetorch.rl.mujoco_tasks import MujocoEnvs
from onetorch.runs.errors import RunError, Stopped, UsageError
from onetorch.runs.run import Run

aten = torch.ops.aten


@pytest.fixture
def warp() -> None:
    pytest.importorskip("mujoco_warp", reason="the extra warp is not installed (390 MB)")


def make(env: str, num_envs: int, seed: int) -> Any:
    """On the processor also where there is a GPU, whose sums may come in another order each time."""
    from onetorch.rl.warp_tasks import WarpEnvs

    return WarpEnvs(env, num_envs, seed, "cpu")


def take(batch: Any, native: MujocoEnvs) -> None:
    """Gives `batch` the states of `native`, rounded to float32 in both."""
    for i, data in enumerate(native.data):
        for name in ("qpos", "qvel", "qacc_warmstart"):
            batch.fields[name][i] = torch.from_numpy(getattr(data, name))
            getattr(data, name)[:] = batch.fields[name][i].numpy()
    for name in ("qpos", "qvel"):
        native.fields[name][:] = batch.fields[name].numpy()
    batch.place = torch.from_numpy(native.place).float()
    native.place = batch.place.double().numpy()


# Of observations and rewards after one step; the velocities that the rewards have are differences of positions in float32, divided by as little as 0.02 s.
PLANAR = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "InvertedPendulum-v5", "Reacher-v5")
ATOL = dict.fromkeys(PLANAR, 1e-3) | {"InvertedDoublePendulum-v5": 2e-2}  # which shows a force of thousands, clipped to 10


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("env", ATOL)
def test_one_step_from_many_states_is_mujocos(env: str) -> None:
    N = 16
    native, batch, rng = MujocoEnvs(env, N, 7), make(env, N, 0), torch.Generator().manual_seed(0)
    assert batch.spaces == envs.spaces(env)
    errors, ended = [], 0
    for _ in range(60):
        take(batch, native)
        act = torch.randn(N, native.spaces.act_dim, generator=rng)
        for want, got in zip(native.step(act), batch.step(act), strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            if want.dtype == torch.bool:
                assert torch.equal(got, want)
                ended += int(want.sum())
            else:
                torch.testing.assert_close(got, want, atol=ATOL[env], rtol=1e-3)
                errors.append((got - want).abs().median().item())
    assert np.median(errors) < 5e-6
    assert (ended > 0) == (env not in ("HalfCheetah-v5", "Swimmer-v5"))


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("env", ["Ant-v5", "Humanoid-v5"])
def test_bodies_in_space(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo Warp turns the friction pyramid of a steep capsule otherwise than MuJoCo, and has no PGS. With round friction cones and Newton's solver in both,
    all the rest is seen: what a step gives from many states, forces and bodies' velocities included."""
    import mujoco

    from onetorch.rl import warp_tasks

    def load(task: mujoco_tasks.Task) -> Any:
        model = mujoco_tasks.load(task)
        model.opt.cone, model.opt.solver = mujoco.mjtCone.mjCONE_ELLIPTIC, mujoco.mjtSolver.mjSOL_NEWTON
        return model

    N = 8
    monkeypatch.setattr(warp_tasks, "load", load)
    native, batch, rng = MujocoEnvs(env, N, 7), make(env, N, 0), torch.Generator().manual_seed(0)
    native.model.opt.cone, native.model.opt.solver = mujoco.mjtCone.mjCONE_ELLIPTIC, mujoco.mjtSolver.mjSOL_NEWTON
    assert batch.spaces == envs.spaces(env)
    close, contacts = list[float](), 0
    for _ in range(40):
        take(batch, native)
        act = torch.randn(N, native.spaces.act_dim, generator=rng)
        want, got = native.step(act), batch.step(act)
        contacts += sum(data.ncon for data in native.data)
        near = ((got[0] - want[0]).abs() <= 1e-2 + 1e-2 * want[0].abs()).all(1) & ((got[1] - want[1]).abs() < 1e-2) & (got[2] == want[2])
        close.append(near.float().mean().item())
    assert contacts > 50
    assert np.mean(close) > 0.98, np.mean(close)


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize(("env", "steps", "atol"), [("HalfCheetah-v5", 10, 2e-2), ("Hopper-v5", 12, 2e-3), ("Walker2d-v5", 15, 2e-2), ("Swimmer-v5", 50, 1e-3)])
def test_a_rollout_follows_gymnasiums(env: str, steps: int, atol: float) -> None:
    """Gymnasium's own environment, without setting the state again."""
    batch, one = make(env, 2, 0), envs.make(env, 2, 0, "sync")
    native, rng = MujocoEnvs(env, 2, 0), torch.Generator().manual_seed(1)
    assert torch.equal(native.obs, one.obs)
    for i, data in enumerate(native.data):
        batch.fields["qpos"][i], batch.fields["qvel"][i] = torch.from_numpy(data.qpos), torch.from_numpy(data.qvel)
    batch.place = torch.from_numpy(native.place).float()
    for _ in range(steps):
        act = torch.rand(2, native.spaces.act_dim, generator=rng) * 2 - 1
        want, got = one.step(act), batch.step(act)
        torch.testing.assert_close(got[0], want[0], atol=atol, rtol=1e-3)
        torch.testing.assert_close(got[1], want[1], atol=atol, rtol=1e-3)
        assert torch.equal(got[2], want[2])


@pytest.mark.usefixtures("warp")
def test_ends_limits_and_final_observations() -> None:
    """Hopper falls, HalfCheetah never ends but by its limit; the observation reached is kept, and the next episode begins where `obs` says."""
    hopper = make("Hopper-v5", 4, 0)
    ended, paid = [], torch.zeros(4, dtype=torch.float64)
    for _ in range(60):
        next_obs, reward, terminated, truncated = hopper.step(torch.ones(4, 3))
        assert not truncated.any()
        paid += reward
        ended += paid[terminated].tolist()
        paid[terminated] = 0
        z, angle = next_obs[:, 0], next_obs[:, 1]
        assert torch.equal(terminated, ~((z > 0.7) & (angle.abs() < 0.2)) | terminated)
        assert torch.equal(hopper.obs[~terminated], next_obs[~terminated])
        first = hopper.obs[terminated]
        assert (first[:, 0] - 1.25).abs().le(5.1e-3).all()
        assert first[:, 1:].abs().le(5.1e-3).all()
    assert hopper.episodes.finished == len(ended) > 4
    assert hopper.episodes.recent == pytest.approx(ended)
    assert hopper.episodes.running == pytest.approx(paid.numpy())
    assert int(hopper.episode.sum()) == len(ended)

    cheetah = make("HalfCheetah-v5", 2, 0)
    for t in range(1000):
        next_obs, _, terminated, truncated = cheetah.step(torch.zeros(2, 6))
        assert not terminated.any()
        assert truncated.tolist() == [t == 999] * 2
        assert torch.equal(cheetah.obs, next_obs) == (t != 999)
    assert cheetah.episodes.length.tolist() == [0, 0]


@pytest.mark.usefixtures("warp")
def test_beginnings_are_the_tasks() -> None:
    """Ranges, and deviations within three standard errors, of 600 beginnings; each environment and each episode has its own."""
    N = 600
    cheetah, pendulum = make("HalfCheetah-v5", N, 0), make("InvertedPendulum-v5", N, 0)
    q, v = cheetah.obs[:, :8], cheetah.obs[:, 8:]
    assert (q.abs() <= 0.1).all()
    assert q.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.05)
    assert v.std().item() == pytest.approx(0.1, rel=0.05)
    assert v.abs().max() > 0.3  # normal, not uniform
    assert (pendulum.obs.abs() <= 0.01).all()
    assert len(cheetah.obs.unique(dim=0)) == N
    reacher = make("Reacher-v5", N, 0)
    before = reacher.obs
    goal, velocity = before[:, 4:6], before[:, 6:8]
    assert (goal.norm(dim=1) <= 0.2).all()
    assert (goal.norm(dim=1) < 0.1).float().mean().item() == pytest.approx(0.25, abs=0.055)  # even over the disk
    assert (velocity.abs() <= 0.005).all()
    for _ in range(50):
        reacher.step(torch.zeros(N, 2))
    assert len(torch.cat((reacher.obs, before)).unique(dim=0)) == 2 * N
    assert torch.allclose(reacher.obs[:, 8:], torch.from_numpy(_reach(reacher)), atol=1e-6)  # what follows from the state is of the new episode


def _reach(batch: Any) -> np.ndarray:
    """The way from the target to the fingertip (N, 2), by MuJoCo from the positions."""
    import mujoco

    model = mujoco_tasks.load(batch.task)
    data, out = mujoco.MjData(model), []
    for qpos in batch.fields["qpos"]:
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        out.append((data.xpos[mujoco_tasks.FINGERTIP] - data.xpos[mujoco_tasks.TARGET])[:2])
    return np.array(out, np.float32)


def play(batch: Any, steps: int, seed: int) -> list[torch.Tensor]:
    rng, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        out += [*batch.step(torch.randn(batch.num_envs, batch.spaces.act_dim, generator=rng)), batch.obs]
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("env", ["Hopper-v5", "HalfCheetah-v5", "Ant-v5"])
def test_seeds_and_resumption_bit_for_bit(env: str) -> None:
    first, second, other = make(env, 3, 1), make(env, 3, 1), make(env, 3, 2)
    assert torch.equal(first.obs, second.obs)
    assert not torch.equal(first.obs, other.obs)
    assert same(play(first, 50, 0), play(second, 50, 0))
    play(other, 7, seed=9)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.obs, other.obs)
    assert same(play(first, 60, 5), play(other, 60, 5))
    assert first.episodes.recent == other.episodes.recent
    assert np.array_equal(first.episodes.running, other.episodes.running)
    assert first.episodes.finished > 0 or env != "Hopper-v5"


@pytest.mark.usefixtures("warp")
def test_what_is_not_finite_is_named() -> None:
    batch = make("HalfCheetah-v5", 3, 0)
    batch.step(torch.zeros(3, 6))
    batch.fields["qvel"][1, 3] = torch.nan
    told = r"HalfCheetah-v5 number 1 gave the observation \[.* nan.* at step 2 of episode 0: expected finite numbers \(it was given the action \[0. 0. .*\]\)"
    with pytest.raises(RunError, match=told) as caught:
        batch.step(torch.zeros(3, 6))
    assert "\n" not in str(caught.value)
    batch = make("HalfCheetah-v5", 3, 0)
    with pytest.raises(RunError, match=r"HalfCheetah-v5 number 0 gave the reward nan at step 1 of episode 0: .* the action \[nan nan"):
        batch.step(torch.full((3, 6), torch.nan))  # MuJoCo Warp goes on as if it were a bound
    batch = make("Hopper-v5", 3, 0)
    batch.fields["overflow"][2] = 1
    with pytest.raises(RunError, match=r"Hopper-v5 number 2 had more contacts than there is room for, at step 1 of episode 0"):
        batch.step(torch.zeros(3, 3))


class Waits(TorchDispatchMode):
    """Notes what a host would wait for, were its tensors on a GPU: numbers asked for, places of what is true, copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func in (aten.index.Tensor, aten.index_put_.default) and any(x is not None and x.dtype == torch.bool for x in args[1])
        moved = func is aten._to_copy.default and kwargs.get("device") is not None
        if masked or moved or func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.asked.append(args[0])
        return func(*args, **kwargs)


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("env", ["Hopper-v5", "Reacher-v5"])
def test_no_step_waits(env: str) -> None:
    """All that is asked is `told`, which is in the host's memory."""
    batch = make(env, 3, 0)
    with Waits() as waits:
        for _ in range(60):
            batch.step(torch.ones(3, batch.spaces.act_dim))
    assert batch.episodes.finished > 0
    assert len(waits.asked) == 60
    assert all(x is batch.told for x in waits.asked)


@pytest.mark.usefixtures("warp")
def test_wrong_states() -> None:
    batch = make("Hopper-v5", 2, 0)
    state = batch.state_dict()
    with pytest.raises(ValueError, match="2 environments were saved, 3 are here"):
        make("Hopper-v5", 3, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved environments are Reacher-v5, these are Hopper-v5"):
        batch.load_state_dict(state | {"env": "Reacher-v5"})
    with pytest.raises(ValueError, match=r"was saved by mujoco_warp 1\.0, this is mujoco_warp "):
        batch.load_state_dict(state | {"version": "mujoco_warp 1.0"})


def test_which_environments_and_when() -> None:
    assert "warp" in envs.asked("Hopper-v5")
    with pytest.raises(UsageError, match="backend of CartPole-v1 must be one of native, sync, processes, got 'warp'"):
        envs.make("CartPole-v1", 1, 0, "warp")
    if not torch.cuda.is_available():
        assert "warp" not in envs.backends("Hopper-v5")


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(UsageError, match=r"Hopper-v5 needs a package that is not installed \(.*\): pip install 'onetorch\[warp\]'"):
        envs.make("Hopper-v5", 1, 0, "warp")


class Broken(Run):
    """A run that is stopped after `last` iterations."""

    last = 0

    def checkpoint(self, live: Any) -> None:
        super().checkpoint(live)
        if live.iteration == self.last:
            raise Stopped("enough", 0)


@pytest.mark.usefixtures("warp")
@pytest.mark.parametrize("algorithm", [ppo, sac], ids=["ppo", "sac"])
def test_training_stops_and_goes_on(algorithm: Any, tmp_path: Path) -> None:
    """A few updates on Hopper, broken off and resumed: the weights are those of the run in one go."""
    small = {"batch_size": 64, "minibatches": 2} if algorithm is ppo else {"batch_size": 8, "replay": 200, "hidden": (16,), "update_after": 20, "log_every": 10}
    config = algorithm.Config(env="Hopper-v5", total_steps=256 if algorithm is ppo else 80, num_envs=8 if algorithm is ppo else 2, **small)
    fixed = {"backend": "warp", "threads": "1", "device": "cpu"} | ({"dtype": "float32"} if algorithm is sac else {})

    def train(folder: str, last: int = 0, resume: bool = False) -> Any:
        with contextlib.suppress(Stopped), Broken(tmp_path / folder, config, quiet=True, fixed=fixed, checkpoint_seconds=0, resume=resume) as run:
            run.last = last
            return algorithm.train(config, run)
        return None

    model = train("straight")
    assert train("broken", last=2 if algorithm is ppo else 25) is None
    again = train("broken", resume=True)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
