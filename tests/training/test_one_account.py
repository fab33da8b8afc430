"""One model on one data set has one account, whoever trains it, from whatever file or object."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy import Segment, epsilon, read_ledger
from defend.training.one_account import THIS_PROCESS
from tests.helpers import Net, data, loader, trainer
from tests.training import loops
from tests.training.loops import net, sgd, train

ROOT = Path(__file__).parents[2]
DELTA = 1e-3
PHASES = ((0.7, 1 / 8, 8), (0.9, 1 / 8, 8))  # σ, q and steps of two trainings


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


def private(model, optimizer=None, batches=None, **settings):
    return loops.private(model, optimizer, batches, selftest=False, **settings)


def composed(*phases):
    return epsilon(tuple(Segment(*phase) for phase in phases), DELTA, "prv")


BOTH = composed(*PHASES)
FIRST, SECOND = (composed(phase) for phase in PHASES)


def again(model, **settings):
    """A second training, with another σ and nothing that was said of the first."""
    return train(private(model, **{"noise_multiplier": 0.9, **settings}))


def fit(model, sigma, root, *callbacks):
    callback = DifferentialPrivacy(noise_multiplier=sigma, delta=DELTA, max_grad_norm=0.5)
    run = trainer(
        callbacks=[callback, *callbacks],
        default_root_dir=root,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    run.fit(model, loader(256, 32))
    return callback, run


def forget_this_process():
    """As in another process, which has only the ledgers in its folder."""
    THIS_PROCESS.__init__()


def without(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return model


class Unknown(Dataset):
    """Its content is nowhere to be seen."""

    def __init__(self, records, seed=0):
        self.get = data(records, seed=seed).__getitem__
        self.records = records

    def __len__(self):
        return self.records

    def __getitem__(self, index):
        return self.get(index)


def batches(dataset):
    return DataLoader(dataset, batch_size=32)


# --- what goes on -------------------------------------------------------------------------------


def test_a_model_goes_on_in_whatever_object_it_is():
    """A copy, its state dict, a part of another model, in half of its weights, and itself."""
    model = net()
    first = train(private(model))
    assert first.epsilon == pytest.approx(FIRST, abs=1e-6)
    with pytest.warns(UserWarning, match=r"trained before .* goes on: ε = 3\.8\d* was spent by 8"):
        second = again(copy.deepcopy(model))
    assert second.epsilon == pytest.approx(BOTH, abs=1e-6)
    assert max(FIRST, SECOND) + 0.4 < BOTH  # what would be reported otherwise
    assert second.ledger_path == first.ledger_path

    loaded = net()
    loaded.load_state_dict(model.state_dict())
    wrapped = nn.Sequential(nn.Sequential(loaded.net), nn.Linear(3, 3))
    third = again(without(wrapped, "0"), optimizer=sgd(wrapped[1]))  # frozen, but trained before
    assert third.history == (Segment(0.7, 1 / 8, 8), Segment(0.9, 1 / 8, 16))
    assert third.ledger_path == first.ledger_path

    with torch.no_grad():
        model.net[0].weight.mul_(0.5)
        model.net[0].bias.mul_(0.5)
        model.net[2].weight.mul_(0.5)
        model.net[2].bias.mul_(0.5)
    assert again(copy.deepcopy(model)).steps == 8  # nobody can know it
    assert again(model).steps > 8  # but the object is the one that was trained


def test_public_weights_begin_anew():
    """Equal starts, zeros, reset weights: no fit moved these."""
    model = net()
    nn.init.zeros_(model.net[2].weight)
    nn.init.zeros_(model.net[2].bias)
    start = copy.deepcopy(model.state_dict())
    train(private(model))
    other = net()
    other.load_state_dict(start)
    assert again(other).epsilon == pytest.approx(SECOND, abs=1e-6)
    model.load_state_dict(start)
    assert again(model).steps == 8
    model = without(net(), "net.0")
    train(private(model))
    model = copy.deepcopy(model)
    model.net[2].load_state_dict(net().net[2].state_dict())
    assert again(without(model)).steps == 8  # `net.0` never moved


def test_other_data_have_another_account_and_the_first_is_not_forgotten():
    model = net()
    first = train(private(model))
    other = again(model, batches=loader(256, 32, seed=1))
    assert other.epsilon == pytest.approx(SECOND, abs=1e-6)
    assert other.ledger_path != first.ledger_path
    back = again(copy.deepcopy(model))  # its weights are all of the second training
    assert back.epsilon == pytest.approx(BOTH, abs=1e-6)
    assert back.ledger_path == first.ledger_path


def test_a_target_holds_over_both():
    settings = {"noise_multiplier": None, "target_epsilon": 3.0}
    model = net()
    first = train(private(model, noise_multiplier=1.5))
    assert first.epsilon < 2
    second = again(model, **settings)
    assert 2.9 < second.epsilon <= 3.0
    alone = again(net(), **settings)
    assert 2.9 < alone.epsilon <= 3.0
    assert second.noise_multiplier > alone.noise_multiplier


PROGRAM = """
import os
from tests.training import test_one_account as here
from tests.helpers import Net
callback, _ = here.fit(Net.load_from_checkpoint("first.ckpt"), 0.9, ".")
averaged = Net.load_from_checkpoint("average-4.ckpt")
loop = here.private(averaged)
print(repr(callback.epsilon), loop.steps, callback.ledger_path.name, loop.ledger_path.name)
batches = iter(loop.loader)
for _ in range(2):
    loop.step(next(batches))  # and nobody ends the pass, or closes the loop
