"""DQN: its targets by hand under every option, a task with a known answer, time limits, exact resumption in a fresh process, and wrong inputs."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import rl_tasks
import torch
from safetensors.torch import load_file
from torch import nn

from onetorch.rl import dqn
from onetorch.rl.buffer import Batch, PrioritizedReplay
from onetorch.rl.envs import Spaces
from onetorch.runs.errors import NonFinite, UsageError
from onetorch.runs.run import Run

SMALL = dqn.Config(
    total_steps=512, num_envs=4, update_every=32, updates=4, batch_size=16, update_after=64, replay=300, target_every=7, hidden=(16,),
    tau=1.0, lr=1e-2, adam_eps=1e-8, huber=1.0, max_grad_norm=10.0, anneal=False, double=False, clipped=False, n_step=1,
)  # fmt: skip
BACKENDS = {"CartPole-v1": "native"}


def train(folder: Path, config: dqn.Config, **options: Any) -> tuple[dqn.QNet, list[dict[str, Any]]]:
    fixed = {"threads": "1", "backend": BACKENDS.get(config.env, "sync")}
    with Run(folder, config, quiet=True, fixed=fixed, **options) as run:
        model = dqn.train(config, run)
    return model, timeless(folder)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the columns that depend on time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def table(values: list[list[float]]) -> nn.Linear:
    """A net that looks Q(s, .) up for one-hot s: values[s][a]."""
    net = nn.Linear(len(values), len(values[0]), bias=False)
    net.weight.data = torch.tensor(values).T.clone()
    return net


def batch_of(obs: list[int], act: list[int], reward: list[float], next_obs: list[int], terminated: list[int]) -> Batch:
    eye = torch.eye(2)
    end = torch.tensor(terminated, dtype=torch.float32)
    return Batch(eye[obs], torch.tensor(act), torch.tensor(reward), eye[next_obs], end, torch.zeros(len(obs)))


def test_targets_by_hand() -> None:
    model, target = table([[7.0, 2.0], [0.0, 1.0]]), table([[1.0, 5.0], [3.0, -2.0]])
    batch = batch_of([0, 0, 1], [0, 1, 0], [2.0, 2.0, 1.0], [0, 0, 1], [0, 1, 0])
    discount = torch.tensor([0.5, 0.5, 0.25])
    # the target's greatest: 2 + 5 / 2; nothing follows the end; 1 + 3 / 4
    assert dqn.td_target(model, target, batch, discount, double=False).tolist() == [4.5, 2.0, 1.75]
    # the model would do 0 in state 0 and 1 in state 1, for which the target has 1 and -2
    assert dqn.td_target(model, target, batch, discount, double=True).tolist() == [2.5, 2.0, 0.5]
    # clipped: in state 0 the model's own 1 is less than the target's 5, in state 1 the target's -2 less than the model's 1
    model, target = table([[1.0, 0.0], [0.0, 1.0]]), table([[5.0, 8.0], [3.0, -2.0]])
    assert dqn.td_target(model, target, batch, discount, double=True).tolist() == [4.5, 2.0, 0.5]
    assert dqn.td_target(model, target, batch, discount, double=True, clipped=True).tolist() == [2.5, 2.0, 0.5]


def test_dueling_is_a_value_and_what_an_action_adds_to_it() -> None:
    torch.manual_seed(0)
    net = dqn.QNet(Spaces(obs_dim=3, act_dim=4, discrete=True), (8, 5), dueling=True)
    obs = torch.randn(6, 3)
    q, out = net(obs), net.head(obs)
    torch.testing.assert_close(q.mean(1), out[:, 0])  # V, whatever the advantages
    torch.testing.assert_close(q - q.mean(1, keepdim=True), out[:, 1:] - out[:, 1:].mean(1, keepdim=True))
    # what is added to every advantage alike changes nothing: only V can say how good a state is
    bias = net.head.split(net.head.flat.detach())[-1]
    bias[1:] += 3.0
    torch.testing.assert_close(net(obs), q)
    bias += torch.tensor([2.0, 4.0, 0, 0, 0])
    torch.testing.assert_close(net(obs), q + 2 + torch.tensor([3.0, -1, -1, -1]))


@pytest.mark.parametrize(("image", "obs_dim"), [((1, 10, 12), 0), ((4, 84, 84), 0), ((1, 8, 9), 3 + 72)])
def test_pictures_are_seen(image: tuple[int, int, int], obs_dim: int) -> None:
    net = dqn.QNet(Spaces(obs_dim, act_dim=3, discrete=True, image=image), (8,), dueling=False)
    pixels = torch.randint(256, (2, *image), dtype=torch.uint8)
    obs = torch.cat((torch.randn(2, 3), pixels.float().flatten(1)), 1) if obs_dim else pixels
    q = net(obs)
    seen = net.body(pixels.float() / 255)
    torch.testing.assert_close(q, net.head(torch.cat((obs[:, :3], seen), 1) if obs_dim else seen))
    q.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    if image == (4, 84, 84):  # Mnih et al.: 3,136 numbers are left
        assert net.head.sizes[0] == 3136


def linear(config: dqn.Config, folder: Path) -> tuple[dqn.State, Run]:
    """A state whose Q is linear, in an environment whose observation is always 1, and three transitions with rewards 0, 1 and 4 in its memory."""
    config = dataclasses.replace(config, env="Trap-v0", hidden=(), num_envs=1)
    state = dqn.begin(config, "sync")
    no = torch.zeros(1).bool()
    for act, reward in ((0, 0.0), (1, 1.0), (1, 4.0)):
        state.replay.add(torch.ones(1, 1), torch.tensor([act]), torch.tensor([reward]), torch.ones(1, 1), no, no)
    for net in (state.model, state.target):
        net.head.load_state_dict({"0.weight": torch.tensor([[1.0], [2.0]]), "0.bias": torch.tensor([0.5, 0.0])})
    return state, Run(folder, config, quiet=True)


def test_loss_and_gradient_by_hand(tmp_path: Path) -> None:
    """Q is (1.5, 2). With gamma 1/2 each target is r + 1: 1, 2 and 5, so the errors are 0.5, 0 and -3, and Huber's losses 0.125, 0 and 2.5."""
    state, run = linear(config := dataclasses.replace(SMALL, gamma=0.5, batch_size=30_000, updates=1), tmp_path / "run")
    with run:
        seen = dqn.learn(config, state, 1.0, run)
    third = pytest.approx(1 / 3, rel=0.03)  # each transition is drawn as often
    assert seen["loss"].item() / (0.125 + 2.5) == third
    assert (seen["q"] - seen["y"]).abs().mean().item() / 3.5 == third
    # the gradient of Huber's loss is the error, at most 1: 0.5 / 3 for action 0, -1 / 3 for action 1; of weight and bias alike, as the observation is 1
    assert state.model.head.flat.grad is not None
    for grad in state.model.head.split(state.model.head.flat.grad):
        assert grad.flatten().tolist() == pytest.approx([0.5 / 3, -1 / 3], rel=0.03)
    assert seen["grad_norm"] == pytest.approx(math.sqrt(2 * (0.25 + 1) / 9), rel=0.03)
    # up to 2 errors count squared: 2 (3 - 1) = 4 for the third, and a gradient of -2
    state, run = linear(config := dataclasses.replace(config, huber=2.0), tmp_path / "wider")
    with run:
        seen = dqn.learn(config, state, 1.0, run)
    assert seen["loss"].item() / (0.125 + 4.0) == third
    assert seen["grad_norm"] == pytest.approx(math.sqrt(2 * (0.25 + 4) / 9), rel=0.03)


