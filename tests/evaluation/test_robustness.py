import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from defend import L2, PGD, InputError, Linf, RobustnessReport, evaluate
from defend.evaluation import RobustnessMeter, robustness_curve


class Threshold(nn.Module):
    """Class 1 where x > 0.5: right at eps if and only if |x − 0.5| > eps."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        margin = self.slope * (x - 0.5)
        return torch.cat([-margin, margin], 1)


X = torch.tensor([[0.05], [0.35], [0.45], [0.55], [0.65], [0.95]])
Y = (X > 0.5).long().squeeze(1)
Y[5] = 0  # wrong even when clean


def down(model, x, y, *, generator=None, chunk_size=None):
    return x - 0.1


def up(model, x, y, *, generator=None, chunk_size=None):
    return x + 0.1


def batches(size):
    return DataLoader(TensorDataset(X, Y), batch_size=size)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_counts_by_hand(size):
    report = evaluate(Threshold(), batches(size), {"down": down, "up": up}, progress=False)
    # Clean: all but the last. Down fools 0.55; up fools 0.45; both fool the worst case.
    assert report == RobustnessReport(6, 5 / 6, {"down": 4 / 6, "up": 4 / 6}, 3 / 6)
    assert report.metrics() == {
        "robust/clean_accuracy": 5 / 6,
        "robust/down_accuracy": 4 / 6,
        "robust/up_accuracy": 4 / 6,
        "robust/worst_case_accuracy": 3 / 6,
    }


@pytest.mark.parametrize("limit", [1, 4, 5, 100])
def test_max_records(limit):
    report = evaluate(Threshold(), batches(4), {"up": up}, max_records=limit, progress=False)
    expected = evaluate(Threshold(), [(X[:limit], Y[:limit])], {"up": up}, progress=False)
    assert report == expected
    assert report.records == min(limit, 6)


@pytest.mark.parametrize("limit", [0, -1])
def test_refuses_max_records_below_one(limit):
    with pytest.raises(InputError, match=f"`max_records` to be ≥ 1 or None, got {limit}"):
        evaluate(Threshold(), batches(4), {"up": up}, max_records=limit, progress=False)


def test_pgd_finds_what_can_be_found():
    model = Threshold()
    curve = robustness_curve(model, X, Y, PGD(Linf(0.1)), [0.0, 0.1, 0.2, 0.5])
    assert curve == {0.0: 5 / 6, 0.1: 3 / 6, 0.2: 1 / 6, 0.5: 0.0}
    report = evaluate(model, batches(3), {"l2": PGD(L2(0.1))}, progress=False)
    assert report.attack_accuracy["l2"] == 3 / 6


def test_the_same_seed_gives_the_same_report_and_the_model_is_untouched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attacks = {"pgd": PGD(Linf(0.1), steps=1)}
    state = torch.get_rng_state()
    one, two = (evaluate(model, [(X, Y)], attacks, progress=False) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_that_diverged_is_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 2), float("nan"))

    report = evaluate(Broken(), [(X, torch.zeros(6).long())], {"up": up}, progress=False)
    assert (report.clean_accuracy, report.worst_case_accuracy) == (0.0, 0.0)


def answering(logits):
    """A model with these logits for every record."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([logits]).expand(len(x), -1)

    return Constant()


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("logits", "target", "right"),
    [
        ([1.0, -INF, 0.0], 0, 1.0),  # class 1 is masked
        ([1.0, -INF, 0.0], 1, 0.0),
        ([-INF, 2.0, -INF], 1, 1.0),
        ([0.0, INF, 1.0], 1, 1.0),
        ([NAN, 0.0, 1.0], 0, 0.0),
        ([0.0, 1.0, NAN], 2, 0.0),
        ([0.0, 1.0, NAN], 1, 0.0),
        ([NAN, INF, -INF], 1, 0.0),
    ],
)
def test_masked_classes_are_legal_and_nan_is_never_right(logits, target, right):
    batch = (X, torch.full((6,), target))
    report = evaluate(answering(logits), [batch], {"up": up}, progress=False)
    assert (report.clean_accuracy, report.worst_case_accuracy) == (right, right)


