"""What is counted, and what is kept."""

import io
import pickle
from typing import Any

import torch
from opacus import PrivacyEngine

from tests.contracts.opacus_alone.yardstick import (
    Private,
    breaks,
    epsilon,
    loader_of,
    private,
    train,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, batch, flat, net

BREAKS = breaks()


@BREAKS.add
def epsilon_of_zero_steps() -> Outcome:
    reported = private(net()).engine.get_epsilon(DELTA)
    return Outcome("safe" if reported == 0 else "accepts", f"ε {reported}")


def _trained(steps: int, **settings: Any) -> Private:
    p = private(net(), **settings)
    for _ in range(steps):
        train(p, *batch())
    return p


@BREAKS.add
def rollback_refunds_epsilon() -> Outcome:
    p, file = _trained(1), io.BytesIO()
    p.engine.save_checkpoint(path=file, module=p.module, optimizer=p.optimizer)
    for _ in range(50):
        train(p, *batch())
    spent = p.engine.get_epsilon(DELTA)
    file.seek(0)
    p.engine.load_checkpoint(path=file, module=p.module, optimizer=p.optimizer)
    after = p.engine.get_epsilon(DELTA)
    return Outcome("accepts" if after < spent else "safe", f"ε {spent:.2f} becomes {after:.2f}")


@BREAKS.add
def resume_without_accountant() -> Outcome:
    """A checkpoint of module and optimizer, as in any PyTorch script."""
    p = _trained(50)
    spent = p.engine.get_epsilon(DELTA)
    saved = p.module.state_dict(), p.optimizer.state_dict()
    again = private(net())
    again.module.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    train(again, *batch())
    reported = again.engine.get_epsilon(DELTA)
    return Outcome(
        "accepts" if reported < spent else "safe",
        f"ε {reported:.2f} reported, {spent:.2f} spent before it",
    )


@BREAKS.add
def checkpoint_without_sigma() -> Outcome:
    """Resumed with a tenth of the noise and ten times the clipping norm: is that noticed?"""
    p, file = _trained(1, sigma=5.0), io.BytesIO()
    p.engine.save_checkpoint(path=file, module=p.module, optimizer=p.optimizer)
    file.seek(0)
    again = private(net(), sigma=0.5, norm=1.0)
    again.engine.load_checkpoint(path=file, module=again.module, optimizer=again.optimizer)
    train(again, *batch())
    reported = again.engine.get_epsilon(DELTA)
    counted = epsilon((5.0, 1 / 16, 1), (0.5, 1 / 16, 1))
    return Outcome(
        "safe" if abs(reported - counted) < 1e-6 else "accepts",
        f"σ 5 → 0.5 and C 0.1 → 1 go unnoticed, but ε counts them: {reported:.2f}",
    )


@BREAKS.add
def per_record_gradients_left_on_module() -> Outcome:
    """Pickle the module after training, hooks removed as Opacus offers it."""
    p = _trained(2)
    clean = pickle.loads(pickle.dumps(p.module.to_standard_module()))
    left = {
        name
        for parameter in clean.parameters()
        for name in ("grad_sample", "summed_grad", "grad")
        if getattr(parameter, name, None) is not None
    }
    left |= {"activations" for layer in clean.modules() if getattr(layer, "activations", None)}
    equal = "summed_grad" in left and torch.equal(
        flat(q.summed_grad for q in clean.parameters()),
        flat(q.summed_grad for q in p.optimizer.params),
    )
    return Outcome(
        "accepts" if equal else "safe",
        f"the file holds {', '.join(sorted(left)) or 'none'}, without noise",
    )


@BREAKS.add
def beyond_the_planned_epochs() -> Outcome:
    """`make_private_with_epsilon` for one epoch, and then four. (Of the two accountants, this one
    finds σ in less than a second.)"""
    module, engine = net(), PrivacyEngine(accountant="rdp")
    made = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=loader_of(size=16),
        target_epsilon=2.0,
        target_delta=DELTA,
        epochs=1,
        max_grad_norm=0.1,
    )
    p = Private(engine, *made)
    for _ in range(4):
        for x, y in p.loader:
            train(p, x, y)
    reported = engine.get_epsilon(DELTA)
    return Outcome("accepts" if reported > 2.0 else "safe", f"target ε 2.00, spent {reported:.2f}")
