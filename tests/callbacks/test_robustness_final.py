"""The curve and the warning are about the weights that a fit ends with."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch.utils.data import DataLoader

from defend import PGD, DifferentialPrivacy, Linf, RobustnessEvaluation
from defend import evaluate as evaluate_model
from defend.callbacks import _evidence
from tests.helpers import Net, data, flat, loader, trainer

ATTACKS = {"pgd3": PGD(Linf(0.1), steps=3)}
NOT_FINAL = "without a robustness evaluation of the final weights"


def validation():
    return DataLoader(data(48, seed=1), batch_size=16)


def accuracy(module):
    x, y = data(48, seed=1).tensors
    return (module(x).argmax(1) == y).float().mean().item()


def fit(*callbacks, module=None, **settings):
    pl.seed_everything(0)
    module = module or Net()
    run = trainer(callbacks=[*callbacks], **settings)
    run.fit(module, loader(), validation())
    return module, run


@pytest.mark.parametrize("evaluation_first", [True, False])
def test_averaged_weights_that_were_validated_are_the_final_ones(evaluation_first):
    # It hardly moves from the initial weights, and puts them in place through `.data`.
    averaging, evaluation = EMAWeightAveraging(decay=0.999), RobustnessEvaluation(ATTACKS)
    order = [evaluation, averaging] if evaluation_first else [averaging, evaluation]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NOT_FINAL}")
        module, _ = fit(*order, max_epochs=6)
    last_step, _ = fit(max_epochs=6)
    assert accuracy(module) != accuracy(last_step)
    assert evaluation.curves["linf"][0.0] == pytest.approx(accuracy(module))
    assert evaluation.report == evaluate_model(module, validation(), ATTACKS, progress=False)


def test_weights_averaged_at_the_end_are_told_and_have_the_curve():
    class Records(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.before = flat(pl_module)

    # Its on_train_end comes after the evaluation's and the record's.
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    records, evaluation = Records(), RobustnessEvaluation(ATTACKS)
    with pytest.warns(UserWarning, match=NOT_FINAL):
        module, run = fit(evaluation, records, averaging, max_epochs=6)
    assert not torch.equal(records.before, flat(module))
    assert evaluation._latest.step == run.global_step  # the step alone would not tell
    assert evaluation.curves["linf"][0.0] == pytest.approx(accuracy(module))
    assert evaluation.report != evaluate_model(module, validation(), ATTACKS, progress=False)


class Nudge(pl.Callback):
    """At the end of training, what neither step nor version tells."""

    def __init__(self, name, amount):
        self.name, self.amount = name, amount

    def on_train_end(self, trainer, pl_module):
        pl_module.get_parameter(self.name).data.add_(self.amount)


def test_one_changed_weight_is_noticed_and_none_is_not():
    with pytest.warns(UserWarning, match=NOT_FINAL):
        fit(RobustnessEvaluation(ATTACKS), Nudge("net.2.bias", torch.tensor([0, 0, 1e-3])))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NOT_FINAL}")
        fit(RobustnessEvaluation(ATTACKS), Nudge("net.2.bias", torch.zeros(3)))


def test_changed_buffers_are_noticed():
    class Shift(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.norm.running_mean.data.add_(1.0)

    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(8)

        def forward(self, x):
            return super().forward(self.norm(x))

    with pytest.warns(UserWarning, match=NOT_FINAL):
        fit(RobustnessEvaluation(ATTACKS), Shift(), module=Normed())


@pytest.mark.parametrize("evaluation_first", [True, False])
def test_the_evidence_has_the_curve_of_the_final_weights(monkeypatch, evaluation_first):
    cards = []
    monkeypatch.setattr(_evidence, "log_card", lambda run, _, results: cards.append(results))
    private = DifferentialPrivacy(delta=1e-3, max_grad_norm=1.0, noise_multiplier=1.0)
    evaluation = RobustnessEvaluation(ATTACKS)
    order = [evaluation, private] if evaluation_first else [private, evaluation]
    with pytest.warns(UserWarning, match=NOT_FINAL):
        module, _ = fit(*order, Nudge("net.2.bias", torch.tensor([9.0, 0, 0])))
    (card,) = cards
    assert card["curves"] == evaluation.curves
    assert card["curves"]["linf"][0.0] == pytest.approx(accuracy(module))
