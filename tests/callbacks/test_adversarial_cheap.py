"""Clean fraction, ε warm-up, one-step attacks, Free and attacks of torchattacks under a Trainer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from defend import L2, PGD, AdversarialTraining, InputError, Linf, RobustnessEvaluation
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.attacks.torchattacks.adapter import TorchAttack
from defend.objectives import TRADES
from tests.callbacks.by_hand import ATTACK, EPS, Rich, batches, generator
from tests.helpers import Net, data, flat, loader, trainer


class Seeing(Net):
    """Remembers how far each record was moved, and the training forwards."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.moved, self.modes, self.clean = [], [], None

    def forward(self, x):
        self.modes.append(self.training)
        return super().forward(x)

    def on_train_batch_start(self, batch, batch_idx):
        self.clean = batch[0].clone()

    def training_step(self, batch, batch_idx):
        self.moved.append((batch[0].detach() - self.clean).flatten(1))
        return super().training_step(batch, batch_idx)


def fit(
    attack, module=None, *, callbacks=(), ckpt=None, count=4, seed=11, settings=None, **options
):
    pl.seed_everything(seed)
    module = module or Seeing()
    callback = AdversarialTraining(attack, **(settings or {}))
    run = trainer(callbacks=[callback, *callbacks], **options)
    run.fit(module, batches(count), ckpt_path=ckpt)
    return module, run


# --- clean fraction -------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "clean"), [(0.0, 0), (0.25, 4), (0.5, 8), (0.97, 16)])
def test_a_part_of_each_batch_stays_clean(fraction, clean):
    module, _ = fit(ATTACK, settings={"clean_fraction": fraction})
    still = torch.stack([moved.abs().amax(1) == 0 for moved in module.moved])
    assert still.sum(1).tolist() == [clean] * 4
    if fraction == 0.5:  # others in each batch
        assert len({tuple(row.tolist()) for row in still}) == 4


def test_the_others_are_attacked_as_ever():
    attack = PGD(Linf(EPS), steps=2, random_start=False)
    module = Seeing()
    expected = attack(module, *data(16).tensors) - data(16).tensors[0]
    fit(attack, module, count=1, settings={"clean_fraction": 0.5})
    (moved,) = module.moved
    attacked = moved.abs().amax(1) > 0
    torch.testing.assert_close(moved[attacked], expected[attacked], rtol=0, atol=1e-6)


# --- warm-up --------------------------------------------------------------------------------------


class Recording:
    """An attack whose radius can be changed; notes what it is called with."""

    def __init__(self, eps, seen=None):
        self.eps, self.seen = eps, [] if seen is None else seen

    def with_eps(self, eps):
        return Recording(eps, self.seen)

    def __call__(self, model, x, y, *, generator=None, chunk_size=None):
        self.seen.append(self.eps)
        return x


@pytest.mark.parametrize(("warmup", "until"), [(2, 8), (1.5, 6), (0, 0)])
def test_eps_grows_step_by_step(warmup, until):
    attack = Recording(0.2)
    fit(attack, settings={"warmup_epochs": warmup}, max_epochs=3)
    expected = [0.2 * min(1.0, (step + 1) / until if until else 1.0) for step in range(12)]
    assert attack.seen == pytest.approx(expected)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_warm_up_goes_on_where_it_was(tmp_path, step):
    """At the end of an epoch and in the middle of one."""
    straight, resumed = Recording(0.2), Recording(0.2)
    settings = {"settings": {"warmup_epochs": 2.5}, "max_epochs": 3}
    fit(straight, callbacks=[SaveAt(step, tmp_path / "a.ckpt")], **settings)
    fit(resumed, ckpt=tmp_path / "a.ckpt", **settings)
    assert resumed.seen == straight.seen[step:]
    assert len(set(straight.seen)) == 10


