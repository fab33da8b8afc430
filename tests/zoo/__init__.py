"""Small, sound set-ups as people write them: the zoo.

`all_setups()` gives them all. The files are imported at the first call, since transformers takes
seconds to import. Importable without defend.
"""

import importlib
import importlib.util

from tests.zoo.setup import SETUPS, SetUp

FILES = {
    "transformers": ("transformers", "transformers_causal", "transformers_vision"),
    "peft": ("peft",),
    "attention": ("attention",),
    "recurrent": ("recurrent",),
    "tabular": ("tabular",),
    "vision": ("vision", "vision_transformers"),
    "other": ("other_graphs", "other_losses", "other_models", "other_weights"),
}
FAMILIES = tuple(FILES)


def all_setups(*families: str) -> dict[str, SetUp]:
    """The set-ups of these families, or of all; those of peft only where it is installed."""
    chosen = families or FAMILIES
    for family in chosen:
        if family != "peft" or importlib.util.find_spec("peft") is not None:
            for file in FILES[family]:
                importlib.import_module(f"tests.zoo.{file}")
    return {name: setup for name, setup in SETUPS.items() if setup.family in chosen}
