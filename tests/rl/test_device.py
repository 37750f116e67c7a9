"""What a GPU would refuse, found without one: every algorithm acts, steps and learns on another device, "meta", whose tensors have no numbers.

`Elsewhere` looks at every operation: tensors of two devices must not meet, a generator draws only on its own device, and what makes the host wait for the
device (`.item()`, `.cpu()`, a mask as an index) is counted, and answered with numbers made up. It says nothing of kernels, of numbers and of speed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rl_tasks  # noqa: F401 (registers the tasks)
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onetorch.rl import ddpg, dqn, envs, ppo, sac, td3, trpo, vpg
from onetorch.rl.classic import Classic
from onetorch.runs.errors import Stopped
from onetorch.runs.run import Run
from onetorch.runs.state import set_generator

aten, REAL = torch.ops.aten, torch.Generator
MOVES = (aten.copy_.default, aten._to_copy.default)  # what may see two devices
MASKED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Elsewhere(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # operations for which the host waits
        self.generators: list[tuple[torch.Generator, str]] = []  # made here, and of which device they say they are

    def generator(self, device: Any = "cpu") -> torch.Generator:
        """In place of torch.Generator: there is none of a device without numbers."""
        self.generators.append((REAL(), torch.device(device).type))
        return self.generators[-1][0]

    def of(self, generator: torch.Generator) -> str:
        return next((device for known, device in self.generators if known._cdata == generator._cdata), "cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        met = {x.device.type for x in tensors if x.dim() or x.device.type != "cpu"}  # a number on the CPU may meet any tensor, as on a GPU
        assert len(met) < 2 or func in MOVES, f"{func} of tensors on {' and '.join(sorted(met))}"
        there = "meta" in met
        if func is aten._local_scalar_dense.default and there:
            self.waits.append("item")
            return torch.full((), 0.5).to(tensors[0].dtype).item()
        if func is aten._to_copy.default and there and kwargs.get("device") == torch.device("cpu"):
            self.waits.append("cpu")
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if func is aten.copy_.default and there and args[0].device.type == "cpu":
            self.waits.append("copy_")
            return args[0].zero_()
        if func in MASKED and there and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits.append("mask")
            (mask,) = args[1]
            return args[0].new_empty((len(mask.view(-1)), *args[0].shape[mask.dim() :])) if func is aten.index.Tensor else args[0]
        if func is aten.nonzero.default and there:
            self.waits.append("nonzero")
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        generator = kwargs.pop("generator", None)
        out = func(*args, **kwargs) if generator is None or there else func(*args, **kwargs, generator=generator)
        if generator is not None:
            assert out.device.type == self.of(generator), f"{func} on {out.device} with a generator of the device {self.of(generator)}"
        return out


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    with Elsewhere() as mode:
        monkeypatch.setattr(torch, "Generator", mode.generator)
        yield mode


def tensors(value: Any, name: str = "state") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a state, by name."""
    if isinstance(value, Tensor):
        yield name, value
        if value.grad is not None:
            yield f"{name}.grad", value.grad
    elif isinstance(value, nn.Module):
        for key, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield from tensors(tensor, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}[{i}]")
    elif type(value).__module__.startswith("onetorch.rl") and not isinstance(value, envs.GymEnvs):
        for key, item in vars(value).items():
            yield from tensors(item, f"{name}.{key}")


def all_there(elsewhere: Elsewhere, state: Any) -> None:
    found = dict(tensors(state))
    assert len(found) > 6
    assert [name for name, tensor in found.items() if tensor.device.type != "meta"] == []
    assert {device for _, device in elsewhere.generators} <= {"meta"}


