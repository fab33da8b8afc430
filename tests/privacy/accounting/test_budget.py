import copy
import json
import math

import pytest

from defend import BudgetError, InputError
from defend.privacy import Budget, Segment, epsilon
from defend.privacy.mechanism.schedules import Decay

Q, DELTA = 0.1, 1e-3


def budget(**settings):
    return Budget(**{"delta": DELTA, "accountant": "rdp", "noise_multiplier": 1.0, **settings})


def spend(account, steps, planned=math.inf, done=0):
    fit = account.open(sample_rate=Q, planned=planned, done=done)
    for _ in range(steps):
        fit.charge()
    return account


def test_charges_are_numbered_counted_and_composed():
    account = budget()
    fit = account.open(sample_rate=Q, planned=math.inf, done=0)
    assert [fit.charge() for _ in range(3)] == [0, 1, 2]
    assert account.history == ((1.0, Q, 3),)
    assert account.epsilon == epsilon([(1.0, Q, 3)], DELTA, "rdp")


def test_the_last_affordable_step_is_the_last():
    account = budget(target_epsilon=2.0)
    fit = account.open(sample_rate=Q, planned=1000, done=0)
    while not fit.exhausted:
        fit.charge()
    with pytest.raises(BudgetError, match=r"stop at ε = 2.0"):
        fit.charge()
    assert account.epsilon <= 2.0
    assert epsilon([(1.0, Q, account.steps + 1)], DELTA, "rdp") > 2.0


@pytest.mark.parametrize("planned", [1, 7, 20, 33, 200])
def test_epsilon_now_is_a_tight_upper_bound_that_ends_exact(planned):
    account = budget(noise_multiplier=None, target_epsilon=3.0)
    fit = account.open(sample_rate=Q, planned=planned, done=0)
    for _ in range(planned):
        fit.charge()
        assert account.epsilon - 1e-9 <= fit.epsilon_now() <= min(3.0, account.epsilon + 1e-6)
    assert fit.epsilon_now() == pytest.approx(account.epsilon, abs=1e-6)
    assert fit.exhausted


def test_epsilon_now_goes_on_without_an_end():
    account = budget()
    fit = account.open(sample_rate=Q, planned=math.inf, done=0)
    for _ in range(2100):
        fit.charge()
        now = fit.epsilon_now()
    assert now == pytest.approx(account.epsilon, abs=1e-6)


def test_a_schedule_is_charged_step_by_step_from_its_place_in_the_plan():
    schedule = Decay(0.5, every=3)
    first = spend(budget(noise_multiplier=8.0, noise_schedule=schedule), 4, planned=7)
    assert first.history == ((8.0, Q, 3), (4.0, Q, 1))
    rest = budget(noise_multiplier=8.0, noise_schedule=schedule)
    rest.merge(json.loads(json.dumps(first.state_dict())))
    fit = rest.open(sample_rate=Q, planned=7, done=4)
    for _ in range(3):
        fit.charge()
    assert rest.history == ((8.0, Q, 3), (4.0, Q, 3), (2.0, Q, 1))
    assert rest.epsilon == epsilon(rest.history, DELTA, "rdp")
    assert fit.epsilon_now() == pytest.approx(rest.epsilon, abs=1e-6)


def test_a_scheduled_plan_meets_its_target():
    account = budget(noise_multiplier=None, target_epsilon=3.0, noise_schedule=Decay(0.9, every=10))
    fit = account.open(sample_rate=Q, planned=50, done=0)
    for _ in range(50):
        fit.charge()
    assert 2.9 < account.epsilon <= 3.0
    assert fit.exhausted
    assert len(account.history) == 5


