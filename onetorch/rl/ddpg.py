"""Deep Deterministic Policy Gradient (DDPG), Lillicrap et al. 2015, "Continuous control with deep reinforcement learning", arXiv:1509.02971.

Q-learning for Box actions: a deterministic policy pi learns to find the action at which the critic is highest, and stands in for the maximum in its target:

    y     = r + gamma (1 - d) Q_targ(s', pi_targ(s'))
    L(Q)  = E[ (Q(s, a) - y)^2 ]
    L(pi) = -E[ Q(s, pi(s)) ]

| symbol        | shape   | meaning                                                                                     |
|---------------|---------|---------------------------------------------------------------------------------------------|
| obs, next_obs | (B, …)  | s, s': observations, as the environment gives them                                          |
| act           | (B, A)  | a in [-1, 1]: pi(s) and noise N(0, act_noise^2) at the time it was done                     |
| terminated    | (B,)    | d: 1 where the task ended. A time limit is not an end                                       |
| q, y          | (B,)    | Q(s, a) and the critic's target                                                             |

What is known to matter: DDPG climbs its critic's errors, and from the same settings some seeds learn and some never do (Henderson et al. 2018,
arXiv:1709.06560); TD3 is this algorithm with that mended. Uncorrelated Gaussian noise explores as well as the paper's Ornstein-Uhlenbeck process
(Barth-Maron et al. 2018, arXiv:1804.08617).

Speed: as in `sac`; the critic's weights get no gradients in the policy's step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.rl import envs as environments
from onetorch.rl import evaluation, stacks
from onetorch.rl.buffer import Batch, Replay
from onetorch.rl.graphs import Step
from onetorch.rl.nets import Adam, encoder, follow
from onetorch.rl.stacks import Stack
from onetorch.runs.errors import UsageError
from onetorch.runs.plan import devices, thread_counts
from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    env: str = "Pendulum-v1"  # Gymnasium environment with Box actions; observations may be vectors or pictures
    seed: int = 0  # of weights, actions, batches and environments
    total_steps: int = 20_000  # environment steps, all environments together
    num_envs: int = 1  # N, environments stepped together
    random_steps: int = 1000  # environment steps with actions drawn uniformly, at the start
    update_after: int = 1000  # transitions remembered before the first update
    update_every: int = 1  # environment steps, divided by N, between rounds of updates
    updates_per_step: float = 1.0  # gradient steps for each step of an environment
    replay: int = 1_000_000  # transitions remembered
    batch_size: int = 256  # B, transitions per gradient step
    lr: float = 1e-3  # Adam's step size, of the policy
    q_lr: float | None = None  # Adam's step size of the critic; None: lr
    gamma: float = 0.99  # discount
    tau: float = 0.005  # how far the targets go towards policy and critic in each update
    act_noise: float = 0.1  # standard deviation of what is added to actions, which lie in [-1, 1]
    frame_stack: int = 1  # an observation is the last so many
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers, of pi and of Q
    log_every: int = 500  # environment steps, divided by N, between rows of metrics

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        for name in ("total_steps", "num_envs", "update_after", "update_every", "replay", "batch_size", "frame_stack", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "q_lr", "updates_per_step"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("random_steps", "act_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.replay < self.num_envs:
            raise ValueError(f"replay must hold a transition of each of the {self.num_envs} environments, got {self.replay}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


class Agent(nn.Module):
    """The policy pi, (B, D) -> (B, A) before tanh, and the critic q, (B, D + A) -> (1, B, 1), of what the encoder makes of observations: vectors
    (B, D) are left as they are, pictures become features (B, D)."""

    def __init__(self, spaces: environments.Spaces, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.act_dim = spaces.act_dim
        self.encoder, D = encoder(spaces)
        self.pi = Stack(None, (D, *hidden, spaces.act_dim))
        self.q = Stack(1, (D + spaces.act_dim, *hidden, 1))

    def forward(self, obs: Tensor) -> Tensor:
        """pi(s) for obs (B, …): (B, A) in [-1, 1]."""
        return self.pi(self.encoder(obs)).tanh()

    def act(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions at obs (N, …): pi(s), and `noise` (N, A) added where it is given, (N, A) in [-1, 1]."""
        return self(obs) if noise is None else (self(obs) + noise).clamp(-1, 1)

    def follow(self, other: "Agent", tau: float) -> None:
        """Weights go towards those of `other` by the fraction tau."""
        self.pi.flat.lerp_(other.pi.flat.detach(), tau)
        self.q.flat.lerp_(other.q.flat.detach(), tau)
        follow(self.encoder, other.encoder, tau)


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: Agent
    target: Agent  # the slow copy
    pi_optimizer: Adam
    q_optimizer: Adam
    envs: environments.Envs
    replay: Replay
    rng: torch.Generator  # of actions, batches and noise
    iteration: int = 0


