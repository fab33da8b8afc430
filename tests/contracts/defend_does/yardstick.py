"""The tools: an ordinary module, a private fit, and how far one record moves its release.

The release is measured where the optimizer takes it. With σ = 0 and a known seed it is the clipped
sum divided by the expected batch size; with batch_size = all records, q = 1 and every record is in
each batch. A released sum may move by C, and by nothing more than rounding beyond it.
"""

import copy
import re
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from defend import BudgetError, DifferentialPrivacy, InputError, PrivacyError
from defend.privacy import epsilon
from tests import helpers
from tests.contracts.outcomes import Outcome, Table, first_words
from tests.contracts.small import DELTA, NORMS, batch, flat, loss, net, same_weights, sensitivity

ROUNDING = 1e-4  # of C
LEAD = "The self-test on your own step and data found"
FOLDER = tempfile.mkdtemp(prefix="defend-breaks-")

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def breaks() -> Table:
    """An empty table. Errors of defend's are verdicts; any other error is one of the break's."""
    return Table(_verdict)


def _verdict(error: Exception) -> Outcome:
    if not isinstance(error, PrivacyError | InputError | BudgetError):
        raise error
    return Outcome("self-test" if str(error).startswith(LEAD) else "refused", expected(error))


def expected(error: Exception) -> str:
    """What the error says that it expected, without paths, which differ between machines."""
    found = re.findall(r"Expected (.+?)(?:, got\b|: |\. [A-Z]|$)", str(error), re.M)
    found = [re.sub(r" (?:in|at|of) \S*/\S+", "", text) for text in found]
    return "; ".join(dict.fromkeys(found)) or first_words(error)


# --- what a user writes ---------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """An ordinary module around a network and a loss."""

    def __init__(self, network: nn.Module | None = None, compute: Loss = loss) -> None:
        super().__init__()
        self.network = net() if network is None else network
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(self, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def dp(**settings: Any) -> DifferentialPrivacy:
    """The callback as a user sets it up."""
    defaults = {"delta": DELTA, "max_grad_norm": 0.1, "noise_multiplier": 1.0}
    return DifferentialPrivacy(**{**defaults, **settings})


def records(rows: int = 64) -> TensorDataset:
    return TensorDataset(*batch(rows))


def loader(rows: int = 64, size: int = 4, **settings: Any) -> DataLoader:
    return DataLoader(records(rows), size, **settings)


def trainer(*callbacks: Callback, **settings: Any) -> pl.Trainer:
    """A Trainer that writes below a folder of its own; one step unless told."""
    folder = tempfile.mkdtemp(dir=FOLDER)
    plan = {} if "max_epochs" in settings else {"max_steps": 1}
    return helpers.trainer(
        callbacks=list(callbacks), **{"default_root_dir": folder, **plan, **settings}
    )


# --- how it is measured ---------------------------------------------------------------------------


class Released(Callback):
    """Keeps each gradient that reaches the optimizer, and the weights after each step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(flat(p.grad for p in pl_module.parameters() if p.requires_grad))


def fit(
    module: pl.LightningModule,
    data: Any = None,
    callback: DifferentialPrivacy | None = None,
    extra: tuple[Callback, ...] = (),
    **settings: Any,
) -> pl.Trainer:
    """One private fit. A refusal before the first step must have left the weights alone.

    Raises:
        AssertionError: if it had moved them.
    """
    callback = dp() if callback is None else callback
    run = trainer(callback, *extra, **settings)
    before = copy.deepcopy(module.state_dict())
    taken = callback.steps
    try:
        run.fit(module, loader() if data is None else data)
    except (PrivacyError, InputError, BudgetError):
        if callback.steps == taken:
            after = module.state_dict()
            assert all(torch.equal(after[name], value) for name, value in before.items())
        raise
    return run


def largest_move(
    make: Callable[[], nn.Module] = net,
    compute: Loss = loss,
    data: tuple[Tensor, Tensor] | None = None,
    norms: tuple[float, ...] = NORMS,
    module: Callable[..., Plain] = Plain,
    extra: tuple[Callback, ...] = (),
    **settings: Any,
) -> float:
    """How far one record moves the sum that a step releases, in units of C: the worst found."""
    x, y = batch() if data is None else data
    rows, engine = len(x), ["auto"]

    def total(x: Tensor, y: Tensor, norm: float) -> Tensor:
        with same_weights():
            user = module(make(), compute)
        spy = Released()
        torch.manual_seed(1)
        callback = dp(
            noise_multiplier=0.0,
            insecure_seed=7,
            max_grad_norm=norm,
            ledger=False,
            selftest=len(x) == rows,  # on the whole batch; it says the same without a record
            engine=engine[-1],
        )
        fit(user, DataLoader(TensorDataset(x, y), len(x)), callback, (*extra, spy), **settings)
        engine.append(callback.settings()["engine"])
        return spy.gradients[0].double() * len(x)

    return max(sensitivity(partial(total, norm=norm), x, y) / norm for norm in norms)


def judge(value: float, note: str = "") -> Outcome:
    """A sensitivity above C is a break that was let through."""
    verdict = "open" if value > 1 + ROUNDING else "safe"
    return Outcome(verdict, f"sensitivity {value:.3f} C{note}")


def measure(*args: Any, **settings: Any) -> Outcome:
    """`judge` of `largest_move`, or what was raised instead."""
    return judge(largest_move(*args, **settings))


def holds(right: bool, detail: str) -> Outcome:
    return Outcome("safe" if right else "open", detail)


def promised(steps: int, sigma: float = 1.0, rate: float = 1 / 16) -> float:
    """ε of so many steps."""
    return epsilon([(sigma, rate, steps)], DELTA)
