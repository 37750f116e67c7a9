import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import fid, images, vae
from onetorch.generative.vae import Config
from onetorch.runs import plan
from onetorch.runs.errors import NonFinite, RunError, UsageError
from onetorch.runs.run import Run

TINY = Config(
    shape=(1, 4, 4), levels=5, steps=6, batch=8, blocks=(1, 2), width=8, inner=8, latent=2, mixtures=2, eval_every=3, eval_samples=8, warmup=2, kl_warmup=4
)


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


def model_with_weights(config: Config = TINY) -> vae.VAE:
    """A model as after some training."""
    torch.manual_seed(0)
    model = vae.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


# -- densities -----------------------------------------------------------------------------------------------------------------------------------------


def test_the_divergence_of_two_normals() -> None:
    """By hand: N(1, 2^2) from N(0, 1) is ln(1 / 2) + (4 + 1) / 2 - 1 / 2; of one from itself nothing."""
    one, zero, two = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0).log()
    assert vae.divergence(one, two, zero, zero).item() == pytest.approx(2 - math.log(2))
    assert vae.divergence(one, two, one, two).item() == pytest.approx(0, abs=1e-7)
    q, p = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    found = vae.divergence(q.mean, q.stddev.log(), p.mean, p.stddev.log())
    assert found.item() == pytest.approx(torch.distributions.kl_divergence(q, p).item())