def test_the_check_finds_what_it_is_for(elsewhere: Elsewhere) -> None:
    here, there = torch.ones(3), torch.ones(3, device="meta")
    for wrong in (
        lambda: here + there, lambda: there.index_select(0, here.long()), lambda: there[here.bool()], lambda: torch.cat((here, there)),
        lambda: torch.rand(3, device="meta", generator=torch.Generator()), lambda: torch.rand(3, generator=torch.Generator("meta")),
        lambda: torch.randint(3, (3,), device="meta", generator=torch.Generator()), lambda: nn.Linear(3, 1)(there.unsqueeze(0)),
        lambda: torch.empty_like(there).exponential_(generator=torch.Generator()),
    ):  # fmt: skip
        with pytest.raises((AssertionError, RuntimeError), match=r"device|meta"):
            wrong()
    assert elsewhere.waits == []
    assert torch.rand(3, device="meta", generator=torch.Generator("meta")).is_meta
    assert (there.sum().item(), there.cpu().device.type, there[there > 0].shape) == (0.5, "cpu", (3,))
    assert elsewhere.waits == ["item", "cpu", "mask"]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0"])
def test_no_step_of_a_native_task_waits(elsewhere: Elsewhere, env: str) -> None:
    batch = envs.make(env, 8, 0, device="meta")
    for _ in range(3):
        act = torch.zeros(8, dtype=torch.int64, device="meta") if batch.spaces.discrete else torch.zeros(8, 1, device="meta")
        assert all(x.is_meta for x in (*batch.step(act), batch.obs))
    assert elsewhere.waits == []
    all_there(elsewhere, batch)


def test_stacked_frames(elsewhere: Elsewhere) -> None:
    native, moved = envs.make("CartPole-v1", 4, 0, frame_stack=3, device="meta"), envs.make("Film-v0", 4, 0, "sync", frame_stack=3, device="meta")
    assert isinstance(native, envs.Stacked)
    assert isinstance(moved, envs.Moved)
    for batch, shape in ((native, (4, 12)), (moved, (4, 3, 16, 24))):
        for _ in range(8):  # Film-v0 ends after 6
            assert all(x.is_meta for x in (*batch.step(torch.zeros(4, dtype=torch.int64, device="meta")), batch.obs))
        assert batch.obs.shape == shape


PLAIN: dict[str, Any] = {"num_envs": 8, "batch_size": 32, "hidden": (16,), "normalize_obs": True}
ON_POLICY: list[tuple[ModuleType, dict[str, Any]]] = [
    (vpg, {"entropy_coef": 0.01}), (trpo, {}), (ppo, {"minibatches": 2, "value_clip": 0.2, "entropy_coef": 0.01, "target_kl": 9.0}),
]  # fmt: skip


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Everything-v0", "PictureAndNumber-v0"])
@pytest.mark.parametrize(("algorithm", "fields"), ON_POLICY, ids=["vpg", "trpo", "ppo"])
def test_on_policy_algorithms(elsewhere: Elsewhere, algorithm: Any, fields: dict[str, Any], env: str) -> None:
    config = algorithm.Config(env=env, **PLAIN, **fields)
    native = env in ("CartPole-v1", "Pendulum-v1")
    state = algorithm.begin(config, 8, "native" if native else "sync", "meta")
    for _ in range(2):
        elsewhere.waits.clear()
        batch = algorithm.rollout(config, state, 4)
        assert elsewhere.waits.count("cpu") == (0 if native else 4)  # the actions
        assert sum(wait != "cpu" for wait in elsewhere.waits) == 2  # once for each rollout: which steps a time limit ended, twice asked
        algorithm.update(config, state, batch)
        state.model.observe(batch["raw"])
        all_there(elsewhere, (state, batch))


def named(value: Any) -> str:
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else "-".join(map(str, value.values()))


OFF_POLICY: list[tuple[ModuleType, dict[str, Any]]] = [
    (sac, {"env": "Pendulum-v1"}), (sac, {"env": "Pendulum-v1", "alpha": 0.2}), (sac, {"env": "CartPole-v1"}), (td3, {"env": "Pendulum-v1"}),
    (ddpg, {"env": "Pendulum-v1"}), (sac, {"env": "Target-v0"}), (sac, {"env": "Point-v0"}), (td3, {"env": "Point-v0"}), (ddpg, {"env": "PointAndNumber-v0"}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "fields"), OFF_POLICY, ids=named)
