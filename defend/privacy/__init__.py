"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133) on an unmodified module, in any training loop.

*Formal guarantee.* After T steps the released weights are (ε, δ)-differentially private with
respect to the training data set:

- **Adjacency**: add or remove one record (one index of the data set).
- **Mechanism**: each step clips the gradient of each sampled record to L2 norm C, sums, adds
  N(0, (σC)²) noise once to each coordinate, and divides by the expected (not the actual) number
  of records. One record changes the sum by at most C.
- **Sampling**: every record joins every batch independently with probability q (Poisson).
- **Randomness**: masks, noise, random starts of attacks, and the global RNGs that dropout and
  augmentation draw from are secret and independent for each record; so a record's numbers may be
  thought of as its own, and leaving it out changes no other record's.
- **Accounting**: the Poisson-subsampled Gaussian mechanism composed over all steps of all fits that
  led to the weights, by PRV (Gopi et al. 2021, arXiv 2106.02848) or RDP (Mironov et al. 2019,
  arXiv 1908.10530).

Covered: the weights after every step, and whatever is computed from them without the training
data. Not covered: un-noised quantities that a training step logs (losses, accuracies); choices
made by looking at the data before training (hyper-parameters, architecture); validation data;
floating-point attacks on the noise; branches of training that are known to other processes only.
"""

from defend.privacy.accounting import (
    Segment,
    affordable_steps,
    epsilon,
    noise_multiplier_for,
)
from defend.privacy.budget import Budget
from defend.privacy.mechanism import add_noise_, clip_and_sum
from defend.privacy.randomness import Randomness
from defend.privacy.sampling import PoissonBatchSampler
from defend.privacy.step import PrivateStep

__all__ = [
    "Budget",
    "PoissonBatchSampler",
    "PrivateStep",
    "Randomness",
    "Segment",
    "add_noise_",
    "affordable_steps",
    "clip_and_sum",
    "epsilon",
    "noise_multiplier_for",
]
