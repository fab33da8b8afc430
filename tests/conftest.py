import functools
import importlib.metadata
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; for the programs of tests too
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import pytest
import torch

# Each Trainer asks what is installed, which takes longer than the rest of it.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# Programs that tests start, recipes too, import what lies here.
_PATHS = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """Every test starts from the same RNG, on one thread, without Lightning's chatter."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


LONGEST = (
    "tests/contracts/test_matrix.py",
    "tests/contracts/test_sensitivity.py",
    "tests/callbacks/test_ddp.py",
    "tests/test_recipes.py",
    "tests/test_recipe_mnist.py",
    "tests/contracts/test_silent_breaks.py",
    "tests/training/test_memory_retry.py",
    "tests/callbacks/test_resume.py",
    "tests/callbacks/test_pytorch_lightning.py",
    "tests/training/test_adversarial_fabric.py",
    "tests/callbacks/test_leaks.py",
    "tests/callbacks/test_kept_state.py",
    "tests/attacks/test_peers.py",
    "tests/training/test_adversarial_uses.py",
    "tests/callbacks/test_together.py",
)


# Files that share what is expensive (programs of several processes, Opacus set up wrong): one
# worker of pytest-xdist runs them all. Any other file is a group of its own.
GROUPS = {
    "tests/callbacks/test_ddp.py": "programs",
    "tests/training/test_adversarial_fabric.py": "programs",
    "tests/training/test_fabric.py": "programs",
    "tests/training/test_processes.py": "programs",
    "tests/contracts/test_opacus_alone.py": "breaks",
    "tests/contracts/test_silent_breaks.py": "breaks",
}


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if hasattr(config, "workerinput"):  # the longest files begin
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(_file(item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole groups to one worker. The groups of pytest-xdist 3.8 do nothing under pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if _file(nodeid) == "tests/contracts/test_matrix.py":
                return nodeid  # each long, and for itself
            return GROUPS.get(_file(nodeid), _file(nodeid))

    return ByGroup(config, log)


def _file(nodeid):
    return nodeid.split("::")[0]
