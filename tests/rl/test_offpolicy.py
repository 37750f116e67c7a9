"""What holds for SAC, TD3 and DDPG alike: time limits, exact resumption in a fresh process, golden losses, learning, and wrong inputs."""

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rl_tasks  # noqa: F401 (registers the tasks)
import torch
from offpolicy_runs import small, timeless, train, which
from safetensors.torch import load_file

from onetorch.rl import ddpg, dqn, envs, ppo, sac, stacks, td3, trpo, vpg
from onetorch.runs.errors import NonFinite
from onetorch.runs.run import Run

ALGORITHMS = [sac, td3, ddpg]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_time_limit_is_not_taken_for_an_end(algorithm: ModuleType, tmp_path: Path) -> None:
    """Reward 1 for ever, cut every 5 steps: the value is 1 / (1 - 0.9) = 10. Taken for an end it would be worth 4.1 at most."""
    free = {"alpha": 1e-6} if algorithm is sac else {}
    config = small(algorithm.Config, env="TrapBox-v0", gamma=0.9, lr=1e-2, tau=0.2, total_steps=700, **free)
    model, _ = train(algorithm, tmp_path / "run", config)
    assert model.q(torch.tensor([[1.0, 0.3]])).flatten().tolist() == pytest.approx([10.0] * (1 if algorithm is ddpg else 2), abs=0.5)


def test_time_limit_is_not_taken_for_an_end_with_discrete_actions(tmp_path: Path) -> None:
    model, _ = train(sac, tmp_path / "run", small(sac.Config, env="Trap-v0", gamma=0.9, lr=1e-2, tau=0.05, alpha=1e-6, total_steps=700))
    assert model.q(torch.ones(1, 1)).flatten().tolist() == pytest.approx([10.0] * 4, abs=0.5)


@pytest.mark.parametrize("algorithm", [td3, ddpg])
def test_finds_the_best_action(algorithm: ModuleType, tmp_path: Path) -> None:
    """One step that pays 1 - 2 (a - 0.5)^2."""
    config = small(algorithm.Config, env="Target-v0", lr=3e-4, q_lr=3e-3, act_noise=0.5, batch_size=64, replay=5000, total_steps=1500)
    model, _ = train(algorithm, tmp_path / "run", config)
    assert model(torch.ones(1, 1)).item() == pytest.approx(0.5, abs=0.15)
    assert model.q(torch.tensor([[1.0, 0.5]]))[0].item() == pytest.approx(1.0, abs=0.1)


PICTURES = {"env": "Point-v0", "lr": 1e-3, "q_lr": 3e-3, "batch_size": 64, "update_after": 64}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_from_pictures(algorithm: ModuleType, tmp_path: Path) -> None:
    """To point at the bright column: a policy that does not look is 0.57 off on the mean, one that looks after 600 steps 0.03 to 0.13."""
    model, _ = train(algorithm, tmp_path / "run", small(algorithm.Config, **PICTURES, total_steps=600))
    pictures = (255 * torch.eye(8, dtype=torch.uint8)).view(8, 1, 1, 8).expand(8, 1, 8, 8)
    assert (model(pictures)[:, 0] - torch.linspace(-1, 1, 8)).abs().mean().item() < 0.25


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_critics_teach_the_encoder_and_the_policy_only_looks(algorithm: ModuleType) -> None:
    config = small(algorithm.Config, **PICTURES, num_envs=4, frame_stack=2, tau=0.25, **({"policy_delay": 1} if algorithm is td3 else {}))
    state = algorithm.begin(config)
    for _ in range(20):
        algorithm.explore(config, state, True)()
    assert state.replay.image is not None
    assert state.replay.image.shape[1:] == (2, 8, 8)
    model, batch = state.model, state.replay.sample(16, state.rng)
    slow = state.target_encoder if algorithm is sac else state.target.encoder
    learned, before = list(model.encoder.parameters()), [p.clone() for p in slow.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(learned, before, strict=True))

    drawn = state.rng.get_state()
    y = algorithm.bellman_target(config, state, batch, *([torch.ones(())] if algorithm is sac else []))
    loss = algorithm.critic_loss(model, batch._replace(obs=model.encoder(batch.obs)), y)
    expected = torch.autograd.grad(loss, learned)
    state.rng.set_state(drawn)
    algorithm.update(config, state, batch)
    for p, g, old, q in zip(learned, expected, before, slow.parameters(), strict=True):
        assert g.abs().max() > 0
        torch.testing.assert_close(p.grad, g)  # the critics' alone
        torch.testing.assert_close(q, old + 0.25 * (p.detach() - old))


