import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import AdversarialTraining, InputError, InputSpace
from defend.attacks.presets import fgsm_rs, n_fgsm
from tests.helpers import Net, loader

SPACES = [InputSpace(), InputSpace(mean=(0.5, 0.3), std=(0.25, 0.2))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_and_batch(space=SPACES[0]):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    raw = torch.rand(6, 2, 4, 4, generator=seeded(2), dtype=torch.float64)
    raw[0] = raw[0].round()  # in the corner of the box, where clipping matters
    return model, space.to_model(raw), torch.tensor([0, 1, 2, 0, 1, 2])


def by_hand(model, x, y, space, *, start, step, clip=None):
    """One signed step of each record alone from x + start, everything in raw units."""
    rows = []
    for i in range(len(x)):
        clean = space.to_raw(x[i : i + 1])
        noise = (clean + start[i : i + 1]).clamp(0, 1) - clean
        raw = (clean + noise).requires_grad_()
        (grad,) = torch.autograd.grad(
            F.cross_entropy(model(space.to_model(raw)), y[i : i + 1]), raw
        )
        delta = noise + step * grad.sign()
        if clip is not None:
            delta = delta.clamp(-clip, clip)
        rows.append(space.to_model((clean + delta).clamp(0, 1)))
    return torch.cat(rows).detach()


def noise_like(x, radius, seed):
    return torch.empty_like(x).uniform_(-1, 1, generator=seeded(seed)) * radius


@pytest.mark.parametrize("space", SPACES, ids=["raw", "normalized"])
@pytest.mark.parametrize("step_size", [None, 0.03, 0.3])
def test_fgsm_rs_equals_the_slow_reference(space, step_size):
    model, x, y = model_and_batch(space)
    adv = fgsm_rs(0.1, step_size=step_size, inputs=space)(model, x, y, generator=seeded(3))
    step = 0.125 if step_size is None else step_size
    start = noise_like(x, 0.1, 3)
    expected = by_hand(model, x, y, space, start=start, step=step, clip=0.1)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=["raw", "normalized"])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_n_fgsm_equals_the_slow_reference(space, noise):
    model, x, y = model_and_batch(space)
    adv = n_fgsm(0.1, noise=noise, inputs=space)(model, x, y, generator=seeded(3))
    start = noise_like(x, noise * 0.1, 3)
    expected = by_hand(model, x, y, space, start=start, step=0.1)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_n_fgsm_is_not_clipped_back_to_eps_but_stays_in_its_ball():
    model, x, y = model_and_batch()
    x = x * 0.2 + 0.4  # away from the box
    moved = (n_fgsm(0.1)(model, x, y, generator=seeded()) - x).abs()
    # |η ± ε| for η uniform in ±2ε: half of it within ε, a quarter beyond 2ε (clipped: all, none).
    assert 0.4 < (moved <= 0.1).double().mean() < 0.6
    assert 0.15 < (moved > 0.2).double().mean() < 0.35
    assert 0.29 < moved.max() <= 0.3 + 1e-12


@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_with_eps_scales_everything(factor):
    assert fgsm_rs(0.1).with_eps(0.1 * factor) == fgsm_rs(0.1 * factor)
    scaled, wanted = n_fgsm(0.1).with_eps(n_fgsm(0.1).ball.eps * factor), n_fgsm(0.1 * factor)
    for name in ("step_size", "start_radius"):
        assert getattr(scaled, name) == pytest.approx(getattr(wanted, name))
    assert scaled.ball.eps == pytest.approx(wanted.ball.eps)


@pytest.mark.parametrize("preset", [fgsm_rs, n_fgsm])
def test_a_warm_up_by_a_factor_is_one_of_eps(preset):
    model, x, y = model_and_batch()
    attack = preset(0.1)
    warm = attack(model, x, y, generator=seeded(), eps=attack.ball.eps * 0.3)
    expected = preset(0.03)(model, x, y, generator=seeded())
    torch.testing.assert_close(warm, expected, rtol=0, atol=1e-12)


def test_a_step_of_two_eps_forgets_the_start():
    model, x, y = model_and_batch()
    x = x * 0.2 + 0.4  # away from the box
    adv = fgsm_rs(0.1, step_size=0.2)(model, x, y, generator=seeded())
    torch.testing.assert_close((adv - x).abs(), torch.full_like(x, 0.1), rtol=0, atol=1e-12)
    adv = fgsm_rs(0.1)(model, x, y, generator=seeded())
    assert ((adv - x).abs() < 0.09).any()


def test_they_cost_one_gradient_and_pass_their_settings_on():
    model, x, y = model_and_batch()
    for attack in (fgsm_rs(0.1, precision="fp32"), n_fgsm(0.1, precision="fp32")):
        assert attack.perturb(model, x, y).gradients == len(x)
        assert attack.precision == "fp32"
        assert attack.inputs == InputSpace()


@pytest.mark.parametrize("preset", [fgsm_rs, n_fgsm])
@pytest.mark.parametrize("eps", [0.0, -0.1, float("inf"), float("nan")])
def test_eps_must_be_positive(preset, eps):
    with pytest.raises(InputError, match="Expected `eps` to be a finite number > 0"):
        preset(eps)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("inf")])
def test_noise_must_be_positive(noise):
    with pytest.raises(InputError, match=r"Expected `noise` to be > 0.*this is FGSM"):
        n_fgsm(0.1, noise=noise)


def test_the_step_must_be_positive():
    with pytest.raises(InputError, match="Expected `step_size` to be > 0"):
        fgsm_rs(0.1, step_size=0.0)


CONFIG = """
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: defend.AdversarialTraining
      init_args:
        attack:
          class_path: defend.attacks.presets.{preset}
          init_args:
            eps: 0.1
            inputs:
              class_path: defend.InputSpace
              init_args:
                low: -1.0
"""


@pytest.mark.parametrize("preset", [fgsm_rs, n_fgsm])
def test_lightning_cli_builds_them_from_yaml(tmp_path, preset):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, an extra")
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningCLI

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(32, 16)

    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, preset=preset.__name__))
    args = ["fit", "--config", str(config)]
    cli = LightningCLI(Net, Data, args=args, save_config_callback=None)
    callback = cli.trainer.callbacks[0]
    assert type(callback) is AdversarialTraining
    assert callback.attack == preset(0.1, inputs=InputSpace(low=-1.0))
