import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onetorch.generative import gpt
from onetorch.generative.vocabulary import learn
from onetorch.runs import checkpoint, folder, plan
from onetorch.runs.errors import NonFinite, RunError, UsageError
from onetorch.runs.run import Run

TINY = gpt.Config(
    steps=8, batch=4, context=16, layers=2, heads=2, width=16, ngram_orders=(2, 3), ngram_rows=50, ngram_width=8, lr_matrix=0.03, warmup=2, rotary_base=30.0,
    base_width=None, base_batch=None, eval_every=4, eval_windows=4,
)  # fmt: skip
PLAN = "threads=1,dtype=float32,attention=explicit"


def model_with_weights(config: gpt.Config = TINY, seed: int = 0) -> gpt.GPT:
    """A model no matrix of which is zero, as after some training."""
    torch.manual_seed(seed)
    model = gpt.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def text_file(folder: Path, size: int = 6000) -> Path:
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not ", "that ", "is ", "the ", "question.\n"], size)
    (folder / "text.txt").write_text("".join(words)[:size], encoding="utf-8")
    return folder / "text.txt"


def start(config: gpt.Config, folder: Path) -> Run:
    return Run(folder, config, fixed=plan.parse(PLAN), quiet=True)


def test_the_future_does_not_change_the_past() -> None:
    model, window = model_with_weights(), tokens(2, 16)
    before = model(window)
    for t in (0, 5, 15):
        changed = window.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 256
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(-1).any()


def test_every_byte_of_the_window_reaches_the_last_logits() -> None:
    model, window = model_with_weights(), tokens(1, 16)
    before = model(window)[0, -1]
    for t in range(16):
        changed = window.clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        assert not torch.equal(model(changed)[0, -1], before), t


def test_rotary_products_depend_on_the_distance_alone() -> None:
    model = gpt.build(TINY)
    q, k = torch.randn(2, 8)  # D = 8
    x = torch.stack([q, k]).expand(1, 16, 1, 2, 8)  # heads 0 and 1 hold q and k at every position
    turned = gpt.rotate(x, model.rotary)[0, :, 0]  # (T, 2, D)
    scores = turned[:, 0] @ turned[:, 1].T  # (T, T): q at t times k at s
    for lag in (-3, 0, 5):
        assert torch.allclose(scores.diagonal(lag), scores.diagonal(lag)[:1].expand(16 - abs(lag)), atol=1e-5)
    assert scores[0, 0].item() == pytest.approx((q @ k).item(), abs=1e-5)
    # At position 1 the first pair (x_0, x_4) turns by one radian.
    assert turned[1, 0, 0].item() == pytest.approx((q[0] * math.cos(1) - q[4] * math.sin(1)).item(), abs=1e-5)
    assert turned[1, 0, 4].item() == pytest.approx((q[4] * math.cos(1) + q[0] * math.sin(1)).item(), abs=1e-5)


def test_a_block_is_the_formula_written_out() -> None:
    model, x = model_with_weights(), torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(2))
    block = model.blocks[0]
    with torch.no_grad():
        found = block(x, model.rotary[:, :3], functools.partial(model._attend, 0, 0, None))

        def normalized(v: Tensor) -> Tensor:
            return (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()

        def turned(v: Tensor, t: int) -> Tensor:
            out = v.clone()
            for i in range(4):
                a = t * 30.0 ** (-2 * i / 8)
                out[i], out[i + 4] = v[i] * math.cos(a) - v[i + 4] * math.sin(a), v[i + 4] * math.cos(a) + v[i] * math.sin(a)
            return out

        expected = []
        for t in range(3):
            parts = []
            for h in range(2):
                rows = [block.qkv.weight @ normalized(x[0, s]) for s in range(t + 1)]
                q, *_ = [turned(normalized(rows[t][8 * h : 8 * h + 8]), t)]
                ks = [turned(normalized(r[16 + 8 * h : 24 + 8 * h]), s) for s, r in enumerate(rows)]
                weight = torch.softmax(torch.stack([q @ k for k in ks]) * 1.4 / math.sqrt(8), 0)
                parts.append(sum(w * r[32 + 8 * h : 40 + 8 * h] for w, r in zip(weight, rows, strict=True)))
            y = x[0, t] + block.out.weight @ torch.cat(parts)
            expected.append(y + block.down.weight @ torch.relu(block.up.weight @ normalized(y)) ** 2)
    assert torch.allclose(found[0], torch.stack(expected), atol=1e-4)


def test_all_attention_paths_agree() -> None:
    model, window = model_with_weights(), tokens(3, 16)
    explicit = model(window)
    for path in ("sdpa", "blocks"):
        model.path = path
        assert torch.allclose(model(window), explicit, atol=1e-4), path


def test_bfloat16_changes_the_loss_little_and_keeps_float32_weights_and_gradients() -> None:
    model, window = model_with_weights(), tokens(8, 17)
    loss = gpt.nll(model, window).mean()
    model.dtype = torch.bfloat16
    low = gpt.nll(model, window).mean()
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss.item(), rel=0.02)
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_untrained_model_is_uniform() -> None:
    assert torch.equal(gpt.build(TINY)(tokens(2, 16)), torch.zeros(2, 16, 256))  # the head begins at zero
    assert gpt.nll(gpt.build(TINY), tokens(2, 17)).tolist() == [pytest.approx([math.log(256)] * 16)] * 2


