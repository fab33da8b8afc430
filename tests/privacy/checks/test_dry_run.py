"""When the step is looked at again, and that a late change of its ways is found."""

import pytest
import torch
import torch.nn.functional as F

from defend import PrivacyError
from defend.privacy import StepUnderTest
from defend.privacy.checks.dry_run import DryRun, is_due
from tests.helpers import loader
from tests.loops import private_loop


def test_it_is_due_less_and_less_often():
    steps = [s for s in range(300) if is_due(s, 0, first_of_epoch=False)]
    assert steps == [4, 16, 64, 256]
    epochs = [e for e in range(40) if is_due(3, e, first_of_epoch=True)]
    assert epochs == [1, 4, 16]
    assert not is_due(3, 16, first_of_epoch=False)


@pytest.mark.parametrize("late", [3, 9, 40])
def test_a_loss_that_turns_bad_later_is_found(late, tmp_path):
    model = torch.nn.Linear(8, 3)
    calls = []

    def loss(module, batch):
        x, y = batch
        if module is model:
            calls.append(len(x))
        if len(calls) >= late:
            x = x - x.mean(0)
        return F.cross_entropy(module(x), y)

    private = private_loop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loader(64, 8),
        loss=loss,
        epochs=20,
        delta=1e-3,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        ledger=tmp_path / "ledger.jsonl",
    )

    def train():
        with private:
            for _ in range(20):
                for batch in private.loader:
                    private.step(batch)

    with pytest.raises(PrivacyError, match=r"(?s)self-test on your own step.*alone"):
        train()
    assert late <= private.steps <= 4 * late + 8
    assert not private.selftest.passed


def test_only_one_record_is_loaded_to_compare_its_views():
    loaded = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            loaded.append(index)
            return torch.rand(4)

    step = StepUnderTest(loss=lambda m, x: m(x).mean(), collate=torch.stack, views=3)
    assert not DryRun(torch.nn.Linear(4, 1), Counted(), step, max_grad_norm=1.0).views_are_alike()
    assert loaded == [loaded[0]] * 3
