"""DP-SGD in a loop of your own: plain PyTorch, torchrun or Fabric."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from defend.errors import InputError, PrivacyError
from defend.privacy.checks.preconditions import Setup, check
from defend.privacy.mechanism.clipping import Clipping, FlatClipping
from defend.privacy.mechanism.schedules import Schedule
from defend.training.adversarial import AdversarialSettings, AttackedBatch
from defend.training.beside import PrivateAdversary
from defend.training.host import Host, Loss
from defend.training.private import PrivateTraining
from defend.training.readings import Readings
from defend.training.settings import PrivacySettings
from defend.training.tally import rates
from defend.training.tryout import Trial

LEDGERS = Path("privacy_ledgers")


class PrivateLoop(Readings):
    """A private training in a loop of your own; made by `make_private`.

    Attributes:
        loader: your data, in Poisson-sampled batches.
        steps_per_epoch: batches in one pass over `loader`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader,
        *,
        loss: Loss,
        epochs: int,
        settings: PrivacySettings,
        adversarial: AdversarialSettings | None,
        fabric: Any,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._loss = loss
        self._adversary = None if adversarial is None else PrivateAdversary(adversarial)
        self._host = host = Host(model, fabric)
        self._optimizer: Optimizer = optimizer
        inner = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
        check(replace(_facts(host, inner), resumed=state is not None))
        self._private = PrivateTraining(settings, LEDGERS)
        if state is not None:
            self._private.load_state_dict(state["privacy"])
        self._taken = 0 if state is None else int(state["taken"])
        self._open = True
        try:
            self._private.start(host.processes)
            self.loader = self._private.replace_loader(loader)
            self.steps_per_epoch = self._share_epoch(loader, host.processes.world_size)
            trial = Trial(
                loss=self._whole_loss,
                transfer=self._to_device,
                attack=None if adversarial is None else self._attacked,
                attack_anew=None if adversarial is None else self._attacked,
                backward=self._undone_after(Tensor.backward),
                half=self._half,
            )
            self._private.try_out(host.bare, trial)
            self._planned = epochs * self.steps_per_epoch
            self._private.open(
                host.bare,
                inner,
                planned=self._planned,
                done=self._taken,
                ddp=host.ddp,
                keep_release=adversarial is not None and adversarial.moves_weights,
            )
        except BaseException:
            self.close()
            raise

    def step(self, batch: Any) -> Tensor:
        """One private step on a batch of `loader`: forward, backward, clip, noise, update.

        After any error the loop is closed, so that no private gradient stays behind: a batch that
        was drawn may not be dropped. Go on with `make_private(..., state=private.state_dict())`.

        Args:
            batch: from `loader`. It may have been changed since, as long as row i still comes from
                record i alone: an attack on the whole batch, say.

        Returns:
            The mean loss over the rows of the last chunk, detached. It is computed from the data
            without noise: look at it, but do not publish it.

        Raises:
            BudgetError: if the step would exceed `target_epsilon`; nothing is released then.
            PrivacyError: where going on would break the guarantee.
        """
        if not self._open:
            raise PrivacyError(
                "Expected an open loop, got a step after `close` or after an error. Go on with "
                "make_private(..., state=private.state_dict())."
            )
        try:
            return self._step(batch)
        except BaseException:
            self.close()
            raise

    def _step(self, batch: Any) -> Tensor:
        losses: list[Tensor] = []

        def compute(chunk: Any, rows: int) -> None:
            loss = self._whole_loss(self._host.model, chunk)
            self._undone_after(self._host.backward)(loss * rows)
            losses[:] = [loss.detach()]

        self._optimizer.zero_grad()
        batch = self._to_device(batch)
        if self._adversary is not None:
            batch = self._attacked(self._host.bare, batch)
        self._private.run(batch, compute)
        self._private.release()
        self._optimizer.step()
        self._taken += 1
        return losses[0]

    def _up_to_date(self) -> PrivateTraining:
        return self._private

    def attack_generator(self) -> torch.Generator:
        """Secret numbers for an attack's random starts in the current step.

        Attack the whole batch before `step`, once: each call starts from the same numbers.
        """
        return self._private.attack_generator(self._host.device)

    def rates(self) -> dict[str, float]:
        """Shares of the attack's input gradients that were zero, and not finite, since last asked.

        Under the names `attack/zero_grad_rate` and `attack/nonfinite_grad_rate`; of this process.
        Empty without an attack that counts them. Computed from the data without noise: look at
        them, but do not publish them.
        """
        return {} if self._adversary is None else rates(self._adversary.steps.tally.take())

    @property
    def exhausted(self) -> bool:
        """Whether the planned steps are taken, or no further one fits into `target_epsilon`."""
        return self._taken >= self._planned or self._private.budget.exhausted

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; save it beside the weights. Holds no secret."""
        return {"privacy": self._private.state_dict(), "taken": self._taken}

    def close(self) -> None:
        """Remove every hook and every private gradient; the model keeps its weights only."""
        self._open = False
        if self._adversary is not None:
            self._adversary.restore_weights()
        self._private.close()

    def __enter__(self) -> "PrivateLoop":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _share_epoch(self, loader: DataLoader, world_size: int) -> int:
        """Steps in an epoch: each takes `batch_size` records on every process."""
        sampler = self._private.sampler
        assert sampler is not None
        if world_size > 1 and not isinstance(loader.sampler, DistributedSampler):
            sampler.steps = math.ceil(sampler.steps / world_size)
        return sampler.steps

    @property
    def _half(self) -> bool:
        return "mixed" in str(self._host.precision)

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._host.mean_loss(self._loss, model, batch)

    # --- with an adversary ------------------------------------------------------------------------

    def _to_device(self, batch: Any) -> Any:
        batch = self._host.to_device(batch)
        return batch if self._adversary is None else self._adversary.as_taken(self._host, batch)

    def _attacked(self, module: nn.Module, batch: Any, anew: int | None = None) -> AttackedBatch:
        assert self._adversary is not None
        return self._adversary.attacked(
            module,
            batch,
            host=self._host,
            private=self._private,
            epochs=(self._taken + 1) / self.steps_per_epoch,
            anew=anew,
        )

    def _whole_loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self._adversary is None:
            return self._mean_loss(model, batch)
        return self._adversary.loss(
            model, batch, self._mean_loss, host=self._host, private=self._private
        )

    def _undone_after(self, backward: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
        def run(loss: Tensor) -> None:
            with nullcontext() if self._adversary is None else self._adversary.backward():
                backward(loss)

        return run


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    *,
    loss: Loss,
    epochs: int,
    delta: float,
    max_grad_norm: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: str = "prv",
    chunk_size: int | str | None = "auto",
    clipping: Clipping = FlatClipping(),
    views: int = 1,
    noise_schedule: Schedule | None = None,
    clip_schedule: Schedule | None = None,
    ledger: str | Path | bool | None = None,
    selftest: bool = True,
    secure_noise: bool = False,
    insecure_seed: int | None = None,
    adversarial: AdversarialSettings | None = None,
    fabric: Any = None,
    state: Mapping[str, Any] | None = None,
) -> PrivateLoop:
    """DP-SGD in a loop of your own, with the guarantee of `DifferentialPrivacy`.

        with make_private(model, optimizer, loader, loss=loss, epochs=5, target_epsilon=3.0,
                          delta=1e-5, max_grad_norm=1.0) as private:
            for epoch in range(5):
                for batch in private.loader:
                    private.step(batch)

    Where training may end within an epoch (σ and a target together, or a resume), stop as soon as
    `private.exhausted`. The model, its optimizer and its schedulers stay your own. To train
    adversarially at the same ε:

        make_private(..., adversarial=AdversarialSettings(PGD(Linf(0.1)), objective=TRADES(6.0)))

    or attack the whole batch yourself before the step, with `private.attack_generator()` for its
    random starts.

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
        adversarial: what to train against, or None. AWP follows the last released gradient; Free
            is refused.
        fabric: the Fabric that set model and optimizer up, or None.
        state: `state_dict()` of the run to go on from, or None.
        delta, max_grad_norm, target_epsilon, noise_multiplier, accountant, chunk_size, clipping,
        views, noise_schedule, clip_schedule, ledger, selftest, secure_noise, insecure_seed: as in
            `DifferentialPrivacy`; the default place of the ledger is `privacy_ledgers/`.

    Raises:
        InputError: for settings out of range.
        PrivacyError: for a set-up, a loss or a forward that would not be private.
    """
    settings = PrivacySettings(
        delta=delta,
        max_grad_norm=max_grad_norm,
        target_epsilon=target_epsilon,
        noise_multiplier=noise_multiplier,
        accountant=accountant,
        chunk_size=chunk_size,
        clipping=clipping,
        views=views,
        noise_schedule=noise_schedule,
        clip_schedule=clip_schedule,
        ledger=ledger,
        selftest=selftest,
        secure_noise=secure_noise,
        insecure_seed=insecure_seed,
    )
    if epochs < 1:
        raise InputError(f"Expected `epochs` to be ≥ 1, got {epochs}. Give those of all training.")
    if state is not None and set(state) != {"privacy", "taken"}:
        raise InputError(
            f"Expected a `state` that `state_dict` gave, got one of {sorted(state)}. Pass it as it "
            "was saved."
        )
    return PrivateLoop(
        model,
        optimizer,
        loader,
        loss=loss,
        epochs=epochs,
        settings=settings,
        adversarial=adversarial,
        fabric=fabric,
        state=state,
    )


def _facts(host: Host, optimizer: Optimizer) -> Setup:
    known = Setup(module=host.bare, optimizers=(optimizer,), world_size=host.processes.world_size)
    if host.fabric is None:
        return known
    strategy = type(host.fabric.strategy).__name__
    return replace(known, strategy=strategy, precision=host.precision)
