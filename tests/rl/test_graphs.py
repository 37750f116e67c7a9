"""What a CUDA graph would do, done without a GPU: `Tape` notes every operation of a step, with the numbers that the host gave, and repeats these very ones."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rl_tasks  # noqa: F401 (registers the tasks)
import torch
from offpolicy_runs import small, which
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onetorch.rl import ddpg, graphs, sac, stacks, td3
from onetorch.runs.errors import NonFinite
from onetorch.runs.run import Run

ALGORITHMS = [sac, td3, ddpg]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Tape(TorchDispatchMode):
    """Within it operations are noted and undone at the end; what the host waits for is refused, as it is while a graph is recorded."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator, self.drawn = generator, generator.get_state()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, torch.UntypedStorage | None]] = {}  # each storage that was met, and what was in it where it is not of the tape

    def meet(self, x: Tensor, ours: bool) -> None:
        self.before.setdefault(x.untyped_storage().data_ptr(), (x.detach(), None if ours else x.untyped_storage().clone()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for x in tensors((args, kwargs)):
            self.meet(x, ours=False)
        out = func(*args, **(kwargs or {}))
        outs = tensors(out)
        for x in outs:
            self.meet(x, ours=True)
        self.calls.append((func, args, kwargs or {}, outs))
        return out

    def undo(self) -> None:
        for x, bytes_before in self.before.values():
            if bytes_before is not None:
                x.untyped_storage().copy_(bytes_before)
        self.generator.set_state(self.drawn)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs in self.calls:
            for held, x in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                if x.data_ptr() != held.data_ptr():
                    held.copy_(x)


def record(work: Callable[[], graphs.Seen], generator: torch.Generator) -> Callable[[], graphs.Seen]:
    tape = Tape(generator)
    try:
        with tape:
            seen = work()
    finally:
        tape.undo()

    def replay() -> graphs.Seen:
        tape.replay()
        return seen

    return replay


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "on_gpu", lambda generator: True)
    monkeypatch.setattr(graphs, "aside", lambda work: work())
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(stacks, "library", lambda: None)  # the C++ functions are not torch's operations, and a GPU has none


def prepared(algorithm: ModuleType, **fields: Any) -> tuple[Any, Any]:
    """A config, and a state with transitions, whose optimizers count as on a GPU."""
    config = small(algorithm.Config, **({"env": "Pendulum-v1", "hidden": (16, 16), "batch_size": 8} | fields))
    state = algorithm.begin(config)
    for _ in range(50):
        algorithm.explore(config, state, True)()
    for optimizer in (state.pi_optimizer, state.q_optimizer):
        optimizer.steps = torch.zeros((), dtype=torch.float64)
    return config, state


def weights(state: Any) -> list[Tensor]:
    nets = [state.model, state.target, *([state.target_encoder] if hasattr(state, "target_encoder") else [])]
    return [*(p for net in nets for p in net.parameters()), *([state.log_alpha] if hasattr(state, "log_alpha") else [])]


CASES = [*((a, {}) for a in ALGORITHMS), *((a, {"env": "Point-v0", "num_envs": 2, "batch_size": 4}) for a in ALGORITHMS)]
CASES += [(sac, {"env": "Trap-v0"}), (sac, {"alpha": 0.2}), (td3, {"policy_delay": 3})]


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize(("algorithm", "fields"), CASES)
def test_a_recorded_step_does_what_the_step_does(algorithm: ModuleType, fields: dict[str, Any]) -> None:
    """Bit for bit, with transitions added between the steps and the generator drawn from elsewhere too."""
    config, state = prepared(algorithm, **fields)
    _, plain = prepared(algorithm, **fields)
    learn = graphs.Step(partial(algorithm.update, config, state), state.rng)
    for i in range(24):
        expected = algorithm.update(config, plain, plain.replay.sample(config.batch_size, plain.rng), None, *which(algorithm, config, plain))
        seen = learn(state.replay.sample(config.batch_size, state.rng), *which(algorithm, config, state))
        assert {name: x.item() for name, x in seen.items()} == {name: x.item() for name, x in expected.items()}, i
        assert all(torch.equal(a, b) for a, b in zip(weights(state), weights(plain), strict=True)), i
        algorithm.explore(config, state, i % 2 == 0)()
        algorithm.explore(config, plain, i % 2 == 0)()
    assert learn.replayed >= 24 - graphs.WARM * len(learn.recorded)
    assert len(learn.recorded) == (2 if algorithm is td3 else 1)
    assert state.q_optimizer.state_dict()["steps"] == 24
    assert torch.equal(state.rng.get_state(), plain.rng.get_state())


@pytest.mark.usefixtures("taped")
def test_a_number_from_the_host_would_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: with steps that the host counts, Adam's correction stays what it was while the step was recorded."""
    config, state = prepared(sac)
    _, plain = prepared(sac)
    for each in (state, plain):
        each.q_optimizer.steps = 0
    learn = graphs.Step(partial(sac.update, config, state), state.rng)
    for _ in range(graphs.WARM + 2):
        sac.update(config, plain, plain.replay.sample(8, plain.rng))
        learn(state.replay.sample(8, state.rng))
    assert not torch.equal(state.model.q.flat, plain.model.q.flat)


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_is_found_late(algorithm: ModuleType, tmp_path: Path) -> None:
    """Even where the losses are finite again, or the batch that was not came long before the look."""
    config, state = prepared(algorithm)
    with Run(tmp_path / "run", config, quiet=True, fixed={}) as run:
        learn = graphs.Step(partial(algorithm.update, config, state), state.rng, run)
        good = state.replay.sample(8, state.rng)
        for _ in range(graphs.WARM + 1):
            learn(good)
        learn(good._replace(reward=torch.full((8,), 1e30)))  # its square is beyond float32
        while learn.replayed < graphs.LOOK - 1:
            learn(good)
        with pytest.raises(NonFinite, match=r"^(q_loss|policy_loss|entropy|losses) has become (inf|-inf|nan) in iteration 0: the weights are spoilt; there "):
            learn(good)


@pytest.mark.usefixtures("taped")
def test_a_step_that_cannot_be_recorded_is_launched_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    config, state = prepared(ddpg)
    counted = []

    def update(batch: Any, run: Any) -> graphs.Seen:
        seen = ddpg.update(config, state, batch, run)
        counted.append(seen["q_loss"].item())
        return seen

    learn = graphs.Step(update, state.rng)
    before = copy.deepcopy(state.model.pi.flat)
    for _ in range(graphs.WARM + 3):
        learn(state.replay.sample(8, state.rng))
    assert (len(counted), learn.replayed) == (graphs.WARM + 3, 0)
    assert not torch.equal(before, state.model.pi.flat)
    said = capsys.readouterr().err
    assert said == (
        "the gradient step could not be recorded as a CUDA graph, and is launched kernel by kernel: operation not permitted when stream is capturing\n"
    )


def test_on_a_processor_the_step_is_called_as_it_is() -> None:
    generator, given = torch.Generator(), object()
    learn = graphs.Step(lambda batch, run, *which: {"batch": batch, "run": run, "which": which}, generator, run=given)  # type: ignore[arg-type,dict-item]
    assert learn(given, True) == {"batch": given, "run": given, "which": (True,)}  # type: ignore[arg-type,comparison-overlap]
