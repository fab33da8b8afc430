"""Promises about the package as a whole."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import defend
from tests.structure import measure

ROOT = Path(__file__).parents[1]

LIGHT = """
import sys
import defend
from tests.structure import measure
heavy = {"mlflow", "torchattacks", "matplotlib", "opacus", "sklearn", "pandas"}
heavy |= {"lightning", "lightning_fabric", "pytorch_lightning"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""


def test_import_is_light():
    process = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert process.stdout.strip() == "[]"


CALLBACKS = """
import sys
from defend import AdversarialTraining, DifferentialPrivacy, RobustnessEvaluation, PGD, Linf
AdversarialTraining(PGD(Linf(0.1)))
DifferentialPrivacy(target_epsilon=1.0, delta=1e-5, max_grad_norm=1.0)
RobustnessEvaluation({"pgd": PGD(Linf(0.1))})
print(sorted({"mlflow", "torchattacks", "opacus"} & {n.split(".")[0] for n in sys.modules}))
"""


def test_callbacks_bring_in_only_lightning_until_they_run():
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLBACKS],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = defend.nonsense
    assert set(defend.__all__) <= set(dir(defend))


def test_every_public_name_is_there_and_documented():
    for name in defend.__all__:
        assert getattr(defend, name).__doc__, name


def test_every_module_says_what_it_is():
    for path in (ROOT / "defend").rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == defend.__version__
    assert project["version"] in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_documents_name_only_files_that_exist(name):
    import re

    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:defend|recipes|tests|notebooks|benchmarks)/[\w/.-]+)`", text)
    assert paths or name == "CONTRIBUTING.md"
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_shape_of_the_code():
    """What `python -m tests.structure` prints; it may get better, and not worse."""
    shape = measure(ROOT)
    for empty in ("long_functions", "import_cycles", "upward_imports", "concrete_checks"):
        assert shape[empty] == [], empty
    assert len(shape["wide_functions"]) <= 4
    assert len(shape["large_classes"]) <= 3
    assert len(shape["runs"]) <= 4


def test_the_way_of_a_batch_is_one_short_file():
    assert len((ROOT / "defend/training/step.py").read_text().splitlines()) <= 150
