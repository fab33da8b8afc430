"""What defend does with each way to break DP-SGD: found by running it.

One function for each break, under the same name as in `opacus_alone`, writes it as a user of defend
would: an ordinary LightningModule under `DifferentialPrivacy`, or a plain loop with `make_private`.

- "refused": an error of defend's, before the break could touch a released weight; `detail` is what
  the error says that it expected;
- "self-test": the same, and it was the self-test on the user's own step and data that found it;
- "safe": it goes on, and what is measured is as it should be; `detail` is the measurement;
- "open": it goes on, and the guarantee is broken.
"""

from tests.contracts.defend_does import (
    accounting,
    data,
    hooks,
    layers,
    lightning,
    losses,
    optimizers,
    precision,
)
from tests.contracts.outcomes import Break

BREAKS: dict[str, Break] = {
    **layers.BREAKS,
    **hooks.BREAKS,
    **losses.BREAKS,
    **optimizers.BREAKS,
    **data.BREAKS,
    **precision.BREAKS,
    **accounting.BREAKS,
    **lightning.BREAKS,
}

# Breaks of Opacus' that no user of defend can write, and why. None so far.
NOT_APPLICABLE: dict[str, str] = {}