def test_loss_by_hand() -> None:
    # Logits ln 3 for byte 65 and 0 for the other 255, whatever came before.
    class Fixed(torch.nn.Module):
        def forward(self, window: Tensor) -> Tensor:
            logits = torch.zeros(*window.shape, 256)
            logits[..., 65] = math.log(3.0)
            return logits

    window = torch.tensor([[1, 65, 65, 2]])
    expected = [-math.log(3 / 258), -math.log(3 / 258), -math.log(1 / 258)]
    assert gpt.nll(Fixed(), window).tolist() == [pytest.approx(expected)]  # type: ignore[arg-type]


def test_hashed_ngrams_depend_on_their_own_bytes_alone() -> None:
    model = gpt.build(TINY)
    model.config = replace(TINY, ngram_orders=(2, 4), ngram_rows=10**9)  # the table of so many rows is not needed for its row numbers
    a, b = torch.tensor([[7, 8, 9, 1, 2, 3, 4]]), torch.tensor([[0, 1, 2, 3, 4]])
    rows_a, rows_b = model.hashed(a), model.hashed(b)
    assert rows_a.shape == (1, 7, 2)
    assert torch.equal(rows_a[0, 6], rows_b[0, 4])  # both end in 1 2 3 4
    assert rows_a[0, 4, 0] == rows_b[0, 2, 0]  # both end in 1 2 …
    assert rows_a[0, 4, 1] != rows_b[0, 2, 1]  # … after 8 9, and after the beginning and 0
    assert len(set(model.hashed(tokens(64, 16)).flatten().tolist())) > 1900  # 2048 n-grams, few of them equal, hardly any collision


def test_parameters_are_shared_out_among_the_optimizers() -> None:
    model = gpt.build(TINY)
    held = [id(p) for o in gpt.optimizers(model, TINY) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_score_is_the_mean_over_every_byte_but_the_first() -> None:
    model, text = model_with_weights(), tokens(16 * 5 + 4).numpy().astype(np.uint8)  # 5 windows and one of 3
    with torch.no_grad():
        losses = [gpt.nll(model, torch.from_numpy(text[i : i + 17].astype(np.int64))[None])[0] for i in range(0, 83, 16)]
    assert [len(x) for x in losses] == [16] * 5 + [3]
    loss, se, count, bpb, bpb_se, size, _ = gpt.score(model, text)
    assert count == size == 83
    assert (bpb, bpb_se) == (pytest.approx(loss / math.log(2)), pytest.approx(se / math.log(2)))
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    m, w = np.array([x.mean().item() for x in losses]), np.array([16] * 5 + [3]) / 83
    assert se == pytest.approx(math.sqrt(6 / 5 * np.sum(w**2 * (m - w @ m) ** 2)), rel=1e-3)


def test_samples_follow_prompt_temperature_and_generator() -> None:
    model = model_with_weights()
    greedy = gpt.generate(model, b"ab", 20, torch.Generator(), rows=2, temperature=0)
    assert greedy[0] == greedy[1]
    assert greedy[0][:2] == b"ab"
    assert len(greedy[0]) == 22
    for seen, chosen in ((greedy[0][:16], 16), (greedy[0][9:17], 17), (greedy[0][9:21], 21)):  # full after 16, it begins again with the last 8
        assert model(torch.tensor([list(seen)]))[0, -1].argmax() == greedy[0][chosen]
    drawn = [gpt.generate(model, b"a", 9, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="prompt"):
        gpt.generate(model, b"", 3, torch.Generator())


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"batch": -1}, {"width": 20}, {"lr_matrix": 0.0}, {"lr_head": math.inf}, {"momentum": 1.0}, {"decay": 0.0}, {"ngram_orders": (1,)},
    {"rotary_base": 1.0}, {"eval_windows": 1},
])  # fmt: skip
def test_wrong_configs_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        gpt.Config(**wrong)