# Of an update of fixed weights from fixed transitions in float64, and the loss of the next: whoever changes what the algorithm computes sees it here. Twelve
# digits, because the last bits differ between processors.
GOLDEN: dict[str, dict[str, float]] = {
    "plain": {
        "loss": 2.1603177589370097, "grad_norm": 1.628992310227206, "q": 1.5758688185775585,
        "y": 2.6977752564592676, "loss of the next": 1.74536207973637,
    },
    "double": {
        "loss": 2.1909695036765204, "grad_norm": 1.5066907552361124, "q": 1.5758688185775585,
        "y": 2.4092752454999102, "loss of the next": 1.691464766420539,
    },
    "dueling, three steps": {
        "loss": 3.2095653932161383, "grad_norm": 2.0675517786676676, "q": 1.8727542453349193,
        "y": 4.053609039372049, "loss of the next": 2.6135482044394105,
    },
    "priority": {
        "loss": 0.896680444722952, "grad_norm": 0.592107292733903, "q": 1.6425342100693303,
        "y": 1.8339754877518195, "loss of the next": 1.0612437196583981,
    },
    "all": {
        "loss": 1.410934337980607, "grad_norm": 0.5217583277020965, "q": 1.7790007148424412,
        "y": 2.858770801749986, "loss of the next": 1.1081432761903134,
    },
}
GOLDEN_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"double": True},
    "dueling, three steps": {"dueling": True, "n_step": 3},
    "priority": {"priority": 0.6, "double": True},
    "all": {"double": True, "dueling": True, "n_step": 3, "priority": 0.6, "tau": 0.1, "target_every": 1},
}


