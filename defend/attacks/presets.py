"""Single-step attacks to train against: PGD with the settings of a paper.

One gradient a record makes adversarial training as cheap as it gets, at a risk: the model may learn
to fool its own attack from one epoch to the next (catastrophic overfitting). Watch for it with
`defend.evaluation.overfitting`.
"""

from defend.attacks.pgd import PGD
from defend.errors import InputError
from defend.threat.balls import Linf
from defend.threat.inputs import InputSpace


def fgsm_rs(
    eps: float,
    *,
    step_size: float | None = None,
    inputs: InputSpace = InputSpace(),
    precision: str | None = None,
) -> PGD:
    r"""FGSM from a random start (Wong, Rice & Kolter 2020, arXiv 2001.03994, "Fast").

        δ₀ ~ U(−ε, ε),    δ = clip( δ₀ + α · sign ∇_δ loss(model(x + δ₀), y), −ε, ε )

    with x + δ₀ and x + δ clipped to the box.

    Args:
        eps: ε > 0, in raw units.
        step_size: α > 0, in raw units; None means the paper's 1.25 · ε. Beyond 2 · ε the start
            is forgotten and this is FGSM.
        inputs: the legal box, with mean and std where batches are normalized.
        precision: as in `PGD`.

    Returns:
        `PGD(Linf(eps), steps=1, ...)`.

    Raises:
        InputError: if `eps` or `step_size` is not positive.
    """
    _check_eps(eps)
    return PGD(
        Linf(eps),
        steps=1,
        step_size=1.25 * eps if step_size is None else step_size,
        inputs=inputs,
        precision=precision,
    )


def n_fgsm(
    eps: float,
    *,
    noise: float = 2.0,
    inputs: InputSpace = InputSpace(),
    precision: str | None = None,
) -> PGD:
    r"""Noise FGSM (de Jorge et al. 2022, arXiv 2202.01181).

        η ~ U(−kε, kε),    δ = η + ε · sign ∇_η loss(model(x + η), y)

    The noise is wider than ε and δ is *not* clipped back to ε, which is what keeps training from
    catastrophic overfitting. So |δ| may reach (k + 1)ε, and that is the ball of the attack
    returned: train with it, but measure robustness with another attack, at ε. For the same reason
    `with_eps` and `eps=` take (k + 1)ε; noise and step scale along, so that a warm-up by a factor
    is a warm-up of ε by that factor.

    x + η and x + δ are both clipped to the box, as in the authors' code; the formula above, the
    paper's, has no box. The gradient is then never taken where no input can be.

    Args:
        eps: ε > 0, in raw units.
        noise: k > 0.
        inputs: the legal box, with mean and std where batches are normalized.
        precision: as in `PGD`.

    Returns:
        `PGD(Linf((noise + 1) * eps), steps=1, step_size=eps, start_radius=noise * eps, ...)`.

    Raises:
        InputError: if `eps` or `noise` is not positive.
    """
    _check_eps(eps)
    if not 0 < noise < float("inf"):
        raise InputError(
            f"Expected `noise` to be > 0, got {noise}. Without noise this is FGSM: "
            "PGD(Linf(eps), steps=1, step_size=eps, random_start=False)."
        )
    return PGD(
        Linf((noise + 1) * eps),
        steps=1,
        step_size=eps,
        start_radius=noise * eps,
        inputs=inputs,
        precision=precision,
    )


def _check_eps(eps: float) -> None:
    if not 0 < eps < float("inf"):
        raise InputError(
            f"Expected `eps` to be a finite number > 0, got {eps}. Give the radius in units of the "
            "raw input box, for example 8 / 255."
        )