def test_steps_after_the_checkpoint_are_not_refunded():
    """The ledger knows 14 steps, the checkpoint 10: σ rises so that the target still holds."""
    first = spend(budget(noise_multiplier=None, target_epsilon=3.0), 10, planned=40)
    state = json.loads(json.dumps(first.state_dict()))
    again = budget(noise_multiplier=None, target_epsilon=3.0)
    again.merge(state)
    spent = (Segment(first.noise_multiplier, Q, 14),)
    again.unite(dict.fromkeys(state["fits"], spent), insecure=False)
    with pytest.warns(UserWarning, match="4 of them after the checkpoint"):
        spend(again, 30, planned=40, done=10)
    assert again.steps == 44
    assert again.noise_multiplier > first.noise_multiplier
    assert 2.9 < again.epsilon <= 3.0


def test_a_resumed_plan_keeps_its_noise_and_a_changed_one_finds_another():
    first = spend(budget(noise_multiplier=None, target_epsilon=3.0), 10, planned=40)
    state = json.loads(json.dumps(first.state_dict()))  # plain data
    same, longer = (budget(noise_multiplier=None, target_epsilon=3.0) for _ in range(2))
    same.merge(state)
    spend(same, 30, planned=40, done=10)
    assert same.history == ((first.noise_multiplier, Q, 40),)
    longer.merge(state)
    with pytest.warns(UserWarning, match="was spent by 10 earlier steps"):
        spend(longer, 70, planned=80, done=10)
    assert longer.noise_multiplier > first.noise_multiplier
    assert 2.9 < longer.epsilon <= 3.0


def test_what_is_known_of_elsewhere_is_in_the_running_epsilon():
    """Fits that are taken up in the middle of one."""
    account, other = budget(), spend(budget(noise_multiplier=2.0), 30)
    fit = account.open(sample_rate=Q, planned=20, done=0)
    fit.charge()
    alone = fit.epsilon_now()
    account.merge(other.state_dict())
    assert fit.epsilon_now() > alone
    assert fit.epsilon_now() == pytest.approx(account.epsilon, abs=1e-6)


def test_a_rollback_refunds_nothing_and_another_run_adds():
    account = spend(budget(), 5)
    early = account.state_dict()
    spend(account, 5)
    account.merge(early)
    assert account.steps == 10
    other = spend(budget(noise_multiplier=2.0), 3)
    account.merge(other.state_dict())
    assert account.steps == 13
    assert {segment[0] for segment in account.history} == {1.0, 2.0}
    account.merge(spend(other, 10).state_dict())
    assert account.steps == 23


def test_branches_of_one_run_are_united_not_chosen_between():
    trunk = spend(budget(), 5)
    branches = []
    for sigma, steps in ((1.0, 20), (5.0, 30)):
        branch = budget(noise_multiplier=sigma)
        branch.merge(trunk.state_dict())
        branches.append(spend(branch, steps))
    one, two = branches
    epsilons = one.epsilon, two.epsilon
    one.merge(two.state_dict())
    assert one.steps == 5 + 20 + 30
    assert one.epsilon > max(epsilons)


def test_copies_that_go_on_apart_are_counted_apart():
    original = spend(budget(), 5)
    twin = copy.deepcopy(original)
    spend(original, 10), spend(twin, 10)
    twin.merge(original.state_dict())
    assert twin.steps == 25


def test_what_is_not_private():
    assert budget().private
    assert not budget(insecure=True).private
    assert not spend(budget(noise_multiplier=0.0), 1).private
    tainted = budget()
    tainted.merge(spend(budget(insecure=True), 1).state_dict())
    assert not tainted.private


def test_a_finished_plan_takes_no_step():
    first = spend(budget(noise_multiplier=None, target_epsilon=3.0), 10, planned=10)
    again = budget(noise_multiplier=None, target_epsilon=3.0)
    again.merge(first.state_dict())
    assert again.open(sample_rate=Q, planned=10, done=10).exhausted
    assert again.noise_multiplier == first.noise_multiplier


def test_an_endless_plan_needs_the_noise():
    with pytest.raises(InputError, match="a plan with an end to find the noise"):
        budget(noise_multiplier=None, target_epsilon=1.0).open(
            sample_rate=Q, planned=math.inf, done=0
        )
