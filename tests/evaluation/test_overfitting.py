import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, InputError, InputSpace, Linf
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.evaluation.overfitting import OverfittingAlarm
from defend.evaluation.trend import Reading, RobustnessTrend, wilson

FGSM = PGD(Linf(0.2), steps=1, step_size=0.2, random_start=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def readings(pgd, loss, *, records=64, chance=0.1):
    """A history of given accuracies and losses."""
    return [
        Reading(p, 0.9, value, False, records, chance) for p, value in zip(pgd, loss, strict=True)
    ]


def alarms(history, drop=0.5):
    trend = RobustnessTrend(drop)
    return [trend.add(reading) for reading in history]


def collapsed(history, drop):
    return alarms(history, drop)[-1]


def alarms_slowly(history, drop):
    """The rule from its docstring, over all readings anew at each."""

    def pooled(end):
        for start in reversed(range(end)):
            some = history[start:end]
            n = sum(r.records for r in some)
            if n >= 128:
                share = sum(r.records * r.pgd_accuracy for r in some) / n
                loss = sum(r.records * r.single_step_loss for r in some) / n
                return (*wilson(share, n, 3.0), loss)
        return None

    found = []
    for end in range(1, len(history) + 1):
        looks = [look for i in range(1, end + 1) if (look := pooled(i))]
        if not looks:
            found.append(False)
            continue
        best = max(looks, key=lambda look: look[0])
        lost = looks[-1][1] < drop * best[0]
        learned = best[0] > history[end - 1].chance
        found.append(lost and learned and looks[-1][2] < best[2])
    return found


# --- the rule -------------------------------------------------------------------------------------


def test_a_collapse_under_a_falling_loss_is_seen_after_two_looks():
    history = readings([0.1, 0.4, 0.5, 0.5, 0.0, 0.0, 0.0], [2.3, 1.5, 1.2, 1.1, 0.5, 0.4, 0.3])
    assert alarms(history) == [False] * 5 + [True] * 2


def test_one_bad_look_is_not_enough():
    history = readings([0.1, 0.4, 0.5, 0.5, 0.0, 0.5, 0.5], [2.3, 1.5, 1.2, 1.1, 0.5, 0.4, 0.3])
    assert not any(alarms(history))


def test_training_that_diverges_is_no_overfitting():
    accuracy = [0.1, 0.4, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert not any(alarms(readings(accuracy, [2.3, 1.5, 1.2, 1.1, 2.3, 2.3, 9.0])))
    assert not any(alarms(readings(accuracy, [2.3, 1.5, 1.2, 1.1, *[math.nan] * 3])))
    assert not any(alarms(readings(accuracy, [2.3, 1.5, 1.2, 1.1, *[math.inf] * 3])))


def test_a_constant_answer_is_no_robustness_to_lose():
    """Two classes: right on half of them under any attack, until something is learned."""
    accuracy, loss = [0.5, 0.5, 0.48, 0.0, 0.0], [0.7, 0.69, 0.6, 0.5, 0.4]
    assert not any(alarms(readings(accuracy, loss, chance=0.5)))
    assert any(alarms(readings(accuracy, loss, chance=0.1)))


def test_robustness_that_rises_or_wavers_is_left_alone():
    assert not any(alarms(readings([0.1, 0.2, 0.3, 0.4, 0.5], [2.3, 2.0, 1.7, 1.4, 1.1])))
    wavering = [0.5, 0.5, 0.35, 0.3, 0.4, 0.35]
    assert not any(alarms(readings(wavering, [1.5, 1.4, 1.3, 1.2, 1.1, 1.0])))


def test_looks_at_few_records_are_taken_together():
    accuracy, loss = [0.5] * 16 + [0.0] * 16, [1.5] * 16 + [0.5] * 16
    few = alarms(readings(accuracy, loss, records=8))
    # 16 looks make 128 records; a few more of them may be left over from before the collapse.
    assert few.index(True) in range(28, 32)
    assert not any(alarms(readings(accuracy[:24], loss[:24], records=5)))
    assert alarms(readings([0.5, 0.0], [1.5, 0.5], records=128)) == [False, True]


def random_history(seed, looks=60):
    draw = seeded(seed)
    level, history = 0.5, []
    for _ in range(looks):
        u = torch.rand(5, generator=draw).tolist()
        level = u[0] if u[1] < 0.1 else level
        loss = math.nan if u[4] < 0.02 else u[3]
        history.append(Reading(level, 0.9, loss, False, int(1 + 80 * u[2]), 0.1 + 0.3 * u[4]))
    return history


def test_reading_by_reading_it_is_the_rule_over_all_of_them():
    seen = []
    for seed in range(20):
        history = random_history(seed)
        expected = alarms_slowly(history, 0.6)
        assert alarms(history, 0.6) == expected
        seen += expected
    assert 0.02 < sum(seen) / len(seen) < 0.5  # both answers occur


def test_a_look_costs_and_keeps_as_much_after_a_thousand():
    for records in (1, 64):
        trend, sizes = RobustnessTrend(0.5), []
        for _ in range(5):
            for _ in range(200):
                trend.add(Reading(0.3, 0.4, 1.0, False, records, 0.1))
            sizes.append(len(json.dumps(trend.state_dict())))
        assert sizes == [sizes[0]] * 5


def test_drop_says_how_far_it_must_fall():
    history = readings([0.6, 0.6, 0.25, 0.25], [1.5, 1.5, 1.0, 1.0], records=512)
    assert not collapsed(history, 0.3)
    assert collapsed(history, 0.6)


def binomial(n, p):
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize(("share", "n"), [(0.0, 20), (0.3, 64), (1.0, 128)])
def test_wilson_solves_its_equation(share, n):
    lower, upper = wilson(share, n, 3.0)
    assert 0 <= lower <= share <= upper <= 1
    for p in (lower, upper):
        assert abs(share - p) == pytest.approx(3 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert lower < upper


def false_alarms(rule, p, n=128, looks=1000):
    """Probability that a look goes off though p never changes; best is the best of `looks`."""
    mass = binomial(n, p)
    cumulative = [min(1.0, sum(mass[: k + 1])) for k in range(n + 1)]
    total = before = 0.0
    for best, value in enumerate(cumulative):
        share, before = value**looks - before, value**looks
        if share > 1e-15:
            total += share * sum(mass[now] for now in range(n + 1) if rule(now / n, best / n))
    return total


def test_noise_alone_does_not_set_it_off():
    """Exactly, from the binomial distribution; the naive rule on the same numbers does."""

    def ours(now, best):
        history = readings([best, now], [1.0, 0.9], records=128, chance=0.0)
        return collapsed(history, 0.5)

    def naive(now, best):
        return now < 0.5 * best

    for p in (0.1, 0.2, 0.4, 0.7):
        assert false_alarms(ours, p) < 1e-6
    assert false_alarms(naive, 0.1) > 0.05
    assert false_alarms(naive, 0.2) > 1e-3


def test_noisy_histories_do_not_set_it_off():
    """The same by simulation, looks of 64 taken together; rejects the naive rule."""
    generator, naive = seeded(), 0
    for p in (0.2, 0.3, 0.6):
        for _ in range(5):
            right = torch.full((60, 64), p).bernoulli(generator=generator).mean(1).tolist()
            loss = (1 + 0.1 * torch.randn(60, generator=generator)).tolist()
            history = readings(right, loss)
            assert not any(alarms(history))
            naive += sum(right[i] < 0.5 * max(right[:i]) for i in range(1, 60))
    assert naive > 10


# --- a look ---------------------------------------------------------------------------------------


def classifier(classes=3):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, classes)
    )


def batch(records=40, classes=3):
    x = torch.rand(records, 8, generator=seeded(3))
    return x, torch.arange(records) % classes


def test_a_look_is_what_one_sees_by_hand():
    model, (x, y) = classifier(), batch()
    training = fgsm_rs(0.1)
    watch = OverfittingAlarm(records=24).watch(training)
    reading = watch.look(model, x, y, seeded(4))
    generator = seeded(4)
    x, y, model = x[:24], y[:24], model.eval()
    single = model(training(model, x, y, generator=generator))
    strong = model(PGD(Linf(0.1), iterate="best")(model, x, y, generator=generator))
    assert reading.single_step_accuracy == pytest.approx((single.argmax(1) == y).float().mean())
    assert reading.single_step_loss == pytest.approx(F.cross_entropy(single, y).item(), rel=1e-5)
    assert reading.pgd_accuracy == pytest.approx((strong.argmax(1) == y).float().mean())
    assert reading.pgd_accuracy < 1
    assert (reading.records, reading.alarm) == (24, False)
    assert reading.chance == pytest.approx(1 / 3)


def test_a_look_leaves_no_trace():
    model, (x, y) = classifier().train(), batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng, before = torch.get_rng_state(), x.clone()
    OverfittingAlarm().watch(FGSM).look(model, x, y)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, before)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_chance_is_of_all_records_so_far():
    watch, model = OverfittingAlarm(records=2).watch(FGSM), classifier()
    x = torch.rand(2, 8)
    assert watch.look(model, x, torch.tensor([0, 0])).chance == 1
    assert watch.look(model, x, torch.tensor([1, 1])).chance == 0.5
    assert watch.look(model, x, torch.tensor([1, 2])).chance == 0.5


