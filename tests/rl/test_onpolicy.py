"""What vpg, trpo and ppo share, and what each of them must do: values beyond a time limit, a small problem with a known answer, exact resumption."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rl_tasks
import torch
from safetensors.torch import load_file

from onetorch.rl import envs, ppo, trpo, vpg
from onetorch.rl.envs import Spaces
from onetorch.rl.nets import ActorCritic, Adam
from onetorch.rl.onpolicy import RewardNorm, collect, env_counts, fit_value
from onetorch.rl.returns import gae
from onetorch.runs.errors import NonFinite, RunError, UsageError
from onetorch.runs.run import Run

ALGORITHMS = (vpg, trpo, ppo)
NAMES = ("vpg", "trpo", "ppo")
PLAIN: dict[str, Any] = {"total_steps": 2048, "num_envs": 8, "batch_size": 256, "hidden": (16,), "normalize_reward": False}
SMALL: dict[ModuleType, Any] = {
    vpg: vpg.Config(**PLAIN, lr=1e-2, value_minibatches=2, value_epochs=4, value_lr=1e-2),
    trpo: trpo.Config(**PLAIN, delta=0.05, value_minibatches=2, value_epochs=4, value_lr=1e-2),
    ppo: ppo.Config(**PLAIN, lr=1e-2, minibatches=2, anneal=False),
}
each = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)


def train(algorithm: Any, folder: Path, config: Any, **options: Any) -> tuple[ActorCritic, list[dict[str, Any]]]:
    fixed = {"threads": "1"} | options.pop("fixed", {})
    with Run(folder, config, quiet=True, fixed=fixed, **options) as run:
        model = algorithm.train(config, run)
    return model, timeless(folder)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the columns that depend on time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def test_a_batch_is_what_was_seen_and_values_the_final_observation_at_a_time_limit() -> None:
    torch.manual_seed(0)
    model = ActorCritic(envs.spaces("Pendulum-v1"), (16,), "tanh")
    one, twin = envs.make("Pendulum-v1", 3, 0, "sync"), envs.make("Pendulum-v1", 3, 0, "sync")
    torch.manual_seed(1)
    batch = {name: x.unflatten(0, (250, 3)) for name, x in collect(model, one, 250, gamma=0.9, lam=0.8).items()}
    torch.manual_seed(1)
    noise, steps = model.noise(250, 3), []
    with torch.no_grad():
        for t in range(250):
            obs, act = twin.obs, model.act(twin.obs, noise[t])
            next_obs, reward, terminated, truncated = twin.step(act)
            steps.append((reward, model.value(obs), model.value(next_obs), terminated, truncated))
            assert torch.equal(batch["raw"][t], obs)
            assert torch.equal(batch["act"][t], act)
            torch.testing.assert_close(batch["logp"][t], model.logp(obs, act)[0])
    reward, value, next_value, terminated, truncated = (torch.stack(x) for x in zip(*steps, strict=True))
    assert truncated.sum() == 3
    adv = gae(reward, value, next_value, terminated, truncated, 0.9, 0.8)
    torch.testing.assert_close(batch["value"], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch["ret"], adv + value, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(batch["adv"], (adv - adv.mean()) / adv.std(), atol=1e-4, rtol=1e-4)


def test_reward_norm_by_hand() -> None:
    norm = RewardNorm(1, gamma=0.5)
    # discounted returns 4, 2 + 6 = 8, and after the end 6: mean 6, variance (4 + 4 + 0) / 3
    scaled = norm(torch.tensor([[4.0], [6.0], [6.0]]), torch.tensor([[False], [True], [False]]))
    assert scaled.flatten().tolist() == pytest.approx([x / math.sqrt(8 / 3) for x in (4, 6, 6)], rel=1e-6)
    assert norm.discounted.tolist() == [6.0]
    # it goes on with 6 in hand: 3 + 1 = 4 is the fourth, which makes the mean 5.5 and the variance 11 / 4
    assert norm(torch.tensor([[1.0]]), torch.tensor([[True]])).item() == pytest.approx(1 / math.sqrt(11 / 4), rel=1e-6)
    assert norm.discounted.tolist() == [0.0]
    assert norm(torch.tensor([[1e6]]), torch.tensor([[False]])).item() <= 10
    assert set(norm.state_dict()) == {"discounted", "moments.mean", "moments.var", "moments.count"}


def test_fit_value_moves_the_critic_alone_to_the_least_squares_fit() -> None:
    torch.manual_seed(0)
    model = ActorCritic(Spaces(2, 2, True), (), "tanh")
    before = {name: p.clone() for name, p in model.named_parameters()}
    obs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ret = torch.tensor([1.0, 3.0, 0.0, 3.0])  # least squares with a constant: 0.75 + 2.5 x - 0.5 y, residuals ±1/4, so a loss of 1/32
    loss = fit_value(model, Adam((model.v.parameters(), 0.05)), obs, ret, epochs=300, minibatches=1)
    assert loss == pytest.approx(1 / 32, rel=1e-3)
    assert model.v.flat.tolist() == pytest.approx([2.5, -0.5, 0.75], abs=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.startswith("v."))


def test_env_counts() -> None:
    assert env_counts(7, 700) == (7,)
    assert env_counts(0, 2048) == (32, 16, 8, 4, 2, 1)
    assert env_counts(0, 96) == (1,)
    assert env_counts(0, 7) == (1,)


@each
def test_time_limit_is_not_taken_for_an_end(tmp_path: Path, algorithm: Any) -> None:
    """Reward 1 for ever, cut every 5 steps: the value is 1 / (1 - 0.9) = 10. Taken for an end it would be worth 1 + 0.9 + … at most, 4.1."""
    assert rl_tasks.LIMIT == 5
    config = dataclasses.replace(SMALL[algorithm], env="Trap-v0", gamma=0.9, total_steps=256 * 60)
    model, _ = train(algorithm, tmp_path / "run", config, fixed={"backend": "sync"})
    assert model.value(torch.ones(1, 1)).item() == pytest.approx(10.0, abs=0.3)


@each
@pytest.mark.parametrize(("gamma", "walks"), [(0.9, [True, True, True]), (0.4, [False, True, True])])
def test_the_known_answer_of_a_small_problem(tmp_path: Path, algorithm: Any, gamma: float, walks: list[bool]) -> None:
    config = dataclasses.replace(SMALL[algorithm], env="Chain-v0", gamma=gamma, lam=0.9, total_steps=256 * 50)
    model, _ = train(algorithm, tmp_path / "run", config, fixed={"backend": "sync"})
    states = torch.eye(3)
    with torch.no_grad():
        share = model.dist(states)[0].softmax(-1)[:, 1]
        value = model.value(states)
    best = {0.9: [4.05, 4.5, 5.0], 0.4: [1.0, 2.0, 5.0]}[gamma]
    seen = 3 if walks[0] else 1  # states that the best policy comes by
    assert ((share > 0.5).tolist() == walks) if seen == 3 else share[0] < 0.5
    assert (share[:seen] - torch.tensor(walks[:seen]).float()).abs().max() < 0.1
    torch.testing.assert_close(value[:seen], torch.tensor(best[:seen]), atol=0.35, rtol=0)


RESUMED: dict[str, tuple[Any, Any, str]] = {
    "ppo-native": (ppo, ppo.Config(**PLAIN, minibatches=2), "native"),
    "ppo-sync": (
        ppo,
        ppo.Config(**PLAIN | {"normalize_reward": True}, env="Pendulum-v1", normalize_obs=True, value_clip=0.2, entropy_coef=0.01, value_lr=1e-3),
        "sync",
    ),
    "ppo-processes": (ppo, ppo.Config(**PLAIN | {"num_envs": 4}, env="Noisy-v0", target_kl=0.001), "processes"),
    "vpg-native": (vpg, vpg.Config(**PLAIN | {"normalize_reward": True}, entropy_coef=0.01), "native"),
    "vpg-sync": (vpg, vpg.Config(**PLAIN, env="Pendulum-v1", normalize_obs=True), "sync"),
    "trpo-native": (trpo, trpo.Config(**PLAIN | {"normalize_reward": True}), "native"),
    "vpg-stack": (vpg, vpg.Config(**PLAIN, frame_stack=3), "native"),
    "npg-sync": (trpo, trpo.Config(**PLAIN, env="Pendulum-v1", normalize_obs=True, line_search=False), "sync"),
}
CHILD = """
import os, sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
import test_onpolicy
from onetorch.runs.run import Run
for name, (algorithm, config, backend) in test_onpolicy.RESUMED.items():
    run = Run(Path({folder!r}) / name, config, quiet=True, fixed=dict(threads="1", backend=backend), checkpoint_seconds=0, resume={resume})
    if {resume}:
        with run:
            algorithm.train(config, run)
        continue
    save = run.checkpoint
    class Enough(Exception): pass
    def checkpoint(state):
        save(state)
        if state.iteration == 4: raise Enough
    run.checkpoint = checkpoint
    try:
        algorithm.train(config, run)
    except Enough:
        run.close("stopped")
