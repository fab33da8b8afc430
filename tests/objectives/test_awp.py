"""Adversarial weight perturbation, against a proxy that takes a step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend.errors import InputError
from defend.objectives import AWP, MART, TRADES, Madry
from defend.objectives.awp import ascent, weight_perturbation
from tests.reference import objectives as reference

PAPERS = [(Madry(), reference.madry), (TRADES(), reference.trades), (MART(), reference.mart)]
GAMMA = 0.01


def normalized(seed=0, dropout=0.0):
    """Convolution, BatchNorm, dropout, in float64 and in train mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * 36, 4),
    ).double()


class Tied(nn.Module):
    """One weight, used twice under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(36, 36)
        self.second = nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.head = nn.Linear(36, 4)
        self.double()

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).tanh()))


def batches(records=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(records, 1, 6, 6, generator=generator, dtype=dtype)
    noise = torch.rand(x.shape, generator=generator, dtype=dtype)
    return x, x + 0.3 * (noise - 0.5), torch.arange(records) % 4


def by_proxy(module, paper, gamma=GAMMA):
    x, x_adv, y = batches()

    def mean_loss(proxy):
        clean, adv = proxy(x), proxy(x_adv)
        return reference.batch(paper, clean, adv, y).mean()

    return reference.proxy_perturbation(module, mean_loss, gamma)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-7, atol=1e-10) for name in one
    )


@pytest.mark.parametrize("make", [normalized, Tied])
@pytest.mark.parametrize(("objective", "paper"), PAPERS, ids=[o.name for o, _ in PAPERS])
def test_it_is_the_way_that_a_proxy_goes(make, objective, paper):
    module = make()
    ours = weight_perturbation(module, objective, *batches(), GAMMA)
    assert same(ours, by_proxy(module, paper))
    for name, step in ours.items():
        size = module.get_parameter(name).norm()
        assert float(step.norm() / size) == pytest.approx(GAMMA)
    assert same(ours, weight_perturbation(module, AWP(objective), *batches(), GAMMA))


def wrong(kind, module):
    """Perturbations that are nearly right."""
    x, x_adv, y = batches()
    right = weight_perturbation(module, TRADES(), x, x_adv, y, GAMMA)
    if kind == "downhill":
        return {name: -step for name, step in right.items()}
    if kind == "one norm for all layers":
        size = sum(step.norm() ** 2 for step in right.values()).sqrt()
        return {name: step * GAMMA / size for name, step in right.items()}
    if kind == "only the natural loss":
        return weight_perturbation(module, Madry(), x, x_adv, y, GAMMA)
    if kind == "in eval mode":
        return weight_perturbation(copy.deepcopy(module).eval(), TRADES(), x, x_adv, y, GAMMA)
    assert kind == "other names"
    return {name: step for name, step in right.items() if name != "0.weight"}


@pytest.mark.parametrize(
    "kind",
    [
        "downhill",
        "one norm for all layers",
        "only the natural loss",
        "in eval mode",
        "other names",
    ],
)
def test_a_planted_wrong_perturbation_is_told_apart(kind):
    module = normalized()
    assert not same(wrong(kind, module), by_proxy(module, reference.trades))


def test_eval_mode_is_kept():
    module = normalized().eval()
    module[1].running_mean.add_(0.1)
    ours = weight_perturbation(module, TRADES(), *batches(), GAMMA)
    assert not module.training
    assert same(ours, by_proxy(module, reference.trades))


def test_it_raises_the_loss_more_than_chance():
    module = normalized()
    x, x_adv, y = batches()

    def loss_at(perturbation):
        weights = {k: p.detach() for k, p in module.named_parameters()}
        moved = {k: w + perturbation.get(k, 0.0) for k, w in weights.items()}
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        output = torch.func.functional_call(module, (moved, buffers), (x_adv,))
        return float(F.cross_entropy(output, y))

    ours = weight_perturbation(module, Madry(), x, x_adv, y, GAMMA)
    gain = loss_at(ours) - loss_at({})
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draw = {k: torch.randn(v.shape, generator=generator).double() for k, v in ours.items()}
        chance = {k: v * ours[k].norm() / v.norm() for k, v in draw.items()}
        assert loss_at(chance) - loss_at({}) < 0.5 * gain


def test_only_trainable_parameters_of_more_than_one_dimension_move():
    module = normalized()
    assert weight_perturbation(module, Madry(), *batches(), GAMMA).keys() == {
        "0.weight",
        "5.weight",
    }
    module[0].requires_grad_(False)
    assert weight_perturbation(module, Madry(), *batches(), GAMMA).keys() == {"5.weight"}


def test_a_layer_without_a_gradient_stays():
    module = normalized()
    module.spare = nn.Linear(3, 3).double()
    module.forward = lambda x: nn.Sequential.forward(module[:6], x)
    with torch.no_grad():
        module[0].weight.zero_()  # of size zero, so is its perturbation
    step = weight_perturbation(module, Madry(), *batches(), GAMMA)
    assert not step["spare.weight"].any()
    assert not step["0.weight"].any()
    assert step["5.weight"].any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_zero_and_broken_gradients_give_no_direction(bad):
    weight, gradient = torch.ones(3, 3), torch.zeros(3, 3)
    gradient[1, 1] = bad
    assert torch.equal(ascent(weight, gradient, 0.1), torch.zeros(3, 3))
    gradient[1, 1] = -2.0
    expected = torch.zeros(3, 3)
    expected[1, 1] = -0.3  # γ · ‖w‖ = 0.1 · 3
    torch.testing.assert_close(ascent(weight, gradient, 0.1), expected)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-15, 1e15, 1e30])
def test_the_size_of_the_gradient_does_not_matter(scale):
    """Squares of tiny gradients are zero, and those of large ones infinite."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(4, 6, generator=generator) for _ in range(2))
    expected = 0.1 * weight.norm() * gradient / gradient.norm()
    step = ascent(weight, gradient * scale, 0.1)
    tolerance = 1e-4 if scale > 1e-37 else 0.05  # subnormal numbers have few digits
    torch.testing.assert_close(step, expected, rtol=tolerance, atol=tolerance)


