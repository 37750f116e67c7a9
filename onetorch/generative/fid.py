"""Frechet distance between two sets of images in the features of a network, FID (Heusel et al. 2017, arXiv:1706.08500), with its error.

    network = features(train)                             a small classifier, trained here on the data at hand; kept per data
    reference = network.embed(held_out.pixels)            (M, 64)
    found = distance(network.embed(samples), reference)   found.fid ± found.error, found.infinity

FID is the squared 2-Wasserstein distance of the Gaussians with the means and covariances of two sets of features:

    d = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

It is biased: two samples of one distribution are apart, by about c / N + c' / M for sets of N and M images. So two figures are comparable only at the same N
and M, and `infinity` is beside: what is left when that bias is taken away (Chong & Forsyth 2020, arXiv:1911.07023, fit a line in 1 / N; here the jackknife
does it, Quenouille 1956, which gives the standard error too). It scatters about 0, below it also, where the two are of one distribution.

The usual features are those of a network trained on ImageNet, which says little of digits and has to be downloaded. These are the inputs of the last layer
of a convolutional net that classifies the training images by their labels, or, where there are none, tells by how many right angles an image was turned
(Gidaris et al. 2018); a linear map of them has to give the image too, or else ten classes would leave nothing but ten points. They are whitened: over the
training images each has variance 1, whatever the data, and none counts more than another. Figures of other networks are not comparable with these.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onetorch.generative.images import Images, scale
from onetorch.runs import cache, sealed
from onetorch.runs.errors import CheckpointError

Floats = NDArray[np.float64]

WIDTH = 64  # features
STEPS = 600
GROUPS = 20  # of images left out in turn for the error
CACHE = "features"


class Features(nn.Module):
    """Images to features: convolutions that halve the picture until it has at most 4 x 4 pixels, and a linear layer."""

    metric: Tensor  # (64, 64) what the features are multiplied with in the end

    def __init__(self, shape: tuple[int, int, int], levels: int, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.levels, inner = levels, 32
        layers: list[nn.Module] = [nn.Conv2d(channels, inner, 3, padding=1, stride=1 if max(height, width) < 16 else 2), nn.ReLU()]
        if max(height, width) >= 16:
            height, width = -(-height // 2), -(-width // 2)
        while max(height, width) > 4:
            outer = min(2 * inner, 128)
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(1, outer), nn.ReLU()]
            inner, height, width = outer, -(-height // 2), -(-width // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner * height * width, WIDTH))
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
        self.image = nn.Linear(WIDTH, math.prod(shape))
        self.register_buffer("metric", torch.eye(WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, 64) of uint8 images (B, C, H, W)."""
        return self.body(scale(pixels, self.levels)) @ self.metric

    @torch.no_grad()
    def embed(self, pixels: NDArray[np.uint8] | Tensor) -> Floats:
        """Features (N, 64) of any number of images, in float64."""
        parts = torch.as_tensor(np.asarray(pixels)).split(500)
        return torch.cat([self(p) for p in parts]).double().numpy()


