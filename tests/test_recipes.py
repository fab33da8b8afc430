"""The quickstart, small, and as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    process = subprocess.run(
        [sys.executable, ROOT / "recipes" / "quickstart.py", "--epochs", "20"],
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def table(output):
    """{run: (clean %, PGD-20 %, ε or None)} from the printed table."""
    rows = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d.]+", cells[1]):
            epsilon = None if cells[3] == "–" else float(cells[3])
            rows[cells[0]] = (float(cells[1]), float(cells[2]), epsilon)
    return rows


def test_the_table_tells_the_story(quickstart):
    rows = table(quickstart[1])
    assert list(rows) == ["plain", "robust", "private", "robust and private"]
    assert rows["plain"][0] > 90
    assert rows["plain"][1] < 20
    assert rows["robust"][1] >= rows["plain"][1] + 40
    for name in ("private", "robust and private"):
        assert 0 < rows[name][2] <= 8.0
    assert rows["plain"][2] is rows["robust"][2] is None


def test_the_printed_epsilon_by_a_second_accountant(quickstart):
    """From (σ, q, steps, δ) as MLflow has them, by dp-accounting."""
    from mlflow import MlflowClient

    from tests.privacy.accounting.test_calibration import second_opinion

    client = MlflowClient(f"sqlite:///{quickstart[0]}/mlflow.db")
    experiment = client.get_experiment_by_name("defend-quickstart")
    runs = {r.info.run_name: r.data for r in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 4
    for name in ("private", "robust and private"):
        params, card = runs[name].params, runs[name].tags["mlflow.note.content"]
        sigma, rate, delta = (
            float(params[f"defend/{k}"]) for k in ("noise_multiplier", "sample_rate", "delta")
        )
        steps = int(re.search(r"\| steps \| (\d+) \|", card).group(1))
        recomputed = second_opinion([(sigma, rate, steps)], delta)
        printed = table(quickstart[1])[name][2]
        assert recomputed <= float(params["defend/target_epsilon"]) == 8.0
        assert recomputed - 0.01 <= printed <= recomputed + 0.05


def test_the_picture_and_the_line_that_opens_the_ui(quickstart):
    folder, output = quickstart
    picture = folder / "outputs" / "adversarial_examples.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.relative_to(folder)) in output
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in output


def test_the_review_notebook_runs_on_its_results(quickstart, monkeypatch, capsys):
    monkeypatch.setenv("TRACKING_URI", f"sqlite:///{quickstart[0]}/mlflow.db")
    notebook = json.loads((ROOT / "notebooks" / "review.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert not cell["outputs"]  # committed without results
    assert set(names["table"].index) == {"plain", "robust", "private", "robust and private"}
    assert len(names["figure"].axes[0].lines) == 4
    assert "# Defense card" in capsys.readouterr().out
