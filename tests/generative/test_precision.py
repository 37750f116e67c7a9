import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onetorch.generative import gpt, precision
from onetorch.generative.precision import LossScale
from onetorch.runs import checkpoint, plan
from onetorch.runs.errors import NonFinite, UsageError
from onetorch.runs.run import Run

TINY = gpt.Config(
    steps=8, batch=4, context=16, layers=2, heads=2, width=16, ngram_orders=(2, 3), ngram_rows=50, ngram_width=8, warmup=2, base_width=None, base_batch=None,
    eval_every=8, eval_windows=4, eval_samples=0,
)  # fmt: skip


def text_file(folder: Path) -> Path:
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not ", "that ", "is ", "the ", "question.\n"], 3000)
    (folder / "text.txt").write_text("".join(words)[:6000], encoding="utf-8")
    return folder / "text.txt"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(config: gpt.Config, folder: Path, dtype: str, resume: bool = False) -> Run:
    return Run(folder, config, fixed=plan.parse(f"threads=1,dtype={dtype},attention=explicit"), resume=resume, checkpoint_seconds=0, quiet=True)


def test_the_factor_moves_as_torchs_grad_scaler_does() -> None:
    weight = torch.ones(1, requires_grad=True)
    reference, optimizer, ours = torch.amp.GradScaler("cpu"), torch.optim.SGD([weight], lr=0.0), LossScale("float16")
    reference.scale(weight.sum())
    for step in range(4100):
        norm = torch.tensor(math.inf if step in (0, 1, 50, 3000) else 1.0)
        weight.grad = norm.reshape(1).clone()
        reference.step(optimizer)
        reference.update()
        assert ours.take(norm) == bool(norm.isfinite())
        assert ours.factor == reference.get_scale(), step
    assert ours.factor == 2.0**16 / 16 * 2  # four overflows, and 2000 steps without one once: after step 50


def test_the_gradient_is_brought_back_and_other_kinds_have_no_factor() -> None:
    layer = torch.nn.Linear(3, 2)
    for kind, factor in (("float16", 65536.0), ("bfloat16", 1.0), ("float8", 1.0)):
        scale = LossScale(kind)
        layer.zero_grad()
        (layer(torch.ones(1, 3)).sum() * scale.factor).backward()
        assert layer.weight.grad is not None
        assert scale.factor == factor
        scale.undo(layer)
        assert torch.equal(layer.weight.grad, torch.ones(2, 3))
        assert scale.take(torch.tensor(math.nan)) == (kind != "float16")


def test_a_gradient_that_is_no_number_at_any_factor_is_not_refused_for_ever() -> None:
    scale, refused = LossScale("float16"), 0
    while not scale.take(torch.tensor(math.nan)):
        refused += 1
    assert refused == 17  # 2^16 to 1


def test_float16_learns_what_float32_does(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path), steps=60, eval_every=60)
    for dtype in ("float32", "float16"):
        with start(config, tmp_path / dtype, dtype) as run:
            gpt.train(config, run)
    full, half = rows(tmp_path / "float32"), rows(tmp_path / "float16")
    assert [r["loss"] for r in half] != [r["loss"] for r in full]
    assert half[0]["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=0.01)
    assert half[-1]["val_loss"] == pytest.approx(full[-1]["val_loss"], abs=0.1)
    assert half[-1]["val_loss"] < 2.5


def test_steps_whose_gradient_overflows_are_left_out_and_the_factor_is_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LARGEST", 2.0**28)
    config = replace(TINY, data=text_file(tmp_path), steps=24, eval_every=24)

    with start(config, tmp_path / "whole", "float16") as run:
        gpt.train(config, run)
    left_out = [r["step"] for r in rows(tmp_path / "whole") if "grad_norm" not in r]
    assert left_out[:3] == [1, 2, 3]
    assert 3 < len(left_out) < 20
    loss = {r["step"]: r["loss"] for r in rows(tmp_path / "whole")}
    assert loss[1] == loss[2] == pytest.approx(math.log(256), rel=1e-3)  # no step was taken
    assert loss[24] < loss[1] - 0.5

    run = start(config, tmp_path / "parts", "float16")
    save = run.checkpoint

    def stop(state: gpt.State) -> None:
        save(state)
        if state.iteration == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt), run:
        gpt.train(config, run)
    with start(config, tmp_path / "parts", "float16", resume=True) as run:
        gpt.train(config, run)
    ends = [checkpoint.load(tmp_path / name / "checkpoints" / "00000024") for name in ("whole", "parts")]
    assert all(torch.equal(a, ends[1].model[name]) for name, a in ends[0].model.items())
    assert [r["loss"] for r in rows(tmp_path / "parts")] == list(loss.values())