def test_off_policy_algorithms(elsewhere: Elsewhere, algorithm: Any, fields: dict[str, Any]) -> None:
    config = algorithm.Config(**fields, num_envs=2, replay=50, batch_size=8, hidden=(16,))
    native = not fields["env"].endswith("-v0")
    state = algorithm.begin(config, None if native else "sync", device="meta")
    for warm in (True, True, False, False):
        algorithm.explore(config, state, warm)()
    assert elsewhere.waits == [] if native else set(elsewhere.waits) <= {"cpu", "nonzero"}  # actions; where time limits cut pictures off
    elsewhere.waits.clear()
    for _ in range(2):
        batch = state.replay.sample(8, state.rng)
        algorithm.update(config, state, batch)
    assert elsewhere.waits == [] or (batch.obs.dtype == torch.uint8 and elsewhere.waits == ["cpu"] * 2)  # which of these pictures a time limit cut off
    all_there(elsewhere, state)


@pytest.mark.parametrize("fields", [{}, {"priority": 0.5, "dueling": True}, {"env": "Noisy-v0", "n_step": 1, "double": False}], ids=named)
def test_dqn(elsewhere: Elsewhere, fields: dict[str, Any]) -> None:
    config = dqn.Config(**fields, num_envs=4, replay=80, batch_size=8, hidden=(16,))
    run: Any = SimpleNamespace(phase=lambda name: None, finite=lambda **values: None)
    state = dqn.begin(config, "sync" if fields.get("env") else "native", "meta")
    for _ in range(3):
        dqn.explore(config, state, 0.5, run)()
    assert fields.get("env") or elsewhere.waits == []
    dqn.learn(config, state, 0.4, run)
    all_there(elsewhere, state)


def test_moved_environments_are_the_same() -> None:
    """Here from the CPU to the CPU: "cpu:0" is another name for it."""
    plain, moved = envs.make("Trap-v0", 3, 0, "sync"), envs.make("Trap-v0", 3, 0, "sync", device="cpu:0")
    assert isinstance(moved, envs.Moved)
    act = torch.zeros(3, dtype=torch.int64)
    for _ in range(7):
        for a, b in zip((*plain.step(act), plain.obs), (*moved.step(act), moved.obs), strict=True):
            assert torch.equal(a, b)
    assert moved.episodes.recent == [5.0] * 3
    again = envs.make("Trap-v0", 3, 1, "sync", device="cpu:0")
    again.load_state_dict(moved.state_dict())
    assert torch.equal(again.obs, moved.obs)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_ends_are_fetched_when_asked_for(env: str) -> None:
    """What the torch path notes on its device, against sums of the rewards it gave; a thousand steps are more than it keeps without a fetch."""
    batch, generator = Classic(env, 5, 0, "cpu"), torch.Generator().manual_seed(0)
    paid, length, returns = np.zeros(5), np.zeros(5), list[float]()
    for _ in range(1100):
        act = torch.randint(2, (5,), generator=generator) if batch.spaces.discrete else torch.rand(5, 1, generator=generator)
        _, reward, terminated, truncated = batch.step(act)
        paid, length = paid + reward.numpy(), length + 1
        done = (terminated | truncated).numpy()
        assert np.array_equal(truncated.numpy(), length == batch.task.max_steps)
        returns += paid[done].tolist()
        paid[done], length[done] = 0, 0
    assert len(batch.there.ended) == 1100 - 1024
    assert batch.episodes.finished == len(returns) > 20
    assert batch.episodes.recent == pytest.approx(returns[-100:], rel=1e-5)
    assert batch.there.ended == []
    assert batch.episodes.running == pytest.approx(paid, rel=1e-5)
    assert np.array_equal(batch.episodes.length, length)


