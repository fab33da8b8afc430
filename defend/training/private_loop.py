"""DP-SGD in a loop of your own: plain PyTorch, torchrun or Fabric."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from defend.attacks.result import rates
from defend.errors import InputError, PrivacyError
from defend.privacy.checks.preconditions import Setup, check
from defend.training.adversarial import AdversarialSteps
from defend.training.config import Adversarial, Privacy, check_adversarial, check_state
from defend.training.dry_run_step import step_under_test
from defend.training.private import PrivateFit, PrivateTraining
from defend.training.private_data import PrivateData
from defend.training.recorded_loader import RecordedLoader
from defend.training.reporting import PrivacyReport
from defend.training.runtime import Loss, PlainRuntime, runtime_of
from defend.training.step import TrainingStep

LEDGERS = Path("privacy_ledgers")


class PrivateLoop(PrivacyReport, AbstractContextManager["PrivateLoop"]):
    """A private training in a loop of your own; made by `make_private`.

    Attributes:
        loader: your data, in Poisson-sampled batches.
        steps_per_epoch: batches in one pass over `loader`.
    """

    def __init__(
        self,
        training: PrivateTraining,
        optimizer: Optimizer,
        runtime: PlainRuntime,
        step: TrainingStep,
        fit: PrivateFit,
        *,
        taken: int,
        planned: int,
    ) -> None:
        self.loader = RecordedLoader(fit.data.loader, self._loading, self._end_pass)
        self.steps_per_epoch = fit.data.sampler.steps
        self._training, self._budget = training, fit.account.budget
        self._taken, self._planned = taken, planned
        self._adversarial = step.adversarial
        # A loop that is closed has let go of model, optimizer and secrets.
        self._open: tuple[Optimizer, PlainRuntime, TrainingStep, PrivateFit] | None
        self._open = optimizer, runtime, step, fit

    def step(self, batch: Any) -> Tensor:
        """One private step on a batch of `loader`: forward, backward, clip, noise, update.

        After any error the loop is closed, so that no private gradient stays behind: a batch that
        was drawn may not be dropped. Go on with `make_private(..., state=private.state_dict())`.

        Args:
            batch: from `loader`, as it was given; it may have been moved to another device.

        Returns:
            The mean loss over the rows of the last chunk, of all where records have a batch each;
            detached. It is computed from the data without noise: look at it, but do not publish it.

        Raises:
            BudgetError: if the step would exceed `target_epsilon`; nothing is released then.
            PrivacyError: where going on would break the guarantee.
        """
        if self._open is None:
            raise PrivacyError(
                "Expected an open loop, got a step after `close` or after an error. Go on with "
                "make_private(..., state=private.state_dict())."
            )
        optimizer, runtime, step, fit = self._open
        try:
            self.loader.check(batch)
            self._refuse_kept_state(fit)
            optimizer.zero_grad()
            runtime.batches = self._taken + 1
            whole = batch if fit.data.isolated else runtime.to_device(batch)
            loss = step.gradient(whole, fit)
            fit.release()
            optimizer.step()
        except BaseException:
            self.close()
            raise
        self._taken += 1
        return loss

    def _loading(self) -> AbstractContextManager[None]:
        """Inside, a data set may fill a cache: what it keeps is tried out with the batches."""
        return nullcontext() if self._open is None else self._open[-1].watch.paused()

    def _end_pass(self) -> None:
        if self._open is not None:
            self._open[-1].end_pass()
            self._open[-1].account.note_pass(last=self.exhausted)

    def _refuse_kept_state(self, fit: PrivateFit) -> None:
        if not self._training.settings.selftest:
            return
        published = fit.watch.published
        names = [name for name in fit.watch.take() if name in published]
        used = None if names else fit.first_read()
        if names or used:
            fit.doubt()
            what = "is published" if names else "goes into gradients"
            raise PrivacyError(
                f"Expected nothing to be kept from one step to the next, got `{used or names[0]}`, "
                f"which changed between two steps, and {what}. Nobody can try out what is done "
                "there; what depends on the records gets no noise. Do it in `loss`, where it is "
                "tried out; fill caches before the loop, and keep averages of the weights in a "
                "copy of the model, beside it."
            )

    def _up_to_date(self) -> PrivateTraining:
        return self._training

    def rates(self) -> dict[str, float]:
        """Shares of the attack's input gradients that were zero, and not finite, since last asked.

        Under the names `attack/zero_grad_rate` and `attack/nonfinite_grad_rate`; of this process.
        Empty without an attack that counts them. Computed from the data without noise: look at
        them, but do not publish them.
        """
        return {} if self._adversarial is None else rates(self._adversarial.take_counts())

    @property
    def exhausted(self) -> bool:
        """Whether the planned steps are taken, or no further one fits into `target_epsilon`."""
        return self._taken >= self._planned or self._budget.exhausted

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; save it beside the weights. Holds no secret."""
        if self._open is not None:
            self._open[-1].account.note_weights()
        return {"privacy": self._training.state_dict(), "taken": self._taken}

    def close(self) -> None:
        """Remove every hook and every private gradient; the model keeps its weights only."""
        if self._open is not None:
            (*_, fit), self._open = self._open, None
            if self._adversarial is not None:
                self._adversarial.restore_weights()
            fit.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, are of a closed loop: they hold the account and no secret."""
        return {**vars(self), "_open": None}


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    *,
    loss: Loss,
    epochs: int,
    privacy: Privacy,
    adversarial: Adversarial | None = None,
    fabric: Any = None,
    state: Mapping[str, Any] | None = None,
) -> PrivateLoop:
    """DP-SGD in a loop of your own, with the guarantee of `DifferentialPrivacy`.

        privacy = Privacy(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
        run = make_private(model, optimizer, loader, loss=loss, epochs=5, privacy=privacy)
        with run as private:
            for epoch in range(5):
                for batch in private.loader:
                    private.step(batch)

    Where training may end within an epoch (σ and a target together, or a resume), stop as soon as
    `private.exhausted`. The model, its optimizer and its schedulers stay your own. To train
    adversarially at the same ε:

        make_private(..., adversarial=Adversarial(PGD(Linf(0.1)), objective=TRADES(6.0)))

    A batch goes into `step` as the loader gave it: what is done to records belongs into the data
    set, the collate function or `loss`, where the self-test sees it.

    Under torchrun wrap the model in DistributedDataParallel first, and give each process the whole
    data set: all share one Poisson mask over it, and `batch_size` times the number of processes is
    the expected batch. Under Fabric pass what `fabric.setup` gave, the loader as it was, and
    `fabric`.

    Args:
        model: in the modes it trains in, on its device; may be wrapped by Fabric or DDP.
        optimizer: holds exactly the model's trainable parameters.
        loader: a DataLoader over a map-style data set; its `batch_size` is the expected one of a
            process.
        loss: (model, batch) → the mean loss over the rows of the batch.
        epochs: over the whole training, those before a resume included.
        privacy: what is asked of DP-SGD; `DifferentialPrivacy` says what each setting means. The
            default place of the ledger is `privacy_ledgers/`.
        adversarial: what to train against, or None. AWP follows the last released gradient; Free
            is refused.
        fabric: the Fabric that set model and optimizer up, or None.
        state: `state_dict()` of the run to go on from, or None.

    Raises:
        InputError: for settings out of range.
        PrivacyError: for a set-up, a loss or a forward that would not be private.
    """
    _check(epochs, privacy, adversarial, state)
    runtime = runtime_of(model, loss, fabric)
    inner = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    check(_facts(runtime, inner, resumed=state is not None), engine=privacy.engine)
    training, taken = PrivateTraining(privacy, LEDGERS), 0
    if state is not None:
        training.load_state_dict(state["privacy"])
        taken = int(state["taken"])
    data = PrivateData(loader, privacy, runtime.processes)
    try:
        _share_epoch(data)
        runtime.steps_per_epoch = data.sampler.steps
        steps = None if adversarial is None else AdversarialSteps(adversarial)
        step = TrainingStep(runtime, steps, data)
        tried = step_under_test(
            step,
            loader.collate_fn,
            views=privacy.views,
            half=runtime.half,
        )
        dry_run = training.try_out(runtime.module, data, tried)
        planned = epochs * data.sampler.steps
        fit = training.open(
            inner,
            data,
            dry_run,
            planned=planned,
            done=taken,
            ddp=runtime.ddp,
            keep_release=adversarial is not None and adversarial.moves_weights,
        )
    except BaseException:
        data.forget()
        raise
    return PrivateLoop(training, optimizer, runtime, step, fit, taken=taken, planned=planned)


def _check(
    epochs: int, privacy: Privacy, adversarial: Adversarial | None, state: Mapping[str, Any] | None
) -> None:
    if not isinstance(privacy, Privacy):
        raise InputError(
            "Expected `privacy` to be Privacy(target_epsilon=..., delta=..., max_grad_norm=...), "
            f"got {privacy!r}. Wrap the settings."
        )
    if epochs < 1:
        raise InputError(f"Expected `epochs` to be ≥ 1, got {epochs}. Give those of all training.")
    check_state(state, {"privacy", "taken"})
    if adversarial is not None:
        check_adversarial(adversarial)
        adversarial.refuse_beside_privacy()


def _share_epoch(data: PrivateData) -> None:
    """Steps in an epoch: each takes `batch_size` records on every process."""
    world_size, sampler = data.processes.world_size, data.sampler
    if world_size > 1 and not isinstance(data.original.sampler, DistributedSampler):
        sampler.steps = math.ceil(sampler.steps / world_size)


def _facts(runtime: PlainRuntime, optimizer: Optimizer, *, resumed: bool) -> Setup:
    return Setup(
        module=runtime.module,
        optimizers=(optimizer,),
        resumed=resumed,
        world_size=runtime.processes.world_size,
        strategy=runtime.strategy,
        precision=runtime.precision,
    )