"""


def test_another_process_loads_the_weights_alone(tmp_path):
    """Those at the end, and an average that was saved on the way."""
    saves = ModelCheckpoint(
        ".", "average-{step}", every_n_train_steps=4, save_top_k=-1, auto_insert_metric_name=False
    )
    first, run = fit(Net(), 0.7, tmp_path, EMAWeightAveraging(decay=0.6), saves)
    run.save_checkpoint("first.ckpt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    spent, steps, *ledgers = done.stdout.split()[-4:]
    assert float(spent) == pytest.approx(BOTH, abs=1e-6)
    assert int(steps) == 16
    assert ledgers == [first.ledger_path.name] * 2
    last = read_ledger(first.ledger_path)[-3:]
    assert [line["kind"] for line in last] == ["step", "step", "note"]
    assert len(last[-1]["weights"]) == 4


def test_the_head_first_then_all_under_a_trainer_and_in_a_loop(tmp_path):
    model = without(Net(), "net.0")
    head, _ = fit(model, 0.7, tmp_path)
    both, _ = fit(without(model), 0.9, tmp_path)
    assert both.epsilon == pytest.approx(BOTH, abs=1e-6)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, 0.9, tmp_path, Fails(3))
    model = copy.deepcopy(model)
    loop = private(model)  # this process knows the ledger
    assert loop.steps == 16 + 3
    assert loop.ledger_path.samefile(head.ledger_path)
    loop.close()
    forget_this_process()
    with private(model) as loop:  # and it is in the same place after all
        assert loop.steps == 16 + 3


class Fails(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.after:
            raise RuntimeError("on purpose")


def test_short_passes_do_not_fill_the_ledger(tmp_path):
    """A line of 40 parameters waits for three steps; the last one does not."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    whole = DataLoader(data(24), batch_size=24)
    loop = private(model, sgd(model), whole, epochs=10)
    with loop:
        for _ in range(10):
            for batch in loop.loader:
                loop.step(batch)
            if loop.exhausted:
                kinds = [line["kind"] for line in read_ledger(loop.ledger_path)[2:]]
    assert kinds == [*["step", "step", "step", "note"] * 3, "step", "note"]


def test_of_several_accounts_that_gave_the_same_weights_one_is_enough():
    """Runs with one seed end in equal weights: the account that is asked for, else the newest."""
    ends, ledgers = [], []
    for seed in (1, 1, 2):
        ends.append(net())
        ledgers.append(train(private(ends[-1], insecure_seed=seed)).ledger_path.absolute())
    for asked, goes_on in ((ledgers[0], 0), (ledgers[1], 1), (None, 1)):
        with private(copy.deepcopy(ends[0]), ledger=asked, insecure_seed=3) as loop:
            assert loop.ledger_path.samefile(ledgers[goes_on])
            assert loop.steps == 8
    joined = copy.deepcopy(ends[0])
    joined.net[0].load_state_dict(ends[2].net[0].state_dict())
    refused(joined, "weights of several accounts")


def test_an_average_in_a_callbacks_state_is_known_in_another_process(tmp_path):
    averages = Averages()
    saves = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    first, _ = fit(Net(), 0.7, tmp_path, averages, saves)
    kept = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["Averages"]
    assert first.steps == 8
    forget_this_process()
    for name, steps in (("average", 8), ("start", 0)):
        model = Net()
        model.load_state_dict(kept[name])
        with private(model) as loop:
            assert loop.steps == steps


class Averages(Callback):
    """Keeps an average in its own state, and what is public beside it."""

    def on_fit_start(self, trainer, pl_module):
        self.start = copy.deepcopy(pl_module.state_dict())
        self.average = copy.deepcopy(self.start)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, value in pl_module.state_dict().items():
            self.average[name].lerp_(value, 0.4)

    def state_dict(self):
        return {"average": self.average, "start": self.start}


def test_what_is_merged_into_a_frozen_weight_counts_as_trained():
    model = without(net(), "net.0")
    train(private(model))
    other = nn.Sequential(model.net[0], nn.Linear(16, 3))
    with private(other) as loop:
        assert loop.steps == 0  # frozen, and as it was
    with torch.no_grad():
        model.net[0].weight += 0.1
    with private(other) as loop:
        assert loop.steps == 8
    with private(copy.deepcopy(other)) as loop:
        assert loop.steps == 0  # nobody can know it


# --- what is refused, and the way forward ---------------------------------------------------------


