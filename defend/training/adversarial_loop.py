"""Adversarial training in a loop of your own: plain PyTorch, torchrun or Fabric."""

import secrets
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from defend.attacks.result import rates
from defend.errors import InputError
from defend.privacy.mechanism.randomness import Randomness
from defend.training.adversarial import AdversarialSteps
from defend.training.config import Adversarial, check_adversarial, check_state
from defend.training.runtime import Loss, PlainRuntime, runtime_of
from defend.training.step import TrainingStep

_STATE = {"seed", "attacked", "steps"}


class AdversarialLoop:
    """An adversarial training in a loop of your own; made by `make_adversarial`."""

    def __init__(
        self, runtime: PlainRuntime, optimizer: Optimizer, steps: AdversarialSteps
    ) -> None:
        self._runtime, self._optimizer, self._steps = runtime, optimizer, steps
        self._step = TrainingStep(runtime, steps)

    @property
    def attack(self) -> Any:
        """What is trained against: the attack, increasing what the objective says."""
        return self._steps.attack.source

    def step(self, batch: Any) -> Tensor:
        """One step of the optimizer on a batch: attack, forward, backward, update.

        With `Free` there are as many steps as it has replays, all on this batch.

        Returns:
            The whole loss, detached: `loss` of the batch that the objective trains on, and the
            objective's own term. With `Free`, that of the last replay.

        Raises:
            InputError: if the batch has no such fields, if its inputs lie outside the attack's
                `InputSpace`, or if `loss` does not return one number.
        """
        batch = self._runtime.to_device(batch)
        self._runtime.batches += 1  # once, however often Free replays it
        for _ in range(self._steps.attack.replays):
            self._optimizer.zero_grad()
            loss = self._backward(batch, 1.0)
            self._optimizer.step()
            # Where the user's autocast spans steps it would go on with the weights of the last.
            torch.clear_autocast_cache()
        return loss

    def backward(self, batch: Any, weight: float = 1.0) -> Tensor:
        """All of `step` but `zero_grad` and the optimizer's step: to accumulate gradients.

            for i, batch in enumerate(loader):
                loop.backward(batch, 1 / 4)
                if i % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()

        The weights are where they were and `.grad` has grown by `weight` times the gradient. Under
        DistributedDataParallel, `no_sync` saves the batches before the last the synchronizing.

        Args:
            batch: as in `step`.
            weight: what the loss is multiplied by, 1 / k for k batches to a step.

        Returns:
            The whole loss, detached and not multiplied.
        """
        batch = self._runtime.to_device(batch)
        self._runtime.batches += 1
        return self._backward(batch, weight)

    def _backward(self, batch: Any, weight: float) -> Tensor:
        try:
            loss = self._step.loss(batch)
            self._step.backward(loss if weight == 1 else loss * weight)
        finally:
            self._steps.restore_weights()
        return loss.detach()

    def attacked(self, batch: Any, generator: torch.Generator | None = None) -> Any:
        """The batch with adversarial inputs, for a loop that does all the rest itself.

        With a clean fraction each record tosses a coin of its own here; `step` leaves the same
        number of records clean in every batch. Not for a private loop, which refuses a batch that
        was changed: there `make_private(..., adversarial=...)` attacks.

        Args:
            batch: in any container; it is left as it is.
            generator: source of random starts and coins; None for this loop's own.

        Raises:
            InputError: where more is needed than other inputs: with TRADES, MART, AWP and Free.
        """
        settings, runtime, steps = self._steps.settings, self._runtime, self._steps
        if settings.joins_the_step:
            raise InputError(
                "Expected objective=Madry() and an attack such as PGD for `attacked`, got "
                f"{settings.method}, which takes part in the training step too. Call `step` or "
                "`backward`."
            )
        runtime.batches += 1
        batch, x = steps.converted(runtime.to_device(batch), runtime.convert)
        if generator is None:
            generator = runtime.generator(x.device)
        with runtime.autocast():
            return steps.attacked(
                runtime.module, batch, generator=generator, epochs=runtime.epochs(), private=True
            ).batch

    def rates(self) -> dict[str, float]:
        """Shares of input gradients that were zero, and not finite, since the last call.

        Under the names `attack/zero_grad_rate` and `attack/nonfinite_grad_rate`; of this process.
        Empty where nothing was counted, as with attacks other than PGD and Free.
        """
        return rates(self._steps.take_counts())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; save it beside the weights and the optimizer's state.

        It is the same on all processes, but with `Free`, whose perturbation is each one's own.
        """
        return {
            "seed": self._runtime.randomness.root,
            "attacked": self._runtime.batches,
            "steps": self._steps.state_dict(),
        }


def make_adversarial(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Sized | None,
    *,
    loss: Loss,
    adversarial: Adversarial,
    fabric: Any = None,
    state: Mapping[str, Any] | None = None,
) -> AdversarialLoop:
    """Adversarial training in a loop of your own: min_θ E[max_δ loss(x + δ, y; θ)].

        adversarial = Adversarial(PGD(Linf(8 / 255)))
        loop = make_adversarial(model, optimizer, loader, loss=loss, adversarial=adversarial)
        for epoch in range(20):
            for batch in loader:
                loop.step(batch)

    The model, its optimizer, its loader and its schedulers stay your own. To accumulate gradients
    call `loop.backward` and step yourself; to combine with `make_private` see `loop.attacked`.

    One-step attacks are prone to catastrophic overfitting, which the training loss does not show.
    An alarm sees it:

        watch = OverfittingAlarm().watch(adversarial.attack)
        for step, (x, y) in enumerate(loader):
            if watch.is_due(step) and watch.look(model, x, y).alarm:
                break  # or go on against watch.attack, with a loop made for it
            loop.step((x, y))

    Forwards of a step run in this order: the attack's, in eval mode and without a trace; AWP's,
    whose changes to buffers are undone; that of `loss`, on the clean batch with TRADES and on the
    adversarial one else; for TRADES and MART that of the other batch. If `loss` calls the model
    with the batch's inputs as they are, and nothing else, its logits serve the objective; else the
    model runs on that batch once more. Each training forward updates BatchNorm's statistics and
    has dropout masks of its own.

    Under torchrun wrap the model in DistributedDataParallel first and shard the data as usual;
    under Fabric pass what `fabric.setup` gave, and `fabric`. The attack runs on the model itself
    and gradients synchronize as usual; each process has random starts of its own, and with AWP its
    own weight perturbation. Attack and objective run under `fabric.autocast`; without Fabric, in
    what precision `step` is called: under `torch.autocast` or not.

    Args:
        model: gives logits (or an object with `logits`); in the modes it trains in, on its device;
            may be wrapped by Fabric or DDP.
        optimizer: of the model.
        loader: your training loader; its length is the epoch that `warmup_epochs` counts by. None
            where there is no warm-up.
        loss: (model, batch) → the mean loss over the rows of the batch.
        adversarial: what is asked; `AdversarialTraining` says what each setting means. With `Free`
            each `step` trains on its batch several times.
        fabric: the Fabric that set model and optimizer up, or None.
        state: `state_dict()` of the run to go on from, its seed included, or None.

    *Guarantees.* The attack leaves gradients, modes, buffers and the global RNG as they were. After
    an exception weights are where they were and no hook stays. A run that goes on from `state`
    continues as it would have without the break.

    Raises:
        InputError: for settings out of range or that do not go together, a warm-up by a loader
            without a length, and several processes without DistributedDataParallel.
    """
    check_adversarial(adversarial)
    check_state(state, _STATE)
    runtime = runtime_of(model, loss, fabric)
    if adversarial.warmup_epochs:
        runtime.steps_per_epoch = _length(loader)
    steps, seed = AdversarialSteps(adversarial), adversarial.seed
    if state is not None:
        seed, runtime.batches = int(state["seed"]), int(state["attacked"])
        steps.load_state_dict(state["steps"])
    elif seed is None:
        seed = runtime.processes.broadcast(secrets.randbits(62))
    runtime.randomness = Randomness(seed)
    return AdversarialLoop(runtime, optimizer, steps)


def _length(loader: Any) -> int:
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        length = 0
    if length < 1:
        raise InputError(
            "Expected a `loader` with a length ≥ 1 for a warm-up, got "
            f"{type(loader).__name__}, which has none: nobody can tell when eps is at its full "
            "size. Pass one, or leave out `warmup_epochs`."
        )
    return length