@pytest.mark.parametrize(
    "attack", [ATTACK, n_fgsm(EPS), Free(Linf(EPS), replays=1)], ids=["pgd", "n_fgsm", "free"]
)
def test_the_ball_grows_with_it(attack):
    module, run = fit(attack, settings={"warmup_epochs": 2}, max_epochs=3)
    largest = [float(moved.abs().max()) for moved in module.moved]
    bounds = [attack.ball.eps * min(1.0, (step + 1) / 8) for step in range(12)]
    assert all(a <= b + 1e-6 for a, b in zip(largest, bounds, strict=True))
    assert largest[-1] > 0.5 * bounds[-1]
    assert run.callback_metrics["attack/eps_share"] == 1


def test_without_an_end_of_the_epoch_in_sight_it_grows_by_epochs():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(x, y) for x, y in zip(*data(64).tensors, strict=True)])

    attack = Recording(0.2)
    callback = AdversarialTraining(attack, warmup_epochs=4)
    stream = torch.utils.data.DataLoader(Endless(), batch_size=16)
    trainer(callbacks=[callback], max_epochs=2, limit_train_batches=2).fit(Net(), stream)
    assert attack.seen == pytest.approx([0.025, 0.05, 0.075, 0.1])  # two batches are an epoch
    attack.seen.clear()
    trainer(callbacks=[AdversarialTraining(attack, warmup_epochs=4)], max_epochs=2).fit(
        Net(), stream
    )
    assert attack.seen == pytest.approx([0.05] * 4 + [0.1] * 4)
    # Over one epoch it would not grow at all.
    with pytest.raises(InputError, match=r"with a length for warmup_epochs=1, got one without"):
        trainer(callbacks=[AdversarialTraining(attack, warmup_epochs=1)]).fit(Net(), stream)
    attack.seen.clear()
    trainer(callbacks=[AdversarialTraining(attack, warmup_epochs=1)], limit_train_batches=2).fit(
        Net(), stream
    )
    assert attack.seen == pytest.approx([0.1, 0.2])


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [fgsm_rs(EPS), n_fgsm(EPS)], ids=["fgsm_rs", "n_fgsm"])
def test_one_step_attacks(attack):
    module = Seeing()
    x, y = data(16).tensors
    expected = attack(module, x, y, generator=generator(0)) - x
    fit(attack, module, count=1)
    torch.testing.assert_close(module.moved[0], expected, rtol=0, atol=1e-6)


# --- Free -----------------------------------------------------------------------------------------


