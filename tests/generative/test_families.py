"""What the three families of images have in common."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from onetorch.generative import diffusion, fid, glow, vae
from onetorch.runs import plan
from onetorch.runs.run import Run

FAMILIES: list[tuple[ModuleType, dict[str, Any]]] = [
    (diffusion, {"classes": 0, "width": 16, "depth": 1, "heads": 2, "patch": 2, "sample_steps": 3}),
    (vae, {"blocks": (1, 2), "width": 8, "inner": 8, "latent": 2, "kl_warmup": 4}),
    (glow, {"scales": 1, "steps_per_scale": 2, "width": 16}),
]
families = pytest.mark.parametrize(("family", "small"), FAMILIES, ids=lambda x: getattr(x, "__name__", "").rpartition(".")[2])


@pytest.fixture(autouse=True)
def quick_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fid, "STEPS", 5)


def configured(family: ModuleType, small: dict[str, Any], folder: Path, **fields: Any) -> Any:
    rng = np.random.default_rng(0)
    pixels = (rng.integers(2, size=(120, 1, 1)) ^ (rng.random((120, 4, 4)) < 0.1)).astype(np.uint8) * 4
    np.savez(folder / "data.npz", images=pixels, levels=5)
    common = {"data": folder / "data.npz", "shape": (1, 4, 4), "levels": 5, "batch": 8, "warmup": 2, "eval_every": 10**6, "eval_samples": 8}
    return family.Config(**{**common, **small, **fields})


def train(family: ModuleType, config: Any, folder: Path, fixed: str = "threads=1") -> list[dict[str, Any]]:
    if family is diffusion:
        fixed += ",attention=explicit,layout=contiguous_format"
    with Run(folder, config, fixed=plan.parse(fixed), quiet=True) as run:
        family.train(config, run)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@families
def test_every_row_has_times_images_and_utilisation(family: ModuleType, small: dict[str, Any], tmp_path: Path) -> None:
    rows = train(family, configured(family, small, tmp_path, steps=3), tmp_path / "run", "threads=1,dtype=float32")
    assert [row["images"] for row in rows] == [8, 16, 24]
    for row in rows:
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["mfu"] > 0


@families
def test_a_batch_in_parts_gives_the_same_steps(family: ModuleType, small: dict[str, Any], tmp_path: Path) -> None:
    config = configured(family, small, tmp_path, steps=6)
    whole, parts = (train(family, replace(config, accumulate=n), tmp_path / str(n), "threads=1,dtype=float32") for n in (1, 3))  # parts of 3, 3 and 2
    for column in ("loss", "grad_norm"):
        assert [row[column] for row in parts] == pytest.approx([row[column] for row in whole], rel=1e-4)
    assert parts[-1]["val_bpd"] == pytest.approx(whole[-1]["val_bpd"], rel=1e-3)


@families
def test_averages_of_several_rates_are_evaluated(family: ModuleType, small: dict[str, Any], tmp_path: Path) -> None:
    config = configured(family, small, tmp_path, steps=12, ema=0.5, ema_beside=(0.9, 0.0))
    row = train(family, config, tmp_path / "run", "threads=1,dtype=float32")[-1]
    assert row["val_bpd_ema_0"] == row["raw_val_bpd"]  # of rate 0 the average is the weights
    assert len({row[name] for name in ("val_bpd", "val_bpd_ema_0.9", "raw_val_bpd")}) == 3
    alone = train(family, replace(config, ema=0.9, ema_beside=()), tmp_path / "alone", "threads=1,dtype=float32")[-1]
    assert row["val_bpd_ema_0.9"] == alone["val_bpd"]
    assert (tmp_path / "run" / "media" / "samples-00000012-ema-0.9.png").exists()
    with pytest.raises(ValueError, match="different rates"):
        replace(config, ema_beside=(0.5,))


@families
def test_bfloat16_is_near_float32(family: ModuleType, small: dict[str, Any], tmp_path: Path) -> None:
    config = configured(family, small, tmp_path, steps=30)
    full, low = ([row["loss"] for row in train(family, config, tmp_path / dtype, f"threads=1,dtype={dtype}")] for dtype in ("float32", "bfloat16"))
    assert low != full
    assert low[:5] == pytest.approx(full[:5], rel=0.03)
    assert np.mean(low[-5:]) == pytest.approx(np.mean(full[-5:]), rel=0.1)


def test_glow_inverts_in_bfloat16_what_it_did_in_bfloat16(tmp_path: Path) -> None:
    config = replace(configured(glow, FAMILIES[2][1], tmp_path), coupling="affine")
    torch.manual_seed(0)
    model = glow.prepare(glow.build(config), {"dtype": "bfloat16", "device": "cpu"})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        x = torch.rand(4, *model.padded) - 0.5
        z, _, _ = model(x)
        assert torch.allclose(model.inverse(z), x, atol=1e-4)
        exact = glow.prepare(model, {"dtype": "float32", "device": "cpu"})(x)[0]
    assert not torch.equal(z[-1], exact[-1])
    assert torch.allclose(z[-1], exact[-1], atol=0.1)