def test_the_bounds_of_a_linear_gaussian_model() -> None:
    """z is N(0, 1) and x given z is N(2 z, 1), so x is N(0, 5) and z given x N(2 x / 5, 1 / 5): with it every draw gives ln p(x); with a worse q the ELBO is
    below by KL(q, posterior), and IWAE climbs to the truth."""
    x, zero = torch.tensor(1.7, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    true = -0.5 * math.log(2 * math.pi * 5) - 1.7**2 / 10
    noise = torch.randn(100_000, generator=gen(), dtype=torch.float64)

    def weights(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        z = mean + log_std.exp() * noise
        return vae.log_normal(x, 2 * z, zero) + vae.log_normal(z, zero, zero) - vae.log_normal(z, mean, log_std)

    best = 2 * x / 5, torch.full_like(x, -0.5 * math.log(5))
    assert torch.allclose(weights(*best), torch.full_like(noise, true))
    worse = 2 * x / 5 + 0.3, torch.full_like(x, -0.5)
    found = weights(*worse)
    assert found.mean().item() == pytest.approx(true - vae.divergence(*worse, *best).item(), abs=0.01)
    climb = [vae.importance(found[: 100_000 // k * k].view(k, -1)).mean().item() for k in (1, 5, 50)]
    assert climb == sorted(climb)
    assert climb[-1] == pytest.approx(true, abs=0.005)


@pytest.mark.parametrize("pixels", ["categorical", "logistics"])
def test_odds_sum_to_one(pixels: str) -> None:
    config = replace(TINY, shape=(3, 2, 3), pixels=pixels)
    n = 5 if pixels == "categorical" else 6
    odds = vae.log_odds(3 * torch.randn(4, 3 * n, 2, 3, generator=gen()), config)
    assert odds.shape == (4, 3, 5, 2, 3)
    assert torch.allclose(odds.exp().sum(2), torch.ones(4, 3, 2, 3), atol=1e-5)


def test_odds_of_a_logistic() -> None:
    """One density of mean 0 and scale 1 / 2 and three levels, -1, 0 and 1, whose borders are -1/2 and 1/2: s(-1), s(1) - s(-1), s(-1)."""
    config = replace(TINY, shape=(1, 1, 1), levels=3, pixels="logistics", mixtures=1, blocks=(1,))
    found = vae.log_odds(torch.tensor([0.7, 0.0, -math.log(2)]).view(1, 3, 1, 1), config).exp().flatten()
    tail = 1 / (1 + math.e)
    assert found.tolist() == pytest.approx([tail, 1 - 2 * tail, tail], rel=1e-5)


# -- the model -----------------------------------------------------------------------------------------------------------------------------------------


def integrated(model: vae.VAE) -> torch.Tensor:
    """P(x) (L,) of a model of one pixel and one latent number, by a sum over a fine grid of the prior's noise."""
    noise = torch.linspace(-8, 8, 4001)
    weight = torch.exp(-0.5 * noise**2) / math.sqrt(2 * math.pi) * (noise[1] - noise[0])
    with torch.no_grad():
        odds, kls, _ = model.generate(None, [noise.view(-1, 1, 1, 1)])
    assert (kls == 0).all()
    return (weight.view(-1, 1) * odds.view(4001, -1).exp()).sum(0)


def test_iwae_comes_to_the_likelihood_from_above_and_elbo_stays_above() -> None:
    model = model_with_weights(replace(TINY, shape=(1, 1, 1), blocks=(1,), latent=1))
    with torch.no_grad():
        last = model.blocks[0][0].posterior[-1]  # type: ignore[index]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.5, 0.4]))  # wider than the prior, so that no draw weighs much more than others
    truth = integrated(model)
    assert truth.sum().item() == pytest.approx(1, abs=1e-4)
    copies = 1000
    data = images.Images(np.arange(5, dtype=np.uint8).repeat(copies).reshape(-1, 1, 1, 1), 5)
    exact = -truth.log2().double().numpy()
    elbo, iwae, kl = vae.score(model, data, gen(1), draws=50)
    assert kl.shape == (1,)
    pooled = -np.log2(np.exp2(-iwae).reshape(5, copies).mean(1))  # 50,000 draws for each level
    assert pooled == pytest.approx(exact, abs=0.02)
    mean_elbo, mean_iwae = (z.reshape(5, copies).mean(1) for z in (elbo, iwae))
    assert (mean_elbo > mean_iwae + 0.01).all()
    assert (mean_iwae > pooled).all()


def test_samples_have_the_models_frequencies() -> None:
    model = model_with_weights(replace(TINY, shape=(1, 1, 1), blocks=(1,), latent=1))
    drawn = vae.sample(model, 5000, gen(2)).flatten()
    found = torch.bincount(drawn, minlength=5) / 5000
    assert found.tolist() == pytest.approx(integrated(model).tolist(), abs=0.03)


def test_an_image_changes_its_own_latents_alone() -> None:
    model = model_with_weights()
    pixels = torch.randint(5, (2, 1, 4, 4), generator=gen(), dtype=torch.uint8)
    noise = model.noise(2, gen())
    assert [tuple(n.shape) for n in noise] == [(2, 2, 2, 2), (2, 2, 4, 4), (2, 2, 4, 4)]
    with torch.no_grad():
        told, kls, ratio = model(pixels, *noise)
        pixels[1] = 4 - pixels[1]
        again = model(pixels, *noise)
    assert torch.allclose(told[0], again[0][0])
    assert torch.allclose(kls[:, 0], again[1][:, 0])
    assert (kls[:, 1] != again[1][:, 1]).all()
    assert (kls >= 0).all()
    assert ratio.shape == (2,)


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 28, 28)])
def test_odd_sizes_are_halved_upwards(shape: tuple[int, int, int]) -> None:
    model = vae.build(replace(TINY, shape=shape, blocks=(1, 1, 1)))
    assert model.sizes == [(-(-shape[1] // 4), -(-shape[2] // 4)), (-(-shape[1] // 2), -(-shape[2] // 2)), shape[1:]]
    odds, _, _ = model.generate(model.encode(torch.zeros(2, *shape)), model.noise(2, gen()))
    assert odds.shape == (2, shape[0], 5, *shape[1:])


# -- runs ----------------------------------------------------------------------------------------------------------------------------------------------


def start(config: Config, folder: Path) -> Run:
    return Run(folder, config, fixed=plan.parse("threads=1"), quiet=True)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_known_distribution_is_recovered(tmp_path: Path) -> None:
    """A fair coin for the image, and one pixel in ten the other way: P(x) = 1/2 (P(x | 0) + P(x | 1)), whose bits for the held-out images are summed here."""
    config = replace(
        TINY, data=write_data(tmp_path, 1000), steps=300, batch=64, lr=5e-3, width=16, inner=16, kl_warmup=200, eval_every=300, ema=0.98
    )
    with start(config, tmp_path / "run") as run:
        model = vae.train(config, run)
    results = vae.evaluate(model, config, media=tmp_path, samples=60, draws=16, baselines=False)
    bright = (vae.load(config)[1].pixels > 0).sum((1, 2, 3))
    odds = 0.5 * (0.9**bright * 0.1 ** (16 - bright) + 0.1**bright * 0.9 ** (16 - bright))
    exact = float(-np.log2(odds).mean() / 16)
    assert exact - 0.01 < results["bpd"] < exact + 0.06  # type: ignore[operator]
    assert results["bpd"] <= results["elbo_bpd"]  # type: ignore[operator]
    assert results["blocks_in_use"] >= 1  # type: ignore[operator]
    assert results["kl_bpd"] > 0.7 / 16  # type: ignore[operator]  # the coin is a bit, and the latents know it
    drawn = vae.sample(model, 1000, gen(), 1.0).flatten(1)
    share = (drawn > 2).double().mean(1)
    assert ((share < 0.35) | (share > 0.65)).double().mean() > 0.8  # of pixels by themselves 0.21
    assert share.mean().item() == pytest.approx(0.5, abs=0.12)
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


GOLDEN = {"categorical": [2.90685, 2.67039, 2.28055], "logistics": [1.35214, 1.29532, 1.177]}


@pytest.mark.parametrize("pixels", ["categorical", "logistics"])
def test_the_first_losses_are_those_of_before(tmp_path: Path, pixels: str) -> None:
    config = replace(TINY, data=write_data(tmp_path), pixels=pixels, steps=3, lr=0.02)
    with start(config, tmp_path / "run") as run:
        vae.train(config, run)
    rows = rows_of(tmp_path / "run")
    assert [r["loss"] for r in rows] == pytest.approx(GOLDEN[pixels], rel=1e-3)
    assert [r["step"] for r in rows if "val_bpd" in r and "raw_val_bpd" in r] == [3]


def test_a_step_with_too_long_a_gradient_is_left_out(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path), max_grad_norm=1e-4, skip_grad_norm=1e-4, steps=3)
    with start(config, tmp_path / "run") as run:
        model = vae.train(config, run)
    assert [r["skipped"] for r in rows_of(tmp_path / "run")] == [1, 2, 3]
    torch.manual_seed(config.seed)
    for found, begun in zip(model.parameters(), vae.build(config).parameters(), strict=True):
        assert torch.equal(found, begun)


SCRIPT = """
import os, sys
from pathlib import Path
from onetorch.generative import fid, vae
from onetorch.runs import plan
from onetorch.runs.run import Run

fid.STEPS = 5
where, data, stop, resume = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
config = vae.Config(
    data=data, shape=(1, 4, 4), levels=5, steps=4, batch=8, blocks=(1, 1), width=8, inner=8, latent=2, drop=0.1, kl_warmup=3, eval_every=1, eval_samples=8
)
run = Run(where, config, resume=resume, fixed=plan.parse("threads=1"), checkpoint_seconds=0, quiet=True)
save = run.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        os._exit(9)  # as if killed: nothing is flushed or closed
run.checkpoint = checkpoint
with run:
    vae.train(config, run)
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
        vae.train(config, run)
    write_data(tmp_path, 130)
    with pytest.raises(RunError, match="the images are not those this run was begun with"):
        with Run(tmp_path / "run", config, resume=True, quiet=True) as run:
            vae.train(config, run)


def test_a_loss_that_is_no_number_is_caught_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = replace(TINY, data=write_data(tmp_path)), vae.divergence, []

    def broken(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return real(*args) * (math.nan if len(calls) == 3 + 3 + 1 else 1)  # three blocks: once for flops, once in the first step

    monkeypatch.setattr(vae, "divergence", broken)
    with pytest.raises(NonFinite, match="loss is nan in iteration 2"), start(config, tmp_path / "run") as run:
        vae.train(config, run)


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"batch": -1}, {"width": 0}, {"lr": 0.0}, {"ema": 1.0}, {"decay": 0.0}, {"shape": (2, 8, 8)}, {"levels": 1}, {"eval_samples": 2},
    {"blocks": ()}, {"blocks": (1, 0)}, {"blocks": (1, 1, 1, 1, 1, 1)}, {"latent": 0}, {"temperature": -1.0}, {"warmup": -1}, {"skip_grad_norm": 1.0},
    {"kl_warmup": -1}, {"drop": 1.0}, {"mixtures": 0},
])  # fmt: skip
def test_wrong_configs_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"draws": 0}, {"temperature": -0.5}])
def test_wrong_options_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        vae.evaluate(vae.build(TINY), TINY, **wrong)


def test_sharing_can_call_the_model_with_the_example() -> None:
    found = vae.example(TINY)
    assert all(isinstance(tensor, torch.Tensor) for tensor in found)
    told, kls, _ = vae.build(TINY)(*found)
    assert told.shape == (2,)
    assert kls.shape[1:] == (2,)


def test_a_run_that_diverges_is_ended_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = replace(TINY, data=write_data(tmp_path), steps=50, kl_warmup=8, eval_every=50), vae.VAE.forward, []

    def climbing(model: vae.VAE, *arguments: torch.Tensor) -> tuple:
        told, *rest = real(model, *arguments)
        calls.append(told)
        return told - 20.0 * max(len(calls) - 3, 0), *rest  # nats of an image; no step size drives this model up so evenly on every machine

    monkeypatch.setattr(vae.VAE, "forward", climbing)
    with pytest.raises(RunError, match=r"the run diverges: in step (9|\d\d) .* lower --lr, or"), start(config, tmp_path / "run") as run:
        vae.train(config, run)


def test_rates_follow_the_schedule_and_every_row_counts_the_images(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path), schedule="linear", warmup=1, eval_every=6)
    with start(config, tmp_path / "run") as run:
        kept, save = [], run.checkpoint

        def checkpoint(state: vae.State) -> None:
            optimizer = state.optimizer
            kept.append(optimizer.param_groups[0]["lr"])
            save(state)

        run.checkpoint = checkpoint  # type: ignore[method-assign]
        vae.train(config, run)
    assert kept == pytest.approx([config.lr * f for f in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert [row["images"] for row in rows_of(tmp_path / "run")] == [8, 16, 24, 32, 40, 48]
