"""Networks and distributions: plain functions on tensors, because on nets this small a distribution object costs more than the mathematics.

A policy over Box actions is a Gaussian with independent components; over Discrete actions a categorical. Actions are drawn from noise that is made for
a whole rollout at once (`ActorCritic.noise`), which leaves two cheap operations per step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetorch.rl import stacks
from onetorch.rl.envs import Spaces
from onetorch.rl.stacks import Stack

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh, out_gain: float = 1.0) -> nn.Sequential:
    """Fully connected net (…, sizes[0]) -> (…, sizes[-1]) with `activation` between layers.

    Weights begin orthogonal, with gain sqrt(2), and `out_gain` in the last layer; biases at 0.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, out_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, activation()]
    return nn.Sequential(*layers)


def categorical_logp(logits: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) and entropy of the categorical with unnormalised log-probabilities `logits` (B, A) at actions `act` (B,) int64: two tensors (B,)."""
    logp = F.log_softmax(logits, dim=-1)
    return logp.gather(-1, act.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def gaussian_logp(mean: Tensor, log_std: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) and entropy of the Gaussian N(mean, diag exp(log_std)^2), mean and act (B, A), log_std (A,): a tensor (B,) and one ().

    log pi = -sum_i [ (a_i - mean_i)^2 / (2 std_i^2) + log_std_i + log(2 pi) / 2 ]        H = sum_i [ log_std_i + (1 + log(2 pi)) / 2 ]
    """
    log_norm = log_std.sum() + 0.5 * math.log(2 * math.pi) * log_std.numel()
    return -0.5 * ((act - mean) * torch.exp(-log_std)).square().sum(-1) - log_norm, log_norm + 0.5 * log_std.numel()


def categorical_vjp(logits: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor, float], Tensor]]:
    """`categorical_logp` without a graph, and the way back: from a loss's slopes by log pi (B,) and by the mean entropy to that by the logits (B, A).

    d log pi / d logits = onehot(a) - p        d H / d logits = -p (log p + H)
    """
    every = F.log_softmax(logits, dim=-1)
    p, index = every.exp(), act.unsqueeze(-1)
    entropy = -(p * every).sum(-1)

    def backward(by_logp: Tensor, by_entropy: float) -> Tensor:
        by_logp = by_logp.unsqueeze(-1)
        slope = (-by_logp * p).scatter_add_(-1, index, by_logp)
        return slope.addcmul_(p, every + entropy.unsqueeze(-1), value=-by_entropy / len(entropy)) if by_entropy else slope

    return every.gather(-1, index).squeeze(-1), entropy, backward


def gaussian_vjp(mean: Tensor, log_std: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor, float], tuple[Tensor, Tensor]]]:
    """`gaussian_logp` without a graph, and the way back: from a loss's slopes by log pi (B,) and by the entropy to those by mean (B, A) and log_std (A,).

    With z = (a - mean) / std:        d log pi / d mean = z / std        d log pi / d log std = z^2 - 1        d H / d log std = 1
    """
    scale, log_norm = torch.exp(-log_std), log_std.sum() + 0.5 * math.log(2 * math.pi) * log_std.numel()
    z = (act - mean).mul_(scale)
    squared = z.square()

    def backward(by_logp: Tensor, by_entropy: float) -> tuple[Tensor, Tensor]:
        by_mean = (z * scale).mul_(by_logp.unsqueeze(-1))
        return by_mean, (by_logp @ (squared - 1)).add_(by_entropy)

    return squared.sum(-1).mul_(-0.5).sub_(log_norm), log_norm + 0.5 * log_std.numel(), backward


def categorical_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of the categoricals with unnormalised log-probabilities `logits` (p) and `other` (q), (…, A): a tensor (…,)."""
    logp, logq = F.log_softmax(logits, dim=-1), F.log_softmax(other, dim=-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL(p || q) of Gaussians with independent components, p by `mean` (…, A) and `log_std` (A,), q by the other two: a tensor (…,).

    sum_i [ log(s'_i / s_i) + (s_i^2 + (m_i - m'_i)^2) / (2 s'_i^2) - 1/2 ]
    """
    ratio = (log_std - other_log_std).exp()  # s / s'
    shift = (mean - other_mean) * torch.exp(-other_log_std)
    return (0.5 * (ratio.square() + shift.square() - 1) + other_log_std - log_std).sum(-1)


