"""Environments: the native one against Gymnasium bit for bit, exact resume by replay, and every wrong input by name."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import rl_tasks
import torch

from onetorch.rl import envs
from onetorch.rl.env_groups import Worker
from onetorch.rl.env_worker import Observation
from onetorch.rl.envs import ActionMap
from onetorch.runs.errors import RunError, UsageError


def play(batch: envs.Envs, steps: int, seed: int) -> list[torch.Tensor]:
    rng, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        n, spaces = batch.num_envs, batch.spaces
        act = torch.randint(spaces.act_dim, (n,), generator=rng) if spaces.discrete else torch.randn(n, spaces.act_dim, generator=rng)
        out += [*batch.step(act), batch.obs]
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


SYNC = [(env, "sync") for env in ("CartPole-v1", "Pendulum-v1", "Noisy-v0")]
CASES = [*SYNC, ("Noisy-v0", "processes"), ("HalfCheetah-v5", "processes")]


@pytest.mark.parametrize(("env", "backend"), CASES)
def test_resume_continues_bit_for_bit(env: str, backend: str) -> None:
    if env == "HalfCheetah-v5":
        pytest.importorskip("mujoco")
    first, second = (envs.make(env, 3, seed, backend) for seed in (1, 2))
    play(first, 47, seed=0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.obs, second.obs)
    assert same(play(first, 60, seed=5), play(second, 60, seed=5))
    assert first.episodes.recent == second.episodes.recent
    assert np.array_equal(first.episodes.running, second.episodes.running)
    assert np.array_equal(first.episodes.length, second.episodes.length)
    first.close()
    second.close()


@pytest.mark.parametrize("env", ["Noisy-v0", "Pendulum-v1"])
def test_backends_give_the_same_bits(env: str) -> None:
    sync, processes = envs.make(env, 5, 0, "sync"), envs.make(env, 5, 0, "processes")
    assert torch.equal(sync.obs, processes.obs)
    assert same(play(sync, 70, seed=1), play(processes, 70, seed=1))
    processes.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_actions_are_held(backend: str) -> None:
    """Four steps an action, fewer where the episode ends: the last is seen, their sum paid, and the next episode begins with an action of its own."""
    plain, held = envs.make("CartPole-v1", 1, 0, "sync"), envs.make("CartPole-v1", 1, 0, backend, action_repeat=4)
    left = torch.zeros(1, dtype=torch.int64)
    for _ in range(4):  # episodes, in which it falls to one side after 9 steps
        over, paid = False, []
        while not over:
            next_obs, reward, terminated, _ = held.step(left)
            over = bool(terminated)
            paid.append(int(reward))
            for _ in range(paid[-1]):
                expected = plain.step(left)
            assert torch.equal(next_obs, expected[0])
            assert over == bool(expected[2])
        assert paid == [4, 4, 1]
        assert torch.equal(held.obs, plain.obs)
    assert held.episodes.recent == plain.episodes.recent
    held.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_held_actions_are_cut_off_by_a_time_limit_and_resumed(backend: str) -> None:
    held = envs.make("Trap-v0", 2, 0, backend, action_repeat=3)  # five steps an episode
    act = torch.zeros(2, dtype=torch.int64)
    paid = [(reward.tolist(), terminated.any().item(), truncated.tolist()) for _, reward, terminated, truncated in (held.step(act) for _ in range(4))]
    assert paid == [([3.0, 3.0], False, [False, False]), ([2.0, 2.0], False, [True, True])] * 2
    held.close()
    first, second = (envs.make("Noisy-v0", 3, seed, backend, action_repeat=4) for seed in (1, 2))
    play(first, 11, seed=0)
    second.load_state_dict(first.state_dict())
    assert same(play(first, 20, seed=5), play(second, 20, seed=5))
    first.close()
    second.close()


def test_who_can_hold_actions() -> None:
    assert envs.backends("CartPole-v1", 2) == envs.backends("HalfCheetah-v5", 2) == ("sync", "processes")
    with pytest.raises(UsageError, match="backend of CartPole-v1 must be one of sync, processes, got 'native'"):
        envs.make("CartPole-v1", 1, 0, "native", action_repeat=2)
    with pytest.raises(UsageError, match="action_repeat must be at least 1, got 0"):
        envs.make("CartPole-v1", 1, 0, action_repeat=0)
    with pytest.raises(UsageError, match="expected 1 for envpool/Pong-v5, got 2"):
        envs.make("envpool/Pong-v5", 1, 0, action_repeat=2)


def test_environments_differ_from_each_other_and_by_seed() -> None:
    a, b, again = (envs.make("Pendulum-v1", 4, seed, "sync").obs for seed in (0, 1, 0))
    assert torch.equal(a, again)
    assert len({tuple(row.tolist()) for row in torch.cat((a, b))}) == 8


def test_time_limit_is_truncation_and_the_final_observation_is_kept() -> None:
    batch = envs.make("Pendulum-v1", 2, 0, "sync")
    for t in range(1, 202):
        before = batch.obs
        next_obs, reward, terminated, truncated = batch.step(torch.zeros(2, 1))
        assert not terminated.any()
        assert truncated.tolist() == [t == 200] * 2
        assert (not torch.equal(batch.obs, next_obs)) == (t == 200)
        assert torch.equal(next_obs.abs() <= torch.tensor([1.0, 1.0, 8.0]), torch.ones(2, 3, dtype=torch.bool))
        assert (next_obs.dtype, reward.dtype, terminated.dtype, next_obs.shape, reward.shape) == (torch.float32, torch.float32, torch.bool, (2, 3), (2,))
        assert before is not batch.obs
    assert batch.episodes.finished == 2


def test_actions_are_mapped_onto_the_bounds() -> None:
    bounded = ActionMap(gymnasium.spaces.Box(np.array([0.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32)))
    assert bounded(torch.tensor([[-1.0, -1.0], [0.0, 0.5], [3.0, -9.0]])).tolist() == [[0.0, -2.0], [0.5, 1.0], [1.0, -2.0]]
    free = ActionMap(gymnasium.spaces.Box(np.array([-np.inf, 0.0], np.float32), np.array([np.inf, np.inf], np.float32)))
    assert free(torch.tensor([[7.0, -3.0]])).tolist() == [[7.0, 0.0]]
    assert ActionMap(gymnasium.spaces.Discrete(3, start=-1))(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]
    assert ActionMap(gymnasium.spaces.Box(-2, 2, (2, 2)))(torch.zeros(5, 4)).shape == (5, 2, 2)


def test_whole_actions_are_the_nearest() -> None:
    """-2 … 3 on [-1, 1] lie 0.4 apart; who cuts the fractions off does 0 on a third of them, and neither end of what is open."""
    whole = ActionMap(gymnasium.spaces.Box(-2, 3, (1,), np.int64))
    assert whole(torch.tensor([[-0.99], [-0.7], [-0.25], [-0.15], [0.3], [0.7], [0.99], [7.0]])).flatten().tolist() == [-2, -1, -0, 0, 1, 2, 3, 3]
    assert whole(torch.tensor([[0.0]])).dtype == np.int64
    switch = ActionMap(gymnasium.spaces.Box(-1, 1, (1,), np.int8))
    assert switch(torch.tensor([[-0.9], [-0.6], [0.4], [0.6]])).flatten().tolist() == [-1, -1, 0, 1]


@pytest.mark.filterwarnings("error")
def test_bounds_as_far_apart_as_floats_reach_are_none() -> None:
    far = float(np.finfo(np.float32).max)
    assert ActionMap(gymnasium.spaces.Box(-far, far, (2,), np.float32))(torch.tensor([[0.0, 0.5]])).tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_environment_that_is_not_deterministic_cannot_be_resumed(backend: str) -> None:
    batch = envs.make("Chance-v0", 8, 0, backend)
    batch.step(torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Chance-v0 number \d did not come back .* not deterministic"):
        batch.load_state_dict(batch.state_dict())
    batch.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_nan_and_infinity_name_the_environment_and_the_step(backend: str) -> None:
    batch = envs.make("NaNObservation-v0", 2, 0, backend)
    act = torch.zeros(2, dtype=torch.int64)
    batch.step(act)
    batch.step(act)
    with pytest.raises(RunError, match=r"NaNObservation-v0 number 0 gave the observation \[nan\] at step 3 of episode 0"):
        batch.step(act)
    batch.close()
    batch = envs.make("InfiniteReward-v0", 2, 0, backend)
    with pytest.raises(RunError, match="gave the reward inf at step 1"):
        batch.step(act)
    batch.close()


TOLD = {
    "raise": r"raised RuntimeError at {}: the wheel came off",
    "exit": r"raised SystemExit at {}: 3",
    "quit": r"ended its process with exit code 3 at {}",
    "kill": r"lost its process to SIGKILL at {}: was there memory enough\?",
    "crash": r"lost its process to SIGSEGV at {}",
    "sleep": r"hung for 0.6 s at {}",
    "spin": r"hung for 0.6 s at {}",
    "nan": r"gave the observation \[ 0. nan  0.  0.\] at {}: expected finite numbers",
    "infinity": r"gave the observation \[  0.   0. -inf   0.\] at {}: expected finite numbers",
    "shape": r"gave an observation of shape \(1,\) at {}: expected \(4,\)",
    "dtype": r"gave an observation of dtype complex64 at {}: expected float32",
    "none": r"gave an observation of shape \(\) at {}: expected \(4,\)",
}
ALONE = ("quit", "kill", "crash", "spin")  # no process survives these in itself
TRACED = {"raise": "the wheel came off", "exit": "sys.exit(3)"} | dict.fromkeys(("crash", "sleep", "spin"), "in fault")
TRACED |= dict.fromkeys(("shape", "none"), "in write")


@pytest.mark.parametrize("backend", ["sync", "processes"])
@pytest.mark.parametrize("kind", rl_tasks.FAULTS)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_faults_are_named_at_once(kind: str, where: str, backend: str) -> None:
    if backend == "sync" and kind in ALONE:
        return
    batch = envs.make(f"Faulty-{kind}-v0", 3, 0, backend, timeout=0.6)
    workers = [group.process.pid for group in batch.groups if isinstance(group, Worker)]
    nothing = torch.zeros(3, dtype=torch.int64)
    batch.step(nothing)
    batch.step(nothing)
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        batch.step(torch.tensor([0, 0, 1 if where == "step" else 2]))
    seconds = time.monotonic() - start
    when = "step 3 of episode 0" if where == "step" else "the reset of episode 1"
    assert re.fullmatch(f"Faulty-{kind}-v0 number 2 " + TOLD[kind].format(when), str(caught.value)), str(caught.value)
    assert seconds < 1 + (0.6 if kind in ("sleep", "spin") else 0)
    assert TRACED.get(kind, "") in "\n".join(getattr(caught.value, "__notes__", []))
    assert (len(workers) > 0) == (backend == "processes")
    assert not any(alive(pid) for pid in workers)
    with pytest.raises(RunError, match="are closed"):
        batch.step(nothing)
    batch.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_dict_observations_and_several_choices(backend: str) -> None:
    """By hand: the parts in the order of their names (Gymnasium sorts them), one-hot where they are choices."""
    batch = envs.make("Everything-v0", 2, 0, backend)
    assert batch.spaces == envs.Spaces(obs_dim=2 + 3 + 5 + 1 + 4, act_dim=9, discrete=True, multi=(2, 3, 4))
    assert envs.spaces("Everything-v0", multi=True) == batch.spaces
    doors, gear, seats, speed = [0, 1], [0, 1, 0], [0, 1, 0, 0, 1], [0.1, 0.2, 0.3, 0.4]
    torch.testing.assert_close(batch.obs, torch.tensor([[*doors, *gear, *seats, 0, *speed]] * 2))
    next_obs, reward, *_ = batch.step(torch.tensor([[0, 0, 0], [1, 2, 3]]))
    torch.testing.assert_close(next_obs, torch.tensor([[*doors, *gear, *seats, 1, *speed]] * 2))
    assert reward.tolist() == [0 + 10 - 1, 100 + 30 + 2]  # the choices begin at 0, 1, -1
    with pytest.raises(ValueError, match=r"act must be 2 actions of MultiDiscrete\(.*\), got a tensor \(2,\)"):
        batch.step(torch.zeros(2, dtype=torch.int64))
    batch.close()
    wrong = envs.make("WrongPart-v0", 2, 0, backend)
    wrong.step(torch.zeros(2, 3, dtype=torch.int64))
    told = r"WrongPart-v0 number [01] gave the observation \['gear'\] .*5.* at step 2 of episode 0: expected one of Discrete\(3, start=-1\)"
    with pytest.raises(RunError, match=told):
        wrong.step(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_pictures_beside_vectors(backend: str) -> None:
    batch = envs.make("Switches-v0", 2, 0, backend)
    assert batch.spaces == envs.Spaces(obs_dim=1 + 4 * 8 * 10, act_dim=6, discrete=True, multi=(2, 2, 2), image=(4, 8, 10))
    next_obs, *_ = batch.step(torch.tensor([[1, 0, 0], [0, 1, 1]]))
    assert next_obs[:, 0].tolist() == [0.5, 0.5]
    pictures = next_obs[:, 1:].reshape(2, 4, 80)
    assert (pictures == torch.tensor([[200, 1, 1, 0], [200, 1, 0, 1]]).unsqueeze(-1)).all()  # depth, then the three channels of eye
    batch.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_pictures_alone_stay_bytes(backend: str) -> None:
    batch = envs.make("Film-v0", 3, 0, backend)
    assert batch.spaces == envs.Spaces(obs_dim=0, act_dim=2, discrete=True, image=(1, 16, 24))
    assert (batch.spaces.obs_shape, batch.spaces.obs_dtype) == ((1, 16, 24), torch.uint8)
    next_obs, *_ = batch.step(torch.zeros(3, dtype=torch.int64))
    assert next_obs.dtype == batch.obs.dtype == torch.uint8
    assert next_obs.shape == (3, 1, 16, 24)
    assert (next_obs == 1).all()
    other = envs.make("Film-v0", 3, 1, backend)
    other.load_state_dict(batch.state_dict())
    assert torch.equal(other.obs, batch.obs)
    batch.close()
    other.close()


@pytest.mark.parametrize(
    ("shape", "image"),
    [((8, 10), (1, 8, 10)), ((8, 10, 3), (3, 8, 10)), ((3, 8, 10), (3, 8, 10)), ((4, 8, 10), (4, 8, 10)), ((4, 8, 10, 3), (12, 8, 10))]
    + [((7, 10), None), ((80,), None)],
)
def test_what_a_picture_is(shape: tuple[int, ...], image: tuple[int, ...] | None) -> None:
    space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
    seen = Observation(space)
    assert seen.image == image
    value = space.sample()
    row = np.empty(seen.shape, seen.dtype)
    seen.write(value, row)
    if image is None:
        assert row.tolist() == value.ravel().tolist()
        assert row.dtype == np.float32
    else:
        assert sorted(row.ravel().tolist()) == sorted(value.ravel().tolist())
        if shape[-1] == 3:
            assert np.array_equal(row[-1], value[..., 2] if len(shape) == 3 else value[3, ..., 2])
        assert Observation(gymnasium.spaces.Box(0, 1, shape, np.float32)).image is None


def test_stacks_begin_anew_with_each_episode() -> None:
    """CartPole stacked by 3: each row is the last three observations of its own episode, the first repeated where there are fewer."""
    plain, stacked = envs.make("CartPole-v1", 4, 0), envs.make("CartPole-v1", 4, 0, frame_stack=3)
    assert stacked.spaces == envs.spaces("CartPole-v1", frame_stack=3) == envs.Spaces(obs_dim=12, act_dim=2, discrete=True)
    history = [[row] * 3 for row in plain.obs]
    ends, rng = 0, torch.Generator().manual_seed(0)
    for _ in range(80):
        assert torch.equal(stacked.obs, torch.stack([torch.cat(rows) for rows in history]))
        act = torch.randint(2, (4,), generator=rng)
        (next_obs, _, terminated, _), (next_stacked, *_) = plain.step(act), stacked.step(act)
        history = [[*rows[1:], row] for rows, row in zip(history, next_obs, strict=True)]
        assert torch.equal(next_stacked, torch.stack([torch.cat(rows) for rows in history]))
        history = [[plain.obs[i]] * 3 if terminated[i] else rows for i, rows in enumerate(history)]
        ends += int(terminated.sum())
    assert ends > 5
    assert stacked.episodes.finished == ends
    again = envs.make("CartPole-v1", 4, 9, frame_stack=3)
    again.load_state_dict(stacked.state_dict())
    assert same(play(stacked, 40, 1), play(again, 40, 1))
    assert again.episodes.recent == stacked.episodes.recent
    with pytest.raises(ValueError, match="12\\) were saved, here they are \\(4, 8\\)"):
        envs.make("CartPole-v1", 4, 9, frame_stack=2).load_state_dict(stacked.state_dict())


def test_algorithms_are_not_given_what_they_do_not_ask_for() -> None:
    told = r"Everything-v0 has actions that are \d choices at once, of \(.*\); this algorithm takes one, `ppo`, `trpo` and `vpg` several$"
    with pytest.raises(UsageError, match=told):
        envs.spaces("Everything-v0")
    with pytest.raises(UsageError, match=r"Film-v0 has pictures \(C, H, W\) = \(1, 16, 24\) for observations; this algorithm takes vectors$"):
        envs.spaces("Film-v0")
    assert envs.spaces("Film-v0", images=True, frame_stack=4).image == (4, 16, 24)
    with pytest.raises(UsageError, match="frame_stack is for vectors or pictures, not for both"):
        envs.make("Switches-v0", 1, 0, frame_stack=2)


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_lunar_lander(backend: str) -> None:
    with warnings.catch_warnings():  # the bindings of Box2D warn when they are imported, and end the process where that is an error
        warnings.simplefilter("ignore")
        pytest.importorskip("Box2D")
    first, second = (envs.make("LunarLander-v3", 3, seed, backend) for seed in (0, 1))
    assert first.spaces == envs.Spaces(obs_dim=8, act_dim=4, discrete=True)
    play(first, 150, 0)
    second.load_state_dict(first.state_dict())
    assert same(play(first, 30, 1), play(second, 30, 1))
    assert first.episodes.finished > 0
    first.close()
    second.close()


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_atari(backend: str) -> None:
    for package in ("ale_py", "cv2"):
        pytest.importorskip(package)
    first, second = (envs.make("ALE/Breakout-v5", 2, seed, backend, frame_stack=4) for seed in (0, 1))
    assert first.spaces == envs.spaces("ALE/Breakout-v5", images=True, frame_stack=4) == envs.Spaces(0, 4, discrete=True, image=(4, 84, 84))
    rewards = sum(float(x.sum()) for x in play(first, 120, 0)[1::5])
    assert rewards > 0
    assert first.obs.dtype == torch.uint8
    assert first.obs.float().std() > 10
    second.load_state_dict(first.state_dict())
    assert same(play(first, 20, 1), play(second, 20, 1))
    first.close()
    second.close()


def test_atari_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    for name in [name for name in gymnasium.registry if name.startswith("ALE/")]:
        monkeypatch.delitem(gymnasium.registry, name)
    with pytest.raises(UsageError, match=r"ALE/Breakout-v5 needs a package that is not installed \(.*\): pip install 'onetorch\[atari\]'"):
        envs.make("ALE/Breakout-v5", 1, 0)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPol-v1", r"unknown environment 'CartPol-v1'; nearest: CartPole-v1$"),
        ("halfcheetah-v5", r"nearest: HalfCheetah-v5$"),
        ("Hopper-v9", r"nearest: Hopper-v5$"),
        ("phys2d/MountanCar", r"nearest: MountainCar-v0$"),
        ("Banana-v3", r"unknown environment 'Banana-v3' \([^;]*\)$"),
        ("TextObservation-v0", r"observation space Text\(.*\); supported: Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these$"),
        ("TextAction-v0", r"action space Text\(.*\); supported: Box, Discrete, MultiDiscrete, MultiBinary$"),
        ("NothingSeen-v0", r"observation space Dict\(.*\), which holds no number$"),
        ("NothingDone-v0", r"action space Box\(.*\), which holds no number$"),
        ("Unmade-v0", r"Unmade-v0 cannot be made: TypeError: .*missing 1 required positional argument: 'size'"),
        ("MissingPackage-v0", r"needs a package that is not installed .*pip install 'onetorch\[rl\]'"),
    ],
)
def test_what_cannot_be_made_is_named_in_one_line(env: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        envs.make(env, 1, 0, "sync")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["sync", "processes"])
def test_module_that_registers_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    name = f"registers_{backend}"
    (tmp_path / f"{name}.py").write_text(
        "import gymnasium, rl_tasks\nclass Mine(rl_tasks.Task): pass\n"
        f"gymnasium.register('Mine-{backend}-v0', entry_point='{name}:Mine', max_episode_steps=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = envs.make(f"{name}:Mine-{backend}-v0", 2, 0, backend)
    assert envs.backends(f"{name}:Mine-{backend}-v0") == ("sync", "processes")
    ends = [batch.step(torch.zeros(2, dtype=torch.int64))[3].tolist() for _ in range(3)]
    assert ends == [[False, False], [False, False], [True, True]]
    batch.close()
    with pytest.raises(UsageError, match="the module 'no_such_module' cannot be imported"):
        envs.make("no_such_module:Mine-v0", 1, 0)


@pytest.mark.parametrize(
    ("text", "told"), [("raise RuntimeError('no\\ndisk')", "RuntimeError: no disk"), ("def (", r"SyntaxError: invalid syntax \(.*\.py, line 1\)")]
)
def test_a_module_that_fails_is_named_and_where(text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_itself.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=rf"^fails_itself:Mine-v0: the module 'fails_itself' cannot be imported \({told}\)") as caught:
        envs.make("fails_itself:Mine-v0", 1, 0)
    assert any("fails_itself.py" in line for line in caught.value.__notes__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lies_here.py").touch()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    with pytest.raises(UsageError, match=r"'lies_here' cannot be imported \(.*\); to take the one in this folder, put PYTHONPATH=\. before the command$"):
        envs.make("lies_here:Mine-v0", 1, 0)
    with pytest.raises(UsageError, match="the module '' cannot be imported"):
        envs.make(":CartPole-v1", 1, 0)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Everything-v0", "Switches-v0"])
def test_the_ceiling_of_every_kind_of_action(env: str) -> None:
    """Everything-v0 and Switches-v0 look whether they were given actions of theirs."""
    assert envs.speed(env, 2, "sync", seconds=0.0) > 0


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        envs.make("CartPole-v1", 0, 0)
    with pytest.raises(ValueError, match="native, sync, processes, got 'thread'"):
        envs.make("CartPole-v1", 1, 0, "thread")
    with pytest.raises(ValueError, match="3 environments were saved, 2 are here"):
        envs.make("Pendulum-v1", 2, 0, "sync").load_state_dict(envs.make("Pendulum-v1", 3, 0, "sync").state_dict())


@pytest.mark.parametrize("backend", ["sync", "processes"])
@pytest.mark.parametrize(
    ("env", "told"),
    [
        ("OldReset-v0", r"gave ndarray from reset at the reset of episode 0: expected a tuple \(observation, info\)"),
        ("OldStep-v0", r"gave 4 values from step at step 1 of episode 0: expected a tuple \(observation, reward, terminated, truncated, info\)"),
        ("RewardList-v0", r"gave the reward array\(\[1\.\]\) at step 1 of episode 0: expected a number"),
        ("NoFlag-v0", r"gave the terminated None at step 1 of episode 0: expected True or False"),
    ],
)
def test_answers_of_another_form_are_named(env: str, told: str, backend: str) -> None:
    with pytest.raises(RunError, match=told):
        envs.make(env, 2, 0, backend).step(torch.zeros(2, dtype=torch.int64))


def test_a_worker_killed_between_two_steps_is_named() -> None:
    batch = envs.make("Endless-v0", 2, 0, "processes")
    group = batch.groups[-1]  # type: ignore[attr-defined]
    os.kill(group.process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="Endless-v0 number 1 lost its process to SIGKILL at "):
        batch.step(torch.zeros(2, dtype=torch.int64))
    assert not any(alive(g.process.pid) for g in batch.groups)  # type: ignore[attr-defined]


def test_what_an_environment_started_is_ended_with_it() -> None:
    batch = envs.make("Starter-v0", 1, 0, "processes")
    child = int(batch.step(torch.ones(1, dtype=torch.int64))[0].item())
    assert alive(child)
    with pytest.raises(RunError, match="lost its process to SIGKILL"):
        batch.step(torch.zeros(1, dtype=torch.int64))
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline, "what the environment started is still there"
        time.sleep(0.02)


def test_the_clock_is_given_back_after_each_step() -> None:
    batch = envs.make("Endless-v0", 1, 0, "sync", timeout=0.4)
    batch.step(torch.zeros(1, dtype=torch.int64))
    time.sleep(0.6)  # an update that takes longer than a step may
    batch.step(torch.zeros(1, dtype=torch.int64))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_clock_of_someone_else_is_left_alone() -> None:
    def theirs(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGALRM, theirs)
    try:
        envs.make("Endless-v0", 1, 0, "sync").step(torch.zeros(1, dtype=torch.int64))
        assert signal.getsignal(signal.SIGALRM) is theirs
    finally:
        signal.signal(signal.SIGALRM, before)


def test_slow_environments_do_not_hang_together() -> None:
    """The timeout is of one step of one environment: five of 0.15 s are no hang of 0.4 s."""
    for backend in ("sync", "processes"):
        batch = envs.make("Slow-v0", 5, 0, backend, timeout=0.4)
        batch.step(torch.zeros(5, dtype=torch.int64))
        batch.close()


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, busy: bool) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import rl_tasks, sys, time, torch\n"
        "from onetorch.rl import envs\n"
        "batch = envs.make('Faulty-spin-v0', 2, 0, 'processes')\n"
        "print(*(group.process.pid for group in batch.groups), flush=True)\n"
        f"batch.step(torch.full((2,), {int(busy)}))\n"
        "time.sleep(60)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | path)
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert workers
    assert all(alive(pid) for pid in workers)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)  # what reaches a whole process group must not end a worker before its parent
    time.sleep(0.3)
    assert all(alive(pid) for pid in workers)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # an orphan waits for init to be reaped
    except FileNotFoundError:
        return not Path("/proc").is_dir()


def test_tasks_are_registered() -> None:
    assert gymnasium.spec("Trap-v0").max_episode_steps == rl_tasks.LIMIT
