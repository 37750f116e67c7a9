"""Trust Region Policy Optimization (TRPO), Schulman et al. 2015, arXiv:1502.05477; with natural policy gradient (NPG), Kakade 2001.

Collect a batch under the current policy; then move the policy as far as its expected gain grows without leaving a ball of KL divergence around the old one:

    maximise  L(theta) = E[ rho A ]   subject to   E[ KL(pi_old(.|s) || pi_theta(.|s)) ] <= delta        rho = pi_theta(a|s) / pi_old(a|s)

Near theta_old the gain is linear, g = grad L, and the divergence quadratic with the Fisher matrix F, so the step is alpha x with F x = g and
alpha = sqrt(2 delta / x'Fx). x comes from conjugate gradient, which needs F only by its products F v = grad((grad KL)'v): no matrix is ever formed. A line
search then shortens the step until the true divergence is within delta and the true gain is not negative. Without it, that is the natural policy gradient.

| symbol      | shape        | meaning                                                                          |
|-------------|--------------|----------------------------------------------------------------------------------|
| obs         | (B, D)       | observations of N environments for T steps, B = T N, normalised where configured |
| act         | (B[, A])     | actions: (B,) int64 for Discrete, (B, K) of K choices, (B, A) float32 for Box     |
| logp        | (B,)         | log pi_old(a|s), under the policy that acted                                     |
| adv         | (B,)         | advantages by GAE, of unit variance                                              |
| ret         | (B,)         | lambda-returns, the critic's target                                              |
| g, x        | (P,)         | gradient of L in the P weights of the policy; the solution of F x = g            |

What is known to matter: delta, between 0.005 and 0.05; a damped F (F + c I), because a batch leaves directions in which it says nothing; batches large enough
for F to mean something; observations of unit scale (Rajeswaran et al. 2017, arXiv:1703.02660, reach with that and a natural gradient on linear policies what
deep ones do). The critic is no part of the trust region and is fitted by Adam.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
    delta: float = 0.01  # how far a step may move the policy, in KL(pi_old, pi)
    line_search: bool = True  # shorten steps that go too far or gain nothing; without it this is the natural policy gradient
    backtracks: int = 10  # steps that the line search tries before it gives up
    backtrack: float = 0.8  # each this much of the one before
    cg_steps: int = 10  # of conjugate gradient
    damping: float = 0.1  # c in F + c I
    value_lr: float = 1e-3  # Adam's step size for the critic
    value_epochs: int = 5  # the critic's passes over each batch
    value_minibatches: int = 8  # its gradient steps per pass
    gamma: float = 0.99  # discount
    lam: float = 0.97  # lambda of GAE: 0 is one-step, 1 is Monte Carlo
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
        for name in ("total_steps", "frame_stack", "backtracks", "cg_steps", "value_epochs", "value_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("delta", "value_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 < self.backtrack < 1:
            raise ValueError(f"backtrack must be between 0 and 1, got {self.backtrack}")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be at least 0 and finite, got {self.damping}")
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
    optimizer: Adam  # the critic's
    envs: environments.Envs
    reward_norm: RewardNorm | None
    iteration: int = 0


def spaces(config: Config) -> environments.Spaces:
    return environments.spaces(config.env, frame_stack=config.frame_stack, multi=True, images=True)


def build(config: Config) -> ActorCritic:
    return ActorCritic(spaces(config), config.hidden, config.activation, config.normalize_obs, config.log_std, twice=True)


def example(config: Config) -> Tensor:
    """Observations for the module to answer, when it is shared."""
    return spaces(config).example(8)


def begin(config: Config, num_envs: int, backend: str, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    optimizer = Adam((model.v.parameters(), config.value_lr))
    reward_norm = RewardNorm(num_envs, config.gamma).to(device) if config.normalize_reward else None
    envs = environments.make(config.env, num_envs, config.seed, backend, frame_stack=config.frame_stack, device=device)
    return State(model, optimizer, envs, reward_norm)


def surrogate(logp: Tensor, logp_old: Tensor, adv: Tensor) -> Tensor:
    """L = E[ rho A ] with log rho = log pi(a|s) - log pi_old(a|s); (B,) each, scalar out. At pi = pi_old its gradient is the policy gradient."""
    return ((logp - logp_old).exp() * adv).mean()


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """x (P,) with A x ≈ b for a symmetric positive definite A given by `product(v)` = A v, from x = 0 until |b - A x|^2 < tolerance or for `steps`.

    Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear systems".

    >>> A, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> conjugate_gradient(lambda v: A @ v, b, steps=2)  # the solution is (1/11, 7/11)
    tensor([0.0909, 0.6364])
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r.dot(r)
    for _ in range(steps):
        if rr < tolerance:
            break
        z = product(p)
        alpha = rr / p.dot(z)
        x += alpha * p
        r -= alpha * z
        rr, rr_old = r.dot(r), rr
        p = r + (rr / rr_old) * p
    return x


