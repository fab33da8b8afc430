"""What defend writes to an MLflow run, by the run's own client."""

from collections.abc import Mapping
from typing import Any

PREFIX = "defend"

_DESCRIPTION_TAG = "mlflow.note.content"  # rendered as Markdown on top of a run's page
_LONGEST_PARAM = 250  # MLflow cuts values there, in silence


class RunLog:
    """One MLflow run.

    Args:
        client: an `mlflow.MlflowClient`, as Lightning's MLFlowLogger holds one.
        run_id: the run to write to.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def log_params(self, facts: Mapping[str, Any]) -> None:
        """Each fact as the parameter `defend/<name>`.

        A parameter cannot change in MLflow: a resumed run keeps its first values.
        """
        known = self.client.get_run(self.run_id).data.params
        for name, value in facts.items():
            key = f"{PREFIX}/{name}"
            if key not in known:
                self.client.log_param(self.run_id, key, str(value)[:_LONGEST_PARAM])

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self.client.set_tag(self.run_id, name, value)

    def log_card(self, card: str) -> None:
        """The card, as `defend/card.md` and as the run's description."""
        self.client.log_text(self.run_id, card, f"{PREFIX}/card.md")
        self.set_tag(_DESCRIPTION_TAG, card)

    def log_report(self, results: Mapping[str, Any]) -> None:
        """Final figures as `defend/report.json`."""
        self.client.log_dict(self.run_id, dict(results), f"{PREFIX}/report.json")

    def log_curve(self, ball: str, curve: Mapping[float, float]) -> None:
        """Accuracy by eps: a figure, and a metric whose step is round(1000 · eps)."""
        import matplotlib.pyplot as plt

        from defend.tracking.figures import robustness_curve_figure

        for eps, accuracy in curve.items():
            key = f"robust/curve_{ball}"
            self.client.log_metric(self.run_id, key, accuracy, step=round(1000 * eps))
        figure = robustness_curve_figure({ball: curve})
        self.client.log_figure(self.run_id, figure, f"{PREFIX}/robustness_curve_{ball}.png")
        plt.close(figure)
