import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from onetorch.generative import diffusion, fid, images
from onetorch.generative.diffusion import Config
from onetorch.runs import plan
from onetorch.runs.errors import NonFinite, RunError, UsageError
from onetorch.runs.run import Run

TINY = Config(
    shape=(1, 4, 4), levels=5, classes=2, steps=6, batch=8, width=16, depth=1, heads=2, patch=2, stages=(1, 2), eval_every=3, eval_samples=8, sample_steps=3,
    warmup=2, lr=2e-3,
)  # fmt: skip
PLAN = "threads=1,dtype=float32,layout=contiguous_format,attention=explicit"
OBJECTIVES = ["epsilon", "v", "flow"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_data(folder: Path, n: int = 120) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    pixels = rng.integers(2, size=(n, 4, 4)).astype(np.uint8)
    pixels[labels == 0, :2] += 3
    pixels[labels == 1, 2:] += 3
    np.savez(folder / "data.npz", images=pixels, labels=labels, levels=5)
    return folder / "data.npz"


@pytest.fixture(autouse=True)
def quick_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fid, "STEPS", 5)


def model_with_weights(config: Config = TINY) -> diffusion.Diffusion:
    """A model no matrix of which is zero, as after some training."""
    torch.manual_seed(0)
    model = diffusion.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("backbone", ["transformer", "unet"])