def test_training_learns_and_evaluates(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path), steps=60, eval_every=20)
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(256), rel=1e-4)
    assert rows[-1]["loss"] < 2.2  # eight words of 20 letters in any order
    assert [r["step"] for r in rows if "val_bpb" in r] == [20, 40, 60]
    assert rows[-1]["val_bpb"] == pytest.approx(rows[-1]["val_loss"] / math.log(2))
    results = gpt.evaluate(model, config, media=tmp_path, samples=2, length=30, prompt="to ")
    assert results["bytes"] == 599
    assert results["bpb"] == pytest.approx(rows[-1]["val_bpb"], abs=5 * rows[-1]["val_bpb_se"])
    assert 0 < results["ngram_bpb"] < 3  # type: ignore[operator]
    samples = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- sample") == 2
    assert "--- sample 2 ---\nto " in samples


@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("grad_norm", math.inf)])
def test_a_loss_or_gradient_that_is_no_number_is_caught_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float) -> None:
    config, real = replace(TINY, data=text_file(tmp_path)), gpt.nll
    calls: list[gpt.GPT] = []

    def broken(model: gpt.GPT, window: Tensor, counted: bool = False) -> Tensor:
        calls.append(model)
        losses = real(model, window)
        if len(calls) == 3 and what == "loss":
            return losses * value
        if len(calls) == 3:
            losses.register_hook(lambda grad: grad * value)  # the loss is a number, its gradient is none
        return losses

    monkeypatch.setattr(gpt, "nll", broken)
    with pytest.raises(NonFinite, match=f"{what} is (nan|inf) in iteration 3"), start(config, tmp_path / "run") as run:
        gpt.train(config, run)
    assert all(p.isfinite().all() for p in calls[0].parameters())


@pytest.mark.parametrize("wrong", [{"windows": 1}, {"samples": 0}, {"length": 0}, {"prompt": ""}, {"temperature": -1.0}, {"top_k": -1}])
def test_wrong_options_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        gpt.evaluate(gpt.build(TINY), TINY, **wrong)


def test_no_data_is_one_line(tmp_path: Path) -> None:
    config = replace(TINY, data=tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match=r"nothing\.txt: there is no such file"), start(config, tmp_path / "run") as run:
        gpt.train(config, run)


SCRIPT = """
import os, sys
from pathlib import Path
from onetorch.generative import gpt
from onetorch.generative.vocabulary import learn
from onetorch.runs import checkpoint, folder, plan
from onetorch.runs.run import Run

where, data, stop, resume = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
config = gpt.Config(data=data, steps=4, batch=4, context=16, layers=2, heads=2, width=16, ngram_rows=50, ngram_width=8, eval_every=1, eval_windows=4,
                    eval_samples=1, eval_seconds=0.05, ema=(0.9,), vocabulary=270, base_width=None, base_batch=None)
run = Run(where, config, resume=resume, fixed=plan.parse("threads=1,dtype=bfloat16,attention=explicit"), checkpoint_seconds=0, quiet=True)
save = run.checkpoint
def checkpoint(state):
    save(state)
    if state.iteration == stop:
        os._exit(9)  # as if killed: nothing is flushed or closed
run.checkpoint = checkpoint
with run:
    gpt.train(config, run)
"""