def test_class_probabilities_are_targets_too():
    model, (x, y) = classifier(), batch()
    hard = OverfittingAlarm().watch(FGSM).look(model, x, y, seeded())
    soft = OverfittingAlarm().watch(FGSM).look(model, x, F.one_hot(y, 3).float(), seeded())
    assert soft.pgd_accuracy == hard.pgd_accuracy
    assert soft.single_step_loss == pytest.approx(hard.single_step_loss)


def test_a_model_that_has_diverged_is_right_about_nothing():
    x, y = batch(classes=1)

    def broken(v):
        return v[:, :3] * math.nan

    with pytest.warns(UserWarning, match="not finite"):
        reading = OverfittingAlarm().watch(FGSM).look(broken, x, y)
    assert (reading.pgd_accuracy, reading.single_step_accuracy) == (0, 0)
    assert math.isnan(reading.single_step_loss)


def test_the_stronger_attack_is_pgd_at_the_radius_that_is_defended():
    space = InputSpace(low=-1.0)
    for training in (fgsm_rs(0.1, inputs=space), n_fgsm(0.1, noise=3.0, inputs=space)):
        attack = OverfittingAlarm().watch(training).attack
        assert attack.ball.eps == pytest.approx(0.1)
        expected = PGD(Linf(0.1), steps=10, inputs=space)
        assert dataclasses.replace(attack, ball=Linf(0.1)) == expected
    assert OverfittingAlarm().watch(PGD(L2(0.5), steps=2)).attack == PGD(L2(0.5))
    mine = PGD(Linf(0.3), steps=50, restarts=2)
    assert OverfittingAlarm(mine).watch(fgsm_rs(0.1)).attack == mine