"""


def test_resumed_in_a_fresh_process_is_bit_identical(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for name, (algorithm, config, backend) in RESUMED.items():
        _, rows = train(algorithm, straight / name, config, fixed={"backend": backend})
        assert rows[-1]["step"] == 2048
    for resume in (False, True):
        child = CHILD.format(path=[str(Path(__file__).parent), *(p for p in sys.path if p)], folder=str(broken), resume=resume)
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


OTHERS = ("generators.numpy", "generators.python")  # global generators that these neither seed nor use


def saved(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "00000008"
    return load_file(last / "model.safetensors") | load_file(last / "state.safetensors")


@each
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_reaches_every_weight(env: str, algorithm: Any) -> None:
    config = dataclasses.replace(SMALL[algorithm], env=env)
    state = algorithm.begin(config, 8, "native" if env == "CartPole-v1" else "sync")
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    algorithm.update(config, state, algorithm.rollout(config, state, 32))
    assert [name for name, p in state.model.named_parameters() if torch.equal(p, before[name])] == []


@each
def test_learns_cartpole_with_its_defaults(tmp_path: Path, algorithm: Any) -> None:
    config = algorithm.Config(total_steps=140_000)
    model, rows = train(algorithm, tmp_path / "run", config, fixed={"backend": "native", "num_envs": "32"})
    assert max(row["return"] for row in rows if "return" in row) >= 475
    result = algorithm.evaluate(model, config, episodes=10)
    assert float(result["return"]) >= 475
    assert result["episodes"] == 10


@each
def test_learns_from_box_actions(tmp_path: Path, algorithm: Any) -> None:
    config = dataclasses.replace(SMALL[algorithm], env="Tell-v0", total_steps=256 * 80, gamma=0.5)
    model, _ = train(algorithm, tmp_path / "run", config, fixed={"backend": "sync"})
    assert model.act(torch.ones(1, 1), None).item() == pytest.approx(0.5, abs=0.1)


@each
@pytest.mark.parametrize("env", ["Picture-v0", "PictureAndNumber-v0"])
def test_learns_from_pictures_and_several_choices_at_once(tmp_path: Path, algorithm: Any, env: str) -> None:
    """The best return is 16; to guess earns 8 (two switches) or 6.7 (one of two and one of three)."""
    config = dataclasses.replace(SMALL[algorithm], env=env, total_steps=256 * (60 if algorithm is trpo else 160), gamma=0.0, normalize_obs=True)
    if algorithm is ppo:
        config = dataclasses.replace(config, lr=3e-3)
    model, _ = train(algorithm, tmp_path / "run", config, fixed={"backend": "sync"})
    assert float(algorithm.evaluate(model, config, episodes=20)["return"]) > 14
    out, value = model(algorithm.example(config))
    assert (out.shape[0], value.shape) == (8, (8,))


@each
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path, algorithm: Any) -> None:
    config = dataclasses.replace(SMALL[algorithm], total_steps=256)
    state = algorithm.begin(config, 8, "native")
    batch = algorithm.rollout(config, state, 32)
    batch["adv"][7] = math.nan
    before = [p.clone() for p in state.model.parameters()]
    if algorithm is ppo:
        config = dataclasses.replace(config, minibatches=1)
    with Run(tmp_path / "run", config, quiet=True) as run:
        with pytest.raises(NonFinite, match=r"(loss|gain|grad_norm) is nan"):
            algorithm.update(config, state, batch, run=run)
        assert all(torch.equal(p, q) for p, q in zip(before, state.model.parameters(), strict=True))


@each
@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("seed", 2**64), ("batch_size", 1), ("log_std", math.inf)])
def test_config_names_what_can_only_fail(algorithm: Any, field: str, value: float) -> None:
    fields = {"num_envs": 1, "minibatches" if algorithm is ppo else "value_minibatches": 1, field: value}
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        algorithm.Config(**fields)


@each
def test_nan_from_an_environment_is_named(tmp_path: Path, algorithm: Any) -> None:
    with pytest.raises(RunError, match=r"NaNObservation-v0 number 0 gave the observation .* at step 3"):
        train(algorithm, tmp_path / "run", dataclasses.replace(SMALL[algorithm], env="NaNObservation-v0"), fixed={"backend": "sync", "num_envs": "8"})


@each
def test_unknown_environment_is_named(tmp_path: Path, algorithm: Any) -> None:
    with pytest.raises(UsageError, match="nearest: CartPole-v1"):
        train(algorithm, tmp_path / "run", dataclasses.replace(SMALL[algorithm], env="CartPoel-v1"))


@each
def test_episodes_are_evaluated_without_training_state(algorithm: Any) -> None:
    torch.manual_seed(0)
    config = SMALL[algorithm]
    model = algorithm.build(config)
    results = [algorithm.evaluate(model, config, episodes=30) for _ in range(2)]
    assert results[0] == results[1]
    assert 10 < float(results[0]["stochastic_return"]) < 40  # a policy that is nearly uniform; its likeliest action is another matter
    assert results[0]["stochastic_return"] != results[0]["return"]
    assert float(results[0]["return_min"]) <= float(results[0]["return"]) - float(results[0]["return_ci95"])


# Losses of one update of fixed weights on a fixed batch in float64: whoever changes what an algorithm computes sees it here. Twelve digits, because the last
# bits differ between processors.
GOLDEN: dict[str, dict[str, float]] = {
    "vpg CartPole-v1": {
        "policy_loss": 0.00042493454131247756, "value_loss": 0.2426317678690146, "entropy": 0.6744131702192298,
        "kl": 0.005716107460595306, "grad_norm": 0.03846342632787008, "explained_variance": 0.008627016977919344,
    },
    "vpg Pendulum-v1": {
        "policy_loss": -0.0021185376722457315, "value_loss": 0.2604975832970585, "entropy": 1.4189385332046727,
        "kl": 0.006183557154356969, "grad_norm": 0.03928217786354685, "explained_variance": -0.13952691928296623,
    },
    "trpo CartPole-v1": {
        "gain": 0.018910197323986692, "value_loss": 0.2426317678690146, "entropy": 0.6744131702192298,
        "kl": 0.0187111786469378, "step_taken": 1.0, "grad_norm": 0.03897286899164009, "explained_variance": 0.008627016977919344,
    },
    "trpo Pendulum-v1": {
        "gain": 0.02398933813987596, "value_loss": 0.2604975832970585, "entropy": 1.4189385332046727,
        "kl": 0.013200321840198948, "step_taken": 1.0, "grad_norm": 0.037994571723140115, "explained_variance": -0.13952691928296623,
    },
    "ppo CartPole-v1": {
        "policy_loss": -0.006271725467340821, "value_loss": 0.3967139743826128, "entropy": 0.6775556973410598,
        "kl": 0.003510558235100645, "clipped": 0.0, "explained_variance": -0.19962631622673555, "lr": 0.01,
    },
    "ppo Pendulum-v1": {
        "policy_loss": -0.005651419773686307, "value_loss": 0.4662352314072054, "entropy": 1.4089545040955493,
        "kl": 0.002611137940470229, "clipped": 0.0, "explained_variance": -0.18851457586699838, "lr": 0.01,
    },
}


@each
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_golden_losses(env: str, algorithm: Any) -> None:
    config = dataclasses.replace(SMALL[algorithm], env=env, **({"minibatches": 1, "entropy_coef": 0.01} if algorithm is ppo else {"value_minibatches": 1}))
    torch.set_default_dtype(torch.float64)
    try:
        state = algorithm.begin(config, 1, "native" if env == "CartPole-v1" else "sync")
    finally:
        torch.set_default_dtype(torch.float32)
    model = state.model
    B, D = 64, envs.spaces(env).obs_dim
    wave = torch.arange(B, dtype=torch.float64)
    with torch.no_grad():
        for k, p in enumerate(model.state_dict().values()):  # layer by layer, log_std before the nets
            p.copy_(0.5 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (k + 1) + k).reshape(p.shape))
        obs = torch.sin(torch.outer(wave, torch.arange(1, D + 1, dtype=torch.float64)))
        act = torch.arange(B) % 2 if env == "CartPole-v1" else torch.cos(wave).unsqueeze(-1)
        logp, value = model.logp(obs, act)[0] - 0.1 * torch.sin(wave), model.value(obs)
    batch = {"obs": obs, "act": act, "logp": logp, "value": value, "adv": torch.sin(0.7 * wave), "ret": torch.cos(0.3 * wave)}
    losses = algorithm.update(config, state, batch)
    assert losses == pytest.approx(GOLDEN[f"{algorithm.__name__.rpartition('.')[2]} {env}"], rel=1e-11)