class Adam:
    """Adam, Kingma and Ba 2014, arXiv:1412.6980, on one vector of weights (P,): a step and the norm of the gradient are a few calls, not a few per weight.

    Each of `groups` is parameters and their step size. The parameters become views of `weights`. Gradients are None until a backward pass makes them, since
    to add them to zeros would read and write them once more. The arithmetic is that of torch.optim.Adam, whose first use imports torch's compiler, over a
    second of processor time: half of what CartPole takes. In float32 on a CPU a step is one C++ function where there is a compiler (`stacks`).

    >>> net = nn.Linear(2, 1)
    >>> optimizer = Adam((net.parameters(), 0.1))
    >>> net(torch.tensor([3.0, 4.0])).backward()
    >>> optimizer.grad
    tensor([3., 4., 1.])
    """

    def __init__(self, *groups: tuple[Iterable[Tensor], float], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        each = [(p, lr) for params, lr in groups for p in params]
        self.params = [p for p, _ in each]
        self.weights = torch.cat([p.detach().reshape(-1) for p in self.params])
        rates = {lr for _, lr in each}  # where all are the same a step has a vector less to read
        self.lr = rates.pop() if len(rates) == 1 else torch.cat([torch.full_like(p.detach().reshape(-1), lr) for p, lr in each])
        self.betas, self.eps = betas, eps
        # On a GPU they are counted there, where a graph (`graphs`) can go on counting.
        self.steps: int | Tensor = 0 if self.weights.device.type == "cpu" else torch.zeros((), dtype=torch.float64, device=self.weights.device)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.clipped: Tensor | None = None  # the gradient that `clip` leaves for the step
        for p, weights in zip(self.params, self.weights.split([p.numel() for p in self.params]), strict=True):
            p.data, p.grad = weights.view_as(p), None

    @property
    def grad(self) -> Tensor:
        """(P,): the gradient of a single parameter as it stands, else those of all side by side, zeros where there is none."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

    def zero_grad(self) -> None:
        self.clipped = None
        for p in self.params:
            p.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale the gradient of the step that follows down to `max_norm` where its norm is above that. Returns the norm before."""
        self.clipped = self.grad
        norm = self.clipped.norm().item()
        if norm > max_norm:
            self.clipped.mul_(max_norm / norm)
        return norm

    def step(self, left: float = 1.0) -> None:
        """w <- w - left lr m / (sqrt(s) + eps), m and s the moving averages of g and g^2, each divided by how much of a whole average it is yet."""
        grad, self.clipped = self.grad if self.clipped is None else self.clipped, None
        self.steps += 1
        one, two = (1 - beta**self.steps for beta in self.betas)
        if self.weights.device.type == "cpu" and self.weights.dtype == torch.float32 and (lib := stacks.library()) is not None:
            pointers = [x.data_ptr() for x in (self.weights, grad, self.mean, self.square)]
            each, all_alike = (self.lr.data_ptr(), 0.0) if isinstance(self.lr, Tensor) else (None, self.lr)
            lib.onetorch_adam(len(self.weights), *pointers, each, all_alike, 1 - self.betas[0], self.betas[1], self.eps, left / one, two)
            return
        self.mean.lerp_(grad, 1 - self.betas[0])
        self.square.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
        self.weights.addcdiv_(self.mean * (self.lr * (-left / one)), (self.square / two).sqrt_().add_(self.eps))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "square": self.square, "steps": int(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = self.steps.fill_(state["steps"]) if isinstance(self.steps, Tensor) else int(state["steps"])


class RunningNorm(nn.Module):
    """(x - mean) / std by the mean and variance of all rows seen by `update`, clipped to [-clip, clip]; its buffers are saved with the model.

    Until the first update it is the identity (up to the clip). Merging batch moments: Chan, Golub, LeVeque 1979.
    """

    def __init__(self, dim: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.mean: Tensor
        self.var: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.shift: Tensor  # the mean and the standard deviation in float32, made when they change, because `forward` is called for every step
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(dim), persistent=False)
        self.register_buffer("scale", torch.ones(dim), persistent=False)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """x (B, dim): B more rows."""
        x = x.double()
        mean, var, n = x.mean(0), x.var(0, correction=0), x.shape[0]
        total = self.count + n
        shift = mean - self.mean
        self.var.copy_((self.var * self.count + var * n + shift.square() * self.count * n / total) / total)
        self.mean.add_(shift * n / total)
        self.count.copy_(total)
        self._round()

    def _round(self) -> None:
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).sqrt())

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._round()

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift).div_(self.scale).clamp_(-self.clip, self.clip)


