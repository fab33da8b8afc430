"""Adversarial training in a loop of your own: plain PyTorch, torchrun or Fabric."""

import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from defend.attacks.attack import Attack
from defend.attacks.free import Free
from defend.batching.fields import with_field
from defend.errors import InputError
from defend.objectives import Madry, Objective
from defend.privacy.mechanism.randomness import Randomness
from defend.training.adversarial import AdversarialSettings, AdversarialSteps, AttackedBatch
from defend.training.host import Host, Loss
from defend.training.tally import rates

_STATE = {"seed", "attacked", "steps"}


class AdversarialLoop:
    """An adversarial training in a loop of your own; made by `make_adversarial`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Loss,
        settings: AdversarialSettings,
        seed: int | None,
        fabric: Any,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._host = Host(model, fabric)
        self._optimizer, self._loss, self._settings = optimizer, loss, settings
        self._steps = AdversarialSteps(settings)
        self._attacked = 0  # batches so far
        if state is not None:
            seed, self._attacked = int(state["seed"]), int(state["attacked"])
            self._steps.load_state_dict(state["steps"])
        elif seed is None:
            seed = self._host.processes.broadcast(secrets.randbits(62))
        self._randomness = Randomness(seed)

    @property
    def attack(self) -> Attack | Free:
        """What is trained against: the attack, increasing what the objective says."""
        return self._steps.attack

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
        batch = self._host.to_device(batch)
        attack = self._steps.attack
        self._attacked += 1  # once, however often Free replays it
        for _ in range(attack.replays if isinstance(attack, Free) else 1):
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
        batch = self._host.to_device(batch)
        self._attacked += 1
        return self._backward(batch, weight)

    def _backward(self, batch: Any, weight: float) -> Tensor:
        host, steps = self._host, self._steps
        made = self._made(batch, None)
        try:
            loss = steps.run(host.bare, made, self._mean_loss, precision=host.autocast)
            host.backward(loss if weight == 1 else loss * weight)
            steps.after_backward()
        finally:
            steps.restore_weights()
        return loss.detach()

    def _mean_loss(self, batch: Any) -> Tensor:
        return self._host.mean_loss(self._loss, self._host.model, batch)

    def attacked(self, batch: Any, generator: torch.Generator | None = None) -> Any:
        """The batch with adversarial inputs, for a loop that does all the rest itself.

        Beside `make_private` its own `adversarial=` does it all. By hand, attack the whole batch
        before the step, from secret random numbers:

            for batch in private.loader:
                private.step(loop.attacked(batch, private.attack_generator()))

        The attack must then treat each record alone, as `PGD` does. With a clean fraction each
        record tosses a coin of its own here, as DP-SGD needs; `step` leaves the same number of
        records clean in every batch.

        Args:
            batch: in any container; it is left as it is.
            generator: source of random starts and coins; None for this loop's own.

        Raises:
            InputError: where more is needed than other inputs: with TRADES, MART, AWP and Free.
        """
        name = "Free" if isinstance(self.attack, Free) else self._settings.objective.name
        if name == "Free" or self._settings.changes_loss:
            raise InputError(
                f"Expected objective=Madry() and an attack such as PGD for `attacked`, got {name}, "
                "which takes part in the training step too. Call `step` or `backward`."
            )
        batch = self._host.to_device(batch)
        self._attacked += 1
        return self._made(batch, generator, private=True).batch

    def _made(
        self, batch: Any, generator: torch.Generator | None, *, private: bool = False
    ) -> AttackedBatch:
        host = self._host
        x, _ = self._steps.inputs_of(batch)
        if (taken := host.as_model_takes(x)) is not x:
            batch, x = with_field(batch, self._settings.input_key, taken), taken
        if generator is None:
            generator = self._randomness.generator(
                "attack", self._attacked - 1, x.device, rank=host.processes.rank
            )
        with host.autocast():
            return self._steps.attacked(
                host.bare, batch, generator=generator, epochs=self._attacked, private=private
            )

    def rates(self) -> dict[str, float]:
        """Shares of input gradients that were zero, and not finite, since the last call.

        Under the names `attack/zero_grad_rate` and `attack/nonfinite_grad_rate`; of this process.
        Empty where nothing was counted, as with attacks other than PGD and Free.
        """
        return rates(self._steps.tally.take())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; save it beside the weights and the optimizer's state.

        It is the same on all processes, but with `Free`, whose perturbation is each one's own.
        """
        return {
            "seed": self._randomness.root,
            "attacked": self._attacked,
            "steps": self._steps.state_dict(),
        }


