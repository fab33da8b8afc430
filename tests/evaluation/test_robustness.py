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
