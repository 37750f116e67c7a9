import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from onetorch.sparse import DynamicSparsity, Linear, patterns
from onetorch.sparse.dynamic import cosine_fraction, cubic_density
from onetorch.sparse.layout import Layout


def network(seed=0, gate=False, density=0.5):
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    return nn.Sequential(
        Linear(36, 64, patterns.random((64, 36), 8, density, g), gate=gate), nn.ReLU(), Linear(64, 20, patterns.random((20, 64), (8, 16), density, g))
    )


def batch(seed):
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(32, 36, generator=g), torch.randint(0, 20, (32,), generator=g)


def train(model, optimizer, dynamic, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_schedules():
    assert cosine_fraction(0, 100, 0.3) == pytest.approx(0.3)
    assert cosine_fraction(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert cosine_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert cosine_fraction(200, 100, 0.3) == pytest.approx(0.0)
    assert cubic_density(5, 10, 30, 1.0, 0.2) == 1.0
    assert cubic_density(20, 10, 30, 1.0, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert cubic_density(31, 10, 30, 1.0, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("gate", [False, True])
def test_blocks_move_with_their_weights_gates_and_moments(gate):
    """Against dense bookkeeping: what a kept block holds is what it held, what is new is 0 (a gate 1)."""
    model = network(gate=gate)
    layer = model[0]
    adam, sgd = torch.optim.Adam([layer.weight], amsgrad=True), torch.optim.SGD([p for p in model.parameters() if p is not layer.weight], momentum=0.9, lr=0.1)
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    adam.step()
    sgd.step()
    old = layer.layout
    other = patterns.random((64, 36), 8, 0.5, torch.Generator().manual_seed(5))
    assert other.kept == old.kept
    assert bool((other.mask & ~old.mask).any())

    def dense(values, layout):
        return layout.to_dense(values.detach().view(-1, *([1, 1] if values.ndim == 1 else values.shape[1:])).expand(layout.values_shape))

    both = (old & other).element_mask()
    tensors = {"weight": layer.weight, **{key: adam.state[layer.weight][key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}}
    if gate:
        tensors |= {"momentum of gate": sgd.state[layer.gate]["momentum_buffer"]}
    want = {name: dense(tensor, old) * both for name, tensor in tensors.items()}
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    steps = adam.state[layer.weight]["step"].clone()
    gates = None if not gate else dense(layer.gate, old) * both + (other.element_mask() & ~both)
    layer.set_layout(other, adam, sgd)
    for name, tensor in tensors.items():
        assert torch.equal(dense(tensor, other), want[name]), name
        assert tensor.data_ptr() == places[name]
    assert bool(want["exp_avg_sq"].any())
    assert torch.equal(adam.state[layer.weight]["step"], steps)
    assert layer.weight.grad is None
    if gate:
        assert torch.equal(dense(layer.gate, other), gates)
    fewer = Layout.from_mask(other.mask & old.mask, 8, (64, 36))
    layer.set_layout(fewer, adam, sgd)
    assert layer.weight.shape == adam.state[layer.weight]["exp_avg"].shape == fewer.values_shape
    assert torch.equal(layer.to_dense().detach() != 0, want["weight"] != 0)


@pytest.mark.parametrize("as_many", [True, False])
def test_factored_moments_move_along(as_many):
    """Adafactor keeps of each block the means of its rows and of its columns."""
    g = torch.Generator().manual_seed(3)
    layer = Linear(36, 64, patterns.random((64, 36), 8, 0.5, g))
    optimizer = torch.optim.Adafactor([layer.weight])
    layer(torch.randn(5, 36, generator=g)).square().sum().backward()
    optimizer.step()
    old, other = layer.layout, patterns.random((64, 36), 8, 0.5 if as_many else 0.3, g)
    before = {key: optimizer.state[layer.weight][key].clone() for key in ("row_var", "col_var")}
    layer.set_layout(other, optimizer)
    number = old.mask.view(-1).cumsum(0).view(old.mask.shape) - 1
    both = 0
    for key, was in before.items():
        now = optimizer.state[layer.weight][key]
        assert now.shape == (other.kept, *was.shape[1:])
        for at, (r, c) in enumerate(other.mask.nonzero().tolist()):
            both += bool(old.mask[r, c])
            assert torch.equal(now[at], was[number[r, c]] if old.mask[r, c] else torch.zeros_like(now[at]))
    assert 0 < both < 2 * other.kept


@pytest.mark.parametrize(("kind", "key", "begins"), [(torch.optim.Rprop, "step_size", 0.01), (torch.optim.Adagrad, "sum", 0.5)], ids=["Rprop", "Adagrad"])
def test_new_blocks_begin_as_the_optimizer_does(kind, key, begins):
    """Rprop would never leave steps of 0."""
    g = torch.Generator().manual_seed(3)
    layer = Linear(36, 64, patterns.random((64, 36), 8, 0.5, g))
    optimizer = kind([layer.weight], lr=0.01, **({"initial_accumulator_value": 0.5} if key == "sum" else {}))
    layer(torch.randn(5, 36, generator=g)).square().sum().backward()
    optimizer.step()
    old, other = layer.layout, patterns.random((64, 36), 8, 0.5, g)
    layer.set_layout(other, optimizer)
    new = ~old.mask[other.mask]
    assert bool(new.any())
    assert bool((optimizer.state[layer.weight][key][new] == begins).all())


def test_state_that_is_not_by_blocks_is_refused():
    layer = Linear(36, 64, patterns.random((64, 36), 8, 0.5))
    other, before = patterns.random((64, 36), 8, 0.5), layer.layout
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    optimizer.state[layer.weight]["preconditioner"] = torch.eye(8)
    with pytest.raises(ValueError, match=r"optimizer: expected state .* got preconditioner of \(8, 8\) from SGD"):
        layer.set_layout(other, optimizer)
    assert layer.layout is before
    with pytest.raises(ValueError, match="got LBFGS"):
        layer.set_layout(other, torch.optim.LBFGS(layer.parameters()))


def test_rigl_by_hand():
    """One step, in dense arithmetic: the smallest blocks by root mean square go, those with the largest dense gradient come."""
    torch.manual_seed(0)
    layout = patterns.random((20, 36), 8, 0.5, torch.Generator().manual_seed(1))  # 3 x 5 blocks, those at the edges smaller
    layer = Linear(36, 20, layout)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    dynamic = DynamicSparsity(layer, optimizer, every=1, end=4, fraction=0.9)
    parts = [torch.randn(7, 36), torch.randn(5, 36)]
    total = torch.zeros(20, 36)
    for x in parts:  # two backward passes add up
        layer(x).square().sum().backward()
        dense = layer.to_linear()
        dense(x).square().sum().backward()
        total += dense.weight.grad
    assert torch.allclose(layer.probe.grad, total, atol=1e-4)

    def mean_square(matrix):
        return {(r, c): float(matrix[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].square().mean()) for r in range(3) for c in range(5)}

    weight, gradient = mean_square(layer.to_dense().detach()), mean_square(total)
    kept = {tuple(b) for b in layout.mask.nonzero().tolist()}
    moved = round(0.45 * (1 + math.cos(math.pi / 4)) * len(kept))
    stay = set(sorted(kept, key=weight.get)[moved:])
    grown = set(sorted(set(weight) - stay, key=gradient.get)[-moved:])
    before = layer.to_dense().detach()
    assert dynamic.step()
    assert {tuple(b) for b in layer.layout.mask.nonzero().tolist()} == stay | grown
    assert layer.layout != layout
    assert torch.equal(layer.to_dense().detach(), before * (layer.layout & layout).element_mask())


def test_set_is_random_and_only_drops_the_smallest():
    model = network()
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dynamic = DynamicSparsity(model, optimizer, grow="random", every=2, end=10, generator=generator)
    before = [layer.layout for layer in dynamic.layers]
    train(model, optimizer, dynamic, 1)
    assert [layer.layout for layer in dynamic.layers] == before
    magnitudes = [layer.weight.detach().square().mean((1, 2)) for layer in dynamic.layers]
    train(model, optimizer, dynamic, 1, 1)
    for layer, old in zip(dynamic.layers, before, strict=True):
        assert layer.layout.kept == old.kept
        assert layer.layout != old
    assert generator.get_state().tolist() != torch.Generator().manual_seed(3).get_state().tolist()
    assert len(magnitudes) == 2


@pytest.mark.parametrize(("grow", "density"), [("random", None), ("gradient", None), (None, 0.2), ("gradient", 0.2)], ids=str)
def test_continues_bit_for_bit(path, grow, density):
    def make():
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        generator = torch.Generator().manual_seed(1) if grow == "random" else None
        return model, optimizer, DynamicSparsity(model, optimizer, grow=grow, density=density, every=3, end=20, generator=generator)

    whole = make()
    losses = train(*whole, 16)
    first = make()
    begun = train(*first, 8)  # the ninth step is an update: its probes have to be there after loading
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = make()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    assert begun + train(*second, 8, 8) == losses
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name
    for layer in whole[2].layers:
        total = layer.layout.mask.numel()
        assert layer.layout.kept == round(total * (0.5 if density is None else 0.2 + 0.3 * 0.25**3))


def test_gradual_pruning_keeps_the_largest():
    model = network(density=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.0)  # the weights stay, the moments do not
    dynamic = DynamicSparsity(model, optimizer, grow=None, density=0.25, every=5, end=20)
    weight = model[0].to_dense().detach()
    padded = nn.functional.pad(weight, (0, 4)).view(8, 8, 5, 8).square().mean((1, 3)) * torch.tensor([1, 1, 1, 1, 2.0])
    seen = []
    for step in range(24):
        train(model, optimizer, dynamic, 1, step)
        seen.append(model[0].layout.kept)
    # 40 (0.25 + 0.75 x^3) blocks, x = 3/4, 1/2, 1/4, 0
    assert seen == [40] * 4 + [23] * 5 + [14] * 5 + [10] * 10
    kept = model[0].layout.mask
    assert bool(padded[kept].min() > padded[~kept].max())
    assert torch.equal(model[0].to_dense().detach(), weight * model[0].layout.element_mask())
    assert model[2].layout.density == 0.25
    assert model[0].weight.shape[0] == optimizer.state[model[0].weight]["exp_avg"].shape[0] == 10


class Waits(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU: sizes or numbers that depend on values, copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "aten::nonzero", "masked_select", "unique", "aten::equal", "is_nonzero", "item")) or (
            "nonzero_static" in name
        ), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_no_recompilation_and_nothing_waits_for_the_device(grow):
    model = network(gate=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, foreach=True)
    dynamic = DynamicSparsity(model, optimizer, grow=grow, every=2, end=100)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    layouts = [layer.layout for layer in dynamic.layers]
    eager = copy.deepcopy(model)
    x, y = batch(0)
    nn.functional.cross_entropy(compiled(x), y).backward()  # without probes, as every first step of two
    optimizer.step()
    dynamic.step()
    nn.functional.cross_entropy(compiled(x), y).backward()  # with probes, where the gradient grows
    optimizer.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(12):
            with Waits():
                dynamic.step()
            eager.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), y).backward()
            assert torch.equal(compiled(x), eager(x)), step
            optimizer.step()
    assert all(layer.layout != before for layer, before in zip(dynamic.layers, layouts, strict=True))


def test_it_finds_the_inputs_that_matter():
    """Only four of sixteen input blocks carry the target, and the first layout keeps none of them: RigL finds them, a static layout cannot."""
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(8, 128)
    truth[:, 32:64] = torch.randn(8, 32, generator=g)
    x = torch.randn(512, 128, generator=g)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 8:12] = True
    layer = Linear(128, 8, Layout.from_mask(mask, 8), bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    dynamic = DynamicSparsity(layer, optimizer, every=10, end=200, fraction=0.5)
    for _ in range(300):
        loss = (layer(x) - x @ truth.T).square().mean()
        loss.backward()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()
    assert layer.layout.mask.nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert float(loss.detach()) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "model: expected at least one layer of onetorch.sparse, got Linear without any"),
        ({"model": 1}, "model: expected a module, got int"),
        ({"optimizer": [1]}, "optimizer: expected an optimizer or a tuple of them, got list"),
        ({"optimizer": torch.optim.LBFGS([torch.zeros(1)])}, "optimizer: expected one whose state can move along with the blocks, got LBFGS"),
        ({"every": 1.5}, "every: expected a number of steps, got 1.5"),
        ({"fraction": "x"}, "fraction: expected a number, got str"),
        ({"grow": "magnitude"}, 'grow: expected "random", "gradient" or None, got'),
        ({"grow": None}, "density: expected a final density where nothing is grown"),
        ({"every": 0}, "every: expected at least 1 step, got 0"),
        ({"begin": 7, "end": 7}, "begin, end: expected 0 <= begin < end, got 7 and 7"),
        ({"fraction": 1.5}, r"fraction: expected a value in 0\.\.1, got 1.5"),
        ({"density": 0.0}, r"density: expected a value in 0\.\.1"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "optimizer: expected it to hold the weights of every layer, got none for Linear"),
    ],
)
def test_wrong_arguments(change, message):
    model = network()
    arguments = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "end": 10} | change
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**arguments)


def test_wrong_use():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dynamic = DynamicSparsity(model, optimizer, every=1, end=10)
    with pytest.raises(ValueError, match="step: expected a backward pass"):
        dynamic.step()
    with pytest.raises(ValueError, match=r"state: expected \['first', 'steps'\] of 2 layers"):
        dynamic.load_state_dict({"steps": 1, "first": [3]})
    with pytest.raises(ValueError, match="other: expected block"):
        model[0].set_layout(model[2].layout)
