"""AdversarialTraining: the user's own step sees the adversarial batch, whatever the set-up."""

import collections
import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

from defend import PGD, AdversarialTraining, InputError, InputSpace, Linf
from tests.callbacks.by_hand import Rich
from tests.helpers import ConvNet, Net, data, flat, loader, trainer

ATTACK = PGD(Linf(0.1), steps=3, random_start=False)
Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


class Spy(Net):
    """Remembers the batches that its training_step saw."""

    def __init__(self, key=0, target=1, **kwargs):
        super().__init__(**kwargs)
        self.keys, self.seen = (key, target), []

    def training_step(self, batch, batch_idx):
        x, y = (batch[k] if not isinstance(batch, Record) else getattr(batch, k) for k in self.keys)
        self.seen.append((type(batch), x, y))
        return F.cross_entropy(self(x), y)


CONTAINERS = {
    "list": (lambda b: [b[0], b[1]], 0, 1),
    "tuple": (lambda b: (b[0], b[1]), 0, 1),
    "dict": (lambda b: {"x": b[0], "y": b[1]}, "x", "y"),
    "namedtuple": (lambda b: Pair(*b), 0, 1),
    "dataclass": (lambda b: Record(*b), "x", "y"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_step_sees_the_adversarial_batch_in_its_own_container(name):
    make, key, target = CONTAINERS[name]
    pl.seed_everything(0)
    module = Spy(key=key, target=target)
    batches = DataLoader(data(8), batch_size=8, collate_fn=lambda rows: make(default_collate(rows)))
    clean, y = data(8).tensors
    expected = ATTACK(module, clean, y)
    callback = AdversarialTraining(ATTACK, input_key=key, target_key=target)
    trainer(callbacks=[callback]).fit(module, batches)
    ((kind, x, labels),) = module.seen
    assert kind is type(make([clean, y]))
    torch.testing.assert_close(x, expected)
    assert torch.equal(labels, y)


def test_equals_a_hand_written_loop():
    pl.seed_everything(0)
    module, reference = Net(), Net()
    reference.load_state_dict(module.state_dict())
    batches = DataLoader(data(), batch_size=8)
    trainer(max_epochs=2, callbacks=[AdversarialTraining(ATTACK)]).fit(module, batches)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y in batches:
            adv = ATTACK(reference, x, y)
            optimizer.zero_grad()
            F.cross_entropy(reference(adv), y).backward()
            optimizer.step()
    torch.testing.assert_close(flat(module), flat(reference), rtol=0, atol=1e-6)


def test_the_loaders_memory_is_never_written_to():
    kept = [t.clone() for t in data(8).tensors]
    before = kept[0].clone()

    class SameMemory:
        def __iter__(self):
            return iter([kept])

        def __len__(self):
            return 1

    trainer(max_epochs=3, callbacks=[AdversarialTraining(ATTACK)]).fit(Net(), SameMemory())
    assert torch.equal(kept[0], before)


def test_gradient_accumulation_is_not_polluted():
    """Two accumulated halves equal one whole batch (attack and loss are per record)."""

    def fit(batch_size, accumulate):
        pl.seed_everything(0)
        module = Net()
        trainer(callbacks=[AdversarialTraining(ATTACK)], accumulate_grad_batches=accumulate).fit(
            module, DataLoader(data(32), batch_size=batch_size)
        )
        return flat(module)

    torch.testing.assert_close(fit(4, 4), fit(16, 1), rtol=0, atol=1e-6)


def test_a_careless_attack_of_ones_own_pollutes_nothing():
    """It leaves eval mode on and fills the gradients of a step that is being accumulated."""

    def careful(model, x, y, *, generator=None, chunk_size=None):
        adv = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        return (x + 0.1 * grad.sign()).clamp(0, 1)

    def careless(model, x, y, *, generator=None, chunk_size=None):
        model.eval()
        adv = x.clone().requires_grad_()
        F.cross_entropy(model(adv), y).backward()
        return (x + 0.1 * adv.grad.sign()).clamp(0, 1).detach()

    weights = []
    for attack in (careful, careless):
        pl.seed_everything(0)
        module = Rich()
        callback = AdversarialTraining(attack)
        trainer(callbacks=[callback], accumulate_grad_batches=2).fit(module, loader(64, 16))
        assert module.net.training
        weights.append(torch.cat([v.flatten().float() for v in module.state_dict().values()]))
    assert torch.equal(*weights)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()
        self.steps += 1


def test_manual_optimization():
    batches = DataLoader(data(32), batch_size=8)
    results = []
    for cls in (Manual, Net):
        pl.seed_everything(0)
        module = cls()
        trainer(callbacks=[AdversarialTraining(ATTACK)]).fit(module, batches)
        results.append(flat(module))
        if cls is Manual:
            assert module.steps == 4  # the attack takes no steps of its own
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_mixed_precision_reaches_the_attack():
    seen = []

    class Watch(ConvNet):
        def forward(self, x):
            seen.append((self.training, self.net[0](x).dtype))
            return self.net(x)

    module = Watch()
    images = torch.utils.data.TensorDataset(torch.rand(8, 1, 6, 6), torch.arange(8) % 3)
    trainer(callbacks=[AdversarialTraining(ATTACK)], precision="bf16-mixed").fit(
        module, DataLoader(images, batch_size=8)
    )
    assert seen == [(False, torch.bfloat16)] * 3 + [(True, torch.bfloat16)]


def test_unfrozen_batch_statistics_move_once_a_batch():
    module = ConvNet()
    module.net[1] = torch.nn.BatchNorm2d(4)
    images = torch.utils.data.TensorDataset(torch.rand(8, 1, 6, 6), torch.arange(8) % 3)
    trainer(callbacks=[AdversarialTraining(ATTACK)], max_epochs=2).fit(
        module, DataLoader(images, batch_size=4)
    )
    assert module.net[1].num_batches_tracked == 4


def test_chunks_do_not_change_the_result():
    results = []
    for chunk_size in ("auto", 3):
        pl.seed_everything(0)
        module = Net()
        callback = AdversarialTraining(PGD(Linf(0.1), steps=3), chunk_size=chunk_size)
        trainer(callbacks=[callback]).fit(module, DataLoader(data(), batch_size=16))
        results.append(flat(module))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def fit_with(seed, attack=None, ckpt=None, **settings):
    pl.seed_everything(seed)
    module = Net()
    callback = AdversarialTraining(attack or PGD(Linf(0.1), steps=2))
    run = trainer(callbacks=[callback], **settings)
    run.fit(module, DataLoader(data(), batch_size=8), ckpt_path=ckpt)
    return module, run


def test_seed_everything_makes_it_repeat_and_another_seed_does_not():
    one, two = fit_with(1)[0], fit_with(1)[0]
    assert torch.equal(flat(one), flat(two))
    pl.seed_everything(1)
    module = Net()
    pl.seed_everything(2)
    trainer(callbacks=[AdversarialTraining(PGD(Linf(0.1), steps=2))]).fit(
        module, DataLoader(data(), batch_size=8)
    )
    assert not torch.equal(flat(one), flat(module))


def test_the_callback_leaves_the_global_rng_alone():
    """Dropout and shuffling draw the same numbers with an attack that does not move."""
    results = []
    for callbacks in ([], [AdversarialTraining(PGD(Linf(0.0), steps=2))]):
        pl.seed_everything(0)
        module = ConvNet()
        images = torch.utils.data.TensorDataset(torch.rand(16, 1, 6, 6), torch.arange(16) % 3)
        trainer(callbacks=callbacks, max_epochs=2).fit(
            module, DataLoader(images, batch_size=4, shuffle=True)
        )
        results.append(flat(module))
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    straight, _ = fit_with(1, max_epochs=3)
    _, run = fit_with(1, max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    # Another global seed: the attack's own comes from the checkpoint.
    resumed, _ = fit_with(99, ckpt=tmp_path / "half.ckpt", max_epochs=3)
    torch.testing.assert_close(flat(resumed), flat(straight), rtol=0, atol=1e-7)


def left_on(run):
    return set(vars(run.strategy)) & {"training_step", "process_dataloader"}


def test_nothing_is_left_after_a_fit_and_a_second_fit_works():
    module = Net()
    run = trainer(callbacks=[AdversarialTraining(ATTACK)])
    run.fit(module, loader())
    assert not left_on(run)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert not left_on(run)


def test_nothing_is_left_after_an_exception():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of luck")

    run = trainer(callbacks=[AdversarialTraining(ATTACK)])
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(Failing(), loader())
    assert not left_on(run)


def test_validation_is_clean():
    seen = []

    class Validating(Net):
        def validation_step(self, batch, batch_idx):
            seen.append(batch[0].clone())

    batches = DataLoader(data(8), batch_size=8)
    trainer(callbacks=[AdversarialTraining(ATTACK)], num_sanity_val_steps=1).fit(
        Validating(), batches, batches
    )
    assert all(torch.equal(x, data(8).tensors[0]) for x in seen)
    assert len(seen) == 2


class Another(AdversarialTraining):
    """Lightning itself refuses two of the very same class."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialTraining("pgd"), "`attack` to be an attack such as"),
        (lambda: AdversarialTraining(ATTACK, chunk_size=0), "`chunk_size` to be 'auto'"),
        (lambda: AdversarialTraining(ATTACK, chunk_size="all"), "`chunk_size` to be 'auto'"),
    ],
)
def test_refuses_bad_settings(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([AdversarialTraining(ATTACK, input_key="image")], "field 'image'"),
        ([AdversarialTraining(PGD(Linf(0.1), inputs=InputSpace(0, 0.5)))], "inside the box"),
        ([AdversarialTraining(ATTACK), Another(ATTACK)], "one AdversarialTraining"),
    ],
)
def test_refuses_bad_batches_and_pairs(callbacks, message):
    with pytest.raises(InputError, match=message):
        trainer(callbacks=callbacks).fit(Net(), loader())
