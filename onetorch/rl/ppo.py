"""Proximal Policy Optimization (PPO-Clip), Schulman et al. 2017, arXiv:1707.06347.

Collect a batch under the current policy; then take several epochs of minibatch gradient steps on a surrogate that stops paying once the new policy has
moved away from the old one by more than a factor 1 ± eps:

    L(theta) = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ]        rho = pi(a|s) / pi_old(a|s)

| symbol      | shape        | meaning                                                                          |
|-------------|--------------|----------------------------------------------------------------------------------|
| obs         | (T, N, D)    | observations of N environments for T steps, normalised where normalize_obs       |
| act         | (T, N[, A])  | actions: (T, N) int64 for Discrete, (T, N, K) of K choices, (T, N, A) for Box    |
| logp        | (T, N)       | log pi_old(a|s), under the policy that acted                                     |
| reward      | (T, N)       | rewards, scaled where normalize_reward                                           |
| value       | (T, N)       | V(s_t) by the critic that stood when the batch was collected                     |
| next_value  | (T, N)       | V(s_{t+1}); where a time limit cut the episode off, of its final observation     |
| adv, ret    | (T, N)       | advantages by GAE; adv + value, the critic's target                              |

What is known to matter (Engstrom et al. 2020, arXiv:2005.12729; Andrychowicz et al. 2020, arXiv:2006.05990; Huang et al. 2022, "The 37 implementation
details of proximal policy optimization"): observation normalisation for continuous control, a last policy layer that starts near zero, GAE with lambda
near 0.95, a step size that falls, advantages of unit variance, and values beyond a time limit. A clipped value loss has not been found to help.

Speed: with nets this small the number of calls is the cost. So the noise of a batch is drawn at once, log-probabilities and values are computed for the whole
batch after it is collected, minibatches are large, and Adam sees one vector of weights. The nets' passes are one call each (`stacks`), and the losses are
differentiated by hand (`policy_slope`, `value_slope`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from onetorch.rl import envs as environments
from onetorch.rl.nets import ActorCritic, Adam
from onetorch.rl.onpolicy import RewardNorm, collect, env_counts, scores
from onetorch.rl.returns import explained_variance
from onetorch.runs.plan import devices, thread_counts
from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"  # Gymnasium environment
    seed: int = 0  # of weights, actions, minibatches and environments
    total_steps: int = 300_000  # environment steps, all environments together
    num_envs: int = 0  # N, environments stepped together; 0: the speed plan chooses
    batch_size: int = 4096  # T * N, environment steps per iteration
    epochs: int = 2  # passes over each batch
    minibatches: int = 16  # gradient steps per pass
    lr: float = 3e-3  # Adam's step size
    value_lr: float | None = None  # Adam's step size for the critic, where it shall not be lr
    anneal: bool = True  # the step sizes fall linearly to 0
    gamma: float = 0.99  # discount
    lam: float = 0.97  # lambda of GAE: 0 is one-step, 1 is Monte Carlo
    clip: float = 0.3  # eps: how far the ratio pi / pi_old may move and still be paid for
    value_clip: float | None = None  # how far the critic may move within an iteration
    value_coef: float = 0.5  # weight of the critic's loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this norm
    target_kl: float | None = None  # end the epochs of an iteration once KL(pi_old, pi) is above this
    frame_stack: int = 1  # an observation is the last so many
    normalize_obs: bool = False  # observations by their running mean and standard deviation
    normalize_reward: bool = True  # rewards by the running standard deviation of the discounted return
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers, of pi and of v
    activation: Literal["tanh", "relu", "silu"] = "relu"  # between the layers
    log_std: float = 0.0  # logarithm of the standard deviation of Box actions at the start

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, for one advantage has no spread, got {self.batch_size}")
        for name in ("total_steps", "frame_stack", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "value_lr", "clip", "value_clip", "max_grad_norm", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("value_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.num_envs < 0 or (self.num_envs and self.batch_size % self.num_envs):
            raise ValueError(f"num_envs must divide batch_size = {self.batch_size}, or be 0, got {self.num_envs}")
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches must be at most batch_size = {self.batch_size}, got {self.minibatches}")
        if not math.isfinite(self.log_std):
            raise ValueError(f"log_std must be finite, got {self.log_std}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: ActorCritic
    optimizer: Adam
    envs: environments.Envs
    reward_norm: RewardNorm | None
    iteration: int = 0


def spaces(config: Config) -> environments.Spaces:
    return environments.spaces(config.env, frame_stack=config.frame_stack, multi=True, images=True)


def build(config: Config) -> ActorCritic:
    return ActorCritic(spaces(config), config.hidden, config.activation, config.normalize_obs, config.log_std)


def example(config: Config) -> Tensor:
    """Observations for the module to answer, when it is shared."""
    return spaces(config).example(8)


def begin(config: Config, num_envs: int, backend: str, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    optimizer = Adam((model.policy_parameters(), config.lr), (model.v.parameters(), config.value_lr or config.lr), eps=1e-5)
    reward_norm = RewardNorm(num_envs, config.gamma).to(device) if config.normalize_reward else None
    envs = environments.make(config.env, num_envs, config.seed, backend, frame_stack=config.frame_stack, device=device)
    return State(model, optimizer, envs, reward_norm)


def policy_loss(log_ratio: Tensor, adv: Tensor, clip: float) -> Tensor:
    """-E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ] with log_ratio = log rho = log pi(a|s) - log pi_old(a|s); (B,) each, scalar out."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()


def value_loss(value: Tensor, value_old: Tensor, ret: Tensor, clip: float | None) -> Tensor:
    """E[ (V - R)^2 ] / 2; with `clip`, E[ max((V - R)^2, (V_old + clamp(V - V_old, ±clip) - R)^2) ] / 2; all (B,), scalar out."""
    error = (value - ret).square()
    if clip is not None:
        error = torch.max(error, (value_old + (value - value_old).clamp(-clip, clip) - ret).square())
    return 0.5 * error.mean()


