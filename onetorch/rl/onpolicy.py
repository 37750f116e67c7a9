"""What the on-policy algorithms (vpg, trpo, ppo) share: a batch collected under the current policy, and a critic fitted to it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from onetorch.rl import evaluation
from onetorch.rl.envs import Envs
from onetorch.rl.nets import ActorCritic, Adam, RunningNorm
from onetorch.rl.returns import discounted_return, gae
from onetorch.runs.run import Run


class RewardNorm(nn.Module):
    """Rewards divided by the running standard deviation of the discounted return of N environments, and clipped to [-10, 10]; saved with its buffers.

    The scale is that of what a critic has to predict, so that one step size serves all environments. Rewards are not shifted: that would change the task.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = RunningNorm(1)
        self.discounted: Tensor
        self.register_buffer("discounted", torch.zeros(num_envs))  # of the running episodes

    @torch.no_grad()
    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """T more steps: reward (T, N), done (T, N) bool. Returns the scaled rewards (T, N)."""
        discounted = discounted_return(reward, done, self.gamma, self.discounted)
        self.discounted.copy_(discounted[-1] * ~done[-1])
        self.moments.update(discounted.reshape(-1, 1))
        return (reward / self.moments.scale).clamp(-10, 10)


@torch.no_grad()
def collect(
    model: ActorCritic, envs: Envs, T: int, gamma: float, lam: float, reward_norm: RewardNorm | None = None, run: Run | None = None
) -> dict[str, Tensor]:
    """T steps of all N environments under the current policy, with advantages by GAE. Tensors whose first axis is T * N:

    | name       | shape       | meaning                                                                      |
    |------------|-------------|------------------------------------------------------------------------------|
    | raw, obs   | (T * N, D)  | observations as the environment gave them; as pi and v see them, normalised  |
    | act        | (T * N[, A])| actions                                                                      |
    | logp       | (T * N,)    | log pi(a|s) of the policy that acted                                         |
    | value      | (T * N,)    | V(s)                                                                         |
    | adv        | (T * N,)    | advantages, shifted and scaled to mean 0 and standard deviation 1            |
    | ret        | (T * N,)    | lambda-returns: advantages before that, plus V(s); the critic's target       |

    The noise of all actions is drawn at once, and values and probabilities are computed for the whole batch after it is collected: with small nets the
    number of calls is the cost.
    """
    noise, steps = model.noise(T, envs.num_envs), []
    for t in range(T):
        obs = envs.obs
        act = model.act(obs, noise[t])
        if run:
            run.phase("action")
        steps.append((obs, act, *envs.step(act)))
        if run:
            run.phase("environment")
    raw, act, raw_next, reward, terminated, truncated = (torch.stack(column) for column in zip(*steps, strict=True))  # (T, N, …)
    if reward_norm is not None:
        reward = reward_norm(reward, terminated | truncated)

    obs = model.normalize(raw)
    logp, _ = model.logp(obs.flatten(0, 1), act.flatten(0, 1))
    value = model.value(obs.flatten(0, 1)).view_as(reward)
    next_value = torch.cat((value[1:], model.value(model.normalize(raw_next[-1:]))))
    next_value[truncated] = model.value(model.normalize(raw_next[truncated]))  # the time limit is not the task's: what would have followed has a value
    adv = gae(reward, value, next_value, terminated, truncated, gamma, lam)
    ret = adv + value
    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    batch = {"raw": raw, "obs": obs, "act": act, "value": value, "adv": adv, "ret": ret}
    return {name: x.flatten(0, 1) for name, x in batch.items()} | {"logp": logp}


def fit_value(
    model: ActorCritic, optimizer: Adam, obs: Tensor, ret: Tensor, epochs: int, minibatches: int, run: Run | None = None
) -> float:
    """`epochs` passes of `minibatches` gradient steps each on E[ (V(s) - R)^2 ] / 2 at obs (B, D) and ret (B,). Returns the mean loss of the last pass.

    `optimizer` is the critic's: it moves nothing else.
    """
    losses: list[Tensor] = []
    for _ in range(epochs):
        order, losses = torch.randperm(len(obs), device=obs.device), []
        for part, target in zip(*(x.index_select(0, order).chunk(minibatches) for x in (obs, ret)), strict=True):
            loss = 0.5 * (model.value(part) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if run:
                run.finite(value_loss=loss)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def env_counts(num_envs: int, batch_size: int) -> tuple[int, ...]:
    """Candidates of the speed plan for the number of environments: `num_envs` where that is set, else powers of two that leave 64 steps or more to each."""
    if num_envs:
        return (num_envs,)
    return tuple(n for n in (64, 32, 16, 8, 4, 2, 1) if batch_size % n == 0 and batch_size // n >= 64) or (1,)


def scores(model: ActorCritic, env: str, frame_stack: int, media: Path | None, episodes: int, seed: int) -> dict[str, float | int | str]:
    """`evaluation.evaluate` of the likeliest actions and of drawn ones, which leaves torch's generator as it was."""

    def likeliest(obs: Tensor) -> Tensor:
        return model.act(obs, None)

    def drawn(obs: Tensor) -> Tensor:
        return model.act(obs, model.noise(len(obs)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return evaluation.evaluate(likeliest, env, stochastic=drawn, media=media, episodes=episodes, seed=seed, frame_stack=frame_stack)