def refused(model, *texts, **settings):
    with pytest.raises(PrivacyError) as caught:
        private(model, **settings).close()
    for text in ("Expected", "got", *texts):
        assert text in str(caught.value), caught.value


def test_an_account_that_cannot_go_on_is_refused_and_the_cure_works():
    model = net()
    first = train(private(model))
    ledger = str(first.ledger_path.absolute())
    model = copy.deepcopy(model)
    refused(model, "`ledger=False`", f"ledger={ledger!r}", ledger=False)
    refused(model, "got another one", f"ledger={ledger!r}", ledger="other.jsonl")
    other = train(private(net()))
    refused(model, "without a state", f"ledger={ledger!r}", state=other.state_dict(), epochs=2)
    with private(model, ledger=ledger) as loop:
        assert loop.steps == 8
        refused(copy.deepcopy(model), "locked", "Wait for that run to end, or close its ledger")
    with private(copy.deepcopy(model)) as loop:
        assert loop.steps == 8
    with private(model, state=first.state_dict(), epochs=2) as loop:
        assert loop.steps == 8


def test_weights_of_two_accounts_are_refused_until_one_is_public():
    one, two = net(), net()
    train(private(one))
    train(private(two))
    model = net()
    model.net[0].load_state_dict(one.net[0].state_dict())
    model.net[2].load_state_dict(two.net[2].state_dict())
    refused(model, "weights of several accounts", "from public values")
    model.net[2].load_state_dict(net().net[2].state_dict())
    assert again(model).epsilon == pytest.approx(BOTH, abs=1e-6)


def test_without_a_ledger_this_process_still_knows():
    model = net()
    first = train(private(model, ledger=False))
    refused(copy.deepcopy(model), "no ledger of it", "pass that run's state")
    assert again(copy.deepcopy(model), epochs=2, ledger=False, state=first.state_dict()).steps == 16
    assert again(copy.deepcopy(model), batches=loader(256, 32, seed=1)).steps == 8


def test_a_fit_that_is_not_over_is_known_and_a_copy_of_a_ledger_is_no_other_account():
    loop = private(net())
    model = loop._open[1].module
    drawn = iter(loop.loader)
    for _ in range(3):
        loop.step(next(drawn))  # in the middle of a pass
    refused(copy.deepcopy(model), "locked")
    loop.close()
    path = loop.ledger_path
    path.with_name("copy.jsonl").write_bytes(path.read_bytes()[:-700])
    with private(copy.deepcopy(model)) as more:
        assert (more.steps, more.ledger_path) == (3, path)


def test_an_edited_ledger_does_not_go_on():
    model = net()
    path = train(private(model)).ledger_path
    path.write_text(path.read_text().replace('"sample_rate": 0.125', '"sample_rate": 0.120'))
    refused(copy.deepcopy(model), "as they were written")


# --- data of which less is known ------------------------------------------------------------------


def test_data_known_by_their_length_count_as_the_same_and_others_need_a_name():
    model = net()
    first = train(private(model, batches=batches(Unknown(256))))
    assert again(copy.deepcopy(model), batches=batches(Unknown(256, seed=1))).steps == 16
    shorter = {"batches": batches(Unknown(250, seed=1))}
    known = read_ledger(first.ledger_path)[1]["data_digest"]
    assert known.startswith("size:")
    refused(copy.deepcopy(model), f'data_id="{known}"', "a new name", **shorter)
    refused(copy.deepcopy(model), "a new name")  # of known content, after an unknown one
    with private(copy.deepcopy(model), **shorter, data_id=known) as loop:
        assert loop.steps == 16
    with private(copy.deepcopy(model), **shorter, data_id="the others") as loop:
        assert loop.steps == 0


def test_names_tell():
    model = net()
    train(private(model, batches=batches(Unknown(256)), data_id="mine"))
    copied = [copy.deepcopy(model) for _ in range(4)]
    with private(copied[0], batches=batches(Unknown(200)), data_id="mine") as loop:
        assert loop.steps == 8
    with private(copied[1], batches=batches(Unknown(256)), data_id="yours") as loop:
        assert loop.steps == 0
    with private(copied[2], batches=batches(Unknown(256))) as loop:
        assert loop.steps == 8
    refused(copied[3], "data_id=", batches=batches(Unknown(200)))


def test_the_same_records_in_a_wrapper_go_on_and_a_part_of_them_is_asked_about():
    model = net()
    train(private(model))

    class Wrapped(Dataset):
        def __init__(self, base):
            self.base = base

        def __len__(self):
            return len(self.base)

        def __getitem__(self, index):
            return self.base[index]

    with private(copy.deepcopy(model), batches=batches(Wrapped(data(256)))) as loop:
        assert loop.steps == 8
    part = {"batches": batches(Subset(data(256), range(200)))}
    refused(copy.deepcopy(model), "another subset", "If no record is in both", **part)
    with private(copy.deepcopy(model), data_id="a part", **part) as loop:
        assert loop.steps == 0
