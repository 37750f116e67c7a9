"""Bits per dimension: the one measure of all image models, and two plain models that any other has to beat.

An image x of D = C H W whole numbers, each one of L levels, costs -log2 P(x) bits, and per dimension that over D. A model that knows nothing costs log2 L.
A model of densities p on real numbers is brought to this measure by adding noise u, uniform in [0, 1), to the levels (dequantisation; Theis et al. 2016,
arXiv:1511.01844): -E_u log2 p(x + u) is never below -log2 of the probability that p gives to the cell of x, so no density can be too small a number of bits.
"""

import math

import numpy as np
from numpy.typing import NDArray

from onetorch.generative.images import Images

Floats = NDArray[np.float64]


def uniform(levels: int) -> float:
    """Bits per dimension of a model that knows nothing.

    >>> round(uniform(17), 2)
    4.09
    """
    return math.log2(levels)


def mean_and_error(bits: Floats) -> tuple[float, float]:
    """Mean of the bits (N,) of N independent images and its standard error; ValueError for fewer than two."""
    if bits.ndim != 1 or len(bits) < 2:
        raise ValueError(f"bits must be (N,) with N at least 2, got {bits.shape}")
    return float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(len(bits)))


def histogram(train: Images, held_out: Images) -> Floats:
    """Bits per dimension (N,) of each held-out image, every pixel by itself with the frequencies that its levels have in `train`.

    Counts begin at one half (Krichevsky & Trofimov 1981), so that no level is impossible.
    """
    bits = np.zeros(len(held_out))
    trained, asked = (x.pixels.reshape(len(x), -1) for x in (train, held_out))
    for pixel in range(asked.shape[1]):
        counts = np.bincount(trained[:, pixel], minlength=train.levels) + 0.5
        bits -= np.log2(counts / counts.sum())[asked[:, pixel]]
    return bits / asked.shape[1]


def pca_gaussian(train: Images, held_out: Images, components: int | None = None) -> tuple[Floats, int]:
    """(bits per dimension (N,) of each held-out image, number of components) under probabilistic PCA (Tipping & Bishop 1999), dequantised.

    The density is a Gaussian whose covariance has the `components` largest principal components of the training images with their noise, and in every other
    direction the mean of what is left. By default the number that is best on a fifth of `train` after a fit to the rest. The expectation over the noise u
    is exact: with covariance S and mean m, -E_u ln p(x + u) = (ln det 2 pi S + (x + 1/2 - m)^T S^-1 (x + 1/2 - m) + tr S^-1 / 12) / 2.
    """
    x = train.pixels.reshape(len(train), -1).astype(np.float64)
    if components is None:
        choosing = np.arange(len(x)) % 5 == 0
        eigen = _eigen(x[~choosing])
        candidates = sorted({round(1.3**k) for k in range(64)} & set(range(1, x.shape[1])))
        components = min(candidates, key=lambda k: _gaussian_bits(eigen, x[choosing], k).mean())
    if not 0 <= components < x.shape[1]:
        raise ValueError(f"components must be 0 to {x.shape[1] - 1}, got {components}")
    return _gaussian_bits(_eigen(x), held_out.pixels.reshape(len(held_out), -1).astype(np.float64), components), components


def _eigen(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean (D,), eigenvalues (D,) falling, and eigenvectors (D, D) in columns, of the covariance of x (N, D) with noise uniform in [0, 1) added."""
    mean = x.mean(0) + 0.5
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True) + np.eye(x.shape[1]) / 12)
    return mean, values[::-1], vectors[:, ::-1]


def _gaussian_bits(eigen: tuple[Floats, Floats, Floats], x: Floats, components: int) -> Floats:
    mean, values, vectors = eigen
    D = len(mean)
    variance = np.concatenate([values[:components], np.full(D - components, values[components:].mean())])
    distance = ((x + 0.5 - mean) @ vectors) ** 2 @ (1 / variance)
    nats = 0.5 * (np.log(2 * math.pi * variance).sum() + distance + (1 / variance).sum() / 12)
    return nats / math.log(2) / D


def baselines(train: Images, held_out: Images) -> dict[str, float]:
    """Bits per dimension of the three models that know little, with standard errors: uniform_bpd, histogram_bpd, gaussian_bpd."""
    histogram_bpd, histogram_se = mean_and_error(histogram(train, held_out))
    gaussian_bpd, gaussian_se = mean_and_error(pca_gaussian(train, held_out)[0])
    return {
        "uniform_bpd": uniform(train.levels),
        "histogram_bpd": histogram_bpd,
        "histogram_bpd_se": histogram_se,
        "gaussian_bpd": gaussian_bpd,
        "gaussian_bpd_se": gaussian_se,
    }