def test_weights_behind_a_tiny_layer_move_all_the_same():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        module[3].weight.mul_(1e-30)
    steps = weight_perturbation(module, Madry(), *batches(dtype=torch.float32), GAMMA)
    ratio = steps["1.weight"].norm() / module[1].weight.detach().norm()
    assert float(ratio) == pytest.approx(GAMMA, rel=1e-4)


def test_a_norm_beyond_half_precision():
    weight = torch.ones(4, 4, dtype=torch.float16)
    step = ascent(weight, torch.full((4, 4), 3e4, dtype=torch.float16), 0.1)  # of norm 1.2e5
    torch.testing.assert_close(step, torch.full((4, 4), 0.1, dtype=torch.float16))


def test_one_broken_layer_does_not_stop_the_others():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = nn.Linear(36, 4)
            self.bad = nn.Linear(36, 4)

        def forward(self, x):
            hidden = self.bad(x.flatten(1))
            nothing = (hidden - hidden.detach()).abs().sqrt()  # 0, with an infinite slope
            return self.good(x.flatten(1)) + nothing

    step = weight_perturbation(Broken(), Madry(), *batches(dtype=torch.float32), GAMMA)
    assert not step["bad.weight"].any()
    assert step["good.weight"].isfinite().all()
    assert step["good.weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights(dtype):
    module = Tied().to(dtype)
    x, x_adv, y = batches(dtype=dtype)
    for name, step in weight_perturbation(module, TRADES(), x, x_adv, y, GAMMA).items():
        assert step.dtype == dtype
        ratio = step.double().norm() / module.get_parameter(name).detach().double().norm()
        assert float(ratio) == pytest.approx(GAMMA, rel=1e-2)


def test_under_autocast_and_no_grad():
    module = Tied().float()
    x, x_adv, y = batches(dtype=torch.float32)
    exact = weight_perturbation(module, Madry(), x, x_adv, y, GAMMA)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = weight_perturbation(module, Madry(), x, x_adv, y, GAMMA)
        assert not torch.is_grad_enabled()
    for name, step in rough.items():
        assert float(F.cosine_similarity(step.flatten(), exact[name].flatten(), dim=0)) > 0.99


def test_the_clean_batch_is_run_only_where_it_is_needed():
    module, seen = normalized(), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, x_adv, y = batches()
    weight_perturbation(module, AWP(Madry()), x, x_adv, y, GAMMA)
    assert len(seen) == 1
    assert seen[0] is x_adv
    weight_perturbation(module, AWP(TRADES()), x, x_adv, y, GAMMA)
    assert {id(s) for s in seen[1:]} == {id(x), id(x_adv)}


def test_a_model_that_returns_more_than_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Tied()

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(InputError, match=r"to return logits, got dict\. Pass `logits`"):
        weight_perturbation(Wrapped(), Madry(), *batches(), GAMMA)
    step = weight_perturbation(
        Wrapped(), Madry(), *batches(), GAMMA, logits=lambda out: out["logits"]
    )
    plain = weight_perturbation(Tied(), Madry(), *batches(), GAMMA)
    assert same(step, {f"inner.{name}": value for name, value in plain.items()})


def test_nothing_to_perturb():
    module = normalized().requires_grad_(False)
    with pytest.raises(InputError, match=r"trainable parameters .* none to perturb\. Unfreeze"):
        weight_perturbation(module, Madry(), *batches(), GAMMA)
    x, x_adv, y = batches()
    with pytest.raises(InputError, match="none to perturb"):
        weight_perturbation(module, Madry(), x, x_adv.requires_grad_(), y, GAMMA)
    module.spare = nn.Linear(3, 3).double()
    module.forward = lambda x: nn.Sequential.forward(module[:6], x)
    with pytest.raises(InputError, match="none to perturb"):
        weight_perturbation(module, Madry(), *batches(), GAMMA)


@pytest.mark.parametrize("gamma", [0.0, -0.01, float("inf"), float("nan")])
def test_a_bad_gamma(gamma):
    message = rf"`gamma` to be a finite number > 0, got {gamma}\. Give"
    with pytest.raises(InputError, match=message):
        AWP(gamma=gamma)
    with pytest.raises(InputError, match=message):
        weight_perturbation(normalized(), Madry(), *batches(), gamma)


@pytest.mark.parametrize("objective", [AWP(), "trades", TRADES, None])
def test_a_bad_objective(objective):
    with pytest.raises(InputError, match=r"such as Madry\(\) .* other than AWP, got .* Wrap it"):
        AWP(objective)
