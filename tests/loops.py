"""Loops of one's own, made from flat settings, as the callbacks take them."""

import dataclasses

from defend import Adversarial, Privacy, make_adversarial, make_private


def private_loop(model, optimizer, loader, **settings):
    """`make_private`, the settings of DP-SGD given flat, as the callback takes them."""
    names = {field.name for field in dataclasses.fields(Privacy)} & set(settings)
    privacy = Privacy(**{name: settings.pop(name) for name in names})
    return make_private(model, optimizer, loader, privacy=privacy, **settings)


def adversarial_loop(model, optimizer, attack, *, warmup_batches=0, **settings):
    """`make_adversarial`, its settings given flat; an epoch is one batch."""
    names = {field.name for field in dataclasses.fields(Adversarial)} & set(settings)
    asked = {name: settings.pop(name) for name in names}
    adversarial = Adversarial(attack, warmup_epochs=warmup_batches, **asked)
    return make_adversarial(model, optimizer, ["batch"], adversarial=adversarial, **settings)
