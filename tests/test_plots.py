"""What the pictures show, read off their axes."""

from types import SimpleNamespace

import numpy as np
import pytest

from eval import plots
from eval.arithmetic import plots as arithmetic_plots
from merge.search import Trial


@pytest.fixture
def drawn(monkeypatch):
    """The axes that the next picture is drawn on."""
    figure, found = plots.axes()
    for module in (plots, arithmetic_plots):
        monkeypatch.setattr(module, "axes", lambda *size: (figure, found))
    return found[0]


def labels(ax):
    ax.figure.canvas.draw()
    return [one.get_text() for which in ("major", "minor") for one in ax.yaxis.get_ticklabels(which=which) if one.get_text()]


@pytest.mark.parametrize(("losses", "plain"), [((4.6, 4.4, 4.2, 4.1), True), ((0.02, 0.03), True), ((40.0, 0.4), False)])
def test_ticks_within_a_decade_are_plain_numbers(losses, plain, drawn, tmp_path):
    trials = [Trial("a", i, (), loss, 0.0) for i, loss in enumerate(losses)]
    plots.search_history(tmp_path / "history.png", trials, "loss")
    assert drawn.get_yscale() == "log"
    found = labels(drawn)
    assert len(found) >= 2
    assert all(one.replace(".", "").isdigit() for one in found) == plain


def test_ticks_of_the_arithmetic_figures_too(drawn, monkeypatch, tmp_path):
    series = np.array([10.0, 20.0]), np.array([[4.6, 4.4]])
    monkeypatch.setattr(arithmetic_plots, "_series", lambda *arguments: series)
    runs = [SimpleNamespace(name="a", title="a")]
    assert arithmetic_plots.curves(tmp_path / "a.png", None, tmp_path, runs, "x_plus_y", "val_loss", log_x=True)
    assert (drawn.get_xscale(), drawn.get_yscale()) == ("log", "log")
    assert all(one.replace(".", "").isdigit() for one in labels(drawn))


def test_as_many_lines_as_the_study_has_runs_look_different(drawn, monkeypatch, tmp_path):
    series = np.array([10.0, 20.0]), np.array([[0.1, 0.2]])
    monkeypatch.setattr(arithmetic_plots, "_series", lambda *arguments: series)
    runs = [SimpleNamespace(name=f"r{i}", title=f"r{i}") for i in range(56)]
    drawn.figure.set_size_inches(11, 13)  # the size that is asked for is left out by `drawn`
    assert arithmetic_plots.curves(tmp_path / "a.png", None, tmp_path, runs, "x_plus_y", "val_acc", log_x=False)
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn.lines}  # get_linestyle says "--" of many
    assert len(looks) == len(drawn.lines) == 56


def test_training_begins_with_the_loss_before_it(drawn, tmp_path):
    (tmp_path / "training.csv").write_text("update,loss,held_out\n1,5.0,\n2,4.0,4.5\n")
    plots.loss_curve(tmp_path / "training.csv", tmp_path / "training.png", 5.5)
    (held_out,) = [line for line in drawn.lines if line.get_label() == "held-out text"]
    assert list(zip(held_out.get_xdata(), held_out.get_ydata(), strict=True)) == [(0.0, 5.5), (2.0, 4.5)]
