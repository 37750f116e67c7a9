import math

import numpy as np
import pytest

from onetorch.generative import images, likelihood
from onetorch.generative.images import Images


def test_the_histogram_counts() -> None:
    train = Images(np.array([0, 0, 1, 0], np.uint8).reshape(4, 1, 1, 1), 3)
    asked = Images(np.array([0, 1, 2], np.uint8).reshape(3, 1, 1, 1), 3)
    expected = [-math.log2(p / 5.5) for p in (3.5, 1.5, 0.5)]
    assert likelihood.histogram(train, asked).tolist() == pytest.approx(expected)


def test_pca_gaussian_by_integrating_over_the_noise() -> None:
    """Against the definition: the density of numpy's covariance at x + u, averaged over a fine grid of u."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 2)) @ np.array([[3.0, 2.0], [0.0, 1.5]]) + 12).round().clip(0, 24).astype(np.uint8)
    train = Images(x.reshape(-1, 1, 1, 2), 25)
    mean, cov = x.mean(0) + 0.5, np.cov(x.T, bias=True) + np.eye(2) / 12
    u = np.stack(np.meshgrid(*[(np.arange(40) + 0.5) / 40] * 2), -1).reshape(-1, 2)
    distance = x[:5, None] + u - mean
    logp = -0.5 * np.einsum("nui,ij,nuj->nu", distance, np.linalg.inv(cov), distance) - 0.5 * np.log(np.linalg.det(2 * math.pi * cov))
    bits, components = likelihood.pca_gaussian(train, train.take(np.arange(5)), components=1)  # of two: what is left is one direction, itself
    assert components == 1
    assert bits.tolist() == pytest.approx((-logp.mean(1) / math.log(2) / 2).tolist(), rel=1e-4)
    isotropic, _ = likelihood.pca_gaussian(train, train.take(np.arange(5)), components=0)
    variance = np.trace(cov) / 2
    expected = 0.5 * np.log(2 * math.pi * variance) + ((x[:5] + 0.5 - mean) ** 2).sum(1) / variance / 4 + 1 / variance / 24
    assert isotropic.tolist() == pytest.approx((expected / math.log(2)).tolist())


def test_a_density_never_costs_less_than_the_entropy() -> None:
    """Levels drawn evenly from a cell-sized uniform cannot be coded in fewer bits than their entropy."""
    pixels = np.random.default_rng(0).integers(16, size=(4000, 1, 2, 2)).astype(np.uint8)
    train, held_out = images.parts(Images(pixels, 16), "validation")
    assert likelihood.histogram(train, held_out).mean() == pytest.approx(4, abs=0.02)
    assert likelihood.pca_gaussian(train, held_out)[0].mean() > 4


def test_baselines_on_digits_lie_below_uniform() -> None:
    pytest.importorskip("sklearn")
    train, held_out = images.parts(images.digits(), "validation")
    histogram, error = likelihood.mean_and_error(likelihood.histogram(train, held_out))
    gaussian, _ = likelihood.mean_and_error(likelihood.pca_gaussian(train, held_out)[0])
    found = likelihood.baselines(train, held_out)
    assert (found["histogram_bpd"], found["histogram_bpd_se"], found["gaussian_bpd"]) == (histogram, error, gaussian)
    assert found["uniform_bpd"] == math.log2(17)
    assert 0 < error < 0.05
    assert histogram < likelihood.uniform(17)
    assert gaussian < likelihood.uniform(17)


def test_mean_and_error() -> None:
    assert likelihood.mean_and_error(np.array([1.0, 3.0])) == (2.0, 1.0)
    with pytest.raises(ValueError, match="bits"):
        likelihood.mean_and_error(np.array([1.0]))
