import json

import pytest
import torch

from onetorch.sparse import Layout, choice, costs, cpu, dds, patterns, sdd


@pytest.fixture(autouse=True)
def compiled():
    if cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")


@pytest.mark.parametrize("transpose", [False, True])
def test_the_dense_product_gives_the_same(monkeypatch, transpose):
    g = torch.Generator().manual_seed(0)
    layout = patterns.random((96, 64), (16, 32), 0.5, g)
    inner, outer = layout.shape[::-1] if transpose else layout.shape
    x = torch.randn(20, inner, generator=g, dtype=torch.float64, requires_grad=True)
    values = torch.randn(layout.values_shape, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outer, generator=g, dtype=torch.float64)
    results = []
    for limit in (costs.NEVER, 0.0):
        monkeypatch.setattr(costs, "break_even", lambda *_, limit=limit: limit)
        y = dds(x, values, layout, transpose_sparse=transpose, bias=bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, values))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_dense_product_gives_the_same_gradient_of_the_weight(monkeypatch):
    g = torch.Generator().manual_seed(0)
    layout = patterns.random((96, 64), (16, 32), 0.5, g)
    a, b = torch.randn(96, 20, generator=g, dtype=torch.float64), torch.randn(20, 64, generator=g, dtype=torch.float64)
    want = layout.from_dense(a @ b)
    for limit, density in ((costs.NEVER, "sparse"), (0.0, "dense")):
        monkeypatch.setattr(costs, "break_even", lambda *_, limit=limit: limit)
        assert torch.allclose(sdd(a, b, layout), want, rtol=1e-12, atol=1e-12)
        assert choice(layout, 20, torch.float64).startswith(density)


def test_a_full_layout_is_laid_out_as_its_matrix():
    g = torch.Generator().manual_seed(0)
    layout = Layout.from_mask(torch.ones(3, 2, dtype=torch.bool), (16, 32))
    dense = torch.randn(48, 64, generator=g)
    assert torch.equal(cpu.fill(layout.from_dense(dense)[None], layout.index, layout.grid, (48, 64))[0], dense)


def test_the_dense_product_does_not_read_what_is_not_used(monkeypatch):
    monkeypatch.setattr(costs, "break_even", lambda *_: 0.0)
    layout = Layout.from_mask(torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(), 16)
    values, x = torch.randn(2, 16, 16), torch.randn(20, 48)
    want = dds(x, values, layout, transpose_sparse=True)
    x[:, 16:32] = torch.nan
    assert torch.allclose(dds(x, values, layout, transpose_sparse=True), want, atol=1e-5)


def test_break_even_is_where_the_measured_lines_cross(monkeypatch, tmp_path):
    """A clock in which the sparse kernel takes 4 d + 1 and the dense product 3: they cross at 0.5; with 2 d + 1, never before 1."""

    def measure(sparse, dense):
        clock = [0.0]
        for name in ("perf_counter", "thread_time"):
            monkeypatch.setattr(costs.time, name, lambda: clock[0])
        full = (costs.SIZE // 32) ** 2

        def pass_time(seconds):
            clock[0] += seconds

        monkeypatch.setattr(costs.cpu, "dds", lambda x, v, *_: pass_time(sparse(v.shape[1] / full)))
        monkeypatch.setattr(costs, "dense_dds", lambda x, v, *_: pass_time(dense))
        return costs._measure(torch.float32, (32, 32), 64)

    assert measure(lambda d: 4 * d + 1, 3.0) == pytest.approx(0.5)
    assert measure(lambda d: 4 * d, 3.0) == pytest.approx(0.75)
    assert measure(lambda d: 2 * d + 1, 3.0) == costs.NEVER


def test_measured_once_and_kept(monkeypatch, tmp_path):
    library = cpu.library()
    monkeypatch.setattr(library, "_name", str(tmp_path / "kernels.so"))
    monkeypatch.setattr(costs, "measured", {})
    calls = []
    monkeypatch.setattr(costs, "_measure", lambda *a: calls.append(a) or 0.4)
    layout = patterns.random((256, 256), 32, 0.5, torch.Generator().manual_seed(0))
    assert choice(layout, 300).startswith("dense: density 0.500, the dense product is faster from 0.4")
    assert choice(layout, 500).startswith("dense")  # the same class of token counts
    monkeypatch.setattr(costs, "measured", {})
    assert choice(layout, 300).startswith("dense")  # from the file
    assert calls == [(torch.float32, (32, 32), 512, "dds"), (torch.float32, (32, 32), 512, "sdd")]
    (kept,) = tmp_path.glob("*.json")
    assert list(json.loads(kept.read_text()).values()) == [0.4, 0.4]
    assert choice(patterns.random((256, 256), 32, 0.05), 300).startswith("sparse")
    assert choice(layout, 3).startswith("sparse")
    assert len(calls) == 2


def test_a_real_measurement_touches_no_generator():
    before = torch.get_rng_state()
    with torch.device("meta"):  # nor does it matter what the default device is
        assert 0 < costs._measure(torch.float32, (32, 32), 64) <= costs.NEVER
        assert 0 < costs._measure(torch.float32, (32, 32), 64, "sdd") <= costs.NEVER
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 1}, "layout: expected a Layout, got int"),
        ({"tokens": -1}, "tokens: expected an int, at least 0, got -1"),
        ({"dtype": torch.int32}, "dtype: expected one of float32, float64, bfloat16, float16, got torch.int32"),
    ],
)
def test_choice_of_wrong_arguments(change, message):
    layout = Layout.from_mask(torch.ones(2, 2, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match=message):
        costs.choice(**({"layout": layout, "tokens": 4} | change))


def test_tma_is_measured_once_and_never_in_a_capture(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(costs, "measured", {})
    calls = []
    monkeypatch.setattr(costs, "_speedup", lambda *kernels: calls.append(kernels) or 1.5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not costs.tma_is_faster("dds", "version", min, max)
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert costs.tma_is_faster("dds", "version", min, max)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert costs.tma_is_faster("dds", "version", min, max)  # known by now
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(costs, "measured", {})
    assert costs.tma_is_faster("dds", "version", min, max)  # from the file
    assert calls == [(min, max)]
    assert json.loads((tmp_path / "gpu-version.json").read_text()) == {"dds": 1.5}


def test_speedup_of_tma_is_the_ratio_of_the_times(monkeypatch):
    """A clock in which one kernel takes 3 and the other 2, and the first call of each 100 more."""
    clock, compiled = [0.0], set()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def kernel(name, takes):
        clock[0] += takes + (0 if name in compiled else 100)
        compiled.add(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert costs._speedup(lambda: kernel("pointer", 3), lambda: kernel("TMA", 2)) == pytest.approx(1.5)
