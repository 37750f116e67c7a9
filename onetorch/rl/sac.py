"""Soft Actor-Critic, Haarnoja et al. 2018, arXiv:1801.01290; the temperature learned as in arXiv:1812.05905; Discrete actions as in arXiv:1910.07207.

Off-policy: every step goes into a replay memory, and every step a batch from it improves twin critics and the policy. The policy earns its entropy too:

    y      = r + gamma (1 - d) (min_i Q_targ,i(s', a') - alpha log pi(a'|s'))      a' ~ pi(.|s')         soft Bellman target
    L(Q)   = sum_i E[ (Q_i(s, a) - y)^2 ]
    L(pi)  = E[ alpha log pi(a|s) - min_i Q_i(s, a) ]                              a ~ pi(.|s), reparametrised: gradients flow through a
    L(alpha) = -log alpha E[ log pi(a|s) + H ]                                     H: the entropy that is aimed at

Box actions are a = tanh(u), u ~ N(mean(s), std(s)^2); so log pi(a|s) = log N(u) - sum_i log(1 - tanh(u_i)^2). For Discrete actions both expectations over a
are sums over all of them, and Q(s) is a vector.

| symbol      | shape     | meaning                                                                            |
|-------------|-----------|------------------------------------------------------------------------------------|
| obs, next_obs | (B, …)  | s, s': observations, as the environment gives them                                 |
| act         | (B, A)    | a in [-1, 1]; (B,) int64 for Discrete                                              |
| terminated  | (B,)      | d: 1 where the task ended. A time limit is not an end                              |
| logp        | (B,)      | log pi(a|s) of an action drawn anew                                                |
| q           | (2, B)    | Q_1, Q_2; Discrete (2, B, A)                                                       |
| y           | (B,)      | the critics' target                                                                |

What is known to matter: the smaller of two critics (Fujimoto et al. 2018, arXiv:1802.09477), values beyond time limits, one gradient step for each step of
the environment, a temperature that is learned (or fits the scale of the rewards), and the step size: 1e-3 learns small tasks twice as fast, 3e-4 is safer.

Speed: the nets' passes are single calls (`stacks`), the critics' weights get no gradients in the policy's step, all weights of a stack lie in one tensor, and
where the speed plan finds that it pays, the products between hidden layers are bfloat16 ones, with all else in float32. Environments in other processes step
while the weights are updated.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onetorch.rl import envs as environments
from onetorch.rl import evaluation, stacks
from onetorch.rl.buffer import Batch, Replay
from onetorch.rl.graphs import Step
from onetorch.rl.nets import Adam, encoder, follow
from onetorch.rl.stacks import Stack
from onetorch.runs.plan import devices, thread_counts
from onetorch.runs.run import Run


@dataclass(frozen=True)
class Config:
    env: str = "Pendulum-v1"  # Gymnasium environment with Box or Discrete actions; observations may be vectors or pictures
    seed: int = 0  # of weights, actions, batches and environments
    total_steps: int = 20_000  # environment steps, all environments together
    num_envs: int = 1  # N, environments stepped together
    random_steps: int = 1000  # environment steps with actions drawn uniformly, at the start
    update_after: int = 1000  # transitions remembered before the first update
    update_every: int = 1  # environment steps, divided by N, between rounds of updates
    updates_per_step: float = 1.0  # gradient steps for each step of an environment
    replay: int = 1_000_000  # transitions remembered
    batch_size: int = 256  # B, transitions per gradient step
    lr: float = 1e-3  # Adam's step size, of the policy and the temperature
    q_lr: float | None = None  # Adam's step size of the critics; None: lr
    gamma: float = 0.99  # discount
    tau: float = 0.005  # how far the target critics go towards the critics in each update
    alpha: float | None = None  # temperature: the price of entropy; None: learned, beginning at 1
    target_entropy: float | None = None  # H; None: -A for A Box actions, 0.98 log A for A Discrete ones
    frame_stack: int = 1  # an observation is the last so many
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers, of pi and of each Q
    log_every: int = 500  # environment steps, divided by N, between rows of metrics

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be at least 0 and below 2^64, got {self.seed}")
        for name in ("total_steps", "num_envs", "update_after", "update_every", "replay", "batch_size", "frame_stack", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "q_lr", "alpha", "updates_per_step"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.target_entropy is not None and not math.isfinite(self.target_entropy):
            raise ValueError(f"target_entropy must be finite, got {self.target_entropy}")
        if self.random_steps < 0:
            raise ValueError(f"random_steps must be at least 0, got {self.random_steps}")
        if self.replay < self.num_envs:
            raise ValueError(f"replay must hold a transition of each of the {self.num_envs} environments, got {self.replay}")
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be widths above 0, got {self.hidden}")


class Agent(nn.Module):
    """The policy pi, and the twin critics q, of what the encoder makes of observations: vectors (B, D) are left as they are, pictures become features (B, D).

    pi: (B, D) -> mean and log_std (B, 2 A), or logits (B, A) for Discrete. q: (B, D + A) -> (2, B, 1), or (B, D) -> (2, B, A) for Discrete.
    """

    def __init__(self, spaces: environments.Spaces, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.discrete, self.act_dim = spaces.discrete, spaces.act_dim
        self.encoder, D = encoder(spaces)
        A = spaces.act_dim
        self.pi = Stack(None, (D, *hidden, A if self.discrete else 2 * A))
        self.q = Stack(2, (D, *hidden, A) if self.discrete else (D + A, *hidden, 1))

    def forward(self, obs: Tensor) -> Tensor:
        """The most likely actions at obs (B, …): (B, A) in [-1, 1], or logits (B, A) for Discrete."""
        out = self.pi(self.encoder(obs))
        return out if self.discrete else out.chunk(2, -1)[0].tanh()

    def act(self, obs: Tensor, rng: torch.Generator | None) -> Tensor:
        """Actions at obs (N, …), drawn from pi, or the most likely ones where rng is None."""
        out = self.pi(self.encoder(obs))
        if self.discrete:
            return (out if rng is None else out - torch.empty_like(out).exponential_(generator=rng).log()).argmax(-1)
        noise = None if rng is None else torch.randn(len(obs), self.act_dim, generator=rng, device=out.device)
        return out.chunk(2, -1)[0].tanh() if noise is None else Squashed.apply(out, noise)[0]


@dataclass
class State:
    """All that is needed to go on bit for bit."""

    model: Agent
    target: Stack  # the critics' slow copy
    target_encoder: nn.Module  # the encoder's
    pi_optimizer: Adam
    q_optimizer: Adam
    log_alpha: Tensor  # ()
    envs: environments.Envs
    replay: Replay
    rng: torch.Generator  # of actions, batches and noise
    iteration: int = 0


def spaces(config: Config) -> environments.Spaces:
    return environments.spaces(config.env, frame_stack=config.frame_stack, images=True)


def build(config: Config) -> Agent:
    return Agent(spaces(config), config.hidden)


def example(config: Config) -> Tensor:
    """Observations (8, …) for the module to answer, when it is shared."""
    return spaces(config).example(8)


def begin(config: Config, backend: str | None = None, dtype: str = "float32", run: Run | None = None, device: str = "cpu") -> State:
    torch.manual_seed(config.seed)
    model, space = build(config).to(device), spaces(config)
    if run:
        run.initialize(model)  # before it is copied
    target, target_encoder = copy.deepcopy(model.q).requires_grad_(False), copy.deepcopy(model.encoder).requires_grad_(False)
    model.pi.dtype = model.q.dtype = target.dtype = dtype
    log_alpha = torch.tensor(math.log(config.alpha or 1.0), device=device, requires_grad=config.alpha is None)
    return State(
        model, target, target_encoder,
        Adam(([model.pi.flat, *([log_alpha] if config.alpha is None else [])], config.lr)),
        Adam(([model.q.flat, *model.encoder.parameters()], config.q_lr or config.lr)),
        log_alpha, environments.make(config.env, config.num_envs, config.seed, backend, frame_stack=config.frame_stack, device=device),
        Replay(config.replay, space.obs_shape, () if space.discrete else (space.act_dim,), num_envs=config.num_envs, obs_dtype=space.obs_dtype,
               act_dtype=torch.int64 if space.discrete else torch.float32, device=device),
        torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip


class Squashed(torch.autograd.Function):
    """a = tanh(u), u = mean + std * noise, and log pi(a|s), for out (B, 2 A) = (mean, log_std) and noise (B, A) ~ N(0, 1): tensors (B, A) and (B,).

        log pi = sum_i [ -noise_i^2 / 2 - log_std_i - log(2 pi) / 2 - log(1 - tanh(u_i)^2) ]
        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    The second line (Spinning Up, 2018) is exact where the first has lost all its digits: at u = 10 already tanh(u) rounds to 1. log_std is kept in [-20, 2].
    The gradient is written out, because autograd's thirty small operations would take as long as a net's pass: da/du = 1 - a^2, d log pi / du = 2 a.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = out.chunk(2, -1)
        log_std = raw.clamp(-20, 2)
        spread = log_std.exp().mul_(noise)  # du / d log_std
        u = mean + spread
        act = u.tanh()
        each = F.softplus(-2 * u).add_(u).mul_(2).sub_(log_std).sub_(noise.square(), alpha=0.5)
        ctx.save_for_backward(act, spread, raw)
        return act, each.sum(-1).sub_((2 * math.log(2) + 0.5 * math.log(2 * math.pi)) * noise.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_act: Tensor, grad_logp: Tensor) -> tuple[Tensor, None]:
        act, spread, raw = ctx.saved_tensors
        grad_logp = grad_logp.unsqueeze(-1)
        grad_u = grad_act.addcmul(grad_act * act, act, value=-1).addcmul_(act, grad_logp, value=2)
        grad_log_std = (grad_u * spread).sub_(grad_logp).mul_((raw >= -20) & (raw <= 2))
        return torch.cat((grad_u, grad_log_std), -1), None