def test_four_steps_are_two_steps_a_new_process_and_two_steps(tmp_path: Path) -> None:
    text = text_file(tmp_path)

    def process(name: str, stop: int, how: str) -> int:
        return subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / name, text, str(stop), how], check=False).returncode

    assert process("whole", 0, "new") == 0
    assert process("parts", 2, "new") == 9
    assert process("parts", 0, "resume") == 0
    weights = [(tmp_path / name / "checkpoints" / "00000004" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    for row in rows[0] + rows[1]:
        for name in folder.TIMES:
            del row[name]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]


def test_a_run_does_not_go_on_with_another_text(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path))
    with start(config, tmp_path / "run") as run:
        gpt.train(config, run)
    assert config.data is not None
    config.data.write_bytes(config.data.read_bytes()[::-1])
    with pytest.raises(RunError, match=r"the text is not the one this run was begun with"):
        with Run(tmp_path / "run", config, resume=True, quiet=True) as run:
            gpt.train(config, run)


@pytest.mark.parametrize("kind", ["local", "strided", "fixed"])
def test_sparse_attention_is_the_formula_over_what_each_byte_may_see(kind: str) -> None:
    config = replace(TINY, context=256, attention=kind, stride=64)
    model, window = model_with_weights(config), tokens(2, 256)
    sparse = model(window)
    model.path = "explicit"
    assert torch.allclose(model(window), sparse, atol=1e-4)
    model.config = replace(config, attention="dense")
    assert not torch.allclose(model(window), sparse, atol=1e-2)


@pytest.mark.parametrize("kind", ["dense", "local", "strided", "fixed"])
def test_the_cache_changes_no_byte_of_a_sample(kind: str) -> None:
    config = replace(TINY, context=96, attention=kind, stride=64)
    model = model_with_weights(config)
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01}):
        cached, plain = (
            gpt.generate(model, b"to be", 150, torch.Generator().manual_seed(3), rows=2, cached=cached, **settings)  # type: ignore[arg-type]
            for cached in (True, False)
        )
        assert cached == plain, settings
        assert len(cached[0]) == 155  # the window was full in between


def test_samples_stop_when_their_seconds_are_over() -> None:
    assert gpt.generate(model_with_weights(), b"ab", 50, torch.Generator(), seconds=0.0) == [b"ab"]


def test_the_gradient_of_a_batch_in_parts_is_that_of_the_whole() -> None:
    model, window = model_with_weights(), tokens(6, 17)
    whole = gpt.gradient(model, window, 1)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    parts = gpt.gradient(model, window, 4)  # 2, 2 and 2
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    for p, e in zip((p for p in model.parameters() if p.grad is not None), expected, strict=True):
        assert torch.allclose(p.grad, e, atol=1e-6)


def test_flops_by_hand() -> None:
    config = replace(TINY, ngram_orders=())  # two layers of width 16, T = 3
    matrices = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 16 * 256
    pairs = 2 * 2 * 6  # layers, heads, 1 + 2 + 3
    assert gpt.flops(config, 3) == 6 * matrices * 3 + 12 * 8 * pairs
    assert gpt.flops(TINY, 3) - gpt.flops(config, 3) == 6 * 8 * 16 * 3
    local = replace(config, context=256, attention="local", stride=64)  # whole blocks of 32: their own, the one before and the one before that
    rows = sum(min(t + 1, t % 32 + 65) for t in range(256))
    assert gpt.flops(local, 256) == 6 * matrices * 256 + 12 * 8 * 2 * 2 * rows


def test_stages_averages_and_the_norm_take_part_in_training(tmp_path: Path) -> None:
    config = replace(
        TINY, data=text_file(tmp_path), steps=8, batch_stages=(0.5, 1.0), context_stages=(0.25, 1.0), ema=(0.5, 0.9), final="ema", clip=1e-9, eval_samples=1,
        schedule="cosine",
    )  # fmt: skip
    torch.manual_seed(config.seed)
    before = gpt.build(config).blocks[0].up.weight
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run)
    rows = list(folder.rows(tmp_path / "run"))
    assert [r["tokens"] for r in rows] == [8, 16, 24, 32, 96, 160, 224, 288]  # 2 windows of 4, then 4 of 16
    assert all(0 < r["mfu"] < 1 for r in rows)
    assert {"val_bpb", "val_bpb_ema_0.5", "val_bpb_ema_0.9"} <= rows[-1].keys()
    assert rows[-1]["val_bpb"] == rows[-1]["val_bpb_ema_0.5"]  # the run ends with the average
    assert (model.head.weight.abs() < 0.1).all()
    assert not torch.equal(model.blocks[0].up.weight, before)  # Muon and Adam do not see the size of the gradient
    samples = (tmp_path / "run" / "media" / "samples-00000004.txt").read_text(encoding="utf-8")
    assert "--- sample 1 ---\n\n" in samples
    assert "--- sample 1, average 0.5 ---\n\n" in samples