def spaces(config: Config) -> environments.Spaces:
    return environments.spaces(config.env, frame_stack=config.frame_stack, images=True)


def build(config: Config) -> Agent:
    if spaces(config).discrete:
        raise UsageError(f"{config.env} has Discrete actions; DDPG needs Box ones: `sac` and `dqn` take Discrete ones")
    return Agent(spaces(config), config.hidden)


def example(config: Config) -> Tensor:
    """Observations (8, …) for the module to answer, when it is shared."""
    return spaces(config).example(8)


def begin(config: Config, backend: str | None = None, dtype: str = "float32", run: Run | None = None, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model, target = build(config).to(device), build(config).to(device)
    if run:
        run.initialize(model)  # before it is copied
    target.load_state_dict(model.state_dict())
    target.requires_grad_(False)
    for agent in (model, target):
        agent.pi.dtype = agent.q.dtype = dtype
    space = spaces(config)
    return State(
        model, target,
        Adam(([model.pi.flat], config.lr)),
        Adam(([model.q.flat, *model.encoder.parameters()], config.q_lr or config.lr)),
        environments.make(config.env, config.num_envs, config.seed, backend, frame_stack=config.frame_stack, device=device),
        Replay(config.replay, space.obs_shape, (space.act_dim,), num_envs=config.num_envs, obs_dtype=space.obs_dtype, device=device),
        torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip


@torch.no_grad()
def bellman_target(config: Config, state: State, batch: Batch) -> Tensor:
    """y (B,) = r + gamma (1 - d) Q_targ(s', pi_targ(s'))."""
    seen = state.target.encoder(batch.next_obs)
    value = state.target.q(torch.cat((seen, state.target.pi(seen).tanh()), 1)).flatten()
    return batch.reward + config.gamma * (1 - batch.terminated) * value


def critic_loss(model: Agent, batch: Batch, y: Tensor) -> Tensor:
    """E[ (Q(s, a) - y)^2 ], s as the encoder sees it."""
    return F.mse_loss(model.q(torch.cat((batch.obs, batch.act), 1)).flatten(), y)


def policy_loss(model: Agent, batch: Batch) -> Tensor:
    """-E[ Q(s, pi(s)) ], s as the encoder sees it: the critic is asked, not taught."""
    return -model.q(torch.cat((batch.obs, model.pi(batch.obs).tanh()), 1), frozen=True).mean()


def update(config: Config, state: State, batch: Batch, run: Run | None = None) -> dict[str, Tensor]:
    """One gradient step of the critic and one of the policy, and the targets follow."""
    model = state.model
    y = bellman_target(config, state, batch)
    batch = batch._replace(obs=model.encoder(batch.obs))  # the critic's gradients go on into it, the policy's do not
    q_loss = critic_loss(model, batch, y)
    state.q_optimizer.zero_grad()
    q_loss.backward()
    if run:
        run.finite(q_loss=q_loss)
    state.q_optimizer.step()
    pi_loss = policy_loss(model, batch._replace(obs=batch.obs.detach()))
    state.pi_optimizer.zero_grad()
    pi_loss.backward()
    if run:
        run.finite(policy_loss=pi_loss)
    state.pi_optimizer.step()
    state.target.follow(model, config.tau)
    return {"q_loss": q_loss.detach(), "policy_loss": pi_loss.detach()}


def train(config: Config, run: Run) -> Agent:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # a step of the environments, and the gradient steps that go with it
        trial = begin(config, choice["backend"], choice["dtype"], device=choice["device"])
        for _ in range(10):
            explore(config, trial, True)()
        learn = Step(partial(update, config, trial), trial.rng)

        def work() -> None:
            end = explore(config, trial, True)
            for _ in range(max(1, round(config.num_envs * config.updates_per_step))):
                learn(trial.replay.sample(config.batch_size, trial.rng))
            end()

        return work

    key = f"ddpg {config.env} {config.hidden} {config.batch_size} {config.num_envs}"
    plan = run.plan(
        measure, key=key, asked={"backend": environments.asked(config.env)},
        device=devices(), backend=environments.beside_updates(config.env), dtype=stacks.dtypes(), threads=thread_counts(),
    )  # fmt: skip
    N, rate = config.num_envs, config.num_envs * config.updates_per_step  # gradient steps for each step of all environments
    total = math.ceil(config.total_steps / N)

    state = run.restore(begin(config, plan["backend"], plan["dtype"], run, plan["device"]))
    learn, seen = Step(partial(update, config, state), state.rng, run), dict[str, Any]()
    for state.iteration in run.steps(state.iteration, total, unit="env steps", scale=N):
        step = state.iteration * N
        end = explore(config, state, step <= config.random_steps, run)
        if state.replay.count >= config.update_after and state.iteration % config.update_every == 0:
            for _ in range(round(rate * state.iteration) - round(rate * (state.iteration - config.update_every))):  # fractions of steps add up
                seen = learn(state.replay.sample(config.batch_size, state.rng))
        run.phase("update")
        end()
        if state.iteration % config.log_every == 0 or state.iteration == total:
            episodes = state.envs.episodes
            run.log(step, **{"return": episodes.mean_return()}, episodes=episodes.finished, **seen)
            run.phase("logging")
        run.checkpoint(state)
    state.envs.close()
    return state.model.cpu()


@torch.no_grad()
def explore(config: Config, state: State, warm: bool, run: Run | None = None) -> Callable[[], None]:
    """Begins one step of all environments; what is returned ends it and remembers it. Actions are pi(s) and noise; `warm`: drawn uniformly."""
    model, envs, obs = state.model, state.envs, state.envs.obs
    if warm:
        act = torch.rand(len(obs), model.act_dim, generator=state.rng, device=obs.device) * 2 - 1
    else:
        noise = torch.randn(len(obs), model.act_dim, generator=state.rng, device=obs.device)
        act = (model(obs) + config.act_noise * noise).clamp_(-1, 1)
    step = envs.begin(act)
    if run:
        run.phase("action")

    def end() -> None:
        next_obs, reward, terminated, truncated = step()
        state.replay.add(obs, act, reward, next_obs, terminated, truncated)
        if run:
            run.phase("environment")

    return end


def evaluate(model: Agent, config: Config, *, media: Path | None = None, episodes: int = 20, seed: int = 1_000_000) -> dict[str, float | int | str]:
    """Mean return over episodes of their own, with a 95 % interval: of pi(s), and with noise as in training as `stochastic_return`; `agent.mp4` under `media`
    is without."""
    rng = torch.Generator().manual_seed(seed)

    def noisy(obs: Tensor) -> Tensor:
        return model(obs) + config.act_noise * torch.randn(len(obs), model.act_dim, generator=rng)  # what lies beyond [-1, 1] is clipped

    return evaluation.evaluate(model, config.env, stochastic=noisy, media=media, episodes=episodes, seed=seed, frame_stack=config.frame_stack)
