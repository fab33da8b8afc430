"""What all attacks have in common, and users' own callables among them."""

import pytest
import torch
from torch import nn

from defend import PGD, Free, InputError, Linf, TorchAttack, fgsm_rs
from defend.attacks.attack import Attack, as_attack
from defend.attacks.result import GradientCounts, rates
from defend.objectives import TRADES
from defend.threat import L2

X, Y = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2


class Up:
    """A user's own attack with a radius."""

    def __init__(self, eps):
        self.eps = eps

    def with_eps(self, eps):
        return Up(eps)

    def __call__(self, model, x, y, *, generator=None, chunk_size=None):
        return x + self.eps


def still(model, x, y, *, generator=None, chunk_size=None):
    return x


def test_counts_add_up():
    counts = GradientCounts(8, 1, 2) + GradientCounts(4, torch.tensor(3), torch.tensor(0))
    assert counts.to_ints() == (12, 4, 2)
    with pytest.warns(UserWarning, match="2 of 12 input gradients were not finite"):
        found = rates(counts)
    assert found == {"attack/zero_grad_rate": 4 / 12, "attack/nonfinite_grad_rate": 2 / 12}
    assert rates(GradientCounts(0, 0, 0)) == rates(GradientCounts()) == {}


def test_ours_are_taken_as_they_are():
    for attack in (PGD(Linf(0.1)), Free(Linf(0.1)), TorchAttack("FGSM")):
        assert as_attack(attack) is attack
        assert attack.source is attack


def test_the_facts_of_each_attack():
    pgd, free, cw = PGD(L2(0.5)), Free(Linf(0.1), replays=3), TorchAttack("CW")
    facts = [
        (a.radius, a.replays, a.uses_training_gradient, a.couples_records, a.targeted)
        for a in (pgd, free, cw, as_attack(Up(0.2)), as_attack(still))
    ]
    assert facts == [
        (0.5, 1, False, False, False),
        (0.1, 3, True, False, False),
        (None, 1, False, True, False),
        (0.2, 1, False, False, False),
        (None, 1, False, False, False),
    ]
    assert fgsm_rs(0.1).is_one_step
    assert not PGD(Linf(0.1), steps=1, loss=lambda z, y: z[:, 0]).is_one_step
    assert not pgd.is_one_step
    assert not as_attack(still).is_one_step
    assert free.watched() == free.single_step()
    assert as_attack(still).probe() is None


def test_the_radius_of_a_users_own_attack_can_be_changed_where_it_says_how():
    own = as_attack(Up(0.1))
    assert isinstance(own, Attack)
    torch.testing.assert_close(own(None, X, Y), X + 0.1)
    torch.testing.assert_close(own.perturb(None, X, Y, eps=0.3).x_adv, X + 0.3)
    assert own.with_eps(0.2).radius == 0.2
    with pytest.raises(InputError, match=r"Expected an attack with `eps` and `with_eps`, got <fun"):
        as_attack(still).with_eps(0.1)


def test_a_users_own_attack_keeps_its_name_and_its_facts():
    class Coupled(Up):
        couples_records = targeted = True

    own = Coupled(0.1)
    attack = as_attack(own)
    assert attack.source is own
    assert repr(attack) == repr(own)
    assert attack.couples_records
    assert attack.targeted
    assert attack.increasing("kl", 0.001) is attack


def test_it_may_write_to_its_inputs_and_need_not_be_called_without_records():
    def writes(model, x, y, **_):
        y.zero_()
        return x.add_(1.0)

    x, y = X.clone(), Y.clone()
    x_adv = as_attack(writes)(nn.Identity(), x, y)
    assert torch.equal(x_adv, X + 1.0)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert as_attack(lambda *_, **__: 1 / 0)(None, X[:0], Y[:0]).shape == (0, 2)


@pytest.mark.parametrize("wrong", [lambda x: x[:, :1], lambda x: x.double()])
def test_what_does_not_have_the_form_of_x_is_refused(wrong):
    own = as_attack(lambda model, x, y, **_: wrong(x))
    with pytest.raises(InputError, match=r"return inputs of shape \(4, 2\) and torch.float32, got"):
        own(nn.Identity(), X, Y)


def test_an_attack_is_its_own_perturber_and_keeps_nothing():
    for attack in (PGD(Linf(0.1)), as_attack(Up(0.1))):
        perturber = attack.begin()
        assert perturber.state_dict() == {}
        assert perturber.after_backward().to_ints() == (0, 0, 0)
    assert set(Free(Linf(0.1)).begin().state_dict()) == {"delta"}


def test_pgd_increases_what_the_objective_asks_for_unless_it_has_another_loss():
    objective = TRADES()
    asked = objective.inner_loss, objective.start_radius
    assert PGD(Linf(0.1)).increasing(*asked).loss == "kl"
    assert PGD(Linf(0.1), loss="margin").increasing(*asked) == PGD(Linf(0.1), loss="margin")
    assert PGD(Linf(0.1), start_radius=0.05).increasing(*asked).start_radius == 0.05
