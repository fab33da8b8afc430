"""The programs of `docs/examples` run as they are, on fewer records."""

import importlib.util
from pathlib import Path

import pytest

from defend.privacy import epsilon

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for ledgers and logs


def test_every_program_is_tested():
    assert {p.stem for p in FOLDER.glob("*.py")} == {"tabular", "text", "vision_transformer"}


def test_tabular():
    accuracy, privacy = program("tabular").main(count=2000, epochs=1)
    assert accuracy > 0.5
    assert 2.5 < privacy.epsilon <= 3.0


def test_text_in_two_phases_has_one_account():
    first, both = program("text").main(count=400)
    assert (first.steps, both.steps) == (4, 8)
    assert both.epsilon == pytest.approx(epsilon([(1.0, 0.25, 8)], 1e-4), abs=1e-6)


def test_vision_transformer_goes_record_by_record():
    privacy = program("vision_transformer").main(records=128)
    assert privacy.settings()["engine"] == "record"
    assert privacy.steps == 2