class Pixels(nn.Module):
    """Features of a picture, with the numbers that stand before it: (…, C, H, W) uint8, or (…, vector + C * H * W) with pixels of 0 to 255 -> (…, width).

    Convolutions 3 x 3 of stride 2 with 16, 32, 64, 64, … channels until the shorter side is below 8, so that it fits pictures of any size.
    """

    def __init__(self, vector: int, image: tuple[int, int, int], activation: type[nn.Module]) -> None:
        super().__init__()
        self.vector, self.image = vector, image
        (channels, *sides), layers = image, list[nn.Module]()
        while min(sides) >= 8 or not layers:
            out = min(64, 16 << (len(layers) // 2))
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), activation()]
            channels, sides = out, [(side + 1) // 2 for side in sides]
        self.convolutions = nn.Sequential(*layers)
        self.width = vector + channels * sides[0] * sides[1]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(-3) if x.shape[-3:] == self.image else x
        numbers, pixels = x[..., : self.vector], x[..., self.vector :]
        features = self.convolutions(pixels.reshape(x.shape[:-1].numel(), *self.image) / 255).reshape(*x.shape[:-1], self.width - self.vector)
        return torch.cat((numbers, features), -1) if self.vector else features


class Encoder(nn.Module):
    """What a policy and its critics both read of observations with pictures: (B, C, H, W) uint8, or (B, n + C * H * W) with the pixels last, -> (B, n + 50).

    The critics teach it and the policy only looks, since a policy's gradients spoil the features (Yarats et al. 2019, arXiv:1910.01741, whose last layer this
    is too: 50 features, LayerNorm, tanh). Of vectors there is nothing to learn: `encoder` is the identity.
    """

    def __init__(self, numbers: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.numbers, self.pixels = numbers, Pixels(numbers, image, nn.ReLU)
        self.features = nn.Sequential(nn.Linear(self.pixels.width - numbers, 50), nn.LayerNorm(50), nn.Tanh())

    def forward(self, obs: Tensor) -> Tensor:
        numbers, pixels = self.pixels(obs).tensor_split([self.numbers], -1)
        return torch.cat((numbers, self.features(pixels)), -1)


def encoder(spaces: Spaces) -> tuple[nn.Module, int]:
    """What is read of observations of `spaces`, and how many numbers that are."""
    if spaces.image is None:
        return nn.Identity(), spaces.obs_dim
    numbers = max(spaces.obs_dim - math.prod(spaces.image), 0)
    return Encoder(numbers, spaces.image), numbers + 50


@torch.no_grad()
def follow(slow: nn.Module, net: nn.Module, tau: float) -> None:
    """The weights of `slow` go towards those of `net` by the fraction tau."""
    for p, q in zip(slow.parameters(), net.parameters(), strict=True):
        p.lerp_(q, tau)


class ActorCritic(nn.Module):
    """A policy pi and a value function v on the same observations, each a net of its own: an MLP, after convolutions where there are pictures.

    An MLP is a `stacks.Stack`, whose passes are one call each; with `twice` those of pi are torch's own layers, which can be differentiated twice.

    Observations are as `envs.Spaces` says. So are actions: (…,) int64 for Discrete, (…, K) int64 for K choices at once, which are independent given the
    observation, and (…, A) float32 for Box, whose bounds are always [-1, 1] (`envs` maps them onto the environment's own). The standard deviation of Box
    actions does not depend on the observation. The last layer of pi starts near zero, so that the first policy is nearly uniform (Discrete) or centred (Box):
    the choice that Andrychowicz et al. 2020, arXiv:2006.05990, found to matter most. Pixels are divided by 255 and never normalised otherwise.
    """

    def __init__(
        self, spaces: Spaces, hidden: Sequence[int], activation: str, normalize_obs: bool = False, log_std: float = 0.0, twice: bool = False
    ) -> None:
        super().__init__()
        self.discrete, self.act_dim, self.multi = spaces.discrete, spaces.act_dim, spaces.multi
        self.vector = spaces.obs_dim - math.prod(spaces.image) if spaces.image and spaces.obs_dim else spaces.obs_dim  # numbers that are no pixels

        def net(out: int, gain: float, plain: bool = False) -> nn.Module:
            if spaces.image is not None:
                pixels = Pixels(self.vector, spaces.image, ACTIVATIONS[activation])
                return nn.Sequential(pixels, *mlp((pixels.width, *hidden, out), ACTIVATIONS[activation], gain))
            sizes = (self.vector, *hidden, out)
            layers = mlp(sizes, ACTIVATIONS[activation], gain)
            if plain:
                return layers
            stack = Stack(None, sizes, activation)
            stack.load_state_dict(layers.state_dict())
            return stack

        self.pi, self.v = net(spaces.act_dim, 0.01, twice), net(1, 1.0)
        self.log_std = None if spaces.discrete else nn.Parameter(torch.full((spaces.act_dim,), log_std))
        self.norm = RunningNorm(self.vector) if normalize_obs and self.vector else None

    def policy_parameters(self) -> list[nn.Parameter]:
        """All but the critic's."""
        return [*self.pi.parameters(), *([] if self.log_std is None else [self.log_std])]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """At observations as the environment gives them, (…, D) or (…, C, H, W): logits or means of the actions (…, A), and v (…,)."""
        normal = self.normalize(obs)
        return self.pi(normal), self.value(normal)

    def noise(self, *shape: int) -> Tensor:
        """Noise for `act`, (*shape, A): standard Gumbel for choices, normal with the policy's standard deviation for Box."""
        if self.log_std is None:
            return -torch.empty(*shape, self.act_dim, device=next(self.pi.parameters()).device).exponential_().log()
        return torch.randn(*shape, self.act_dim, device=self.log_std.device) * self.log_std.detach().exp()

    def act(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions at obs: drawn from pi by `noise` (…, A), by Gumbel-max for choices; the most likely ones where noise is None."""
        out = self.pi(self.normalize(obs))
        if noise is not None:
            out = out + noise
        if self.multi:
            return torch.stack([part.argmax(-1) for part in out.split(self.multi, -1)], -1)
        return out.argmax(-1) if self.discrete else out

    def logp(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(act|obs) and the entropy of pi(.|obs), for *normalised* observations."""
        out = self.pi(obs)
        if self.multi:
            parts = [categorical_logp(*part) for part in zip(out.split(self.multi, -1), act.unbind(-1), strict=True)]
            return torch.stack([logp for logp, _ in parts]).sum(0), torch.stack([entropy for _, entropy in parts]).sum(0)
        return categorical_logp(out, act) if self.log_std is None else gaussian_logp(out, self.log_std, act)

    def vjp(self, obs: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor, Tensor, float], None]]:
        """log pi(act|obs) (B,), the entropy of pi(.|obs) and v (B,) without a graph, for *normalised* observations (B, D); and the way back: given a loss's
        slopes by log pi (B,), by v (B,) and by the mean entropy, it adds the loss's gradients to those of the weights.

        On nets this small autograd takes longer than all else that a gradient step does. So the formulas' derivatives are written out, and the nets go back
        by `stacks.vjp`.
        """
        out, back_pi = stacks.vjp(self.pi, obs)
        v, back_v = stacks.vjp(self.v, obs)
        if self.log_std is not None:
            logp, entropy, gaussian = gaussian_vjp(out, self.log_std.detach(), act)
        else:
            parts = [categorical_vjp(*part) for part in zip(out.split(self.multi or out.shape[-1], -1), act.unbind(-1) if self.multi else (act,), strict=True)]
            logp, entropy = (sum(each[1:], each[0]) for each in ([part[0] for part in parts], [part[1] for part in parts]))

        def backward(by_logp: Tensor, by_v: Tensor, by_entropy: float) -> None:
            if self.log_std is not None:
                slope, by_log_std = gaussian(by_logp, by_entropy)
                self.log_std.grad = by_log_std if self.log_std.grad is None else self.log_std.grad.add_(by_log_std)
            else:
                slope = torch.cat([choice(by_logp, by_entropy) for _, _, choice in parts], -1)
            back_pi(slope)
            back_v(by_v.unsqueeze(-1))

        return logp, entropy, v.squeeze(-1), backward

    def dist(self, obs: Tensor) -> tuple[Tensor, ...]:
        """What pi(.|obs) is made of, for *normalised* observations: (logits,) of choices, (mean, log_std) for Box; `kl` compares two of them."""
        return (self.pi(obs),) if self.log_std is None else (self.pi(obs), self.log_std)

    def kl(self, p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
        """KL(p || q) of two policies' `dist` at the same observations (B, D): (B,)."""
        if self.multi:
            return torch.stack([categorical_kl(*parts) for parts in zip(*(logits.split(self.multi, -1) for logits in (*p, *q)), strict=True)]).sum(0)
        return categorical_kl(*p, *q) if self.log_std is None else gaussian_kl(*p, *q)

    def value(self, obs: Tensor) -> Tensor:
        """v (…,), for *normalised* observations."""
        return self.v(obs).squeeze(-1)

    def normalize(self, obs: Tensor) -> Tensor:
        if self.norm is None:
            return obs
        if obs.shape[-1] == self.vector:
            return self.norm(obs)
        return torch.cat((self.norm(obs[..., : self.vector]), obs[..., self.vector :]), -1)

    def observe(self, obs: Tensor) -> None:
        """More observations (B, …) as the environment gives them, for the moments by which they are normalised, where they are."""
        if self.norm is not None:
            self.norm.update(obs[..., : self.vector])