def test_float16_takes_the_steps_of_float32(backbone: Literal["transformer", "unet"], tmp_path: Path) -> None:
    config, found = replace(TINY, data=write_data(tmp_path), backbone=backbone, steps=12, eval_every=12), {}
    for dtype in ("float32", "float16"):
        with Run(tmp_path / dtype, config, fixed=plan.parse(PLAN.replace("float32", dtype)), quiet=True) as run:
            diffusion.train(config, run)
        found[dtype] = [json.loads(line)["loss"] for line in (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()]
    assert found["float16"] != found["float32"]
    assert found["float16"] == pytest.approx(found["float32"], rel=0.05)
    assert found["float16"][-1] < found["float16"][0]


# -- the model -----------------------------------------------------------------------------------------------------------------------------------------


def test_guidance_is_a_line_through_both_predictions() -> None:
    model, x, t = model_with_weights(replace(TINY, objective="v")), torch.randn(3, 1, 4, 4, generator=gen()), torch.tensor(0.4)
    labels, none = torch.tensor([0, 1, 1]), torch.full((3,), 2)
    with torch.no_grad():
        told, free = (model.denoise(x, t, y) for y in (labels, none))
        assert not torch.allclose(told, free)
        assert torch.allclose(model.denoise(x, t, labels, 0.0), free, atol=1e-6)
        assert torch.allclose(model.denoise(x, t, labels, 3.0), free + 3 * (told - free), atol=1e-5)


@pytest.mark.parametrize("backbone", ["transformer", "unet"])
def test_an_image_is_seen_whole_and_by_itself(backbone: str) -> None:
    model = model_with_weights(replace(TINY, backbone=backbone))
    x, t, labels = torch.randn(2, 1, 4, 4, generator=gen()), torch.tensor([0.3, 0.7]), torch.tensor([0, 1])
    x.requires_grad_()
    out = model(x, t, labels)
    assert out.shape == x.shape
    out[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert (x.grad[0] != 0).all()
    assert (x.grad[1] == 0).all()
    for changed in (model(x, t + 0.1, labels), model(x, t, 1 - labels)):
        assert not torch.allclose(changed, out)


def test_the_loss_of_a_new_model_is_the_targets_power() -> None:
    """It predicts zero: for flow E |eps - x_0|^2 = 1 + E x_0^2."""
    model = diffusion.build(TINY)
    x0, eps = torch.randn(2, 64, 1, 4, 4, generator=gen())
    found = diffusion.losses(model, x0, torch.rand(64, generator=gen()), eps, torch.zeros(64, dtype=torch.int64))
    assert torch.allclose(found, (eps - x0).square().flatten(1).mean(1))
    assert found.mean().item() == pytest.approx(2, abs=0.15)


def test_optimizers_share_the_parameters() -> None:
    for config in (TINY, replace(TINY, backbone="unet")):
        model = diffusion.build(config)
        groups = [id(p) for o in diffusion.optimizers(model, config) for g in o.param_groups for p in g["params"]]
        assert sorted(groups) == sorted(id(p) for p in model.parameters())
    assert len(diffusion.optimizers(diffusion.build(TINY), TINY)) == 2


def test_a_batch_has_even_times_and_some_labels_left_out() -> None:
    data = images.Images(np.zeros((50, 1, 4, 4), np.uint8), 5, np.arange(50) % 2, ("a", "b"))
    config = replace(TINY, batch=1000, drop_label=0.25)
    x0, t, eps, labels = diffusion.draw(data, config, gen())
    assert (t.mul(1000).long() == torch.arange(1000)).all()
    assert (x0 == -1).all()
    assert eps.std().item() == pytest.approx(1, abs=0.03)
    assert (labels == 2).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert (diffusion.draw(data, replace(config, classes=0), gen())[3] == 0).all()


def test_flops_are_those_of_the_matrices() -> None:
    """A transformer of one block: products of 4 tokens of width 16, and those that look at the condition once."""
    model = diffusion.build(TINY)
    C, T, pixels = 16, 4, 4
    products = 2 * (12 * C * C * T + 2 * pixels * C * T + (6 + 2) * C * C + 64 * C + C * C) + 4 * T * T * C
    assert diffusion.flops(model) == 3 * products


# -- runs ----------------------------------------------------------------------------------------------------------------------------------------------


def start(config: Config, folder: Path) -> Run:
    return Run(folder, config, fixed=plan.parse(PLAN), quiet=True)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("backbone", "objective"), [("transformer", "flow"), ("unet", "v")])
def test_training_learns_samples_and_evaluates(tmp_path: Path, backbone: str, objective: str) -> None:
    config = replace(
        TINY, data=write_data(tmp_path), backbone=backbone, objective=objective, steps=150, batch=32, width=32, lr=5e-3, eval_every=75,
        sample_steps=8, eval_samples=60,
    )  # fmt: skip
    with start(config, tmp_path / "run") as run:
        model = diffusion.train(config, run)
    rows = rows_of(tmp_path / "run")
    assert [r["step"] for r in rows if "fid" in r] == [75, 150]
    assert np.mean([r["loss"] for r in rows[-10:]]) < 0.6 * np.mean([r["loss"] for r in rows[:5]])
    grids = sorted(p.stem for p in (tmp_path / "run" / "media").glob("*.png"))
    assert grids == ["samples-00000075", "samples-00000075-raw", "samples-00000150", "samples-00000150-raw"]
    assert rows[-1]["raw_val_bpd"] == pytest.approx(rows[-1]["val_bpd"], abs=0.3)
    assert rows[-1]["raw_val_bpd"] != rows[-1]["val_bpd"]
    results = diffusion.evaluate(model, config, media=tmp_path, samples=60, flow_steps=10)
    assert results["flow_bpd"] == pytest.approx(results["bpd"], abs=0.5)
    assert results["bpd"] < results["uniform_bpd"]  # type: ignore[operator]
    assert results["bpd"] == pytest.approx(rows[-1]["val_bpd"], abs=6 * rows[-1]["val_bpd_se"])
    assert results["images"] == 24
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"
    labels = torch.tensor([0, 1]).repeat_interleave(100)
    drawn = diffusion.sample(model, labels, gen(), steps=10).float()
    top, bottom = drawn[:, :, :2].mean((1, 2, 3)), drawn[:, :, 2:].mean((1, 2, 3))
    assert ((top > bottom) == (labels == 0)).float().mean() > 0.9  # samples are of the class that was asked for


GOLDEN = {"epsilon": [1.06029, 1.03776, 1.29413], "v": [0.92756, 0.94456, 1.06061], "flow": [1.83012, 1.83818, 2.08902]}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_losses_are_those_of_before(tmp_path: Path, objective: str) -> None:
    config = replace(TINY, data=write_data(tmp_path), objective=objective, steps=3, eval_every=3)
    with start(config, tmp_path / "run") as run:
        diffusion.train(config, run)
    assert [r["loss"] for r in rows_of(tmp_path / "run")] == pytest.approx(GOLDEN[objective], rel=1e-3)


SCRIPT = """
import dataclasses, os, sys
from pathlib import Path
from onetorch.generative import diffusion, fid
from onetorch.runs import plan
from onetorch.runs.run import Run

fid.STEPS = 5
where, data, backbone, stop, resume = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == "resume"
config = diffusion.Config(
    data=data, shape=(1, 4, 4), levels=5, classes=2, steps=4, batch=8, width=16, depth=1, heads=2, stages=(1, 2), eval_every=1, eval_samples=8,
    sample_steps=2, backbone=backbone, sampler="ancestral",
)
fixed = plan.parse("threads=1,dtype=bfloat16,attention=explicit,layout=" + ("channels_last" if backbone == "unet" else "contiguous_format"))
run = Run(where, config, resume=resume, fixed=fixed, checkpoint_seconds=0, quiet=True)
save = run.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        os._exit(9)  # as if killed: nothing is flushed or closed
run.checkpoint = checkpoint
with run:
    diffusion.train(config, run)
"""


@pytest.mark.parametrize("backbone", ["transformer", "unet"])
def test_four_steps_are_two_steps_a_new_process_and_two_steps(tmp_path: Path, backbone: str) -> None:
    data = write_data(tmp_path)

    def process(name: str, stop: int, how: str) -> int:
        return subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / name, data, backbone, str(stop), how], check=False).returncode

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
        diffusion.train(config, run)
    write_data(tmp_path, 130)
    with pytest.raises(RunError, match="the images are not those this run was begun with"):
        with Run(tmp_path / "run", config, resume=True, quiet=True) as run:
            diffusion.train(config, run)


