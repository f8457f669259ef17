"""What all plots share: a style, a grid of panels at page width, one legend below, files as PNG and SVG."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
WIDTH = 8.0  # inches, which are 800 pixels
_DPI = 100
_STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "fastgate",  # the same plot gives the same bytes
}


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Inside, plots have fastgate's style. Make and save them there."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def panels(count: int, height: float = 2.5, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of page width with `count` axes of this height in inches, at most three in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, sharey=share_y, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def label_edges(axes: Sequence[Axes], x_label: str, y_label: str | None) -> None:
    """Label the x axis below the last panel of each column, and the y axis left of each row."""
    grid: Any = axes[0].get_gridspec()
    columns = grid.ncols
    for i, axis in enumerate(axes):
        if i + columns >= len(axes):
            axis.set_xlabel(x_label)
        if y_label is not None and i % columns == 0:
            axis.set_ylabel(y_label)


def legend_below(figure: Figure, axes: Sequence[Axes], title: str | None = None, columns: int = 3) -> None:
    """One legend for all panels, each label once."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=min(columns, len(named)),
            title=title,
        )


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path` with the suffixes .png and .svg."""
    from PIL import Image

    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=_DPI)
        # A palette makes the file three times smaller. This method keeps colours that few pixels have.
        image = Image.open(buffer).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE)
        image.save(path.with_suffix(".png"), optimize=True)