RESUMED = {
    "sac": (sac, small(sac.Config, num_envs=2, log_every=10), {}),  # Pendulum-v1
    "sac-pictures": (sac, small(sac.Config, env="Point-v0", frame_stack=2, num_envs=2, log_every=10, batch_size=16), {}),
    "sac-discrete": (sac, small(sac.Config, env="CartPole-v1", replay=200), {}),
    "td3": (td3, small(td3.Config, update_every=4, updates_per_step=0.75), {"dtype": stacks.dtypes()[-1]}),
    "td3-pictures": (td3, small(td3.Config, env="PointAndNumber-v0", batch_size=16, num_envs=4, log_every=5), {}),
    "ddpg": (ddpg, small(ddpg.Config, replay=150), {}),
}
CHILD = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_offpolicy
from onetorch.runs.run import Run
for name, (algorithm, config, fixed) in test_offpolicy.RESUMED.items():
    fixed = dict(threads="1", dtype="float32") | fixed
    run = Run(Path({folder!r}) / name, config, quiet=True, fixed=fixed, checkpoint_seconds=1e9, resume={resume})
    if {resume}:
        with run:
            algorithm.train(config, run)
        continue
    half = config.total_steps // config.num_envs // 2 + 3
    save = run.checkpoint
    class Enough(Exception): pass
    def checkpoint(state):
        if state.iteration == half:
            run._checkpoint_seconds = 0
            save(state)
            raise Enough
    run.checkpoint = checkpoint
    try:
        algorithm.train(config, run)
    except Enough:
        run.close("stopped")
"""


def test_resumed_in_a_fresh_process_is_bit_identical(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for name, (algorithm, config, fixed) in RESUMED.items():
        train(algorithm, straight / name, config, fixed=fixed)
    for resume in (False, True):
        child = CHILD.format(path=[str(Path(__file__).parent), *(p for p in sys.path if p)], folder=str(broken), resume=resume)
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name, (_, config, _) in RESUMED.items():
        assert len(timeless(straight / name)) == 20
        assert timeless(broken / name) == timeless(straight / name)
        a, b = (saved(d / name, config.total_steps // config.num_envs) for d in (straight, broken))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


def saved(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / f"{iteration:08d}"
    others = ("generators.numpy", "generators.python")  # neither seeded nor used
    return {k: v for k, v in (load_file(last / "model.safetensors") | load_file(last / "state.safetensors")).items() if not k.startswith(others)}


# Losses after 50 updates from seed 0 in torch 2.13 on a processor with AVX-512; others sum in another order.
GOLDEN = {
    sac: {"q_loss": 125.00482177734375, "policy_loss": -0.051836516708135605, "entropy": 0.6557829976081848, "alpha": 0.9520493149757385},
    td3: {"q_loss": 152.50181579589844, "policy_loss": 0.13265229761600494},
    ddpg: {"q_loss": 77.76065063476562, "policy_loss": 0.10957200825214386},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_losses(algorithm: ModuleType) -> None:
    def fifty() -> dict[str, float]:
        config = small(algorithm.Config, lr=1e-3)
        state = algorithm.begin(config, "sync")
        for _ in range(100):
            algorithm.explore(config, state, True)()
        for _ in range(50):
            seen = algorithm.update(config, state, state.replay.sample(32, state.rng), None, *which(algorithm, config, state))
        return {name: value.item() for name, value in seen.items()}

    first, second = fifty(), fifty()
    assert first == second
    assert first == pytest.approx(GOLDEN[algorithm], rel=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(algorithm: ModuleType, tmp_path: Path) -> None:
    config = small(algorithm.Config)
    state = algorithm.begin(config)
    for _ in range(40):
        algorithm.explore(config, state, True)()
    batch = state.replay.gather(torch.arange(32))
    before = state.model.q.flat.detach().clone()
    with Run(tmp_path / "run", config, quiet=True) as run:
        with pytest.raises(NonFinite, match="q_loss is nan"):
            algorithm.update(config, state, batch._replace(reward=torch.full((32,), math.nan)), run)
    assert torch.equal(before, state.model.q.flat.detach())


def test_updates_keep_pace_with_the_steps(tmp_path: Path) -> None:
    """400 steps of 4 environments, updates from step 52 on, every 2 rounds, half as many as steps: rounds 14, 16, … 100, 4 updates each."""
    count = 0

    class Counting(Run):
        def finite(self, **values: float) -> None:
            nonlocal count
            count += "q_loss" in values
            super().finite(**values)

    config = small(ddpg.Config, num_envs=4, update_after=52, update_every=2, updates_per_step=0.5)
    with Counting(tmp_path / "run", config, quiet=True, fixed={"threads": "1", "dtype": "float32"}) as run:
        ddpg.train(config, run)
    assert count == 44 * 4
    assert [row["step"] for row in timeless(tmp_path / "run")] == [80, 160, 240, 320, 400]


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, dqn])
def test_config_names_a_seed_that_no_generator_takes(algorithm: ModuleType, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be at least 0 and below 2\\^64, got {seed}"):
        algorithm.Config(seed=seed)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("rate", "count"), [(0.3, 45), (1.5, 225)])
def test_fractions_of_updates_add_up(algorithm: ModuleType, rate: float, count: int, tmp_path: Path) -> None:
    """200 steps of one environment, updates from step 51 on: 150 rounds of a fraction each, none of which is a whole step by itself."""
    steps = 0

    class Counting(Run):
        def finite(self, **values: float) -> None:
            nonlocal steps
            steps += "q_loss" in values
            super().finite(**values)

    config = small(algorithm.Config, num_envs=1, total_steps=200, update_after=50, update_every=1, updates_per_step=rate)
    with Counting(tmp_path / "run", config, quiet=True, fixed={"threads": "1", "dtype": "float32", "backend": "native"}) as run:
        algorithm.train(config, run)
    assert steps == count


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, dqn])
def test_environments_step_while_the_weights_are_updated(algorithm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In worker processes: an environment whose step ends only after the update that goes with it has begun."""
    (tmp_path / "updates").touch()
    monkeypatch.setenv("LATE", str(tmp_path / "updates"))

    class Noting(Run):
        def finite(self, **values: float) -> None:
            if values.keys() & {"q_loss", "loss"}:
                with (tmp_path / "updates").open("a") as file:
                    file.write(".")
            super().finite(**values)

    fields = {"total_steps": 20, "update_after": 8, "batch_size": 4, "hidden": (8,), "replay": 20}
    fixed = {"threads": "1", "backend": "processes"}
    if algorithm is dqn:
        config = dqn.Config(env="Late-v0", num_envs=1, update_every=1, updates=1, n_step=1, **fields)
    else:
        config, fixed["dtype"] = algorithm.Config(env="LateBox-v0", random_steps=4, **fields), "float32"
    with Noting(tmp_path / "run", config, quiet=True, fixed=fixed) as run:
        algorithm.train(config, run)
    assert (tmp_path / "updates").read_text() == "." * 12