def features(train: Images) -> Features:
    """The network for these training images: trained on one thread (a few seconds), so that everyone with this machine's kind of processor has the same.

    It is kept in the user's cache folder under the data's digest.
    """
    turned = train.labels is None
    classes = 4 if turned else len(train.names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Features(train.shape, train.levels, classes)
            key = f"{train.digest()}, {sum(p.numel() for p in model.parameters())} parameters, {STEPS} steps, torch {torch.__version__}"
            file = cache.path(CACHE).parent / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
            if _load(model, file, cache.get(CACHE, key)):
                return model
            _fit(model, train, turned)
    finally:
        torch.set_num_threads(threads)
    pieces = sealed.dump(dict(model.state_dict()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sealed.write(file, pieces)
    except OSError:
        return model  # where it cannot be kept, it is trained again next time
    cache.put(CACHE, key, sealed.sha256(pieces))
    return model


def _load(model: Features, file: Path, sha256: object) -> bool:
    """Whether the model now holds what was kept in `file`: not where that is gone or not what was written."""
    try:
        content, found = sealed.read(file)
    except (OSError, CheckpointError):
        return False
    if found == sha256:
        model.load_state_dict(sealed.parse(content, file))
    return found == sha256


def _fit(model: Features, train: Images, turned: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(STEPS):
        index = torch.randint(len(train), (64,)).numpy()
        pixels = torch.from_numpy(np.ascontiguousarray(train.pixels[index]))
        if turned:
            target = torch.randint(4 if train.shape[1] == train.shape[2] else 2, (64,))
            angles = target if train.shape[1] == train.shape[2] else 2 * target
            pixels = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(pixels, angles, strict=True)])
        else:
            assert train.labels is not None
            target = torch.from_numpy(train.labels[index])
        x, z = scale(pixels, train.levels), model(pixels)
        loss = F.cross_entropy(model.head(z), target) + (model.image(z) - x.flatten(1)).square().mean() / x.var()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / STEPS)
        optimizer.step()
    values, vectors = np.linalg.eigh(np.cov(model.embed(train.pixels[:5000]).T))
    model.metric.copy_(torch.from_numpy(vectors / np.sqrt(values.clip(values.max() / 1e4))))


@dataclass(frozen=True)
class Distance:
    """FID of N against M images, its standard error, and what it would be with infinitely many."""

    fid: float
    error: float
    infinity: float


def distance(a: Floats, b: Floats) -> Distance:
    """FID between features a (N, D) and b (M, D), at least 2 of each.

    Error and bias are those of the jackknife over up to 20 groups of each set, left out in turn: with g groups, d the distance of all and d_i without group i,
    error^2 = (g - 1) / g sum (d_i - mean d_i)^2 and bias = (g - 1) (mean d_i - d), both summed over the two sets.
    """
    for x in (a, b):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise ValueError(f"features must be (N, D) and (M, D) with at least two rows each, got {a.shape} and {b.shape}")
    moments = _moments(a), _moments(b)
    whole = frechet(*moments[0], *moments[1])
    variance = bias = 0.0
    for side, x in enumerate((a, b)):
        g = min(GROUPS, len(x))
        if len(x) - -(-len(x) // g) < 2:
            return Distance(whole, math.nan, math.nan)
        without = []
        for i in range(g):
            left = list(moments)
            left[side] = _moments(np.delete(x, np.arange(i, len(x), g), 0))
            without.append(frechet(*left[0], *left[1]))
        variance += (g - 1) * float(np.var(without))
        bias += (g - 1) * (float(np.mean(without)) - whole)
    return Distance(whole, math.sqrt(variance), whole - bias)


def columns(pixels: NDArray[np.uint8], train: Images, held_out: Images, generator: torch.Generator | None = None) -> dict[str, float]:
    """fid, fid_se and fid_infinity of samples (N, C, H, W) against the held-out images, in the features of `train`.

    With a generator also train_fid and train_fid_se, of as many training images that it draws: what a perfect model would have.
    """
    network = features(train)
    reference = network.embed(held_out.pixels)
    found = distance(network.embed(pixels), reference)
    row = {"fid": found.fid, "fid_se": found.error, "fid_infinity": found.infinity}
    if generator is not None:
        some = torch.randperm(len(train), generator=generator)[: len(pixels)].numpy()
        apart = distance(network.embed(train.pixels[some]), reference)
        row |= {"train_fid": apart.fid, "train_fid_se": apart.error}
    return row


def _moments(x: Floats) -> tuple[Floats, Floats]:
    return x.mean(0), np.atleast_2d(np.cov(x.T))


def frechet(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for means (D,) and covariances (D, D), which may be singular.

    The eigenvalues of S_a S_b are those of the symmetric S_a^(1/2) S_b S_a^(1/2), so no root of a matrix that is not symmetric is needed.

    >>> frechet(np.zeros(1), np.array([[4.0]]), np.array([3.0]), np.array([[1.0]]))  # 3^2 + (2 - 1)^2
    10.0
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)
