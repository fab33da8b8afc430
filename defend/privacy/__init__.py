"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133) on an unmodified module, in any training loop.

**Formal guarantees.** After T steps the released weights are (ε, δ)-differentially private with
respect to the training data set:

- **Unit and adjacency**: add or remove one record, that is one index of the data set. Replacing a
  record is a removal and an addition. Several records of one person are covered as a group only.
  The number of records N is taken as public: q, the number of steps and σ follow from it.
- **Mechanism**: each step clips the gradient of each sampled record to L2 norm C, sums, adds
  N(0, (σC)²) noise once to each coordinate, and divides by the expected (not the actual) number
  of records. One record changes the sum by at most C, up to the rounding of floats. Clipping may be
  flat, per parameter (C / √K each, McMahan et al. 2018, arXiv 1710.06963), or to a norm that
  follows a quantile (Andrew et al. 2021, arXiv 1905.03871): its count is released with noise of
  its own, the gradient gets more than σC for it, and both together cost what σ costs.
- **Views**: with K views, gᵢ is the mean of the gradients of K rows, all of them functions of
  record i alone: augmented images of it, adversarial ones, or both. It is clipped once, so the sum
  moves by at most C whatever K is, and sampling and accounting know nothing of K (De et al. 2022,
  arXiv 2204.13650, "augmentation multiplicity"). Rows that were clipped one by one, or joined as
  records of their own, would move it by K · C.
- **Adversarial steps**: an adversarial row is a function of its record, of released weights and of
  random numbers of its own, and TRADES and MART compare two rows of one record. So gᵢ is still a
  function of record i, and DP-SGD bounds any such function by its clip, whatever computes it (Abadi
  et al. 2016, arXiv 1607.00133, Algorithm 1). The attack's gradients in the input are part of that
  function; they are not released and cost nothing. Weights that AWP moves for a gradient move along
  the last *released* gradient (Park et al. 2023, arXiv 2306.05651), never along one of the batch.
  Perturbations that records share (universal ones) or that are carried on from batch to batch
  (`Free`) are functions of other records' raw gradients: `Free` is refused, and attacks and
  objectives of your own are tried out by the self-test, on seven records and at a few moments.
- **Sampling**: every record joins every batch independently with probability q (Poisson). An empty
  batch takes its noised step. With several processes there is one mask for all.
- **Randomness**: masks, noise and random starts of attacks come from a secret root, new at each
  fit. What user code draws from (the global generators, and those that are found on data set,
  collate function, module and callbacks) starts from OS entropy anew before each batch is loaded,
  in workers too, and before each attack and each forward of the step. Secret numbers that are
  independent for each record may be thought of as its own: leaving it out changes no other's.
- **Accounting**: the Poisson-subsampled Gaussian mechanism composed over all steps that the
  ledger and the checkpoint know, at the σ and q that each step had, by PRV (Gopi et al. 2021,
  arXiv 2106.02848) or RDP (Mironov et al. 2019, arXiv 1908.10530). A step is written to the ledger
  and flushed before it is taken: a crash may count one too many, never one too few, and a rollback
  to an older checkpoint refunds nothing. A model that was trained on the same data before is known
  by its weights where their ledger is found, and its account goes on (`docs/one_account.md`). σ, q
  and the number of steps are fixed by the plan or by a schedule that does not look at the data; to
  change them at a resume after looking at released weights is adaptive composition, which the sum
  of all steps at their own σ is not proven for.
- **Post-processing**: learning rates, momentum, weight decay, and everything else that is computed
  from released gradients costs nothing (Dwork & Roth 2014, Proposition 2.1). So do averages of the
  weights (EMA; De et al. 2022, arXiv 2204.13650): each of those was released, and so is their mean.
  An ε warm-up of the attack follows the number of the step alone, and costs nothing either.

**What it rests on**, and how it is held: the step treats each record alone and takes the plain
mean (`selftest` tries it on a copy before step 0 and now and then later); what hooks make of a
batch, and what is kept beside the weights, depends on no other record (both are watched at each
step, and tried out once they change); every gradient that reaches the weights went through clip and
noise (`guard` refuses any other optimizer step); the set-up has none of the known breaks
(`preconditions`, one table). What none of these sees is the user's promise:
`docs/where_your_code_runs.md` lists it, and `docs/matrix.md` what becomes of each kind of break.

**Covered**: the weights after every step, and whatever is computed from them without the training
data; C where it is learned; σ, q, steps and ε, given N.

**Not covered**: un-noised quantities that a training step logs (losses, accuracies; named in the
run and the card, or withheld with release="withhold"); what the self-test reports, and the digests
of data in the ledger, which come from the data without noise: keep them with it. That a run was
refused or stopped with an error, since what is found may depend on a record. Choices made
by looking at the data before training (hyper-parameters, architecture). Validation data. Branches
of training that are known neither to the ledger nor to the checkpoint; a model that was changed by
hand between two trainings in different processes, so that no ledger has its weights. Floating-point
attacks on the noise (Mironov 2012), unless `secure_noise=True` makes them costly (Holohan & Braghin
2021, arXiv 2107.10138). Time and memory that a step takes.
"""

from defend.privacy.accounting.budget import Budget
from defend.privacy.accounting.calibration import affordable_steps, noise_multiplier_for
from defend.privacy.accounting.curve import EpsilonCurve, epsilon
from defend.privacy.accounting.fingerprint import data_digest
from defend.privacy.accounting.history import Segment, scheduled
from defend.privacy.accounting.ledger import Ledger, read_ledger
from defend.privacy.checks.selftest import SelfTest, selftest
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.mechanism.clipping import AdaptiveClipping, FlatClipping, PerLayerClipping
from defend.privacy.mechanism.gaussian import add_noise_, clip_and_sum
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.sampling import Chunking, PoissonBatchSampler
from defend.privacy.mechanism.schedules import Decay
from defend.privacy.mechanism.shard import Shard
from defend.privacy.mechanism.step import PrivateStep, StepSettings

__all__ = [
    "AdaptiveClipping",
    "Budget",
    "Chunking",
    "Decay",
    "EpsilonCurve",
    "FlatClipping",
    "Ledger",
    "PerLayerClipping",
    "PoissonBatchSampler",
    "PrivateStep",
    "Randomness",
    "Segment",
    "SelfTest",
    "Shard",
    "StepSettings",
    "StepUnderTest",
    "add_noise_",
    "affordable_steps",
    "clip_and_sum",
    "data_digest",
    "epsilon",
    "noise_multiplier_for",
    "read_ledger",
    "scheduled",
    "selftest",
]
