"""The plots of the committed results: no label lies on another, and the legend has every colour."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text

from fastgate.report import sweep_plots
from fastgate.report.speedups import read_speedups
from fastgate.report.sweep_report import group_runs
from fastgate.training.sweep_results import read_lines

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"
RESULTS = BENCH / "results"


def visible_texts(figure):
    """Texts that are drawn. An axis has labels of ticks beyond its limits as well, which are not."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
    return [
        text
        for text in figure.findobj(Text)
        if text not in hidden and text.get_visible() and text.get_text().strip()
    ]


def overlaps(figure):
    """Pairs of texts that lie on one another, and texts beyond the edge of the figure."""
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    found = [
        (a, b)
        for (a, first), (b, second) in itertools.combinations(boxes, 2)
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]
    page = figure.bbox
    found += [
        (name, "the edge")
        for name, box in boxes
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1
    ]
    return found


def unexplained_colours(figure):
    """Colours of lines in the panels that the legend does not have. A heat map needs a colour scale."""
    explained = {
        to_hex(line.get_color())
        for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes))
        if legend is not None
        for line in legend.findobj(Line2D)
    }
    for axes in figure.axes:
        if axes.images:
            assert any(other.get_label() == "<colorbar>" for other in figure.axes), (
                "a heat map without a scale"
            )
    used = set()
    for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
        used |= {to_hex(line.get_color()) for line in axes.get_lines()}
        bars = [bar for bar in axes.collections if isinstance(bar, LineCollection)]
        used |= {to_hex(colour) for bar in bars for colour in bar.get_colors()}
    return used - explained


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Name -> figure, of every plot that is saved while a test runs."""
    saved = {}

    def catch(module):
        save = module.save_figure

        def keep(figure, path):
            saved[path.name] = figure
            save(figure, path)
            assert path.with_suffix(".png").stat().st_size < 100_000
            assert path.with_suffix(".svg").stat().st_size < 150_000

        monkeypatch.setattr(module, "save_figure", keep)
        return saved

    return catch


def assert_readable(saved):
    for name, figure in saved.items():
        assert overlaps(figure) == [], name
        assert unexplained_colours(figure) == set(), name
        assert figure.get_size_inches()[0] * 100 <= 800


def test_the_plots_of_a_sweep(figures, tmp_path):
    saved = figures(sweep_plots)
    lines, speedups = read_lines(RESULTS / "tasks.jsonl"), read_speedups(RESULTS / "speeds.json")
    plots = sweep_plots.write_plots(lines, group_runs(lines, speedups), speedups, tmp_path)
    assert [plot.name for plot in plots] == list(saved) == ["score", "speed", "survivors", "gates"]
    assert_readable(saved)


def test_a_line_joins_only_runs_that_differ_in_their_target(figures, tmp_path):
    saved = figures(sweep_plots)
    lines = read_lines(RESULTS / "tasks.jsonl")
    groups = group_runs(lines)
    sweep_plots.write_plots(lines, groups, {}, tmp_path)
    points = {round(group.score, 6): group for group in groups if group.removed}
    joined = 0
    for axes in saved["score"].axes:
        for line in axes.get_lines():
            if line.get_linestyle() != "-" or len(line.get_ydata()) < 2:
                continue
            settings = [
                {
                    k: v
                    for k, v in points[round(score, 6)].settings.items()
                    if k not in ("seed", "sparsity", "keep")
                }
                for score in line.get_ydata()
            ]
            assert all(one == settings[0] for one in settings)
            joined += 1
    assert joined >= 7


@pytest.mark.parametrize("name", ["scenarios_cpu.jsonl", "scenarios_amx.jsonl"])
def test_the_plots_of_the_scenarios(figures, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    for module in ("scenario_table", "scenario_plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import scenario_plots

    saved = figures(scenario_plots)
    monkeypatch.setattr(sys, "argv", ["plots", str(RESULTS / name), str(tmp_path)])
    scenario_plots.main()
    assert list(saved) == ["speed", "matmul_bound"]
    assert_readable(saved)
    shares = [y for axes in saved["matmul_bound"].axes for line in axes.get_lines() for y in line.get_ydata()]
    title = saved["matmul_bound"].get_suptitle()
    assert max(shares) > 100 and "A share above 100% is possible" in " ".join(title.split())
    assert all(axes.get_ylim()[1] > max(shares) for axes in saved["matmul_bound"].axes)
    for module in ("scenario_table", "scenario_plots"):
        sys.modules.pop(module)


def test_the_scripts_of_the_scenarios_have_help(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH / "models"))
    for module in ("scenario_table", "scenario_plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import scenario_plots
    import scenario_table

    for module in (scenario_plots, scenario_table):
        monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
        assert "[FILE]" in capsys.readouterr().out
    for module in ("scenario_table", "scenario_plots"):
        sys.modules.pop(module)
