import io

import torch

from defend.tracking.figures import adversarial_examples_figure, robustness_curve_figure


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(buffer.getvalue())


def test_the_curve_shows_its_points_in_order():
    figure = robustness_curve_figure({"linf": {0.2: 0.1, 0.0: 0.9, 0.1: 0.5}, "l2": {0.0: 0.9}})
    lines = figure.axes[0].lines
    assert list(lines[0].get_xdata()) == [0.0, 0.1, 0.2]
    assert list(lines[0].get_ydata()) == [0.9, 0.5, 0.1]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["L∞", "L2"]
    assert pixels(figure) > 1000


def test_examples_stand_in_rows_with_captions():
    rows = {"original": torch.rand(3, 1, 8, 8), "attacked": torch.rand(3, 8, 8)}
    figure = adversarial_examples_figure(rows, {"attacked": ["a", "b", "c"]})
    axes = figure.axes
    assert len(axes) == 6
    assert [axes[i].get_ylabel() for i in (0, 3)] == ["original", "attacked"]
    assert [a.get_title() for a in axes[3:]] == ["a", "b", "c"]
    shown = torch.tensor(axes[4].images[0].get_array().tolist())
    torch.testing.assert_close(shown, rows["attacked"][1])
    assert pixels(figure) > 1000