@pytest.mark.parametrize("name", list(GOLDEN_CONFIGS))
def test_golden_losses(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, replay=64, updates=1, batch_size=64, **GOLDEN_CONFIGS[name])
    torch.set_default_dtype(torch.float64)
    try:
        state = dqn.begin(config, "native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert state.model.head.flat.dtype == state.replay.rows.dtype == torch.float64
    wave = torch.arange(4, dtype=torch.float64)
    with torch.no_grad():
        for k, net in enumerate((state.model, state.target)):
            net.head.flat.copy_(torch.sin(torch.arange(net.head.flat.numel(), dtype=torch.float64).square() * (k + 1) + k))
    for t in range(16):
        obs, next_obs = (torch.sin(torch.outer(wave + 4 * s, torch.arange(1, 5, dtype=torch.float64))) for s in (t, t + 1))
        ends = torch.tensor([[t % 5 == 0, False, t == 7, False], [False, t % 7 == 3, False, False]])
        state.replay.add(obs, (t + torch.arange(4)) % 2, torch.cos(wave + t), next_obs, *ends)
    if isinstance(state.replay, PrioritizedReplay):
        state.replay.prioritize(torch.arange(64), torch.sin(torch.arange(64)))
    with Run(tmp_path / "run", config, quiet=True) as run:
        seen = dqn.learn(config, state, 0.7, run)
        again = dqn.learn(config, state, 0.7, run)
    found = {"loss": seen["loss"], "grad_norm": seen["grad_norm"], "q": seen["q"].mean(), "y": seen["y"].mean(), "loss of the next": again["loss"]}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(GOLDEN[name], rel=1e-11)


def test_importance_weights_undo_the_priorities(tmp_path: Path) -> None:
    """Priorities 1, 2 and 5 draw the transitions 1, 2 and 5 times of 8; weighted by 1, 1/2 and 1/5 each counts the same."""
    state, run = linear(config := dataclasses.replace(SMALL, gamma=0.5, batch_size=30_000, updates=1, priority=1.0), tmp_path / "run")
    assert isinstance(state.replay, PrioritizedReplay)
    state.replay.prioritize(torch.arange(3), torch.tensor([1.0, 2.0, 5.0]))
    with run:
        seen = dqn.learn(config, state, 1.0, run)
    assert (seen["q"] - seen["y"]).abs().mean().item() == pytest.approx((0.5 * 1 + 3 * 5) / 8, rel=1e-3)  # the mean over what was drawn
    assert seen["loss"].item() == pytest.approx((0.125 + 2.5) / 8, rel=1e-3)
    # the new priorities are the errors 0.5, 0 and 3, of which no more counts than Huber's h
    assert state.replay.tree[torch.arange(3)].tolist() == pytest.approx([0.5, 0, 1], abs=2e-6)


def test_target_is_a_copy_or_an_average(tmp_path: Path) -> None:
    for tau, every in ((1.0, 3), (0.25, 1)):
        config = dataclasses.replace(SMALL, tau=tau, target_every=every, updates=1, dueling=True)
        with Run(tmp_path / str(tau), config, quiet=True) as run:
            state = dqn.begin(config, "native")
            dqn.explore(config, state, 1.0, run)()
            before = expected = {k: v.clone() for k, v in state.target.state_dict().items()}
            for k in range(1, 4):
                dqn.learn(config, state, 1.0, run)
                now = state.model.state_dict()
                if k % every == 0:
                    expected = {name: (1 - tau) * old + tau * now[name] for name, old in expected.items()}
                for name, value in state.target.state_dict().items():
                    torch.testing.assert_close(value, expected[name])
            assert all(not torch.equal(now[name], before[name]) for name in now)  # gradients reach every weight, both streams'
        assert all(p.grad is None and not p.requires_grad for p in state.target.parameters())


class Corridor(gymnasium.Env):
    """Five cells in a row; from cell 2, action 1 goes right and 0 left. Leaving on the right pays 1, on the left 0.3; both end it. Observed one-hot."""

    observation_space = gymnasium.spaces.Box(0, 1, (5,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(5))
        return self.look(), {}

    def look(self) -> Any:
        return np.eye(7, dtype=np.float32)[self.cell + 1, 1:6]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.cell += 2 * int(action) - 1
        reward = {5: 1.0, -1: 0.3}.get(self.cell, 0.0)
        return self.look(), reward, self.cell in (5, -1), False, {}


class Picture(gymnasium.Env):
    """One half of the picture is bright, and pays 1 for the action of its side; another follows, or the end with chance 1/10."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.look(), {}

    def look(self) -> Any:
        self.side = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (8, 8), np.uint8)
        picture[:, 4 * self.side : 4 * self.side + 4] += 100
        return picture

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.side)
        return self.look(), reward, bool(self.np_random.random() < 0.1), False, {}


class Echo(gymnasium.Env):
    """A picture is dark or bright at random, and the action is to say what the one before it was; the first counts for its own. Five steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.bright = 0, int(self.np_random.integers(2))
        self.before = self.bright
        return self.look(), {}

    def look(self) -> Any:
        return np.full((8, 8), 250 * self.bright, np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.before)
        self.count, self.before, self.bright = self.count + 1, self.bright, int(self.np_random.integers(2))
        return self.look(), reward, self.count == 5, False, {}


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", entry_point=Corridor)
    gymnasium.register("Pixels-v0", entry_point=Picture, max_episode_steps=20)
    gymnasium.register("Echo-v0", entry_point=Echo)


@pytest.mark.parametrize(
    "options", [{}, {"double": True}, {"dueling": True}, {"priority": 0.6}, {"double": True, "dueling": True, "tau": 0.1, "target_every": 1}]
)
def test_finds_the_values_of_a_known_task(tmp_path: Path, options: dict[str, Any]) -> None:
    """Q*(s, right) = gamma^(4 - s); Q*(s, left) is gamma max Q*(s - 1, .), and 0.3 in cell 0, where it is better to go left only if gamma^4 < 0.3."""
    gamma = 0.7
    value = [max(gamma ** (4 - s), 0.3 * gamma**s) for s in range(5)]
    known = torch.tensor([[0.3 if s == 0 else gamma * value[s - 1], 1.0 if s == 4 else gamma * value[s + 1]] for s in range(5)])
    assert known.argmax(1).tolist() == [0, 1, 1, 1, 1]
    base = dataclasses.replace(SMALL, env="Corridor-v0", total_steps=1024, epsilon=1.0, gamma=gamma, hidden=(), updates=24, batch_size=64, target_every=25)
    config = dataclasses.replace(base, **{"lr": 0.03, "replay": 1024} | options)
    model, _ = train(tmp_path / "run", config)
    with torch.no_grad():
        assert (model(torch.eye(5)) - known).abs().max() < 0.02


def test_learns_from_pictures(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, env="Pixels-v0", total_steps=512, epsilon=1.0, gamma=0.0, updates=16, replay=512)
    model, _ = train(tmp_path / "run", config)
    env = Picture()
    env.reset(seed=1)
    seen = [(env.look(), env.side) for _ in range(50)]
    best = model(torch.stack([torch.from_numpy(picture).unsqueeze(0) for picture, _ in seen])).argmax(1)
    assert best.tolist() == [side for _, side in seen]


def test_stacked_frames_show_what_was(tmp_path: Path) -> None:
    """Who sees one picture is right half the time; two are enough for all of it, in training, in the memory and in evaluation."""
    config = dataclasses.replace(SMALL, env="Echo-v0", frame_stack=2, total_steps=768, epsilon=1.0, gamma=0.0, updates=16, replay=512)
    model, _ = train(tmp_path / "run", config)
    assert model.image == (2, 8, 8)
    assert dqn.example(config).shape == (8, 2, 8, 8)
    assert dqn.evaluate(model, config, episodes=20)["return_min"] == 5.0


def test_held_actions_count_as_the_steps_they_are(tmp_path: Path) -> None:
    """Five steps an action: each is paid 5, so its value is 5 / (1 - 0.5) = 10, and 1,280 steps are 256 transitions."""
    config = dataclasses.replace(SMALL, env="Endless-v0", action_repeat=5, update_every=40, total_steps=1280, gamma=0.5, updates=16, target_every=10)
    model, rows = train(tmp_path / "run", config)
    assert model(torch.ones(1, 1)).max().item() == pytest.approx(10.0, abs=0.3)
    assert rows[-1]["step"] == 1280
    state = dqn.begin(config, "sync")
    with Run(tmp_path / "other", config, quiet=True) as run:
        dqn.explore(config, state, 1.0, run)()
    assert state.replay.count == 40 // 5
    with pytest.raises(ValueError, match=r"update_every must be a multiple of num_envs \* action_repeat = 12"):
        dataclasses.replace(config, action_repeat=3)


@pytest.mark.parametrize("n", [1, 3])
def test_time_limit_is_not_taken_for_an_end(tmp_path: Path, n: int) -> None:
    """Reward 1 for ever, cut every 5 steps: the value is 1 / (1 - 0.9) = 10. Taken for an end it would be worth 1 + 0.9 + … at most, 4.1."""
    assert rl_tasks.LIMIT == 5
    config = dataclasses.replace(SMALL, env="Trap-v0", gamma=0.9, n_step=n, total_steps=2048, updates=16, target_every=10)
    model, _ = train(tmp_path / "run", config)
    assert model(torch.ones(1, 1)).max().item() == pytest.approx(10.0, abs=0.3)


def test_explores_less_and_less(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, total_steps=4000, update_every=40, epsilon=0.1, epsilon_fraction=0.5, update_after=500)
    _, rows = train(tmp_path / "run", config)
    # it falls from 1 at 0 to 0.1 at 2000; a row tells of the round before it
    assert [row["step"] for row in rows] == [1000, 2000, 3000, 4000]
    assert [row["epsilon"] for row in rows] == pytest.approx([1 - 0.9 * 960 / 2000, 1 - 0.9 * 1960 / 2000, 0.1, 0.1])
    # rounds of updates begin at 500, the first multiple of 40 not below is 520
    assert [row["updates"] for row in rows] == [4 * (step // 40 - 12) for step in (1000, 2000, 3000, 4000)]


def test_epsilon_is_the_share_of_random_actions(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, update_every=20_000, replay=20_000)
    state = dqn.begin(config, "native")
    with Run(tmp_path / "run", config, quiet=True) as run:
        dqn.explore(config, state, 0.3, run)()
    kept = state.replay.gather(torch.arange(20_000))
    with torch.no_grad():
        best = state.model(kept.obs).argmax(1)
    # half of the random ones are the best one too; the standard deviation is 0.0025
    assert (best != kept.act).float().mean().item() == pytest.approx(0.15, abs=0.0125)


RESUMED = {
    "plain": dataclasses.replace(SMALL, anneal=True),
    "all options": dataclasses.replace(SMALL, double=True, dueling=True, n_step=3, priority=0.6, tau=0.1, target_every=1, hidden=(16, 8)),
    "gymnasium": dataclasses.replace(SMALL, env="Noisy-v0", n_step=2, priority=0.5),
    "pictures": dataclasses.replace(SMALL, env="Pixels-v0", n_step=2, dueling=True),
}
CHILD = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_dqn
from onetorch.rl import dqn
from onetorch.runs.run import Run
for name, config in test_dqn.RESUMED.items():
    fixed = dict(threads="1", backend=test_dqn.BACKENDS.get(config.env, "sync"))
    run = Run(Path({folder!r}) / name, config, quiet=True, fixed=fixed, checkpoint_seconds=0, resume={resume})
    if {resume}:
        with run:
            dqn.train(config, run)
        continue
    save = run.checkpoint
    class Enough(Exception): pass
    def checkpoint(state):
        save(state)
        if state.iteration == 9: raise Enough
    run.checkpoint = checkpoint
    try:
        dqn.train(config, run)
    except Enough:
        run.close("stopped")
"""


def test_resumed_in_a_fresh_process_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 9 of 16 rounds, when the memory has begun to overwrite its oldest transitions."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for name, config in RESUMED.items():
        _, rows = train(straight / name, config)
        assert rows[-1]["step"] == 512
    for resume in (False, True):
        child = CHILD.format(path=[p for p in sys.path if p], folder=str(broken), resume=resume)
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in RESUMED:
        assert timeless(broken / name) == timeless(straight / name)
        a, b = ({k: v for k, v in saved(d / name).items() if not k.startswith(OTHERS)} for d in (straight, broken))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


OTHERS = ("generators.numpy", "generators.python")  # global generators that DQN neither seeds nor uses


def saved(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "00000016"
    return load_file(last / "model.safetensors") | load_file(last / "state.safetensors")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    state = dqn.begin(SMALL, "native")
    with Run(tmp_path / "run", SMALL, quiet=True) as run:
        dqn.explore(SMALL, state, 1.0, run)()
        state.replay.rows[3, 5] = math.nan  # a reward
        config = dataclasses.replace(SMALL, batch_size=500)
        before = [p.clone() for p in state.model.parameters()]
        with pytest.raises(NonFinite, match="loss is nan"):
            dqn.learn(config, state, 1.0, run)
        assert all(torch.equal(p, q) for p, q in zip(before, state.model.parameters(), strict=True))


def test_box_actions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dqn needs an environment with Discrete actions, Pendulum-v1 has Box ones"):
        train(tmp_path / "run", dataclasses.replace(SMALL, env="Pendulum-v1"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_envs", 7), ("num_envs", 0), ("replay", 3), ("update_every", 0), ("updates", 0), ("batch_size", 0), ("n_step", 0), ("frame_stack", 0)]
    + [("action_repeat", 0), ("target_every", 0), ("adam_eps", 0.0), ("huber", 0.0), ("max_grad_norm", 0.0)]
    + [("lr", 0.0), ("gamma", 1.5), ("tau", 0.0), ("epsilon", -0.1), ("epsilon_fraction", 2.0), ("priority", -1.0), ("beta", math.nan), ("hidden", (0,))],
)
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dqn.Config(**{field: value})


def test_episodes_are_evaluated_without_training_state() -> None:
    torch.manual_seed(0)
    model = dqn.build(SMALL)
    results = [dqn.evaluate(model, SMALL, episodes=30, epsilon=1.0) for _ in range(2)]
    assert results[0] == results[1]
    assert 10 < float(results[0]["stochastic_return"]) < 40  # random actions
    greedy = dqn.evaluate(model, SMALL, episodes=30, epsilon=0.0)
    assert greedy["stochastic_return"] == greedy["return"] == results[0]["return"]
    with pytest.raises(UsageError, match="epsilon must be between 0 and 1, got 7"):
        dqn.evaluate(model, SMALL, epsilon=7.0)
