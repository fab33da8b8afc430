"""The state machine between backward and optimizer.step, without Lightning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import PrivacyError
from defend.privacy import PrivateStep, Randomness, StepSettings
from tests.reference.dpsgd import clipped_sum

C, B = 0.5, 10.0


class Charges:
    def __init__(self):
        self.count = 0

    def __call__(self, noise_multiplier, max_grad_norm):
        self.count += 1
        return self.count - 1


def make(module, sigma=0.0, optimizer=None, **settings):
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1.0)
    step = PrivateStep(
        module,
        optimizer,
        StepSettings(noise_multiplier=sigma, max_grad_norm=C, expected_batch_size=B, **settings),
        randomness=Randomness(insecure_seed=0),
        charge=Charges(),
    )
    return step, optimizer


def networks():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = shared, nn.Linear(6, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    frozen = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    frozen[0].requires_grad_(False)
    return {
        "mlp": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        "in-place": nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        "used twice": Twice(),
        "custom parameter": nn.Sequential(Scale(), nn.Linear(6, 3)),
        "frozen layer": frozen,
        "convolution": nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(),
            nn.Linear(8, 3),
        ),
        "layer norm": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    }  # fmt: skip


def records(n=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("chunks", [[7], [4, 3], [1] * 7])
def test_equals_a_loop_over_records(name, chunks):
    module = networks()[name]
    x, y = records()
    expected = clipped_sum(
        module,
        lambda a, b: F.cross_entropy(module(a), b),
        [(x[i : i + 1], y[i : i + 1]) for i in range(7)],
        C,
    )
    step, optimizer = make(module)
    before = [p.detach().clone() for p in step.parameters]
    step.begin()
    for a, b in zip(x.split(chunks), y.split(chunks), strict=True):
        step.expect(len(a), len(a))
        F.cross_entropy(module(a), b).backward()
        step.fold()
    step.release()
    for p, total in zip(step.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, total / B, rtol=1e-5, atol=1e-6)
    optimizer.step()
    for p, old, total in zip(step.parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - total / B, rtol=1e-5, atol=1e-6)


def test_two_aligned_forwards_and_one_backward_count_once():
    """What TRADES does: a record's two rows are one record, and its sensitivity is C."""
    module = networks()["mlp"]
    x, y = records()
    other = x + 0.1

    def loss(a, b, c):
        return F.cross_entropy(module(a), b) + F.cross_entropy(module(c), b)

    step, _ = make(module)
    step.begin()
    step.expect(7, 7)
    loss(x, y, other).backward()
    step.fold()
    step.release()
    rows = iter(range(7))

    def one(a, b):
        i = next(rows)
        return loss(a, b, other[i : i + 1])

    expected = clipped_sum(module, one, [(x[i : i + 1], y[i : i + 1]) for i in range(7)], C)
    for p, total in zip(step.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, total / B, rtol=1e-5, atol=1e-6)


def backward(module, step, rows=7, records_=None):
    x, y = records(rows)
    step.expect(rows, rows if records_ is None else records_)
    F.cross_entropy(module(x), y).backward()


def test_padding_and_empty_batches():
    module = networks()["mlp"]
    step, _ = make(module)
    step.begin()
    backward(module, step, rows=2, records_=0)
    step.release()
    assert all(p.grad.abs().max() == 0 for p in step.parameters)


def test_noise_is_added_once_and_charged_once():
    module = networks()["mlp"]
    results = []
    for sigma in (0.0, 1.0):
        step, _ = make(module, sigma)
        step.begin()
        backward(module, step)
        step.fold()
        backward(module, step)
        step.release()
        assert step._charge.count == 1
        results.append(torch.cat([p.grad.flatten() for p in step.parameters]))
        step.close()
    generator = Randomness(insecure_seed=0).generator("noise", 0)
    noise = torch.cat(
        [torch.randn(p.shape, generator=generator).flatten() for p in module.parameters()]
    )
    torch.testing.assert_close(results[1] - results[0], noise * C / B, rtol=1e-4, atol=1e-6)


def test_the_charge_comes_before_the_release():
    module = networks()["mlp"]
    step, optimizer = make(module, 1.0)

    def broke(noise_multiplier, max_grad_norm):
        raise PrivacyError("no budget")

    step._charge = broke
    step.begin()
    backward(module, step)
    before = [p.detach().clone() for p in step.parameters]
    with pytest.raises(PrivacyError, match="no budget"):
        step.release()
    with pytest.raises(PrivacyError, match="got a step on gradients without noise"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(step.parameters, before, strict=True))
    assert all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize("how", ["raw", "twice", "closure"])