def fisher(model: ActorCritic, obs: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v for v (P,), F the Fisher matrix of pi at obs (B, D): the Hessian of E[ KL(pi_old || pi) ] in pi's weights, at pi = pi_old."""
    params = model.policy_parameters()
    dist = model.dist(obs)
    kl = model.kl(tuple(x.detach() for x in dist), dist).mean()
    gradient = flat(torch.autograd.grad(kl, params, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flat(torch.autograd.grad(gradient.dot(v), params, retain_graph=True)) + damping * v

    return product


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def line_search(evaluate: Callable[[float], tuple[float, float]], delta: float, gain_old: float, backtracks: int, backtrack: float) -> float:
    """The first of 1, backtrack, backtrack^2, … (`backtracks` of them) where `evaluate(fraction)` = (kl, gain) has kl <= delta and gain >= gain_old; else 0."""
    for k in range(backtracks):
        kl, gain = evaluate(backtrack**k)
        if kl <= delta and gain >= gain_old:
            return backtrack**k
    return 0.0


def rollout(config: Config, state: State, T: int, run: Run | None = None) -> dict[str, Tensor]:
    return collect(state.model, state.envs, T, config.gamma, config.lam, state.reward_norm, run)


def update(config: Config, state: State, batch: dict[str, Tensor], run: Run | None = None) -> dict[str, float | None]:
    """One step of the policy within the trust region on the whole batch, then the critic's fit."""
    model, params = state.model, state.model.policy_parameters()
    obs, act, logp_old, adv = (batch[name] for name in ("obs", "act", "logp", "adv"))
    logp, entropy = model.logp(obs, act)
    gain = surrogate(logp, logp_old, adv)
    g = flat(torch.autograd.grad(gain, params))
    grad_norm = g.norm()
    if run:
        run.finite(gain=gain, grad_norm=grad_norm)
    F = fisher(model, obs, config.damping)
    x = conjugate_gradient(F, g, config.cg_steps)
    with torch.no_grad():
        old = tuple(tensor.clone() for tensor in model.dist(obs))
        theta = parameters_to_vector(params)
    step = x * torch.sqrt(2 * config.delta / x.dot(F(x)).clamp(min=1e-12))
    if run:
        run.finite(step=step.norm())

    @torch.no_grad()
    def moved(fraction: float) -> tuple[float, float]:
        vector_to_parameters(theta + fraction * step, params)
        return model.kl(old, model.dist(obs)).mean().item(), surrogate(model.logp(obs, act)[0], logp_old, adv).item()

    fraction = line_search(moved, config.delta, gain.item(), config.backtracks, config.backtrack) if config.line_search else 1.0
    kl, gain_new = moved(fraction)  # the weights are those of this step now; the old ones where none was good
    v_loss = fit_value(model, state.optimizer, obs, batch["ret"], config.value_epochs, config.value_minibatches, run)
    return {
        "gain": gain_new - gain.item(),
        "value_loss": v_loss,
        "entropy": entropy.mean().item(),
        "kl": kl,
        "step_taken": fraction,
        "grad_norm": grad_norm.item(),
        "explained_variance": explained_variance(batch["value"], batch["ret"]),
    }


def train(config: Config, run: Run) -> ActorCritic:
    def measure(choice: dict[str, Any]) -> Callable[[], object]:  # about an eighth of an iteration
        trial = begin(config, choice["num_envs"], choice["backend"], choice["device"])
        part = replace(config, value_minibatches=max(1, config.value_minibatches // 8))
        return lambda: update(part, trial, rollout(part, trial, max(1, config.batch_size // choice["num_envs"] // 8)))

    sizes = env_counts(config.num_envs, config.batch_size)
    key = f"trpo {config.env} {config.hidden} {config.batch_size} {config.cg_steps} {config.value_epochs} {config.value_minibatches}"
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
