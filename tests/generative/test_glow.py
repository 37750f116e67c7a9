import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import fid, glow, images
from onetorch.generative.glow import Config
from onetorch.runs import plan
from onetorch.runs.errors import NonFinite, RunError, UsageError
from onetorch.runs.run import Run

TINY = Config(shape=(1, 4, 4), levels=5, steps=6, batch=8, scales=2, steps_per_scale=2, width=8, eval_every=3, eval_samples=8, warmup=2)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_data(folder: Path, n: int = 120) -> Path:
    """Pixels that are 0 or 4, the same in a whole image but for one in ten."""
    rng = np.random.default_rng(0)
    pixels = (rng.integers(2, size=(n, 1, 1)) ^ (rng.random((n, 4, 4)) < 0.1)).astype(np.uint8) * 4
    np.savez(folder / "data.npz", images=pixels, levels=5)
    return folder / "data.npz"


@pytest.fixture(autouse=True)
def quick_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fid, "STEPS", 5)


def model_with_weights(config: Config = TINY) -> glow.Glow:
    """A model in float64 no part of which is the identity, as after some training."""
    torch.manual_seed(0)
    model = glow.build(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# -- the map -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 4), (1, 3, 4)])
def test_the_determinant_is_that_of_autograds_jacobian(coupling: str, shape: tuple[int, int, int]) -> None:
    model = model_with_weights(replace(TINY, shape=shape, coupling=coupling, scales=1 if 2 in shape else 2))
    x = torch.randn(1, *model.padded, generator=gen(), dtype=torch.float64)

    def flat(v: torch.Tensor) -> torch.Tensor:
        return torch.cat([z.flatten() for z in model(v.view(x.shape))[0]])

    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    expected = torch.linalg.slogdet(jacobian)[1]
    found = model(x)[1]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected.item()) > 0.1


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_the_inverse_gives_the_image_back(coupling: str) -> None:
    model = model_with_weights(replace(TINY, coupling=coupling, shape=(3, 8, 8), scales=3))
    x = torch.randn(5, 3, 8, 8, generator=gen(), dtype=torch.float64)
    z, _, _ = model(x)
    assert [tuple(part.shape[1:]) for part in z] == [(6, 4, 4), (12, 2, 2), (48, 1, 1)]
    assert torch.allclose(model.inverse(z), x, atol=1e-9)


def test_samples_are_the_inverse_of_their_noise() -> None:
    """At temperature 0 every z is its prior's mean."""
    model = model_with_weights()
    z, _, prior = model(model.draw(3, gen(), 0.0))
    stds = [model.prior(1, torch.zeros_like(z[1]))[1].flatten(1).sum(1)]
    h = z[1]
    for layer in reversed(list(model.flows[1].children())):
        h = layer.inverse(h)  # type: ignore[operator]
    stds.append(model.prior(0, glow.unsqueeze(h))[1].flatten(1).sum(1))
    assert torch.allclose(prior, -sum(stds) - 8 * math.log(2 * math.pi))  # type: ignore[arg-type]


