import math
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import fid, images
from onetorch.generative.images import Images

RNG = np.random.default_rng(0)


def stripes(n: int, labelled: bool = True) -> Images:
    """Images of 8x8 pixels with a bright row (class 0) or column (class 1) somewhere, and noise."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(6, size=(n, 1, 8, 8)).astype(np.uint8)
    place = rng.integers(8, size=n)
    for i in range(n):
        if i % 2:
            pixels[i, 0, :, place[i]] = 15
        else:
            pixels[i, 0, place[i], :] = 15
    return Images(pixels, 16, np.arange(n) % 2, ("row", "column")) if labelled else Images(pixels, 16)


def test_frechet_of_gaussians_worked_by_hand() -> None:
    """Diagonal: 3^2 + (2 - 1)^2 + (1 - 5)^2. With S_a = I and S_b = [[5, 4], [4, 5]], whose roots are 1 and 3: tr = 2 + 10 - 2 (1 + 3)."""
    assert fid.frechet(np.array([0.0, 1.0]), np.diag([4.0, 1.0]), np.array([3.0, 1.0]), np.diag([1.0, 25.0])) == pytest.approx(26)
    assert fid.frechet(np.zeros(2), np.eye(2), np.zeros(2), np.array([[5.0, 4.0], [4.0, 5.0]])) == pytest.approx(4)


def test_frechet_of_singular_and_of_equal_covariances() -> None:
    assert fid.frechet(np.zeros(2), np.diag([1.0, 0.0]), np.zeros(2), np.diag([0.0, 1.0])) == pytest.approx(2)
    a = RNG.normal(size=(5, 5))
    assert fid.frechet(np.ones(5), a @ a.T, np.ones(5), a @ a.T) == pytest.approx(0, abs=1e-9)


def test_frechet_is_the_distance_of_the_best_transport() -> None:
    """S_b = T S_a T for a symmetric positive T that moves a to b at least cost: d = E |x - T x|^2 = tr (I - T) S_a (I - T)."""
    root, move = RNG.normal(size=(2, 4, 4))
    cov, transport = root @ root.T, move @ move.T + np.eye(4)
    expected = np.trace((np.eye(4) - transport) @ cov @ (np.eye(4) - transport))
    assert fid.frechet(np.zeros(4), cov, np.zeros(4), transport @ cov @ transport) == pytest.approx(expected)


def test_bias_and_error_are_those_of_repeated_samples() -> None:
    """Samples of one distribution are apart, the less the more there are; infinity takes that away, and the error is the scatter."""
    found = [fid.distance(RNG.normal(size=(300, 8)), RNG.normal(size=(200, 8))) for _ in range(40)]
    plain, error, infinity = (np.array([getattr(d, name) for d in found]) for name in ("fid", "error", "infinity"))
    assert plain.mean() > 0.1
    assert abs(infinity.mean()) < 3 * infinity.std() / math.sqrt(40) + 0.01
    assert error.mean() == pytest.approx(plain.std(), rel=0.5)
    shifted = [fid.distance(RNG.normal(size=(300, 8)) + 1, RNG.normal(size=(200, 8)) * 2) for _ in range(40)]  # 8 + 8 (2 - 1)^2
    infinity = np.array([d.infinity for d in shifted])
    assert infinity.mean() == pytest.approx(16, abs=4 * infinity.std() / math.sqrt(40))
    assert np.mean([d.error for d in shifted]) == pytest.approx(np.std([d.fid for d in shifted]), rel=0.35)


def test_few_images_have_a_distance_and_no_error() -> None:
    found = fid.distance(np.array([[0.0], [2.0]]), np.array([[3.0], [3.0]]))  # (1 - 3)^2 + 2 + 0
    assert found.fid == pytest.approx(6)
    assert math.isnan(found.error)
    with pytest.raises(ValueError, match="features"):
        fid.distance(np.zeros((3, 2)), np.zeros((3, 3)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "STEPS", 60)
    return tmp_path / "onetorch"


def test_the_network_tells_the_classes_and_is_kept(cache: Path) -> None:
    train = stripes(400)
    state = torch.get_rng_state()
    network = fid.features(train)
    assert (torch.get_rng_state() == state).all()  # whoever asks draws the same numbers afterwards
    assert train.labels is not None
    with torch.no_grad():
        z = network.body((torch.from_numpy(train.pixels).float() / 15) * 2 - 1)
        assert (network.head(z).argmax(1).numpy() == train.labels).mean() > 0.95
    embedded = network.embed(train.pixels)
    assert embedded.shape == (400, 64)
    assert embedded.var(0, ddof=1).max() == pytest.approx(1, rel=1e-3)
    files = list(cache.glob("features-*.safetensors"))
    assert len(files) == 1
    before = files[0].stat().st_mtime_ns
    again = fid.features(train)
    assert files[0].stat().st_mtime_ns == before
    assert all((a == b).all() for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")  # damaged: it is trained once more, to the same
    third = fid.features(train)
    assert all((a == b).all() for a, b in zip(network.state_dict().values(), third.state_dict().values(), strict=True))
    assert not (fid.features(stripes(300)).metric == network.metric).all()


@pytest.mark.parametrize("labelled", [True, False])
def test_worse_samples_are_further_away(cache: Path, labelled: bool) -> None:
    train, held_out = stripes(600, labelled).take(np.arange(400)), stripes(600, labelled).take(np.arange(400, 600))
    network = fid.features(train)
    reference = network.embed(held_out.pixels)
    same = fid.distance(network.embed(train.pixels), reference)
    noisy = np.minimum(held_out.pixels + RNG.integers(4, size=held_out.pixels.shape).astype(np.uint8), 15).astype(np.uint8)
    noisier = RNG.integers(16, size=(200, 1, 8, 8)).astype(np.uint8)
    distances = [fid.distance(network.embed(x), reference) for x in (noisy, noisier)]
    assert abs(same.infinity) < 5 * same.error
    assert same.fid < distances[0].fid < distances[1].fid
    assert distances[1].infinity > 20 * distances[1].error


def test_columns_hold_the_distance_and_that_of_training_images(cache: Path) -> None:
    train, held_out = images.parts(stripes(200), "validation")
    network = fid.features(train)
    direct = fid.distance(network.embed(train.pixels[:50]), network.embed(held_out.pixels))
    alone = fid.columns(train.pixels[:50], train, held_out)
    assert alone == {"fid": direct.fid, "fid_se": direct.error, "fid_infinity": direct.infinity}
    beside = fid.columns(train.pixels[:50], train, held_out, torch.Generator().manual_seed(0))
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:50].numpy()
    apart = fid.distance(network.embed(train.pixels[chosen]), network.embed(held_out.pixels))
    assert (beside["train_fid"], beside["train_fid_se"]) == (apart.fid, apart.error)