def free_by_hand(module, *, epochs, replays, eps):
    """Shafahi et al., algorithm 1; δ stays in the box [0, 1] of its batch as well."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    delta = torch.zeros(16, 8)
    for _ in range(epochs):
        for x, y in batches():
            for _ in range(replays):
                delta = (x + delta).clamp(0, 1) - x
                adv = (x + delta).requires_grad_()
                optimizer.zero_grad()
                F.cross_entropy(module(adv), y).backward()
                optimizer.step()
                delta = (delta + eps * adv.grad.sign()).clamp(-eps, eps)
                delta = (x + delta).clamp(0, 1) - x
    return flat(module)


def test_free_is_the_papers_loop_at_the_cost_of_plain_steps():
    module = Seeing()
    reference = Net()
    reference.load_state_dict(module.state_dict())
    _, run = fit(Free(Linf(EPS), replays=3), module, max_epochs=2)
    expected = free_by_hand(reference, epochs=2, replays=3, eps=EPS)
    torch.testing.assert_close(flat(module), expected, rtol=0, atol=1e-6)
    assert run.num_training_batches == 3 * 4
    assert run.global_step == len(module.moved) == len(module.modes) == 3 * 4 * 2
    assert all(module.modes)  # no forward but the training's own
    assert max(float(m.abs().max()) for m in module.moved) == pytest.approx(EPS, abs=1e-6)


def test_free_with_accumulation_a_schedule_and_half_precision():
    module = Seeing(schedule=True)  # steps planned by `estimated_stepping_batches`
    _, run = fit(
        Free(L2(0.3), replays=2), module, accumulate_grad_batches=2, precision="bf16-mixed"
    )
    assert run.global_step == 4
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 4
    assert max(float(m.norm(dim=1).max()) for m in module.moved) <= 0.3 + 1e-2
    assert run.callback_metrics["attack/nonfinite_grad_rate"] == 0


def test_free_goes_on_from_a_checkpoint(tmp_path):
    free = Free(Linf(EPS), replays=2)
    straight, _ = fit(free, max_epochs=3)
    _, run = fit(free, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = fit(free, ckpt=tmp_path / "a.ckpt", max_epochs=3, seed=99)
    assert torch.equal(flat(resumed), flat(straight))
    first = resumed.moved[0].abs().amax(1)
    assert (first > 0).all()  # δ was kept


def test_free_begins_anew_with_each_fit():
    """δ of one model's training is no start for another's."""
    pl.seed_everything(11)
    weights = []
    callback = AdversarialTraining(Free(Linf(EPS), replays=2))
    for _ in range(2):
        torch.manual_seed(0)
        module = Seeing()
        trainer(callbacks=[callback]).fit(module, batches(4))
        assert module.moved[0].abs().max() == 0
        weights.append(flat(module))
    assert torch.equal(*weights)


def test_free_needs_a_step_that_uses_its_inputs():
    class Detached(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].detach(), batch[1]), batch_idx)

    with pytest.raises(InputError, match="training step's backward to reach its inputs"):
        fit(Free(Linf(EPS)), Detached())


# --- torchattacks ---------------------------------------------------------------------------------


def test_torchattacks_in_both_callbacks():
    attack = TorchAttack("PGD", {"eps": EPS, "alpha": EPS / 2, "steps": 2})
    evaluation = RobustnessEvaluation({"theirs": attack, "ours": ATTACK})
    pl.seed_everything(0)
    module = Seeing()
    callback = AdversarialTraining(attack, warmup_epochs=1, clean_fraction=0.25)
    trainer(callbacks=[callback, evaluation], max_epochs=2).fit(
        module, loader(64, 16), loader(32, 16, seed=1)
    )
    still = torch.stack([moved.abs().amax(1) == 0 for moved in module.moved])
    assert (still.sum(1) == 4).all()
    largest = [float(moved.abs().max()) for moved in module.moved]
    assert largest[0] <= EPS / 4 + 1e-6
    assert EPS / 2 < largest[-1] <= EPS + 1e-6
    report = evaluation.report
    assert set(report.attack_accuracy) == {"theirs", "ours"}
    assert set(report.zero_gradients) == {"ours"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (PGD(Linf(EPS), targeted=True), {}, "untargeted attack to train on"),
        (ATTACK, {"objective": "trades"}, r"`objective` to be Madry\(\), TRADES\(\)"),
        (ATTACK, {"clean_fraction": 1.0}, r"`clean_fraction` to be in \[0, 1\)"),
        (ATTACK, {"clean_fraction": 0.5, "objective": TRADES()}, "`clean_fraction=0` with trades"),
        (ATTACK, {"warmup_epochs": -1}, "warm-up to be ≥ 0"),
        (lambda model, x, y, **_: x, {"warmup_epochs": 1}, "`eps` and `with_eps` to warm up"),
        (Free(Linf(EPS)), {"objective": TRADES()}, r"objective=Madry\(\) and no clean fraction"),
        (Free(Linf(EPS)), {"clean_fraction": 0.5}, r"objective=Madry\(\) and no clean fraction"),
    ],
)
def test_refuses_settings_that_do_not_go_together(attack, settings, message):
    with pytest.raises(InputError, match=message):
        AdversarialTraining(attack, **settings)


def test_rich_modules_train_with_free_too():
    """Dropout and batch normalization: the forward of the step is all there is."""
    module = Rich()
    fit(Free(Linf(EPS), replays=2), module)
    assert module.net[1].num_batches_tracked == 8
