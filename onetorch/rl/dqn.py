"""Deep Q-Network (DQN), Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518.

Q-learning with a net: act greedily but for a share epsilon of random actions, keep every transition, and fit Q on random batches of them to

    y = r + gamma Q_target(s', argmax_a Q_target(s', a))        L(theta) = E[ w huber(Q(s, a) - y) ]

with no value after a terminal state; Q_target is an older copy of Q. Four improvements are options (Hessel et al. 2018, arXiv:1710.02298, weighs them):

- double (van Hasselt et al. 2016, arXiv:1509.06461): the argmax is Q's own, which takes off the bias of the greatest of noisy values;
- dueling (Wang et al. 2016, arXiv:1511.06581): Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a');
- n_step (Sutton 1988): r becomes r_t + … + gamma^(n-1) r_{t+n-1}, the value that follows gamma^n Q_target(s_{t+n}, …);
- priority (Schaul et al. 2016, arXiv:1511.05952): transitions are drawn by their last error to the power alpha, w = (N P(i))^-beta undoes the bias.

| symbol         | shape     | meaning                                                                            |
|----------------|-----------|------------------------------------------------------------------------------------|
| obs, next_obs  | (B, …)    | s, what was acted on; s', what the step (or n of them) reached, never a reset's    |
| act            | (B,)      | a, int64                                                                           |
| reward         | (B,)      | r, or the discounted sum of n                                                      |
| discount       | (B,)      | gamma^k of the k steps added up; 0 where s' is terminal, not where a limit cut off |
| q              | (B, A)    | Q(s, .)                                                                            |
| y              | (B,)      | the target, a constant to the gradient                                             |
| weight         | (B,)      | w, importance weights of prioritized replay, else 1                                |

What is known to matter: Huber's loss, whose gradient Mnih et al. call clipping the error; a target that stands still long enough; a time limit that is not
taken for an end (Pardo et al. 2018, arXiv:1712.00378); n-step returns, and on many tasks priorities, more than double and dueling (Hessel et al. 2018).

Speed: nets this small are bound by the number of calls, so N environments are stepped at once, a sample is one gather and Adam is fused.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.rl import envs as environments
from onetorch.rl import evaluation
from onetorch.rl.buffer import Batch, PrioritizedReplay, Replay
from onetorch.rl.nets import ACTIVATIONS, mlp
from onetorch.runs.errors import UsageError
from onetorch.runs.run import Run

LOG_STEPS = 1000  # environment steps between two rows of metrics


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"  # Gymnasium environment with Box observations and Discrete actions
    seed: int = 0  # of weights, exploration, samples and environments
    total_steps: int = 50_000  # environment steps, all environments together
    num_envs: int = 8  # N, environments stepped together
    buffer_size: int = 100_000  # transitions kept
    learning_starts: int = 1000  # environment steps before the first update
    update_every: int = 256  # environment steps between two rounds of updates
    updates: int = 128  # gradient steps of a round
    batch_size: int = 64  # B, transitions of a gradient step
    lr: float = 2.3e-3  # Adam's step size
    gamma: float = 0.99  # discount
    target_every: int = 128  # gradient steps between two updates of the target
    tau: float = 1.0  # how far such an update moves the target: 1 is a copy (Mnih), 0.005 with target_every 1 is Polyak's average (Lillicrap)
    epsilon: float = 0.04  # share of random actions at the end; it begins with 1
    epsilon_fraction: float = 0.16  # part of total_steps in which epsilon falls linearly
    double: bool = False  # double Q-learning
    dueling: bool = False  # dueling streams
    n_step: int = 1  # n, rewards added up before a value follows
    priority: float = 0.0  # alpha of prioritized replay; 0 draws uniformly
    beta: float = 0.4  # how far importance weights undo the priorities' bias at the start; 1 at the end
    max_grad_norm: float = 10.0  # gradients are scaled down to this norm
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    activation: Literal["tanh", "relu", "silu"] = "relu"  # between the layers

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_envs", "buffer_size", "update_every", "updates", "batch_size", "target_every", "n_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "epsilon", "epsilon_fraction", "priority", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {self.tau}")
        if self.learning_starts < 0:
            raise ValueError(f"learning_starts must be at least 0, got {self.learning_starts}")
        if self.update_every % self.num_envs:
            raise ValueError(f"num_envs must divide update_every = {self.update_every}, got {self.num_envs}")
        if self.buffer_size < self.num_envs * self.n_step:
            raise ValueError(f"buffer_size must be at least num_envs * n_step = {self.num_envs * self.n_step}, got {self.buffer_size}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


class QNet(nn.Module):
    """Q(s, .): observations (…, D) to values (…, A); with `dueling` V and A have the last hidden layer each for itself."""

    def __init__(self, spaces: environments.Spaces, hidden: Sequence[int], activation: str, dueling: bool) -> None:
        super().__init__()
        between, self.act_dim = ACTIVATIONS[activation], spaces.act_dim
        split = max(len(hidden) - 1, 0) if dueling else len(hidden)
        widths = (spaces.obs_dim, *hidden[:split])
        self.body = mlp(widths, between, out_gain=math.sqrt(2)).append(between()) if split else nn.Identity()
        self.advantage = mlp((widths[-1], *hidden[split:], spaces.act_dim), between)
        self.value = mlp((widths[-1], *hidden[split:], 1), between) if dueling else None

    def forward(self, obs: Tensor) -> Tensor:
        features = self.body(obs)
        advantage = self.advantage(features)
        return advantage if self.value is None else self.value(features) + advantage - advantage.mean(-1, keepdim=True)


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: QNet
    target: QNet
    optimizer: torch.optim.Optimizer
    envs: environments.Envs
    replay: Replay
    generator: torch.Generator  # of samples
    updates: int = 0  # gradient steps done
    iteration: int = 0


def build(config: Config) -> QNet:
    spaces = environments.spaces(config.env)
    if not spaces.discrete:
        raise UsageError(f"dqn needs an environment with Discrete actions, {config.env} has Box ones")
    return QNet(spaces, config.hidden, config.activation, config.dueling)


def example(config: Config) -> Tensor:
    """Observations (8, D) for the module to answer, when it is shared."""
    return torch.randn(8, environments.spaces(config.env).obs_dim)


def begin(config: Config, backend: str, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    envs = environments.make(config.env, config.num_envs, config.seed, backend)
    options: dict[str, Any] = {"num_envs": config.num_envs, "act_dtype": torch.int64, "device": device}
    shape = tuple(envs.obs.shape[1:])
    replay = PrioritizedReplay(config.buffer_size, shape, alpha=config.priority, **options) if config.priority else Replay(config.buffer_size, shape, **options)
    target = copy.deepcopy(model).requires_grad_(False)
    return State(model, target, optimizer, envs, replay, torch.Generator(device).manual_seed(config.seed))


@torch.no_grad()
def td_target(model: nn.Module, target: nn.Module, batch: Batch, discount: Tensor, double: bool) -> Tensor:
    """y = r + discount (1 - terminated) Q_target(s', a*) (B,), a* = argmax_a Q_target(s', a), or with `double` argmax_a Q(s', a); `discount` is gamma^k."""
    q = target(batch.next_obs)
    value = q.gather(1, model(batch.next_obs).argmax(1, keepdim=True)).squeeze(1) if double else q.amax(1)
    return batch.reward + discount * (1 - batch.terminated) * value


def explore(config: Config, state: State, epsilon: float, run: Run) -> None:
    """update_every environment steps, each action with chance epsilon a random one, into the replay memory."""
    model, envs, replay, N = state.model, state.envs, state.replay, config.num_envs
    T, device = config.update_every // N, replay.rows.device
    chance, act_any = torch.rand(T, N) < epsilon, torch.randint(envs.spaces.act_dim, (T, N))
    for t in range(T):
        obs = envs.obs
        with torch.no_grad():
            act = torch.where(chance[t], act_any[t], model(obs.to(device)).argmax(1).cpu())
        run.phase("action")
        next_obs, reward, terminated, truncated = envs.step(act)
        run.phase("environment")
        replay.add(*(x.to(device) for x in (obs, act, reward, next_obs, terminated, truncated)))
        run.phase("replay")


def learn(config: Config, state: State, beta: float, run: Run) -> dict[str, float]:
    """A round of gradient steps. Returns what was seen in the last of them, before its step."""
    model, replay = state.model, state.replay
    params: list[Tensor] = list(model.parameters())
    target_params: list[Tensor] = list(state.target.parameters())
    for _ in range(config.updates):
        rows = replay.draw(config.batch_size, state.generator)
        batch, discount = replay.gather_n(rows, config.n_step, config.gamma)
        y = td_target(model, state.target, batch, discount, config.double)
        q = model(batch.obs).gather(1, batch.act.unsqueeze(1)).squeeze(1)
        if isinstance(replay, PrioritizedReplay):
            loss = (replay.weights(rows, beta) * F.smooth_l1_loss(q, y, reduction="none")).mean()
            replay.prioritize(rows, q.detach() - y)
        else:
            loss = F.smooth_l1_loss(q, y)
        state.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        run.finite(loss=loss, grad_norm=grad_norm)
        state.optimizer.step()
        state.updates += 1
        if state.updates % config.target_every == 0:
            with torch.no_grad():
                torch._foreach_lerp_(target_params, params, config.tau)
    run.phase("update")
    return {"loss": loss.item(), "q": q.mean().item(), "td_error": (q - y).abs().mean().item(), "grad_norm": grad_norm.item()}


def train(config: Config, run: Run) -> QNet:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # about an eighth of a round
        steps = max(1, config.update_every // config.num_envs // 8) * config.num_envs
        part = replace(config, update_every=steps, updates=max(1, config.updates // 8), buffer_size=max(steps, config.num_envs * config.n_step))
        trial = begin(part, choice["backend"], choice["device"])

        def work() -> None:
            explore(part, trial, 0.5, run)
            learn(part, trial, 1.0, run)

        return work

    threads = tuple(k for k in (1, 2, 4) if k <= environments.cores())
    key = f"dqn {config.env} {config.num_envs} {config.hidden} {config.batch_size} {config.update_every} {config.updates}"
    plan = run.plan(measure, key=key, backend=environments.backends(config.env), threads=threads)
    total = math.ceil(config.total_steps / config.update_every)
    decay = config.epsilon_fraction * config.total_steps

    state = begin(config, plan["backend"], plan["device"])
    run.initialize(state.model)
    state.target.load_state_dict(state.model.state_dict())
    state = run.restore(state)
    for state.iteration in run.steps(state.iteration, total, unit="env steps", scale=config.update_every):
        step = state.iteration * config.update_every  # after this round
        fallen = min(1.0, (step - config.update_every) / decay) if decay else 1.0
        epsilon = 1 + (config.epsilon - 1) * fallen if step > config.learning_starts else 1.0
        explore(config, state, epsilon, run)
        losses = learn(config, state, config.beta + (1 - config.beta) * state.iteration / total, run) if step >= config.learning_starts else {}
        if step // LOG_STEPS > (step - config.update_every) // LOG_STEPS or state.iteration == total:
            episodes = state.envs.episodes
            run.log(step, **{"return": episodes.mean_return()}, episodes=episodes.finished, epsilon=epsilon, updates=state.updates, **losses)
        run.checkpoint(state)
        run.phase("logging")
    state.envs.close()
    return state.model


def evaluate(
    model: QNet, config: Config, *, media: Path | None = None, episodes: int = 20, seed: int = 1_000_000, epsilon: float = 0.0
) -> dict[str, float | int | str]:
    """Mean return over episodes of their own, with a 95 % interval; `agent.mp4` under `media`. `epsilon`: share of random actions (Mnih et al.: 0.05)."""

    def policy(obs: Tensor) -> Tensor:
        best = model(obs).argmax(1)
        return torch.where(torch.rand(len(obs)) < epsilon, torch.randint(model.act_dim, (len(obs),)), best)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return evaluation.evaluate(policy, config.env, media=media, episodes=episodes, seed=seed)