def test_a_run_that_diverges_is_ended_with_the_reason(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path), steps=100, lr_head=50.0)
    with pytest.raises(RunError, match=r"the run diverges: in step \d+ .* after 5\.545 at first .* lower --lr_matrix"), start(config, tmp_path / "run") as run:
        gpt.train(config, run)


def test_rates_are_carried_over_to_width_and_batch() -> None:
    def rates(**fields: int | None) -> list[float]:
        config = replace(TINY, **fields)  # type: ignore[arg-type]
        return [g["rate"] for o in gpt.optimizers(gpt.build(config), config) for g in o.param_groups]

    own = rates()
    # As it is without a word said: four times the default's batch, half its width.
    assert rates(base_width=gpt.Config.base_width, base_batch=gpt.Config.base_batch, width=96, batch=64) == pytest.approx(
        [2 * own[0], 2 * own[1], 2 * own[2] * 2, 2 * own[3]]
    )
    assert rates(base_width=16, base_batch=4) == own
    assert rates(base_width=4) == pytest.approx([own[0], own[1], own[2] / 4, own[3]])
    assert rates(base_batch=1) == pytest.approx([2 * r for r in own])


def test_the_size_of_a_step_in_logits_does_not_depend_on_the_width() -> None:
    """The coordinate check of mu-P: how much each of three steps changes the logits, at widths 32 and 128, with the rates of width 32 carried over or not."""

    def changes(width: int, base: int | None) -> list[float]:
        config = replace(TINY, width=width, base_width=base, lr_matrix=0.02, lr_head=0.002, lr_embedding=0.01)
        torch.manual_seed(0)
        model, window = gpt.build(config), tokens(16, 17) % 8
        rates = gpt.optimizers(model, config)
        found = []
        for _ in range(3):
            before = model(window[:, :-1]).detach()
            gpt.nll(model, window).mean().backward()
            for optimizer in rates:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"]
                optimizer.step()
                optimizer.zero_grad()
            found.append((model(window[:, :-1]).detach() - before).square().mean().sqrt().item())
        return found

    narrow, wide, unscaled = changes(32, 32), changes(128, 32), changes(128, None)
    for a, b, c in zip(narrow, wide, unscaled, strict=True):
        assert 0.75 < b / a < 1.33
        assert 3 < c / a < 5  # in proportion to the width


class Even(torch.nn.Module):
    """Of `tokens` each with the same probability, none other; else as gpt.GPT."""

    def __init__(self, tokens: list[int], size: int, merges: list[list[int]]) -> None:
        super().__init__()
        self.real = gpt.build(replace(TINY, vocabulary=size))
        if merges:
            self.real.merges.copy_(torch.tensor(merges))
        self.config, self.head, self.vocabulary = self.real.config, self.real.head, self.real.vocabulary
        self.logits = torch.full((size,), -1e4).index_fill(0, torch.tensor(tokens), 0.0)

    def forward(self, window: Tensor) -> Tensor:
        return self.logits.expand(*window.shape, -1)


