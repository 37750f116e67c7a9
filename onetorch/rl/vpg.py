"""Vanilla Policy Gradient (VPG) with a critic and GAE, Sutton et al. 2000; Schulman et al. 2015, arXiv:1506.02438.

Collect a batch under the current policy, take one step along the gradient of the expected return, then fit the critic to what was seen:

    grad J(theta) = E[ grad log pi(a|s) A(s, a) ]

| symbol      | shape        | meaning                                                                          |
|-------------|--------------|----------------------------------------------------------------------------------|
| obs         | (B, D)       | observations of N environments for T steps, B = T N, normalised where configured |
| act         | (B[, A])     | actions: (B,) int64 for Discrete, (B, K) of K choices, (B, A) float32 for Box     |
| logp        | (B,)         | log pi(a|s)                                                                      |
| adv         | (B,)         | advantages by GAE (Schulman et al. 2015, arXiv:1506.02438), of unit variance     |
| ret         | (B,)         | lambda-returns, the critic's target                                              |

What is known to matter: a batch is used for one step and thrown away, because after that step it is no longer the policy's own; so the size of that step is
the hyper-parameter that decides (Adam's, which does not know how far the policy moves: `trpo` does). The critic may take as many steps as it likes. Advantages
of unit variance make one step size serve many tasks; a lambda of GAE near 1 trusts rewards more than the critic, which is what a critic wants that is fitted
from nothing. A time limit is not the task's end: what would have followed counts by its value.
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
from onetorch.rl.onpolicy import RewardNorm, collect, env_counts, fit_value, scores
from onetorch.rl.returns import explained_variance
from onetorch.runs.plan import devices, thread_counts
from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"  # Gymnasium environment
    seed: int = 0  # of weights, actions, minibatches and environments
    total_steps: int = 300_000  # environment steps, all environments together
    num_envs: int = 0  # N, environments stepped together; 0: the speed plan chooses
    batch_size: int = 2048  # T * N, environment steps per step of the policy
    lr: float = 1e-2  # Adam's step size for the policy
    value_lr: float = 1e-3  # Adam's step size for the critic
    value_epochs: int = 5  # the critic's passes over each batch
    value_minibatches: int = 8  # its gradient steps per pass
    gamma: float = 0.99  # discount
    lam: float = 0.97  # lambda of GAE: 0 is one-step, 1 is Monte Carlo
    entropy_coef: float = 0.0  # weight of the entropy bonus
    frame_stack: int = 1  # an observation is the last so many
    normalize_obs: bool = False  # observations by their running mean and standard deviation
    normalize_reward: bool = True  # rewards by the running standard deviation of the discounted return
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers, of pi and of v
    activation: Literal["tanh", "relu", "silu"] = "tanh"  # between the layers
    log_std: float = -0.5  # logarithm of the standard deviation of Box actions at the start

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, for one advantage has no spread, got {self.batch_size}")
        for name in ("total_steps", "frame_stack", "value_epochs", "value_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "value_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.entropy_coef < math.inf:
            raise ValueError(f"entropy_coef must be at least 0 and finite, got {self.entropy_coef}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.num_envs < 0 or (self.num_envs and self.batch_size % self.num_envs):
            raise ValueError(f"num_envs must divide batch_size = {self.batch_size}, or be 0, got {self.num_envs}")
        if self.value_minibatches > self.batch_size:
            raise ValueError(f"value_minibatches must be at most batch_size = {self.batch_size}, got {self.value_minibatches}")
        if not math.isfinite(self.log_std):
            raise ValueError(f"log_std must be finite, got {self.log_std}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: ActorCritic
    pi_optimizer: Adam
    v_optimizer: Adam
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
    pi_optimizer, v_optimizer = Adam((model.policy_parameters(), config.lr)), Adam((model.v.parameters(), config.value_lr))
    reward_norm = RewardNorm(num_envs, config.gamma).to(device) if config.normalize_reward else None
    envs = environments.make(config.env, num_envs, config.seed, backend, frame_stack=config.frame_stack, device=device)
    return State(model, pi_optimizer, v_optimizer, envs, reward_norm)


def policy_loss(logp: Tensor, adv: Tensor) -> Tensor:
    """-E[ log pi(a|s) A ], whose gradient is minus the policy gradient; (B,) each, scalar out. Its value means nothing: it is not the return."""
    return -(logp * adv).mean()


def rollout(config: Config, state: State, T: int, run: Run | None = None) -> dict[str, Tensor]:
    return collect(state.model, state.envs, T, config.gamma, config.lam, state.reward_norm, run)


def update(config: Config, state: State, batch: dict[str, Tensor], run: Run | None = None) -> dict[str, float | None]:
    """One step of the policy on the whole batch, then the critic's."""
    model, optimizer = state.model, state.pi_optimizer
    logp, entropy = model.logp(batch["obs"], batch["act"])
    pi_loss, entropy = policy_loss(logp, batch["adv"]), entropy.mean()
    loss = pi_loss - config.entropy_coef * entropy
    optimizer.zero_grad()
    loss.backward()
    grad_norm = optimizer.grad.norm()
    if run:
        run.finite(loss=loss, grad_norm=grad_norm)
    optimizer.step()
    v_loss = fit_value(model, state.v_optimizer, batch["obs"], batch["ret"], config.value_epochs, config.value_minibatches, run)
    with torch.no_grad():
        moved = model.logp(batch["obs"], batch["act"])[0] - batch["logp"]
    return {
        "policy_loss": pi_loss.item(),
        "value_loss": v_loss,
        "entropy": entropy.item(),
        "kl": (moved.exp() - 1 - moved).mean().item(),  # KL(pi_old, pi): Schulman 2020, "Approximating KL divergence"
        "grad_norm": grad_norm.item(),
        "explained_variance": explained_variance(batch["value"], batch["ret"]),
    }


def train(config: Config, run: Run) -> ActorCritic:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # about an eighth of an iteration
        trial = begin(config, choice["num_envs"], choice["backend"], choice["device"])
        part = replace(config, value_minibatches=max(1, config.value_minibatches // 8))
        return lambda: update(part, trial, rollout(part, trial, max(1, config.batch_size // choice["num_envs"] // 8)))

    sizes = env_counts(config.num_envs, config.batch_size)
    key = f"vpg {config.env} {config.hidden} {config.batch_size} {config.value_epochs} {config.value_minibatches}"
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
        losses = update(config, state, batch, run)
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