def test_a_loss_that_is_no_number_is_caught_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = replace(TINY, data=write_data(tmp_path)), diffusion.losses, []

    def broken(model: diffusion.Diffusion, *args: Tensor) -> Tensor:
        calls.append(model)
        return real(model, *args) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(diffusion, "losses", broken)
    with pytest.raises(NonFinite, match="loss is nan in iteration 2"), start(config, tmp_path / "run") as run:
        diffusion.train(config, run)
    assert all(p.isfinite().all() for p in calls[0].parameters())


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"batch": -1}, {"width": 20}, {"lr": 0.0}, {"lr_matrix": math.inf}, {"ema": 1.0}, {"decay": -0.1}, {"drop_label": 1.0}, {"shape": (2, 8, 8)},
    {"levels": 1}, {"eval_samples": 2}, {"eval_share": 0.0}, {"guidance": -1.0}, {"guidance": 2.0, "classes": 0}, {"patch": 3}, {"stages": ()},
    {"stages": (1, 1, 1, 1, 1), "backbone": "unet"},
    {"width": 8, "stages": (1,), "heads": 3, "backbone": "unet"}, {"warmup": -1},
])  # fmt: skip
def test_wrong_configs_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def test_an_evaluation_keeps_its_share_of_the_arithmetic() -> None:
    """Heun's 20 steps show an image to the network 40 times, twice as often with guidance; a step shows it a batch as if three times."""
    config = replace(TINY, eval_samples=1000, eval_every=100, batch=100, sampler="heun", sample_steps=20, eval_share=0.2)
    assert diffusion.affordable(config) == 75  # 0.2 of 30,000 is 2 * 75 * 40
    assert diffusion.affordable(replace(config, sampler="euler")) == 150
    assert diffusion.affordable(replace(config, sampler="euler", guidance=2.0)) == 75
    assert diffusion.affordable(replace(config, eval_share=0.01)) == 50
    assert diffusion.affordable(replace(config, eval_share=0.01, eval_samples=10)) == 10


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"sample_steps": -1}, {"times": 0}, {"flow_steps": -1}, {"probes": -1}, {"guidance": -0.5}])
def test_wrong_options_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        diffusion.evaluate(diffusion.build(TINY), TINY, **wrong)
    with pytest.raises(UsageError, match="no classes"):
        diffusion.evaluate(diffusion.build(replace(TINY, classes=0)), replace(TINY, classes=0), guidance=2.0)


def test_a_run_that_diverges_is_ended_with_the_reason(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path), steps=50, lr=1.0)
    with pytest.raises(RunError, match=r"the run diverges: in step \d+ .* lower --lr and --lr_matrix"), start(config, tmp_path / "run") as run:
        diffusion.train(config, run)


def test_rates_follow_the_schedule_and_every_row_counts_the_images(tmp_path: Path) -> None:
    config = replace(TINY, data=write_data(tmp_path), schedule="linear", warmup=1, eval_every=6)
    with start(config, tmp_path / "run") as run:
        kept, save = [], run.checkpoint

        def checkpoint(state: diffusion.State) -> None:
            optimizer = state.optimizers[0]
            kept.append(optimizer.param_groups[0]["lr"])
            save(state)

        run.checkpoint = checkpoint  # type: ignore[method-assign]
        diffusion.train(config, run)
    assert kept == pytest.approx([config.lr * f for f in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert [row["images"] for row in rows_of(tmp_path / "run")] == [8, 16, 24, 32, 40, 48]