def test_bits_per_byte_are_the_same_whatever_the_tokens_are() -> None:
    """Words " a", " b" at random, each with probability 1/2: half a bit per byte, by bytes (space for certain) and by words as tokens."""
    drawn = np.random.default_rng(0).integers(0, 2, 4000)
    text = np.frombuffer(b"".join((b" a", b" b")[i] for i in drawn), np.uint8)
    by_words = Even([256, 257], 258, [[32, 97], [32, 98]])
    vocabulary = by_words.real.vocabulary()
    assert vocabulary is not None
    found = gpt.score(by_words, vocabulary.encode(text))  # type: ignore[arg-type]
    assert found.loss == pytest.approx(math.log(2))
    assert (found.tokens, found.bytes) == (3999, 7998)

    class ByBytes(Even):
        def forward(self, window: Tensor) -> Tensor:
            space = torch.full((256,), -1e4).index_fill(0, torch.tensor([32]), 0.0)
            return torch.where((window == 32)[..., None], self.logits, space)

    by_bytes = gpt.score(ByBytes([97, 98], 256, []), text)  # type: ignore[arg-type]
    assert by_bytes.bpb == pytest.approx(0.5, abs=1e-3)  # the first byte is not predicted
    assert found.bpb == pytest.approx(0.5)
    # Tokens of different length: " a" by its word, " b" by two bytes, each of the three tokens with probability 1/3.
    uneven = Even([256, 32, 98], 257, [[32, 97]])
    spelt = uneven.real.vocabulary().encode(text)  # type: ignore[union-attr]
    expected = (4000 + drawn.sum() - 1) * math.log2(3) / (8000 - uneven.real.vocabulary().lengths[spelt[0]])  # type: ignore[union-attr]
    assert gpt.score(uneven, spelt).bpb == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_a_vocabulary_is_learnt_kept_and_known_anywhere(tmp_path: Path) -> None:
    config = replace(TINY, data=text_file(tmp_path), vocabulary=270, steps=30, eval_every=15)
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run)
    vocabulary, last = model.vocabulary(), list(folder.rows(tmp_path / "run"))[-1]
    assert vocabulary is not None
    text = (tmp_path / "text.txt").read_bytes()
    assert torch.equal(model.merges, torch.from_numpy(learn(np.frombuffer(text[: len(text) * 9 // 10], np.uint8), 270)))
    assert last["val_bpb"] < last["val_loss"] / math.log(2)  # tokens are longer than a byte
    other = gpt.build(config)
    assert other.vocabulary() is None
    found, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    other.load_state_dict(found.model)
    samples = [gpt.generate(m, b"to be", 9, torch.Generator().manual_seed(1)) for m in (model, other)]
    assert samples[0] == samples[1]
    assert samples[0][0][:5] == b"to be"
    results = gpt.evaluate(other, config)
    assert results["bytes"] + len(vocabulary.decode([int(vocabulary.encode(np.frombuffer(text[-600:], np.uint8))[0])])) == 600  # type: ignore[operator]
    assert {"bpb", "bpb_se", "ngram_bpb"} <= results.keys()


def test_shards_are_trained_on_and_judged_in_nats_per_token(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, size in (("train.bin", 2000), ("val.bin", 300)):
        (tmp_path / "shards" / name).write_bytes((np.arange(size) % 7 + 290).astype("<u2").tobytes())
    config = replace(TINY, data=tmp_path / "shards", vocabulary=300, steps=30, eval_samples=1)
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run)
    last = list(folder.rows(tmp_path / "run"))[-1]
    assert last["val_loss"] < 1.6  # seven numbers in turn, ln 7 = 1.95 without looking back
    assert "val_bpb" not in last
    results = gpt.evaluate(model, config, media=tmp_path, samples=1, length=5)
    assert (results["tokens"], results["note"]) == (299, gpt.UNKNOWN)
    assert not {"bpb", "bytes", "ngram_bpb"} & results.keys()
    assert all(0 <= int(word) < 300 for word in (tmp_path / "samples.txt").read_text().splitlines()[1].split())
    for size, says in ((296, "the largest token is 296; --vocabulary must be above it, got 296"), (256, r"numbers up to 296: give their vocabulary")):
        with pytest.raises(UsageError, match=says):
            gpt.evaluate(model, replace(config, vocabulary=size))
    with pytest.raises(UsageError, match="at least 256 for a text, got 100"):
        gpt.evaluate(model, replace(config, data=text_file(tmp_path), vocabulary=100))


def picture_file(folder: Path, count: int = 60) -> Path:
    """Images of 2x3 pixels with two levels in which a pixel is on if the one before it is, the first of them with probability 1/2: one bit, 1/6 a dimension."""
    on = np.random.default_rng(0).integers(0, 2, count).astype(bool)
    np.savez(folder / "images.npz", images=np.broadcast_to(on[:, None, None], (count, 2, 3)))
    return folder / "images.npz"


def test_images_are_trained_on_pixel_by_pixel_and_judged_in_bits_per_dimension(tmp_path: Path) -> None:
    config = replace(
        TINY, data=picture_file(tmp_path), images="data", vocabulary=3, context=6, steps=120, batch=16, eval_every=60, eval_windows=100, ema=(0.9,), final="ema"
    )
    with start(config, tmp_path / "run") as run:
        model = gpt.train(config, run)
    last = list(folder.rows(tmp_path / "run"))[-1]
    assert last["val_bpd"] == pytest.approx(1 / 6, abs=0.05)
    assert last["val_bpd"] == pytest.approx(last["val_loss"] / math.log(2))
    assert last["val_bpd_ema_0.9"] == last["val_bpd"]
    assert last["tokens"] == 120 * 16 * 6
    assert (tmp_path / "run" / "media" / "samples-00000120.png").read_bytes()[:4] == b"\x89PNG"
    drawn = gpt.draw(model, (1, 2, 3), 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 1, 2, 3)
    assert np.mean(drawn == drawn[:, :, :1, :1]) > 0.95
    assert 10 < drawn[:, 0, 0, 0].sum() < 40
    # Each pixel given those before it in its own image, and nothing else.
    _, held_out = gpt.corpus.spell(model, gpt.corpus.read(config), config)
    assert held_out.shape[1] == 7
    assert (held_out[:, 0] == 2).all()
    window = torch.from_numpy(held_out.astype(np.int64))
    by_hand = -torch.log_softmax(model(window[:, :-1]), -1).gather(-1, window[:, 1:, None])
    assert gpt.score(model, held_out).columns()["bpd"] == pytest.approx(by_hand.mean().item() / math.log(2), rel=1e-5)


def test_images_that_do_not_fit_say_what_to_give(tmp_path: Path) -> None:
    config = replace(TINY, data=picture_file(tmp_path), images="data", vocabulary=3, context=8)
    with pytest.raises(UsageError, match=r"images\.npz: for images of 1 x 2 x 3 pixels of 2 levels give --context 6 --vocabulary 3"):
        gpt.evaluate(gpt.build(config), config)
    for wrong in ({"images": "data"}, {"images": "digits", "data": tmp_path}):
        with pytest.raises(ValueError, match="images must be data"):
            replace(TINY, **wrong)  # type: ignore[arg-type]


def test_digits_are_evaluated_beside_plain_models(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = replace(TINY, images="digits", vocabulary=18, context=64)
    results = gpt.evaluate(gpt.build(config), config, media=tmp_path, samples=20)
    assert results["bpd"] == pytest.approx(math.log2(18))  # it knows nothing yet, not even that no image begins in the middle of one
    assert {"bpd_se", "fid", "train_fid", "uniform_bpd", "histogram_bpd", "gaussian_bpd"} <= results.keys()
    assert (tmp_path / "samples.png").exists()


def test_arrays_in_memory_are_trained_on(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    content, config = np.fromfile(text, np.uint8), replace(TINY, steps=3, eval_every=3)
    found = []
    for name, given, named in (("file", None, text), ("array", content, None)):
        with start(replace(config, data=named), tmp_path / name) as run:
            model = gpt.train(run.config, run, given)
        found.append(gpt.evaluate(model, run.config, given, baselines=False))
    assert found[0] == found[1]
    tokens_of = (content.astype(np.uint16) * 3)[:4000]
    with start(replace(config, vocabulary=768), tmp_path / "tokens") as run:
        assert "loss" in gpt.evaluate(gpt.train(run.config, run, tokens_of), run.config, tokens_of)
    with np.load(picture_file(tmp_path)) as file:
        pictures = gpt.images.Images(file["images"].astype(np.uint8)[:, None].copy(), 2)
    with start(replace(config, vocabulary=3, context=6), tmp_path / "images") as run:
        assert {"bpd", "fid"} <= gpt.evaluate(gpt.train(run.config, run, pictures), run.config, pictures, samples=20).keys()
    assert "val_bpd" in list(folder.rows(tmp_path / "images"))[-1]
    with pytest.raises(ValueError, match=r"got an array of float64 \(3,\)"):
        gpt.corpus.read(config, np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="data given: the largest token is"):
        gpt.corpus.read(replace(config, vocabulary=257), tokens_of)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, when its compiler is imported
def test_compiled_the_losses_are_the_same(tmp_path: Path) -> None:
    text, found = text_file(tmp_path), []
    for compiled in (False, True):
        with start(replace(TINY, data=text, compile=compiled), tmp_path / str(compiled)) as run:
            gpt.train(run.config, run)
        found.append([row["loss"] for row in folder.rows(tmp_path / str(compiled))])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