def test_episodes_are_evaluated_without_training_state() -> None:
    for algorithm in ALGORITHMS:
        config = small(algorithm.Config)
        model = algorithm.build(config)
        results = [algorithm.evaluate(model, config, episodes=3) for _ in range(2)]
        assert results[0] == results[1]
        assert results[0]["episode_length"] == 200


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, dqn, ppo, trpo, vpg])
@pytest.mark.parametrize("backend", ["native", "sync"])
def test_a_model_acts_as_the_page_for_spinning_ups_users_says(algorithm: ModuleType, backend: str) -> None:
    """`env.step(model.act(env.obs, None))`, whatever the algorithm, and outside of torch.no_grad."""
    config = algorithm.Config(env="CartPole-v1" if algorithm is dqn else "Pendulum-v1", hidden=(8,))
    model, env = algorithm.build(config), envs.make(config.env, 3, 0, backend)
    act = model.act(env.obs, None)
    assert torch.equal(act, model.act(env.obs, None))
    next_obs, reward, _, _ = env.step(act)
    assert (next_obs.shape, reward.shape) == ((3, env.spaces.obs_dim), (3,))
    assert not next_obs.requires_grad
    if algorithm in (td3, ddpg):
        noise = torch.tensor([[0.1], [-9.0], [9.0]])
        assert torch.allclose(model.act(env.obs, noise), torch.stack([model(env.obs)[0] + 0.1, torch.tensor([-1.0]), torch.tensor([1.0])]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_likeliest_and_drawn_actions_are_both_evaluated(algorithm: ModuleType) -> None:
    """One step that pays 1 - 2 (a - 0.5)^2, and a policy whose best action is 0.5: noise of variance v costs 2 v."""
    config = small(algorithm.Config, env="Target-v0", **({} if algorithm is sac else {"act_noise": 0.2}))
    model = algorithm.build(config)
    with torch.no_grad():
        model.pi.flat.zero_()
        for part, value in zip(model.pi.state_dict()["2.bias"].split(1), (math.atanh(0.5), math.log(0.2)), strict=False):  # of SAC the mean and log_std of u
            part.fill_(value)
    before = torch.get_rng_state()
    result = algorithm.evaluate(model, config, episodes=2000)
    assert torch.equal(torch.get_rng_state(), before)
    assert result["return"] == pytest.approx(1.0, abs=1e-3)
    noise = np.random.default_rng(0).normal(size=100_000) * 0.2
    drawn = np.tanh(math.atanh(0.5) + noise) if algorithm is sac else np.clip(0.5 + noise, -1, 1)
    assert result["stochastic_return"] == pytest.approx(float(1 - 2 * ((drawn - 0.5) ** 2).mean()), abs=0.012)