def soft_value(logits: Tensor, q: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """V = sum_a pi(a|s) (min_i Q_i(s, a) - alpha log pi(a|s)) for logits (B, A) and q (2, B, A), and sum_a pi log pi: tensors (B,)."""
    logp = F.log_softmax(logits, -1)
    pi = logp.exp()
    return (pi * (q.amin(0) - alpha * logp)).sum(-1), (pi * logp).sum(-1)


@torch.no_grad()
def bellman_target(config: Config, state: State, batch: Batch, alpha: Tensor) -> Tensor:
    """y (B,) = r + gamma (1 - d) (min_i Q_targ,i(s', a') - alpha log pi(a'|s'))."""
    out, seen = state.model.pi(state.model.encoder(batch.next_obs)), state.target_encoder(batch.next_obs)
    if state.model.discrete:
        value, _ = soft_value(out, state.target(seen), alpha)
    else:
        act, logp = Squashed.apply(out, torch.randn(len(out), state.model.act_dim, generator=state.rng, device=out.device))
        value = state.target(torch.cat((seen, act), 1)).squeeze(-1).amin(0) - alpha * logp
    return batch.reward + config.gamma * (1 - batch.terminated) * value


def critic_loss(model: Agent, batch: Batch, y: Tensor) -> Tensor:
    """sum_i E[ (Q_i(s, a) - y)^2 ], s as the encoder sees it."""
    if model.discrete:
        q = model.q(batch.obs).gather(-1, batch.act.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    else:
        q = model.q(torch.cat((batch.obs, batch.act), 1)).squeeze(-1)
    return len(q) * F.mse_loss(q, y.expand_as(q))


def policy_loss(state: State, batch: Batch, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """E[ alpha log pi(a|s) - min_i Q_i(s, a) ], and E[ log pi(a|s) ], s as the encoder sees it: the critics are asked, not taught."""
    out = state.model.pi(batch.obs)
    if state.model.discrete:
        value, logp = soft_value(out, state.model.q(batch.obs, frozen=True).detach(), alpha)
        return -value.mean(), logp.mean()
    act, logp = Squashed.apply(out, torch.randn(len(out), state.model.act_dim, generator=state.rng, device=out.device))
    q = state.model.q(torch.cat((batch.obs, act), 1), frozen=True).squeeze(-1)
    q = torch.minimum(*q.unbind())
    return (alpha * logp - q).mean(), logp.mean()


def temperature_loss(log_alpha: Tensor, logp: Tensor, entropy: float) -> Tensor:
    """-log alpha (E[ log pi(a|s) ] + H): the temperature rises while the policy's entropy is below H."""
    return -log_alpha * (logp.detach() + entropy)


def update(config: Config, state: State, batch: Batch, run: Run | None = None) -> dict[str, Tensor]:
    """One gradient step of the critics, the policy and the temperature, and the targets' step after them."""
    model, alpha = state.model, state.log_alpha.detach().exp()
    y = bellman_target(config, state, batch, alpha)
    batch = batch._replace(obs=model.encoder(batch.obs))  # the critics' gradients go on into it, the policy's do not
    q_loss = critic_loss(model, batch, y)
    state.q_optimizer.zero_grad()
    q_loss.backward()
    if run:
        run.finite(q_loss=q_loss)
    state.q_optimizer.step()

    pi_loss, logp = policy_loss(state, batch._replace(obs=batch.obs.detach()), alpha)
    loss = pi_loss
    if config.alpha is None:
        A = model.act_dim
        entropy = config.target_entropy if config.target_entropy is not None else 0.98 * math.log(A) if model.discrete else -float(A)
        loss = loss + temperature_loss(state.log_alpha, logp, entropy)
    state.pi_optimizer.zero_grad()
    loss.backward()
    if run:
        run.finite(policy_loss=loss)
    state.pi_optimizer.step()
    state.target.flat.lerp_(model.q.flat.detach(), config.tau)
    follow(state.target_encoder, model.encoder, config.tau)
    return {"q_loss": q_loss.detach(), "policy_loss": pi_loss.detach(), "entropy": -logp.detach(), "alpha": alpha}


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

    key = f"sac {config.env} {config.hidden} {config.batch_size} {config.num_envs}"
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
    """Begins one step of all environments; what is returned ends it and remembers it; `warm`: with actions drawn uniformly."""
    model, envs, obs = state.model, state.envs, state.envs.obs
    if not warm:
        act = model.act(obs, state.rng)
    elif model.discrete:
        act = torch.randint(model.act_dim, (len(obs),), generator=state.rng, device=obs.device)
    else:
        act = torch.rand(len(obs), model.act_dim, generator=state.rng, device=obs.device) * 2 - 1
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
    """Mean return over episodes of their own, with a 95 % interval: of the likeliest actions, and of drawn ones as `stochastic_return`; `agent.mp4` under
    `media` is of the likeliest."""
    rng = torch.Generator().manual_seed(seed)

    def likeliest(obs: Tensor) -> Tensor:
        return model.act(obs, None)

    def drawn(obs: Tensor) -> Tensor:
        return model.act(obs, rng)

    return evaluation.evaluate(likeliest, config.env, stochastic=drawn, media=media, episodes=episodes, seed=seed, frame_stack=config.frame_stack)