def test_the_first_batch_leaves_every_actnorm_with_mean_zero_and_variance_one() -> None:
    layer, x = glow.ActNorm(3), 4 + 7 * torch.randn(50, 3, 4, 4, generator=gen())
    layer.initialise(x)
    y, logdet = layer(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(y.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    assert logdet.item() == pytest.approx(-16 * x.std((0, 2, 3)).log().sum().item(), rel=1e-5)


def test_the_1x1_begins_as_a_rotation() -> None:
    torch.manual_seed(1)
    layer = glow.Conv1x1(6)
    assert torch.allclose(layer.weight() @ layer.weight().T, torch.eye(6), atol=1e-5)
    assert layer.log_diagonal.sum().item() == pytest.approx(0, abs=1e-5)


def test_levels_survive_their_noise_and_padding_is_of_level_zero() -> None:
    config = replace(TINY, shape=(1, 3, 5), scales=2)
    pixels = torch.randint(5, (20, 1, 3, 5), generator=gen(), dtype=torch.uint8)
    x = glow.dequantise(pixels, config, gen())
    assert x.shape == (20, 1, 4, 8)
    assert (glow.quantise(x, config) == pixels).all()
    padding = x[:, :, 3:]
    assert (padding >= -0.5).all()
    assert (padding < -0.3).all()


def test_bits_of_a_model_that_is_a_gaussian() -> None:
    """A new model is nothing but rotations: x is under a standard normal, and a level is L times as wide."""
    torch.manual_seed(0)
    model = glow.build(TINY)
    data = images.Images(torch.randint(5, (50, 1, 4, 4), generator=gen(), dtype=torch.uint8).numpy(), 5)
    found, tight = glow.score(model, data, gen(3), draws=1)
    x = glow.dequantise(torch.from_numpy(data.pixels), TINY, gen(3))
    expected = (0.5 * math.log(2 * math.pi) + 0.5 * x.double() ** 2 + math.log(5)).mean((1, 2, 3)).numpy() / math.log(2)
    assert found == pytest.approx(expected, abs=1e-5)
    assert tight == pytest.approx(found)
    mean, tight = glow.score(model_with_weights().float(), data, gen(), draws=8)
    assert (tight < mean).all()


# -- runs ----------------------------------------------------------------------------------------------------------------------------------------------


def start(config: Config, folder: Path) -> Run:
    return Run(folder, config, fixed=plan.parse("threads=1"), quiet=True)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_known_distribution_is_recovered(tmp_path: Path) -> None:
    """Four pixels of 16 levels, a common normal number and one for each. The likelihood comes near the entropy and samples have the moments of the data."""
    rng = np.random.default_rng(0)
    common = rng.normal(8, 2, size=(3000, 1, 1))
    pixels = (common + rng.normal(0, 1, size=(3000, 2, 2))).round().clip(0, 15).astype(np.uint8)
    np.savez(tmp_path / "gauss.npz", images=pixels, levels=16)
    config = Config(
        data=tmp_path / "gauss.npz", shape=(1, 2, 2), levels=16, scales=1, steps_per_scale=4, width=16, steps=250, batch=256, lr=5e-3, eval_every=250,
        eval_samples=8, temperature=1.0,
    )  # fmt: skip
    with start(config, tmp_path / "run") as run:
        model = glow.train(config, run)
    results = glow.evaluate(model, config, media=tmp_path, samples=100, draws=8, temperature=1.0, baselines=False)
    covariance = 4 * np.ones((4, 4)) + np.eye(4) * (1 + 1 / 12)  # rounding adds a twelfth
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * covariance)[1] / 4 / math.log(2)
    assert results["bpd"] == pytest.approx(entropy, abs=4 * float(results["bpd_se"]) + 0.02)
    assert results["bpd_iw"] <= results["bpd"]  # type: ignore[operator]
    drawn = glow.sample(model, 4000, gen()).double().flatten(1)
    assert drawn.mean().item() == pytest.approx(8, abs=0.2)
    assert torch.cov(drawn.T).numpy() == pytest.approx(covariance, abs=0.6)
    assert glow.sample(model, 2000, gen(), temperature=0.5).double().var().item() < 0.4 * drawn.var().item()
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


GOLDEN = {"affine": [2.84464, 2.69748, 2.99217], "additive": [2.86692, 2.81495, 3.07281]}


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_the_first_losses_are_those_of_before(tmp_path: Path, coupling: str) -> None:
    config = replace(TINY, data=write_data(tmp_path), coupling=coupling, steps=3, lr=0.02)
    with start(config, tmp_path / "run") as run:
        glow.train(config, run)
    rows = rows_of(tmp_path / "run")
    assert [r["loss"] for r in rows] == pytest.approx(GOLDEN[coupling], rel=1e-3)
    assert [r["step"] for r in rows if "val_bpd" in r and "raw_val_bpd" in r] == [3]


SCRIPT = """
import os, sys
from pathlib import Path
from onetorch.generative import fid, glow
from onetorch.runs import plan
from onetorch.runs.run import Run

fid.STEPS = 5
where, data, stop, resume = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
config = glow.Config(data=data, shape=(1, 4, 4), levels=5, steps=4, batch=8, steps_per_scale=2, width=8, eval_every=1, eval_samples=8)
run = Run(where, config, resume=resume, fixed=plan.parse("threads=1"), checkpoint_seconds=0, quiet=True)
save = run.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        os._exit(9)  # as if killed: nothing is flushed or closed
run.checkpoint = checkpoint
with run:
    glow.train(config, run)
"""


def test_four_steps_are_two_steps_a_new_process_and_two_steps(tmp_path: Path) -> None:
    data = write_data(tmp_path)

    def process(name: str, stop: int, how: str) -> int:
        return subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / name, data, str(stop), how], check=False).returncode

    assert process("whole", 0, "new") == 0
    assert process("parts", 2, "new") == 9
    assert process("parts", 0, "resume") == 0
    weights = [(tmp_path / name / "checkpoints" / "00000004" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    rows = [rows_of(tmp_path / name) for name in ("whole", "parts")]
    for row in rows[0] + rows[1]:
        for time_dependent in ("seconds", "cpu_seconds", "mfu"):
            row.pop(time_dependent, None)
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path))
    with start(config, tmp_path / "run") as run:
        glow.train(config, run)
    write_data(tmp_path, 130)
    with pytest.raises(RunError, match="the images are not those this run was begun with"):
        with Run(tmp_path / "run", config, resume=True, quiet=True) as run:
            glow.train(config, run)


