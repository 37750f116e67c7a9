"""Networks that see an image with noise, how much of it there is, and a label: a transformer of patches, and a U-Net.

The transformer is that of Peebles & Xie 2023 (DiT, arXiv:2212.09748), with normalized queries and keys and squared ReLU; the U-Net that of Ho et al. 2020
(arXiv:2006.11239). Both answer (B, C, H, W) to x (B, C, H, W), times t (B,) between 0 and 1 and labels (B,) int64, of which `classes` stands for none, and
begin by answering zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix kept in float32 and applied in the dtype of its input: autocast takes every norm back to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, sdpa: bool) -> Tensor:
    """Attention of (B, heads, T, D). torch's own is slow on a CPU in the backward pass where sequences are short: there the speed plan says not `sdpa`."""
    if sdpa:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ (k * k.size(-1) ** -0.5).transpose(-2, -1), -1) @ v


class Condition(nn.Module):
    """A vector (B, width) of the time t and the label."""

    frequencies: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 32)), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(labels))


class Block(nn.Module):
    """A transformer block whose norms are shifted and scaled, and its two branches gated, by the condition; the gates begin at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Linear(width, 6 * width)
        self.qkv, self.out = Linear(width, 3 * width, bias=False), Linear(width, width, bias=False)
        self.up, self.down = Linear(width, 4 * width, bias=False), Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, sdpa: bool) -> Tensor:
        B, T, C = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, 2)  # each (B, 1, C)
        qkv = self.qkv(torch.addcmul(shift1, F.layer_norm(x, (C,)), 1 + scale1)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D)
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        y = attend(q, k, v, sdpa).transpose(1, 2).reshape(B, T, C)
        x = torch.addcmul(x, gate1, self.out(y))
        h = F.relu(self.up(torch.addcmul(shift2, F.layer_norm(x, (C,)), 1 + scale2))).square()
        return torch.addcmul(x, gate2, self.down(h))


class Transformer(nn.Module):
    """Patches to tokens, blocks, and back."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        (C, H, W), p = shape, patch
        self.patch, self.grid = p, (H // p, W // p)
        self.condition = Condition(width, classes)
        self.enter = Linear(C * p * p, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, H * W // p**2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = Linear(width, 2 * width)
        self.leave = Linear(width, C * p * p)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, dtype: torch.dtype, sdpa: bool) -> Tensor:
        (B, C, _, _), p, (h, w) = x.shape, self.patch, self.grid
        condition = self.condition(t, labels).to(dtype)
        tokens = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p).to(dtype)
        y = self.enter(tokens) + self.place.to(dtype)  # (B, h w, width)
        for block in self.blocks:
            y = block(y, condition, sdpa)
        shift, scale = self.modulation(condition)[:, None].chunk(2, 2)
        y = self.leave(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:]), 1 + scale))
        return y.view(B, h, w, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class Residual(nn.Module):
    """Two convolutions beside the identity; the condition scales and shifts between them."""

    def __init__(self, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, sdpa: bool) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4).unbind(1)
        y = attend(q, k, v, sdpa).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(y)


class UNet(nn.Module):
    """Stages of residual blocks at ever coarser pixels and back, each stage seeing on the way back what it was on the way there."""

    def __init__(self, channels: int, classes: int, width: int, stages: tuple[int, ...], depth: int, heads: int) -> None:
        super().__init__()
        widths = [width * m for m in stages]
        self.condition = Condition(4 * width, classes)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.descent, self.ascent, self.halve, self.enlarge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inner, kept = width, [width]
        for i, outer in enumerate(widths):
            self.descent.append(nn.ModuleList(Residual(inner if j == 0 else outer, outer, 4 * width) for j in range(depth)))
            kept += [outer] * depth
            self.halve.append(nn.Conv2d(outer, outer, 3, stride=2, padding=1) if i + 1 < len(widths) else nn.Identity())
            inner = outer
        self.middle = nn.ModuleList([Residual(inner, inner, 4 * width), Attention(inner, heads), Residual(inner, inner, 4 * width)])
        for i, outer in reversed(list(enumerate(widths))):
            self.ascent.append(nn.ModuleList(Residual((inner if j == 0 else outer) + kept.pop(), outer, 4 * width) for j in range(depth)))
            self.enlarge.append(nn.Conv2d(outer, outer, 3, padding=1) if i else nn.Identity())
            inner = outer
        self.norm, self.leave = nn.GroupNorm(8, inner), nn.Conv2d(inner, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, dtype: torch.dtype, sdpa: bool) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return self._forward(x, t, labels, sdpa)

    def _forward(self, x: Tensor, t: Tensor, labels: Tensor, sdpa: bool) -> Tensor:
        condition = self.condition(t, labels)
        y, kept = self.enter(x), []
        for stage, halve in zip(self.descent, self.halve, strict=True):
            for block in stage.children():
                y = block(y, condition)
                kept.append(y)
            y = halve(y)
        first, attention, last = self.middle
        y = last(attention(first(y, condition), sdpa), condition)
        for i, (stage, enlarge) in enumerate(zip(self.ascent, self.enlarge, strict=True)):
            for block in stage.children():
                y = block(torch.cat([y, kept.pop()], 1), condition)
            y = enlarge(F.interpolate(y, scale_factor=2.0) if i + 1 < len(self.ascent) else y)
        return self.leave(F.silu(self.norm(y)))
