"""One step of training, in every kind of loop: a batch, on its way to `p.grad`.

    logical batch ── Poisson-sampled when private
      └ `attack`: on the whole batch, without a trace, from secret random numbers when private
          └ `gradient`: chunk by chunk when private, clean and adversarial rows together
              └ `forward`: (AWP: weights moved) the user's step, on the rows the objective says
                  └ TRADES, MART: the module once more, on the other rows; the term is added
              └ `backward`, and after it weights are put back and Free's δ takes its step
              └ end of a chunk, or a Trainer's `on_after_backward`, whichever is first:
                norms of records → factors → weighted sum, gradients forgotten
      └ `release`: ledger, flushed → charge → noise once → ÷ expected batch size → p.grad
      └ the user's own optimizer, which refuses gradients that were not released

A loop that is not private calls `loss`, and runs a backward of its own within `around_backward`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from defend.batching.records import RecordBatches
from defend.training.adversarial import AdversarialSteps, AttackedBatch
from defend.training.outputs import loss_of, mean_of, with_penalty, without_graph
from defend.training.private import PrivateFit
from defend.training.private_data import PrivateData
from defend.training.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """What a step is made of.

    Attributes:
        runtime: the loop that it runs in, or a copy of its module to try it out on.
        adversarial: what is trained against, if anything.
        data: where the run is private, the data with its secrets.
    """

    runtime: Runtime
    adversarial: AdversarialSteps | None = None
    data: PrivateData | None = None

    def loss(self, batch: Any) -> Any:
        """Not private: what the user's step returns, its loss completed. Backward is the loop's."""
        return self.forward(self.attack(batch))

    def gradient(self, batch: Any, fit: PrivateFit) -> Any:
        """Private: the clipped sum over a batch; what the user's step returned last (`mean_of`)."""
        if isinstance(batch, RecordBatches):
            return mean_of(self._records(batch, fit))
        output = None
        if self.adversarial is not None:
            fit.renew_randomness(search=True)  # before each forward `chunks` does
        for chunk in fit.chunks(self.attack(batch)):
            with chunk:  # folds at its end; where memory runs out it is taken again in halves
                output = self.forward(chunk.batch)
                self.backward(loss_of(output) * chunk.rows)  # the sum of the rows' losses
                output = without_graph(output)
        return output

    def _records(self, batch: RecordBatches, fit: PrivateFit) -> Iterator[Any]:
        """Record by record: what the user's step returned; None where it skipped one."""
        starts = None
        if self.adversarial is not None and self.data is not None:  # goes on from record to record
            starts = self.data.attack_generator(next(self.runtime.module.parameters()).device)
        for chunk in fit.chunks(batch):
            with chunk:
                record = self.attack(self.runtime.to_device(chunk.batch), starts=starts)
                output = self.forward(record)
                self.runtime.drop_gradients(self.runtime.module)
                # A record that gives no loss tells nothing of others, and adds zero.
                if output is not None and loss_of(output).requires_grad:
                    self.backward(loss_of(output) * chunk.rows)
                elif self.adversarial is not None:
                    self.adversarial.restore_weights()
            yield None if output is None else without_graph(output)

    def attack(self, batch: Any, *, number: int | None = None, starts: Any = None) -> Any:
        """The batch, clean and attacked; as it is where nothing is trained against.

        Args:
            batch: on the device.
            number: on a copy: attack from other secret numbers, those of this number.
            starts: a generator that the records of the step draw from in turn.
        """
        if self.adversarial is None:
            return batch
        runtime, data, adversarial = self.runtime, self.data, self.adversarial
        batch, x = adversarial.converted(batch, runtime.convert)
        private: dict[str, Any] = {}
        if data is None:
            starts = runtime.generator(x.device)
        else:
            starts = starts or data.attack_generator(x.device, number=number)
            private = {"chunk_size": data.chunk_size, "private": True, "views": data.views}
        with runtime.attack_context(x.device):
            return adversarial.attacked(
                runtime.module, batch, generator=starts, epochs=runtime.epochs(), **private
            )

    def forward(self, batch: Any) -> Any:
        """What the user's step returns for what `attack` gave, the objective's term added."""
        adversarial, runtime = self.adversarial, self.runtime
        if adversarial is None:
            return runtime.forward(batch)
        if not isinstance(batch, AttackedBatch):  # the self-test tries the step alone, too
            batch = adversarial.unattacked(adversarial.converted(batch, runtime.convert)[0])
        module, precision = runtime.module, runtime.autocast
        try:
            with adversarial.around_forward(
                module, batch, precision=precision, released=self._released()
            ):
                output = runtime.forward(batch.batch)
            if output is None:  # a batch that the user's step skips
                adversarial.restore_weights()
                return None
            with precision():
                penalty = adversarial.penalty(module, batch)
            return output if penalty is None else with_penalty(output, penalty)
        except BaseException:
            adversarial.restore_weights()
            raise

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss that `forward` gave."""
        with self.around_backward():
            self.runtime.backward(loss)

    @contextlib.contextmanager
    def around_backward(self) -> Iterator[None]:
        """Around a backward: weights go back to where the optimizer is to move them from."""
        if self.adversarial is None:
            yield
            return
        try:
            yield
            self.adversarial.after_backward()
        finally:
            self.adversarial.restore_weights()

    def _released(self) -> Mapping[str, Tensor] | None:
        """What AWP follows where the run is private: the last release, noise and all."""
        if self.data is None:
            return None
        if self.runtime.on_copy:  # any direction will do; the weights' own is at hand
            return dict(self.runtime.module.named_parameters())
        return self.data.released
