"""Returns and advantages over a rollout of T steps in N environments; time is the first axis everywhere.

Two different things end an episode, and they are never mixed up here:

- **terminated**: the task itself ended. Nothing follows, so the value of what follows is 0.
- **truncated**: a time limit cut the episode off. The task would have gone on, so the value of the observation reached stands in for the rest.
"""

import torch
from torch import Tensor


def gae(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation: the exponentially weighted mean of all n-step advantages.

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}            done_t = terminated_t or truncated_t

    reward (T, N) float; value (T, N) is V(s_t); next_value (T, N) is V(s'_t) of the observation that step t reached *before* any reset: `value[t + 1]`
    inside an episode, and the value of the final observation where a time limit cut it; terminated, truncated (T, N) bool.
    Returns the advantages (T, N). `advantage + value` is the lambda-return, the critic's target.

    >>> one, no = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    >>> gae(one, 0 * one, 0 * one, no, no, gamma=0.5, lam=1.0).flatten()
    tensor([1.5000, 1.0000])

    Schulman et al. 2015, "High-dimensional continuous control using generalized advantage estimation", arXiv:1506.02438.
    """
    _same_shape(reward=reward, value=value, next_value=next_value, terminated=terminated, truncated=truncated)
    adv = reward + gamma * next_value * ~terminated - value  # (T, N), delta so far
    rows, carry = adv.unbind(), (gamma * lam * (~(terminated | truncated)).to(adv.dtype)).unbind()  # views, each (N,)
    for t in reversed(range(len(rows) - 1)):
        rows[t].addcmul_(carry[t], rows[t + 1])
    return adv


def discounted_return(reward: Tensor, done: Tensor, gamma: float, last: Tensor) -> Tensor:
    """What has been collected in the running episode so far, older rewards discounted more: G_t = gamma (1 - done_{t-1}) G_{t-1} + r_t.

    reward (T, N); done (T, N) bool; last (N,) is G at the step before the first, already 0 where that step ended an episode. Returns (T, N).
    It runs forward in time: its spread is the scale by which rewards are divided when they are normalised, as in VecNormalize.

    >>> discounted_return(torch.ones(3, 1), torch.tensor([[False], [True], [False]]), gamma=0.5, last=torch.tensor([4.0])).flatten()
    tensor([3.0000, 2.5000, 1.0000])
    """
    _same_shape(reward=reward, done=done)
    keep = (gamma * (~done).to(reward.dtype)).unbind()
    out = [reward[0] + gamma * last]
    for r, k in zip(reward.unbind()[1:], keep[:-1], strict=True):
        out.append(torch.addcmul(r, k, out[-1]))
    return torch.stack(out)


def explained_variance(prediction: Tensor, target: Tensor) -> float | None:
    """1 - Var[target - prediction] / Var[target]: 1 is a perfect critic, 0 one that knows only the mean. None where the targets do not vary."""
    _same_shape(prediction=prediction, target=target)
    variance = target.var().item()
    return None if variance == 0 else 1 - (target - prediction).var().item() / variance


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("expected one shape (T, N) for all, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