def test_counts_of_several_processes_add_up():
    meters = [RobustnessMeter({"up": up}) for _ in range(2)]
    meters[0].update(Threshold(), X[:4], Y[:4])
    meters[1].update(Threshold(), X[4:], Y[4:])
    total = meters[0].counts + meters[1].counts
    assert meters[0].report(total) == evaluate(Threshold(), batches(6), {"up": up}, progress=False)


def test_dict_batches_by_key():
    report = evaluate(
        Threshold(), [{"x": X, "y": Y}], {"up": up}, input_key="x", target_key="y", progress=False
    )
    assert report.records == 6


def test_the_progress_bar_shows_the_accuracy(capsys):
    evaluate(Threshold(), batches(3), {"up": up})
    assert "robustness: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ({}, "`attacks` to be a dict"),
        ([up], "`attacks` to be a dict"),
        ({"a b": up}, "names of letters, digits"),
        ({"a/b": up}, "names of letters, digits"),
        ({"clean": up}, "another attack name than 'clean'"),
        ({"up": 3}, r"`attacks\['up'\]` to be an attack"),
        ({"up": PGD(Linf(0.1), targeted=True)}, r"`attacks\['up'\]` to be untargeted"),
    ],
)
def test_refuses_bad_attacks(attacks, message):
    with pytest.raises(InputError, match=message):
        evaluate(Threshold(), batches(3), attacks)


def test_refuses_no_data_and_what_is_no_classifier():
    with pytest.raises(InputError, match="at least one record"):
        evaluate(Threshold(), [], {"up": up}, progress=False)
    with pytest.raises(InputError, match="Only classifiers"):
        evaluate(nn.Flatten(0), [(X, Y)], {"up": up}, progress=False)
    with pytest.raises(InputError, match="at least one record"):
        robustness_curve(Threshold(), X[:0], Y[:0], PGD(Linf(0.1)), [0.1])
    with pytest.raises(InputError, match="to be untargeted"):
        robustness_curve(Threshold(), X, Y, PGD(Linf(0.1), targeted=True), [0.1])


# --- attacks at their strongest -------------------------------------------------------------------


class Island(nn.Module):
    """Class 0, but for a narrow strip at 0.6 < x < 0.65, to which all gradients point."""

    def forward(self, x):
        margin = 0.05 - 2 * (x - 0.625).abs()
        return torch.cat([-margin, margin], 1)


# From 0.55 it goes to 0.63, where it is, and on to 0.55: the last iterate is where it began.
ACROSS = PGD(Linf(0.2), steps=2, step_size=0.08, random_start=False)


@pytest.mark.parametrize(
    ("attack", "right"),
    [
        (ACROSS, 0.0),
        (dataclasses.replace(ACROSS, iterate="best"), 0.0),
        (dataclasses.replace(ACROSS, iterate="last"), 1.0),
    ],
)
def test_the_best_iterate_counts_unless_another_is_asked_for(attack, right):
    x, y = torch.tensor([[0.55]]), torch.tensor([0])
    report = evaluate(Island(), [(x, y)], {"pgd": attack}, progress=False)
    assert report.attack_accuracy["pgd"] == right
    assert robustness_curve(Island(), x, y, attack, [0.2])[0.2] == right


def test_an_attack_of_ones_own_may_have_a_stronger_side():
    class Up:
        amount = 0.0

        def for_evaluation(self):
            strongest = Up()
            strongest.amount = 0.1
            return strongest

        def __call__(self, model, x, y, *, generator=None, chunk_size=None):
            return x + self.amount

    attack = Up()
    report = evaluate(Threshold(), batches(6), {"own": attack}, progress=False)
    assert report.attack_accuracy["own"] == 4 / 6
    assert attack.amount == 0.0


# --- gradients that lead nowhere ------------------------------------------------------------------