def make_adversarial(
    model: nn.Module,
    optimizer: Optimizer,
    attack: Attack | Free,
    *,
    loss: Loss,
    objective: Objective = Madry(),
    clean_fraction: float = 0.0,
    warmup_steps: int = 0,
    input_key: int | str = 0,
    target_key: int | str = 1,
    chunk_size: int | str | None = "auto",
    seed: int | None = None,
    fabric: Any = None,
    state: Mapping[str, Any] | None = None,
) -> AdversarialLoop:
    """Adversarial training in a loop of your own: min_θ E[max_δ loss(x + δ, y; θ)].

        loop = make_adversarial(model, optimizer, PGD(Linf(8 / 255)), loss=loss)
        for epoch in range(20):
            for batch in loader:
                loop.step(batch)

    The model, its optimizer, its loader and its schedulers stay your own. To accumulate gradients
    call `loop.backward` and step yourself; to combine with `make_private` see `loop.attacked`.

    One-step attacks are prone to catastrophic overfitting, which the training loss does not show.
    An alarm sees it:

        watch = OverfittingAlarm().watch(attack)
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
        attack: what to train against: `PGD(Linf(8 / 255), steps=10)`, or a cheaper one; with
            `Free` each `step` trains on its batch several times.
        loss: (model, batch) → the mean loss over the rows of the batch.
        objective: `Madry()`, `TRADES(beta)`, `MART(beta)`, or `AWP(...)` of these. It says what the
            attack increases, unless the attack has another loss than "ce".
        clean_fraction: part of the records of each batch that stay clean, in [0, 1).
        warmup_steps: eps grows linearly up to its full size at the batch of this number; all
            replays of `Free` are one batch.
        input_key: where the inputs are in a batch: a position in a list or tuple, a name in a
            dict, either in a namedtuple or dataclass.
        target_key: likewise for the targets.
        chunk_size: most rows attacked at once; "auto": what fits. Does not change the result.
        seed: of random starts and of which records stay clean, ≥ 0; None draws one from the
            operating system. The global RNG is neither read nor moved.
        fabric: the Fabric that set model and optimizer up, or None.
        state: `state_dict()` of the run to go on from, its seed included, or None.

    *Guarantees.* The attack leaves gradients, modes, buffers and the global RNG as they were. After
    an exception weights are where they were and no hook stays. A run that goes on from `state`
    continues as it would have without the break.

    Raises:
        InputError: for settings out of range or that do not go together, and several processes
            without DistributedDataParallel.
    """
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise InputError(f"Expected `warmup_steps` to be an integer ≥ 0, got {warmup_steps!r}.")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise InputError(f"Expected `seed` to be an integer ≥ 0 or None, got {seed!r}.")
    if state is not None and set(state) != _STATE:
        raise InputError(
            f"Expected a `state` that `state_dict` gave, got one of {sorted(state)}. Pass it as it "
            "was saved."
        )
    settings = AdversarialSettings(
        attack,
        objective=objective,
        clean_fraction=clean_fraction,
        warmup_epochs=warmup_steps,
        input_key=input_key,
        target_key=target_key,
        chunk_size=chunk_size,
    )
    return AdversarialLoop(
        model, optimizer, loss=loss, settings=settings, seed=seed, fabric=fabric, state=state
    )