def test_any_training_attack_can_be_watched_with_an_attack_of_ones_own():
    def still(model, x, y, *, generator=None, chunk_size=None):
        return x

    reading = OverfittingAlarm(PGD(Linf(0.1))).watch(still).look(classifier(), *batch())
    assert reading.pgd_accuracy <= reading.single_step_accuracy
    with pytest.raises(InputError, match=r"OverfittingAlarm\(attack=PGD\(...\)\) with a training"):
        OverfittingAlarm().watch(still)


def test_it_is_due_once_a_step():
    watch = OverfittingAlarm(every_n_steps=3).watch(FGSM)
    # Steps of two batches each, as under gradient accumulation.
    due = [watch.is_due(step) for step in (0, 0, 1, 1, 2, 2, 3, 3, 4)]
    assert due == [True, False, False, False, False, False, True, False, False]


def test_a_watch_goes_on_from_its_state():
    model, (x, y) = classifier(), batch()
    alarm = OverfittingAlarm(every_n_steps=2)
    whole, first, second = (alarm.watch(FGSM) for _ in range(3))
    for watch in (whole, first):
        assert watch.is_due(2)
        for _ in range(4):
            watch.look(model, x, y, seeded(1))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert not second.is_due(2)
    y = torch.zeros_like(y)
    assert second.look(model, x, y, seeded(2)) == whole.look(model, x, y, seeded(2))


def test_what_cannot_be_looked_at_is_refused():
    watch, (x, y) = OverfittingAlarm().watch(FGSM), batch()
    with pytest.raises(InputError, match="Expected at least one record to look at"):
        watch.look(classifier(), x[:0], y[:0])

    def regression(v):
        return v.sum(1)

    attack = PGD(Linf(0.1), loss=lambda out, y: (out - y) ** 2)
    with pytest.raises(InputError, match=r"Expected logits of shape \[N, classes\]"):
        OverfittingAlarm(attack).watch(attack).look(regression, x, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": 3}, "Expected `attack` to be a PGD or None"),
        ({"attack": PGD(Linf(0.1), targeted=True)}, "Expected an untargeted `attack`"),
        ({"records": 0}, "Expected `records` to be an integer ≥ 1"),
        ({"every_n_steps": 1.5}, "Expected `every_n_steps` to be an integer ≥ 1"),
        ({"drop": 1.0}, "Expected `drop` to be between 0 and 1"),
        ({"drop": 0.0}, "Expected `drop` to be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        OverfittingAlarm(**settings)