class Broken(torch.autograd.Function):
    """x as it is, with gradients that are not numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(grad != 0, float("nan"))


class Deaf(Threshold):
    """No gradient for class 1, a broken one below 0.1."""

    def forward(self, x):
        heard = torch.where(x > 0.5, x.detach(), x)
        return super().forward(torch.where(x < 0.1, Broken.apply(x), heard))


def test_the_share_of_gradients_that_lead_nowhere():
    attacks = {"pgd": PGD(Linf(0.02), steps=3, random_start=False), "up": up}
    report = evaluate(Deaf(), batches(4), attacks, progress=False)
    assert report.zero_gradients == {"pgd": 4 / 6}  # three of class 1, one broken
    assert report.metrics()["robust/pgd_zero_grad_rate"] == 4 / 6
    assert "robust/up_zero_grad_rate" not in report.metrics()
    report = evaluate(Threshold(), batches(4), {"pgd": PGD(Linf(0.02))}, progress=False)
    assert report.zero_gradients == {"pgd": 0.0}
    assert evaluate(Deaf(), batches(4), {"up": up}, progress=False).zero_gradients == {}


def test_the_gradients_of_several_processes_add_up():
    attacks = {"pgd": PGD(Linf(0.02), steps=3, random_start=False), "up": up}
    meters = [RobustnessMeter(attacks) for _ in range(2)]
    meters[0].update(Deaf(), X[:2], Y[:2])  # one of two is broken
    meters[1].update(Deaf(), X[2:], Y[2:])  # three of four are deaf
    report = meters[0].report(meters[0].counts + meters[1].counts)
    assert report == evaluate(Deaf(), batches(6), attacks, progress=False)
    assert [m.records for m in meters] == [2, 4]
    assert meters[1].report().zero_gradients == {"pgd": 3 / 4}


def test_a_report_is_plain_data():
    report = evaluate(Threshold(), batches(6), {"pgd": PGD(Linf(0.1))}, progress=False)
    assert RobustnessReport(**report.as_dict()) == report


# --- chunks ---------------------------------------------------------------------------------------


class Small(Threshold):
    """Memory for so many rows at once."""

    def __init__(self, most):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no room")
        return super().forward(x)


@pytest.mark.parametrize("chunk_size", ["auto", None, 4, 1])
def test_neither_chunks_nor_short_memory_change_the_report(chunk_size):
    attacks = {"pgd": PGD(Linf(0.1), steps=2), "up": up}
    whole = evaluate(Threshold(), batches(6), attacks, progress=False)
    model = Small(2)
    report = evaluate(model, batches(6), attacks, progress=False, chunk_size=chunk_size)
    assert report == whole
    assert max(model.sizes) == {4: 3, 1: 1}.get(chunk_size, 6)  # 6 rows in equal chunks


def test_what_did_not_fit_is_not_tried_again():
    model = Small(2)
    meter = RobustnessMeter({"up": up})
    for _ in range(3):
        meter.update(model, X, Y)
    assert [size for size in model.sizes if size > 2] == [6, 3]
    expected = evaluate(Threshold(), [(X, Y)] * 3, {"up": up}, progress=False)
    assert meter.report() == expected


def test_the_smallest_batch_says_nothing_about_what_fits():
    model, meter = Small(6), RobustnessMeter({"up": up})
    for rows in (1, 6):
        meter.update(model, X[:rows], Y[:rows])
    assert model.sizes == [1, 1, 6, 6]


@pytest.mark.parametrize(("given", "handed"), [("auto", None), (None, None), (3, 3)])
def test_attacks_other_than_pgd_get_a_number_or_none(given, handed):
    sizes = []

    def spy(model, x, y, *, generator=None, chunk_size=None):
        sizes.append(chunk_size)
        return x

    evaluate(Threshold(), batches(6), {"spy": spy}, progress=False, chunk_size=given)
    assert sizes == [handed]


@pytest.mark.parametrize("chunk_size", [0, "all", 2.5])
def test_refuses_bad_chunk_sizes(chunk_size):
    with pytest.raises(InputError, match="`chunk_size` to be 'auto'"):
        evaluate(Threshold(), batches(6), {"up": up}, chunk_size=chunk_size)


def test_batches_without_records_count_nothing():
    data = [(X, Y), (X[:0], Y[:0])]
    report = evaluate(Threshold(), data, {"pgd": PGD(Linf(0.1)), "up": up}, progress=False)
    assert report.records == 6