@pytest.mark.parametrize("devices", [(None, "cpu"), ("cpu", None)])
def test_a_task_goes_on_on_another_device(devices: tuple[str | None, str | None]) -> None:
    first, second = (Classic("CartPole-v1", 4, 0, device) for device in devices)
    beginnings = second.obs.clone()
    for _ in range(60):
        first.step(torch.ones(4, dtype=torch.int64))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.obs, second.obs)
    assert second.episodes.state_dict()["recent"] == first.episodes.recent
    assert np.array_equal(second.episodes.length, first.episodes.length)
    a, b = first.step(torch.ones(4, dtype=torch.int64)), second.step(torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(a[0], b[0])
    for _ in range(20):
        second.step(torch.ones(4, dtype=torch.int64))
    assert second.episodes.finished > first.episodes.finished
    assert not torch.equal(second.obs, beginnings)


def test_a_generator_of_another_device_is_seeded_by_the_saved_one() -> None:
    saved = torch.arange(16, dtype=torch.uint8)  # a GPU's state is seed and offset, 16 bytes
    one, two, other = torch.Generator(), torch.Generator().manual_seed(5), torch.Generator()
    set_generator(one, saved)
    set_generator(two, saved)
    set_generator(other, saved.flip(0))
    draws = [torch.rand(4, generator=g).tolist() for g in (one, two, other)]
    assert draws[0] == draws[1] != draws[2]
    set_generator(two, one.get_state())
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))


@pytest.mark.parametrize(("algorithm", "fields"), ON_POLICY, ids=["vpg", "trpo", "ppo"])
def test_a_state_goes_on_on_another_device(algorithm: Any, fields: dict[str, Any]) -> None:
    from onetorch.runs import state as states

    config = algorithm.Config(**PLAIN, **fields)
    there, here = algorithm.begin(config, 8, "native", "cpu:0"), algorithm.begin(dataclasses.replace(config, seed=1), 8, "native")
    assert (there.envs.device, here.envs.device) == ("cpu:0", None)
    for _ in range(3):
        batch = algorithm.rollout(config, there, 32)
        algorithm.update(config, there, batch)
        there.model.observe(batch["raw"])
    states.restore_state(here, *states.pack_state(there))
    assert all(torch.equal(p, q) for p, q in zip(there.model.state_dict().values(), here.model.state_dict().values(), strict=True))
    assert torch.equal(there.envs.obs, here.envs.obs)
    assert here.envs.episodes.finished == there.envs.episodes.finished > 0
    states.restore_state(there, *states.pack_state(here))
    algorithm.update(config, here, algorithm.rollout(config, here, 32))


class There(Run):
    """A run whose plan names the device "cpu:0", after one measurement under it, and which may be stopped after `last` iterations."""

    last = 0

    def plan(self, measure: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        choice = super().plan(measure, **kwargs) | {"device": "cpu:0"}
        measure(choice)()
        return choice

    def checkpoint(self, live: Any) -> None:
        super().checkpoint(live)
        if live.iteration == self.last:
            raise Stopped("enough", 0)


SHORT: dict[str, Any] = {"total_steps": 240, "num_envs": 2, "hidden": (16,)}
LATE: dict[str, Any] = SHORT | {"replay": 100, "batch_size": 8, "update_after": 40}
OFTEN: dict[str, Any] = {"random_steps": 20, "log_every": 10}
TRAINED: list[tuple[ModuleType, Any, int]] = [
    *((algorithm, algorithm.Config(**SHORT, batch_size=60), 2) for algorithm in (vpg, trpo)), (ppo, ppo.Config(**SHORT, batch_size=60, minibatches=2), 2),
    (dqn, dqn.Config(**LATE), 7), *((algorithm, algorithm.Config(**LATE, **OFTEN), 60) for algorithm in (sac, td3, ddpg)),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "config", "half"), TRAINED, ids=[named(algorithm) for algorithm, *_ in TRAINED])
def test_training_takes_the_device_of_the_plan_and_goes_on_bit_for_bit(
    algorithm: Any, config: Any, half: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = list[Any](), envs.make
    monkeypatch.setattr(envs, "make", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1])
    fixed = {"threads": "1", "backend": "native"} | ({"dtype": "float32"} if algorithm in (sac, td3, ddpg) else {})

    def train(folder: str, last: int = 0, resume: bool = False) -> nn.Module | None:
        with contextlib.suppress(Stopped), There(tmp_path / folder, config, quiet=True, fixed=fixed, checkpoint_seconds=0, resume=resume) as run:
            run.last = last
            return algorithm.train(config, run)
        return None

    model = train("straight")
    assert train("broken", last=half) is None
    again = train("broken", resume=True)
    assert [batch.device for batch in made] == ["cpu:0"] * 6
    assert model is not None
    assert again is not None
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