def test_no_step_without_noise(how):
    module = networks()["mlp"]
    step, optimizer = make(module, 1.0)
    step.begin()
    backward(module, step)
    if how == "twice":
        step.release()
        optimizer.step()
        backward(module, step)
    before = [p.detach().clone() for p in step.parameters]
    arguments = [lambda: torch.tensor(0.0)] if how == "closure" else []
    with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
        optimizer.step(*arguments)
    assert all(torch.equal(p, old) for p, old in zip(step.parameters, before, strict=True))


def test_a_closure_may_release_inside_the_step():
    module = networks()["mlp"]
    step, optimizer = make(module)

    def closure():
        step.begin()
        backward(module, step)
        step.release()
        return torch.tensor(1.0)

    assert optimizer.step(closure=closure).item() == 1.0
    assert optimizer.step(closure).item() == 1.0


@pytest.mark.parametrize("released", [False, True])
def test_a_batch_without_a_step_is_refused_not_dropped(released):
    """Poisson masks are accounted as independent releases: none may be drawn again."""
    module = networks()["mlp"]
    step, _ = make(module)
    step.begin()
    backward(module, step)
    step.fold()
    if released:
        step.release()
    with pytest.raises(PrivacyError, match="one optimizer step for each batch"):
        step.begin()


@pytest.mark.parametrize("how", ["unfrozen", "added", "leftover"])
def test_parameters_that_start_training_later_are_refused(how):
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    module[0].requires_grad_(False)
    step, optimizer = make(module)
    extra = nn.Linear(6, 6)
    if how == "unfrozen":
        module[0].requires_grad_(True)
    elif how == "added":
        optimizer.add_param_group({"params": extra.parameters()})
    else:
        module[0].weight.grad = torch.ones(6, 6)
    step.begin()
    backward(module, step)
    with pytest.raises(PrivacyError, match="the parameters that were trainable at the start"):
        step.release()
    assert all(p.grad is None for p in module.parameters())
    assert step._charge.count == 0


def test_weights_that_move_between_batch_and_step_are_refused():
    module = networks()["mlp"]
    step, _ = make(module)
    step.begin()
    backward(module, step)
    with torch.no_grad():
        module[0].weight.sub_(0.1 * module[0].weight.grad)
    with pytest.raises(PrivacyError, match="weights to stand still"):
        step.release()


class Misuse(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        if self.how == "weight outside":
            return self.b(F.linear(x, self.a.weight))
        if self.how == "weight outside too":
            return self.b(F.linear(self.a(x), self.a.weight))
        if self.how == "concatenated":
            return self.b(torch.cat([x, x]))[: len(x)]
        if self.how == "folded":
            return self.b(x.repeat_interleave(2, 0).relu()).view(len(x), 2, 3).mean(1)
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weight outside", "gradient per record for `a.weight`, got only their sum"),
        ("weight outside too", "per-record gradients of `a.weight` that add up"),
        ("concatenated", r"7 rows, one a record, in the gradient of `b.weight`, got 14"),
        ("folded", r"7 rows, one a record, in the gradient of `b.weight`, got 14"),
        ("two backwards", "one backward a batch, got 2"),
        ("no backward", "got no gradient at all"),
    ],
)
def test_misuse_is_detected(how, message):
    module = Misuse(how)
    step, _ = make(module)
    step.begin()
    if how == "no backward":
        step.expect(7, 7)
    else:
        backward(module, step)
    if how == "two backwards":
        backward(module, step)
    with pytest.raises(PrivacyError, match=message):
        step.fold()