def test_a_loss_that_is_no_number_is_refused_in_float16_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpt.nll
    monkeypatch.setattr(gpt, "nll", lambda model, window, counted=False: real(model, window, counted) * math.nan)
    config = replace(TINY, data=text_file(tmp_path))
    with pytest.raises(NonFinite, match="loss is nan in iteration 1"), start(config, tmp_path / "run", "float16") as run:
        gpt.train(config, run)


def test_what_is_asked_for_only_is_not_measured() -> None:
    dimensions = {"dtype": ("float32", "bfloat16"), "threads": (1, 2)}
    asked = {"dtype": precision.ASKED}
    assert plan.fix(dimensions, {}, asked) == dimensions
    assert plan.fix(dimensions, {"dtype": "float16"}, asked)["dtype"] == ("float16",)
    with pytest.raises(UsageError, match="dtype is one of float32, bfloat16, float16, float8, got 'float4'"):
        plan.fix(dimensions, {"dtype": "float4"}, asked)
    with pytest.raises(UsageError, match="dtype is one of float32, bfloat16, got 'float16'"):
        plan.fix(dimensions, {"dtype": "float16"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_float8_is_refused_with_the_reason_where_there_is_none(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path))
    with pytest.raises(UsageError, match="dtype=float8 needs an NVIDIA GPU of compute capability"), start(config, tmp_path / "run", "float8") as run:
        gpt.train(config, run)
    assert not (tmp_path / "run").exists()


def test_float8_of_a_gpu_that_is_too_old_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UsageError, match=r"A100 has 8\.0"):
        precision.to_float8(torch.nn.Linear(16, 16))
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(UsageError, match="onetorch\\[float8\\]"):
        precision.to_float8(torch.nn.Linear(16, 16), emulate=True)


@pytest.mark.filterwarnings("ignore")  # of torchao's own import
def test_float8_changes_the_logits_little_and_no_name() -> None:
    pytest.importorskip("torchao", reason="the extra float8 is not installed")
    torch.manual_seed(0)
    model, window = gpt.build(TINY), torch.randint(256, (8, 17))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    full, names = gpt.nll(model, window).mean(), {name: p.clone() for name, p in model.state_dict().items()}
    precision.to_float8(model.blocks, emulate=True)
    model.dtype = precision.dtype("float8")
    assert {type(m).__name__ for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)} == {"Float8Linear"}
    assert all(torch.equal(p, names[name]) for name, p in model.state_dict().items())
    assert list(model.state_dict()) == list(names)
    low = gpt.nll(model, window).mean()
    assert low.item() == pytest.approx(full.item(), rel=0.05)
    assert low.item() != full.item()
    muon, adam = gpt.optimizers(model, TINY)
    for _ in range(20):
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        loss = gpt.nll(model, window).mean()
        loss.backward()
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"]
            optimizer.step()
    assert loss.item() < 0.5 * low.item()


@pytest.mark.filterwarnings("ignore")
def test_float8_leaves_layers_of_other_sizes() -> None:
    pytest.importorskip("torchao", reason="the extra float8 is not installed")
    layers = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16), torch.nn.Linear(16, 32))
    precision.to_float8(layers, emulate=True)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Linear", "Float8Linear"]
