import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from defend import AdversarialTraining, InputError, Linf
from defend.attacks.free import Free
from defend.batching.replay import Replayed
from tests.helpers import Net, data, trainer


class Stream(IterableDataset):
    def __iter__(self):
        yield from data(12)


class Seen(Net):
    """Keeps every batch of inputs that it is trained on."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0].clone())
        self.epochs.append(self.current_epoch)
        return super().training_step(batch, batch_idx)


def fit(loader, **settings):
    module, run = Seen(), trainer(**{"max_epochs": 2, **settings})
    process = run.strategy.process_dataloader
    run.strategy.process_dataloader = lambda loader: Replayed(process(loader), 3)
    run.fit(module, loader)
    return module, run


def test_each_batch_comes_several_times_in_a_row():
    batches = [object(), object()]
    first, second = batches
    assert list(Replayed(batches, 3)) == [first] * 3 + [second] * 3
    assert len(Replayed(batches, 3)) == 6
    assert list(Replayed(iter(batches), 1)) == batches
    assert list(Replayed([], 3)) == []


def test_it_can_be_iterated_again():
    loader = Replayed(DataLoader(data(8), batch_size=4), 2)
    assert [len(x) for x, _ in loader] == [len(x) for x, _ in loader] == [4] * 4


def test_without_a_length_it_has_none():
    with pytest.raises(TypeError, match="has no len"):
        len(Replayed(iter([]), 2))
    with pytest.raises(TypeError, match="has no len"):
        len(Replayed(DataLoader(Stream(), batch_size=4), 2))


def test_the_rest_is_the_loaders_own():
    loader = DataLoader(data(8), batch_size=4)
    replayed = Replayed(loader, 2)
    for name in ("sampler", "batch_sampler", "dataset", "batch_size", "num_workers"):
        assert getattr(replayed, name) is getattr(loader, name)
    replayed._iterator = "reset"  # as Lightning does to stop workers
    assert loader._iterator == "reset"
    assert not hasattr(replayed, "state_dict")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = replayed.nonsense


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_it_can_be_copied(clone):
    other = clone(Replayed(DataLoader(data(8), batch_size=4), 2))
    assert (len(other), other.times, other.batch_size) == (4, 2, 4)


@pytest.mark.parametrize("times", [0, -1, 1.0, True, None])
def test_times_out_of_range_are_refused(times):
    with pytest.raises(InputError, match="Expected `times` to be an integer ≥ 1"):
        Replayed([], times)


def test_a_fit_trains_on_each_batch_several_times():
    loader = DataLoader(data(12), batch_size=4)
    module, run = fit(loader)
    assert run.num_training_batches == 9
    assert run.global_step == len(module.batches) == 18
    expected = [x for x, _ in loader for _ in range(3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(module.batches, expected, strict=True))


def test_max_steps_ends_in_the_middle_of_a_batch():
    module, run = fit(DataLoader(data(12), batch_size=4), max_steps=4, max_epochs=-1)
    assert run.global_step == len(module.batches) == 4
    assert torch.equal(module.batches[0], module.batches[2])
    assert not torch.equal(module.batches[2], module.batches[3])


def test_a_stream_without_a_length_trains_to_its_end():
    module, run = fit(DataLoader(Stream(), batch_size=4), max_epochs=1)
    assert run.global_step == len(module.batches) == 9


def test_limits_count_replayed_batches():
    module, run = fit(DataLoader(data(12), batch_size=4), max_epochs=1, limit_train_batches=5)
    assert run.global_step == len(module.batches) == 5


class Recorded(DistributedSampler):
    def set_epoch(self, epoch):
        self.epochs = [*getattr(self, "epochs", []), epoch]
        super().set_epoch(epoch)


def test_the_sampler_inside_is_told_its_epoch():
    sampler = Recorded(data(12), num_replicas=1, rank=0, shuffle=True)
    module, _ = fit(DataLoader(data(12), batch_size=4, sampler=sampler))
    assert sorted(set(sampler.epochs)) == [0, 1]
    first, second = torch.cat(module.batches[:9:3]), torch.cat(module.batches[9::3])
    assert not torch.equal(first, second)  # shuffled anew
    assert torch.equal(first.sort(0).values, second.sort(0).values)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_stopped_in_the_end(persistent):
    loader = DataLoader(data(8), batch_size=4, num_workers=1, persistent_workers=persistent)
    module, _ = fit(loader)
    assert len(module.batches) == 12
    assert loader._iterator is None


class Scaling(Seen):
    """Scales its inputs in a batch hook, in place or in the container that it was given."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.how == "container":
            batch[0] = batch[0] * 0.5
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return [x.mul_(0.5) if self.how == "tensor" else x * 0.5, y]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["tensor", "container"])
@pytest.mark.parametrize("replays", [2, 3])
def test_a_hook_that_writes_to_the_batch_is_refused_before_it_does_harm(how, replays, stream):
    """Also where batches are fetched ahead, as of a stream."""
    module = Scaling(how)
    callback = AdversarialTraining(Free(Linf(0.01), replays=replays))
    records = Stream() if stream else data(12)
    with pytest.raises(InputError, match="a batch that is replayed to stay as it is"):
        trainer(callbacks=[callback]).fit(module, DataLoader(records, batch_size=4))
    assert len(module.batches) == 1


def test_hooks_that_make_new_tensors_are_fine_and_so_is_a_single_replay():
    for how, replays in (("new", 3), ("tensor", 1)):
        module = Scaling(how)
        callback = AdversarialTraining(Free(Linf(0.0), replays=replays))
        trainer(callbacks=[callback]).fit(module, DataLoader(data(12), batch_size=4))
        expected = [x * 0.5 for x in data(12).tensors[0].split(4) for _ in range(replays)]
        assert all(torch.equal(a, b) for a, b in zip(module.batches, expected, strict=True))


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    more: dict


def test_it_looks_for_tensors_wherever_they_are():
    for place in ("x", "deep"):
        x, deep = torch.zeros(2), torch.zeros(2)
        replays = iter(Replayed([(1, Record(x, {"deep": [deep]}))], 2))
        next(replays)
        (x if place == "x" else deep).add_(1)
        with pytest.raises(InputError, match="to stay as it is"):
            next(replays)
    with torch.inference_mode():
        x = torch.zeros(2)
    assert len(list(Replayed([x], 3))) == 3  # nobody counts writes to these