def test_a_loss_that_is_no_number_is_caught_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = replace(TINY, data=write_data(tmp_path)), glow.nats, []

    def broken(model: glow.Glow, x: torch.Tensor) -> torch.Tensor:
        calls.append(model)
        return real(model, x) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(glow, "nats", broken)
    with pytest.raises(NonFinite, match="loss is nan in iteration 2"), start(config, tmp_path / "run") as run:
        glow.train(config, run)
    assert all(p.isfinite().all() for p in calls[0].parameters())


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"batch": -1}, {"width": 0}, {"lr": 0.0}, {"ema": 1.0}, {"decay": 0.0}, {"shape": (2, 8, 8)}, {"levels": 1}, {"eval_samples": 2},
    {"scales": 4}, {"scales": 0}, {"steps_per_scale": 0}, {"temperature": -1.0}, {"warmup": -1}, {"max_grad_norm": math.inf},
])  # fmt: skip
def test_wrong_configs_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"draws": 0}, {"temperature": -0.5}])
def test_wrong_options_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        glow.evaluate(glow.build(TINY), TINY, **wrong)


def test_images_that_do_not_fit_are_refused_with_the_flags_that_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give --shape 1,4,4 --levels 5$"):
        glow.load(replace(TINY, data=write_data(tmp_path), levels=6))


def test_a_run_that_diverges_is_ended_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = replace(TINY, data=write_data(tmp_path), steps=50, eval_every=50), glow.nats, []

    def climbing(model: glow.Glow, x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return real(model, x) + 20.0 * max(len(calls) - 5, 0)  # nats of an image; no step size drives this model up so evenly

    monkeypatch.setattr(glow, "nats", climbing)
    with pytest.raises(RunError, match=r"the run diverges: in step \d+ .* lower --lr, or"), start(config, tmp_path / "run") as run:
        glow.train(config, run)


def test_rates_follow_the_schedule_and_every_row_counts_the_images(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path), schedule="linear", warmup=1, eval_every=6)
    with start(config, tmp_path / "run") as run:
        kept, save = [], run.checkpoint

        def checkpoint(state: glow.State) -> None:
            optimizer = state.optimizer
            kept.append(optimizer.param_groups[0]["lr"])
            save(state)

        run.checkpoint = checkpoint  # type: ignore[method-assign]
        glow.train(config, run)
    assert kept == pytest.approx([config.lr * f for f in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert [row["images"] for row in rows_of(tmp_path / "run")] == [8, 16, 24, 32, 40, 48]
