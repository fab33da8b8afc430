"""What Opacus does on its own with each way to break DP-SGD: found by running it.

One function for each break sets Opacus up as its manual says (`PrivacyEngine().make_private` with
its defaults), makes the mistake as a user would, and measures what comes of it:

- "refuses": an error is raised, and `detail` begins with it;
- "accepts": it goes on in silence, and `detail` is the measured harm, which may be to the training
  alone (weights of a sampler that are dropped, steps that are lost);
- "safe": it goes on, and the measured result is what it should be.
"""

from tests.contracts.opacus_alone import (
    accounting,
    data,
    hooks,
    layers,
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
}