def zero_gradient_networks():
    """Ordinary models with parameters whose true gradient is zero: what is left is rounding."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(2, 2) for _ in range(3))
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            tokens = x.view(-1, 3, 2)
            scores = self.q(tokens) @ self.k(tokens).transpose(1, 2)
            return self.out((scores.softmax(-1) @ self.v(tokens)).flatten(1))

    def normed(norm):
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), norm, nn.Flatten(),
            nn.Linear(48, 3),
        )  # fmt: skip

    return {
        "group norm": normed(nn.GroupNorm(4, 4)),
        "instance norm": normed(nn.InstanceNorm2d(4)),
        "attention": Attention(),
    }


@pytest.mark.parametrize("name", zero_gradient_networks())
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_rounding_where_the_gradient_is_zero_is_no_misuse(name, half, scale):
    torch.manual_seed(0)
    module = zero_gradient_networks()[name]
    step, _ = make(module)
    x, y = records()
    step.begin()
    step.expect(7, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = F.cross_entropy(module(x).float(), y) * scale
    loss.backward()
    step.release()
    assert all(p.grad.isfinite().all() for p in step.parameters)


def test_the_padding_row_of_an_embedding_stays_zero():
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.table(x).mean(1))

    module = Words()
    step, _ = make(module)
    x, y = torch.randint(0, 5, (7, 6)), torch.arange(7) % 3
    expected = clipped_sum(
        module,
        lambda a, b: F.cross_entropy(module(a), b),
        [(x[i : i + 1], y[i : i + 1]) for i in range(7)],
        C,
    )
    step.begin()
    step.expect(7, 7)
    F.cross_entropy(module(x), y).backward()
    step.release()
    for p, total in zip(step.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, total / B, rtol=1e-5, atol=1e-6)
    assert module.table.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("how", ["in place", "data", "another optimizer"])
@pytest.mark.parametrize("when", ["inside a batch", "between batches"])
def test_weights_that_move_behind_the_optimizer_are_refused(how, when):
    module = networks()["mlp"]
    step, optimizer = make(module, 1.0)
    other = torch.optim.SGD(module.parameters(), lr=1e-6)

    def move():
        weight = module[0].weight
        if how == "data":
            weight.data[0, 0] += 1e-6
        elif how == "in place":
            with torch.no_grad():
                weight[0, 0] += 1e-6
        else:
            weight.grad = torch.ones_like(weight)
            other.step()
            weight.grad = None

    step.begin()
    backward(module, step)
    if when == "inside a batch":
        step.fold()
        move()
        with pytest.raises(PrivacyError, match="stand still between a batch and its step"):
            step.release()
        return
    step.release()
    optimizer.step()
    move()
    with pytest.raises(PrivacyError, match="stand still between a step and the next batch"):
        step.begin()


def test_a_raw_gradient_cannot_join_a_released_one():
    module = networks()["mlp"]
    step, optimizer = make(module, 1.0)
    step.begin()
    backward(module, step)
    step.release()
    x, y = records()
    with pytest.raises(PrivacyError, match="no backward between the release of a gradient"):
        F.cross_entropy(module(x), y).backward()
    # Whoever swallows that error gets no step either.
    assert module[0].weight.grad is None
    with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
        optimizer.step()


def test_a_sum_and_a_mean_give_the_same():
    results = []
    for reduction, rows in (("mean", 1), ("sum", 7)):
        module = networks()["mlp"]
        step, _ = make(module, loss_reduction=reduction)
        x, y = records()
        step.begin()
        step.expect(7, 7)
        (F.cross_entropy(module(x), y) * rows).backward()
        step.release()
        results.append(torch.cat([p.grad.flatten() for p in step.parameters]))
    torch.testing.assert_close(*results)


def test_a_gradient_hook_added_later_is_refused():
    module = networks()["mlp"]
    step, _ = make(module)
    step.begin()
    module[0].weight.register_hook(lambda g: None)
    backward(module, step)
    with pytest.raises(PrivacyError, match="no gradient hooks on parameters"):
        step.release()


def test_order_of_calls_is_checked():
    step, _ = make(networks()["mlp"])
    step.begin()
    with pytest.raises(PrivacyError, match="before `fold"):
        step.fold()
    with pytest.raises(PrivacyError, match="got none"):
        step.release()


def test_layers_without_per_record_gradients_are_refused():
    module = nn.Sequential(nn.Linear(6, 3, dtype=torch.cfloat))
    with pytest.raises(PrivacyError, match="weights that are real numbers"):
        make(module)
    assert all(vars(p) == {} for p in module.parameters())


def test_close_leaves_the_module_as_it_was():
    module = networks()["in-place"]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    keys = [sorted(vars(m)) for m in module.modules()]
    step, optimizer = make(module, 1.0, optimizer)
    step.begin()
    backward(module, step)
    step.close()
    assert [sorted(vars(m)) for m in module.modules()] == keys
    assert all(vars(p) == {} and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())
    assert module[1].inplace
    optimizer.step()  # the guard is gone