def policy_slope(log_ratio: Tensor, adv: Tensor, clip: float) -> Tensor:
    """`policy_loss` differentiated by log pi(a|s): -rho A / B, and 0 where the clipped term is the smaller; (B,) each, (B,) out."""
    ratio = log_ratio.exp()
    gain = ratio * adv
    return gain.masked_fill_(gain > ratio.clamp(1 - clip, 1 + clip) * adv, 0.0).mul_(-1 / len(adv))


def value_slope(value: Tensor, value_old: Tensor, ret: Tensor, clip: float | None) -> Tensor:
    """`value_loss` differentiated by V: (V - R) / B; with `clip`, 0 where V has moved out of it and the clipped error is the greater; all (B,), (B,) out."""
    error = value - ret
    if clip is not None:
        moved = value - value_old
        held = (moved.abs() > clip) & (error.abs() < (value_old + moved.clamp(-clip, clip) - ret).abs())
        error = error.masked_fill(held, 0.0)
    return error / len(ret)


def rollout(config: Config, state: State, T: int, run: Run | None = None) -> dict[str, Tensor]:
    return collect(state.model, state.envs, T, config.gamma, config.lam, state.reward_norm, run)


def update(config: Config, state: State, batch: dict[str, Tensor], left: float = 1.0, run: Run | None = None) -> dict[str, float | None]:
    """Epochs of minibatch gradient steps on one batch, with `left` of the step size. Returns what the last epoch saw, each minibatch before its step."""
    model, optimizer = state.model, state.optimizer
    data = [batch[name] for name in ("obs", "act", "logp", "adv", "value", "ret")]
    for _ in range(config.epochs):
        order, seen = torch.randperm(len(data[0]), device=data[0].device), []
        shuffled = [x.index_select(0, order) for x in data]
        for obs, act, logp_old, adv, value_old, ret in zip(*(x.chunk(config.minibatches) for x in shuffled), strict=True):
            # The loss is policy_loss + value_coef value_loss - entropy_coef entropy. Its slopes by logp, value and entropy are written out, for on small nets
            # autograd takes longer than all the rest. A loss of your own takes `model.logp(obs, act)` and `model.value(obs)`, then `loss.backward()`.
            logp, entropy, value, backward = model.vjp(obs, act)
            log_ratio = logp - logp_old
            optimizer.zero_grad()
            by_logp = policy_slope(log_ratio, adv, config.clip)
            backward(by_logp, config.value_coef * value_slope(value, value_old, ret, config.value_clip), -config.entropy_coef)
            grad_norm = optimizer.clip(config.max_grad_norm or math.inf)
            if run:
                run.finite(grad_norm=grad_norm)
            optimizer.step(left)
            seen.append((log_ratio, value, entropy.reshape(-1)))
        log_ratio, value, entropy = (torch.cat(parts) for parts in zip(*seen, strict=True))
        kl = (log_ratio.exp() - 1 - log_ratio).mean().item()  # KL(pi_old, pi) with low variance: Schulman 2020, "Approximating KL divergence"
        if config.target_kl is not None and kl > config.target_kl:
            break
    _, _, _, adv, value_old, ret = shuffled
    return {
        "policy_loss": policy_loss(log_ratio, adv, config.clip).item(),
        "value_loss": value_loss(value, value_old, ret, config.value_clip).item(),
        "entropy": entropy.mean().item(),
        "kl": kl,
        "clipped": ((log_ratio.exp() - 1).abs() > config.clip).float().mean().item(),
        "explained_variance": explained_variance(batch["value"], batch["ret"]),
        "lr": config.lr * left,
    }


def train(config: Config, run: Run) -> ActorCritic:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # an eighth of an iteration
        trial = begin(config, choice["num_envs"], choice["backend"], choice["device"])
        part = replace(config, epochs=1, minibatches=max(1, config.epochs * config.minibatches // 8))
        return lambda: update(part, trial, rollout(part, trial, max(1, config.batch_size // choice["num_envs"] // 8)))

    sizes = env_counts(config.num_envs, config.batch_size)
    key = f"ppo {config.env} {config.hidden} {config.batch_size} {config.epochs} {config.minibatches}"
    plan = run.plan(
        measure, key=key, asked={"backend": environments.asked(config.env)},
        device=devices(), num_envs=sizes, backend=environments.backends(config.env), threads=thread_counts(),
    )  # fmt: skip
    N = plan["num_envs"]
    T = max(1, config.batch_size // N)
    total = math.ceil(config.total_steps / (T * N))

    state = run.restore(begin(config, N, plan["backend"], plan["device"]))
    for state.iteration in run.steps(state.iteration, total, unit="env steps", scale=T * N):
        batch = rollout(config, state, T, run)
        losses = update(config, state, batch, 1 - (state.iteration - 1) / total if config.anneal else 1.0, run)
        state.model.observe(batch["raw"])
        run.phase("update")
        episodes = state.envs.episodes
        run.log(state.iteration * T * N, **{"return": episodes.mean_return()}, episodes=episodes.finished, **losses)
        run.checkpoint(state)
        run.phase("logging")
    state.envs.close()
    return state.model.cpu()


def evaluate(model: ActorCritic, config: Config, *, media: Path | None = None, episodes: int = 20, seed: int = 1_000_000) -> dict[str, float | int | str]:
    """Mean return over episodes of their own, with a 95 % interval: of the likeliest actions, and of drawn ones as `stochastic_return`; `agent.mp4` under
    `media` is of the likeliest."""
    return scores(model, config.env, config.frame_stack, media, episodes, seed)
