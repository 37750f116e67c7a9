"""Deep Q-Network (DQN), Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518.

Q-learning with a net: act greedily but for a share epsilon of random actions, keep every transition, and fit Q on random batches of them to

    y = r + gamma Q_target(s', argmax_a Q_target(s', a))        L(theta) = E[ w huber(Q(s, a) - y) ]

with no value after a terminal state; huber(e) is e^2 / 2 up to |e| = h, and h (|e| - h / 2) beyond. Q_target is an older copy of Q. Improvements are options
(Hessel et al. 2018, arXiv:1710.02298, weighs them):

- double (van Hasselt et al. 2016, arXiv:1509.06461): the argmax is Q's own, which takes off the bias of the greatest of noisy values; clipped (Fujimoto et al.
  2018, arXiv:1802.09477, section 4.2), the smaller of Q and Q_target counts there, so that values may fall at once but rise no faster than the target;
- dueling (Wang et al. 2016, arXiv:1511.06581): Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a'), here with all hidden layers in common;
- n_step (Sutton 1988): r becomes r_t + … + gamma^(n-1) r_{t+n-1}, the value that follows gamma^n Q_target(s_{t+n}, …);
- priority (Schaul et al. 2016, arXiv:1511.05952): transitions are drawn by their last error, of which no more than h counts, to the power alpha;
  w = (N P(i))^-beta undoes the bias;
- action_repeat (Mnih et al. 2015, the frame skip): an action is held for k steps, and what followed is one transition: a k-th of the decisions to learn.

| symbol         | shape     | meaning                                                                            |
|----------------|-----------|------------------------------------------------------------------------------------|
| obs, next_obs  | (B, …)    | s, what was acted on; s', what the step (or n of them) reached, never a reset's    |
| act            | (B,)      | a, int64                                                                           |
| reward         | (B,)      | r, or the discounted sum of n                                                      |
| discount       | (B,)      | gamma^k of the k steps added up; 0 where s' is terminal, not where a limit cut off |
| q              | (B, A)    | Q(s, .)                                                                            |
| y              | (B,)      | the target, a constant to the gradient                                             |
| weight         | (B,)      | w, importance weights of prioritized replay, else 1                                |

What is known to matter: Huber's loss, whose gradient Mnih et al. call clipping the error, with an h that suits the values (docs/rl.md says what goes wrong
where it is too small); a target that stands still long enough; a time limit that is not taken for an end (Pardo et al. 2018, arXiv:1712.00378); n-step
returns, and on many tasks priorities, more than double and dueling (Hessel et al. 2018).

Speed: nets this small are bound by the number of calls, so N environments are stepped at once, a sample is one gather, the net's passes are single calls
(`stacks`) and its weights one tensor.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.rl import envs as environments
from onetorch.rl import evaluation
from onetorch.rl.buffer import Batch, PrioritizedReplay, Replay
from onetorch.rl.nets import Adam
from onetorch.rl.stacks import Stack
from onetorch.runs.errors import UsageError
from onetorch.runs.plan import devices, thread_counts
from onetorch.runs.run import Run

LOG_STEPS = 1000  # environment steps between two rows of metrics


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"  # Gymnasium environment with Discrete actions; observations may be vectors or pictures
    seed: int = 0  # of weights, exploration, samples and environments
    total_steps: int = 50_000  # environment steps, all environments together
    num_envs: int = 8  # N, environments stepped together
    replay: int = 100_000  # transitions remembered
    update_after: int = 1000  # transitions remembered before the first update
    update_every: int = 16  # environment steps between two rounds of updates
    updates: int = 8  # gradient steps of a round
    batch_size: int = 64  # B, transitions of a gradient step
    lr: float = 2e-3  # Adam's step size
    adam_eps: float = 1.5e-4  # added to the root of the mean square by which Adam divides (Hessel)
    anneal: bool = True  # the step size falls linearly to 0
    gamma: float = 0.99  # discount
    target_every: int = 1  # gradient steps between two updates of the target
    tau: float = 0.01  # how far such an update moves the target: with target_every 1 Polyak's average (Lillicrap); 1 is a copy, for target_every 250 say (Mnih)
    epsilon: float = 0.04  # share of random actions at the end; it begins with 1
    epsilon_fraction: float = 0.16  # part of total_steps in which epsilon falls linearly
    double: bool = True  # double Q-learning
    clipped: bool = True  # of double Q-learning: the smaller of Q and Q_target counts
    dueling: bool = False  # dueling streams
    n_step: int = 3  # n, rewards added up before a value follows
    priority: float = 0.0  # alpha of prioritized replay; 0 draws uniformly
    beta: float = 0.4  # how far importance weights undo the priorities' bias at the start; 1 at the end
    huber: float = 4.0  # h of Huber's loss: errors count squared up to this, beyond it linearly
    max_grad_norm: float = 40.0  # gradients are scaled down to this norm
    frame_stack: int = 1  # an observation is the last so many
    action_repeat: int = 1  # environment steps for which an action is held (Mnih: the frame skip); gamma and n_step count actions
    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers, ReLU between them

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        for name in ("total_steps", "num_envs", "replay", "update_every", "updates", "batch_size", "target_every", "n_step", "frame_stack", "action_repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "adam_eps", "huber", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "epsilon", "epsilon_fraction", "priority", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {self.tau}")
        if self.update_after < 0:
            raise ValueError(f"update_after must be at least 0, got {self.update_after}")
        if self.update_every % (self.num_envs * self.action_repeat):
            steps = f"num_envs * action_repeat = {self.num_envs * self.action_repeat}"
            raise ValueError(f"update_every must be a multiple of {steps}, the steps of one action in each, got {self.update_every}")
        if self.replay < self.num_envs * self.n_step:
            raise ValueError(f"replay must be at least num_envs * n_step = {self.num_envs * self.n_step}, got {self.replay}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


class QNet(nn.Module):
    """Q(s, .): observations (B, D), or pictures (B, C, H, W) uint8, to values (B, A); with `dueling` the last layer gives V and A.

    Pictures go through the convolutions of Mnih et al. 2015 first, those with a side below 36 through two smaller ones.
    """

    def __init__(self, spaces: environments.Spaces, hidden: Sequence[int], dueling: bool) -> None:
        super().__init__()
        self.act_dim, self.image, self.dueling, inputs = spaces.act_dim, spaces.image, dueling, spaces.obs_dim
        if spaces.image:
            C, H, W = spaces.image
            kernels = ((C, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)) if min(H, W) >= 36 else ((C, 16, 3, 1), (16, 32, 3, 2))
            self.body = nn.Sequential(*(layer for k in kernels for layer in (nn.Conv2d(*k), nn.ReLU())), nn.Flatten())
            self.pixels = C * H * W
            inputs = max(inputs - self.pixels, 0) + self.body(torch.zeros(1, C, H, W)).shape[1]
        self.head = Stack(None, (inputs, *hidden, spaces.act_dim + dueling))

    def act(self, obs: Tensor, noise: None = None) -> Tensor:
        """The best actions (B,) at obs; there is nothing to draw."""
        return self(obs).argmax(1)

    def forward(self, obs: Tensor) -> Tensor:
        if self.image:
            pixels = obs if obs.dim() == 4 else obs[:, -self.pixels :].unflatten(1, self.image)
            seen = self.body(pixels.float() / 255)
            obs = seen if obs.dim() == 4 else torch.cat((obs[:, : -self.pixels], seen), 1)
        out = self.head(obs)
        if not self.dueling:
            return out
        value, advantage = out[:, :1], out[:, 1:]
        return value + advantage - advantage.mean(1, keepdim=True)


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: QNet
    target: QNet
    optimizer: Adam
    envs: environments.Envs
    replay: Replay
    generator: torch.Generator  # of samples
    updates: int = 0  # gradient steps done
    iteration: int = 0


def spaces(config: Config) -> environments.Spaces:
    return environments.spaces(config.env, frame_stack=config.frame_stack, images=True)


def build(config: Config) -> QNet:
    space = spaces(config)
    if not space.discrete:
        raise UsageError(f"dqn needs an environment with Discrete actions, {config.env} has Box ones")
    return QNet(space, config.hidden, config.dueling)


def example(config: Config) -> Tensor:
    """Observations (8, …) for the module to answer, when it is shared."""
    space = spaces(config)
    return torch.randint(256, (8, *space.obs_shape)).to(space.obs_dtype) if space.image else torch.randn(8, space.obs_dim)


def begin(config: Config, backend: str, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    optimizer = Adam((model.parameters(), config.lr), eps=config.adam_eps)
    options: dict[str, Any] = {"frame_stack": config.frame_stack, "action_repeat": config.action_repeat, "device": device}
    envs = environments.make(config.env, config.num_envs, config.seed, backend, **options)
    shape: tuple[Any, ...] = (config.replay, envs.spaces.obs_shape)
    kinds: dict[str, Any] = {"num_envs": config.num_envs, "obs_dtype": envs.spaces.obs_dtype, "act_dtype": torch.int64, "device": device}
    replay = PrioritizedReplay(*shape, alpha=config.priority, **kinds) if config.priority else Replay(*shape, **kinds)
    target = copy.deepcopy(model).requires_grad_(False)
    return State(model, target, optimizer, envs, replay, torch.Generator(device).manual_seed(config.seed))


@torch.no_grad()
def td_target(model: nn.Module, target: nn.Module, batch: Batch, discount: Tensor | float, double: bool, clipped: bool = False) -> Tensor:
    """y = r + discount (1 - terminated) Q_target(s', a*) (B,), a* = argmax_a Q_target(s', a), or with `double` argmax_a Q(s', a); `discount` is gamma^k.

    `double` and `clipped`: the smaller of Q_target(s', a*) and Q(s', a*).
    """
    q = target(batch.next_obs)
    if double:
        best, act = model(batch.next_obs).max(1, keepdim=True)
        value = q.gather(1, act)
        value = (torch.minimum(value, best) if clipped else value).squeeze(1)
    else:
        value = q.amax(1)
    return batch.reward + discount * (1 - batch.terminated) * value


def explore(config: Config, state: State, epsilon: float, run: Run) -> Callable[[], None]:
    """update_every environment steps, each action with chance epsilon a random one, into the replay memory. What is returned ends the last of them."""
    model, envs, replay, N = state.model, state.envs, state.replay, config.num_envs
    T, device = config.update_every // (N * config.action_repeat), replay.rows.device
    chance, act_any = torch.rand(T, N, device=device) < epsilon, torch.randint(envs.spaces.act_dim, (T, N), device=device)

    def begin(t: int) -> Callable[[], None]:
        obs = envs.obs
        with torch.no_grad():
            act = torch.where(chance[t], act_any[t], model(obs).argmax(1))
        step = envs.begin(act)
        run.phase("action")

        def end() -> None:
            next_obs, reward, terminated, truncated = step()
            run.phase("environment")
            replay.add(obs, act, reward, next_obs, terminated, truncated)
            run.phase("replay")

        return end

    for t in range(T - 1):
        begin(t)()
    return begin(T - 1)


def batches(config: Config, state: State) -> Iterator[tuple[Tensor, Batch, Tensor | float]]:
    """The rows, transitions and discounts of a round's gradient steps: of all at once, or with priorities, which each step changes, one by one."""
    replay, sizes = state.replay, [config.batch_size] * config.updates
    for count in sizes if config.priority else [sum(sizes)]:
        rows = replay.draw(count, state.generator)
        batch, discount = replay.gather_n(rows, config.n_step, config.gamma)
        discounts = discount.split(config.batch_size) if isinstance(discount, Tensor) else repeat(discount)
        for part, *columns, k in zip(rows.split(config.batch_size), *(x.split(config.batch_size) for x in batch), discounts, strict=False):
            yield part, Batch(*columns), k


def learn(config: Config, state: State, beta: float, run: Run, left: float = 1.0) -> dict[str, Any]:
    """A round of gradient steps, with `left` of the step size. Returns what was seen in the last of them, before its step: loss and grad_norm, q and y (B,)."""
    model, replay, optimizer = state.model, state.replay, state.optimizer
    for rows, batch, discount in batches(config, state):
        y = td_target(model, state.target, batch, discount, config.double, config.clipped)
        act, values = batch.act.unsqueeze(1), model(batch.obs)
        q = values.detach().gather(1, act).squeeze(1)
        error = q - y
        weight = replay.weights(rows, beta) if isinstance(replay, PrioritizedReplay) else None
        h = config.huber
        loss = F.huber_loss(q, y, delta=h) if weight is None else (weight * F.huber_loss(q, y, reduction="none", delta=h)).mean()
        # dL/dQ(s, a) = w clamp(error, -h, h) / B, which Mnih et al. call clipping the error: given to autograd as it is, that is a third of its calls.
        slope = error.clamp(-h, h) / config.batch_size
        slopes = torch.zeros_like(values).scatter_(1, act, (slope if weight is None else slope * weight).unsqueeze(1))
        optimizer.zero_grad()
        values.backward(slopes)
        if isinstance(replay, PrioritizedReplay):
            replay.prioritize(rows, error.clamp(-h, h))
        grad_norm = optimizer.clip(config.max_grad_norm)
        run.finite(loss=loss, grad_norm=grad_norm)
        optimizer.step(left)
        state.updates += 1
        if state.updates % config.target_every == 0:
            with torch.no_grad():
                torch._foreach_lerp_(list(state.target.parameters()), list(model.parameters()), config.tau)
    run.phase("update")
    return {"loss": loss, "q": q, "y": y, "grad_norm": grad_norm}


def train(config: Config, run: Run) -> QNet:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # about an eighth of a round
        once = config.num_envs * config.action_repeat
        steps = max(1, config.update_every // once // 8) * once
        part = replace(config, update_every=steps, updates=max(1, config.updates // 8), replay=max(steps, config.num_envs * config.n_step))
        trial = begin(part, choice["backend"], choice["device"])
        explore(part, trial, 0.5, run)()

        def work() -> None:
            end = explore(part, trial, 0.5, run)
            learn(part, trial, 1.0, run)
            end()

        return work

    key = f"dqn {config.env} {config.num_envs} {config.hidden} {config.batch_size} {config.update_every} {config.updates} {config.action_repeat}"
    plan = run.plan(measure, key=key, device=devices(), backend=environments.backends(config.env, config.action_repeat), threads=thread_counts())
    total = math.ceil(config.total_steps / config.update_every)
    decay = config.epsilon_fraction * config.total_steps

    state = begin(config, plan["backend"], plan["device"])
    run.initialize(state.model)
    state.target.load_state_dict(state.model.state_dict())
    state = run.restore(state)
    for state.iteration in run.steps(state.iteration, total, unit="env steps", scale=config.update_every):
        step = state.iteration * config.update_every  # after this round
        fallen = min(1.0, (step - config.update_every) / decay) if decay else 1.0
        epsilon = 1 + (config.epsilon - 1) * fallen if step // config.action_repeat > config.update_after else 1.0
        left = 1 - (state.iteration - 1) / total if config.anneal else 1.0
        end = explore(config, state, epsilon, run)
        enough = state.replay.count >= max(1, config.update_after)
        seen = learn(config, state, config.beta + (1 - config.beta) * state.iteration / total, run, left) if enough else {}
        end()
        if step // LOG_STEPS > (step - config.update_every) // LOG_STEPS or state.iteration == total:
            episodes = state.envs.episodes
            if seen:
                q, y = seen.pop("q"), seen.pop("y")
                seen |= {"q": q.mean(), "td_error": (q - y).abs().mean()}
            run.log(step, **{"return": episodes.mean_return()}, episodes=episodes.finished, epsilon=epsilon, updates=state.updates, **seen)
        run.checkpoint(state)
        run.phase("logging")
    state.envs.close()
    return state.model.cpu()


def evaluate(
    model: QNet, config: Config, *, media: Path | None = None, episodes: int = 20, seed: int = 1_000_000, epsilon: float | None = None
) -> dict[str, float | int | str]:
    """Mean return over episodes of their own, with a 95 % interval: of the best actions, and with a share epsilon of random ones as `stochastic_return`;
    `agent.mp4` under `media` is of the best. `epsilon`: None is that of the end of training; Mnih et al. take 0.05."""
    share, rng = config.epsilon if epsilon is None else epsilon, torch.Generator().manual_seed(seed)
    if not 0 <= share <= 1:
        raise UsageError(f"epsilon must be between 0 and 1, got {share}")

    def exploring(obs: Tensor) -> Tensor:
        random, act = torch.rand(len(obs), generator=rng) < share, torch.randint(model.act_dim, (len(obs),), generator=rng)
        return torch.where(random, act, model.act(obs))

    options: dict[str, Any] = {"media": media, "episodes": episodes, "seed": seed, "frame_stack": config.frame_stack, "action_repeat": config.action_repeat}
    return evaluation.evaluate(model.act, config.env, stochastic=exploring, **options)
