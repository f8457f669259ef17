"""Training on the screen: bars for the steps and for each gate, or plain lines without a terminal.

Text is printed unchanged: square brackets in names are no markup. A character that the console's encoding
lacks is printed as an escape.
"""

from __future__ import annotations

import io
import sys
import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastgate.training.progress import DENSE, PRUNE, SCORE, Progress

_TITLES = {DENSE: "dense fine-tune", PRUNE: "self-prune", SCORE: "score"}
_UNITS = {DENSE: "step", PRUNE: "step", SCORE: "batch"}
_LINES_PER_PHASE = 10  # without a terminal
_SHORT = 10.0  # seconds; a scoring that takes less prints no lines


def console(*, stderr: bool = False) -> Console:
    """The console for everything that the commands print."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def escape_unencodable_output() -> None:
    """Print escapes for what a console or a file name cannot encode, so that printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def duration(seconds: float) -> str:
    """A time as a person says it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Display:
    """A listener for `finetune`. Call it with each Progress, inside its `with` block.

    plain: print lines even on a terminal, because other processes print to it too.
    """

    def __init__(self, console: Console, plain: bool = False):
        self.console, self.plain = console, plain
        self.live: Live | None = None
        self._start = 0.0  # time after the first step of the phase here
        self._first = 0  # that step: a resumed phase does not begin at 1
        self._phase, self._step = "", 0
        self._last_line = ("", "", -1)  # phase, stage and tenth of the phase

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.plain:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def print(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, soft_wrap=True)

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self._phase or progress.step <= self._step:
            self._start, self._first = time.monotonic(), progress.step
        self._phase, self._step = progress.phase, progress.step
        seconds = time.monotonic() - self._start
        is_short = progress.phase == SCORE and seconds < _SHORT
        if self.live is not None:
            self.live.update(self._picture(progress, seconds))
            if progress.step == progress.total and not is_short:
                self.console.print(self._line(progress, seconds), soft_wrap=True)
            return
        tenth = progress.step * _LINES_PER_PHASE // max(progress.total, 1)
        line = (progress.phase, progress.stage, tenth)
        if line != self._last_line and not is_short:
            self._last_line = line
            self.console.print(self._line(progress, seconds), soft_wrap=True)

    def _line(self, progress: Progress, seconds: float) -> str:
        loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
        stage = f" ({progress.stage})" if progress.stage else ""
        gates = "  gates " + " ".join(f"{gate:.2f}" for gate in progress.gates) if progress.gates else ""
        steps = f"{_UNITS[progress.phase]} {progress.step} of {progress.total}"
        left = self._left(progress, seconds)
        return f"{_TITLES[progress.phase]}{stage}: {steps}, {duration(seconds)}{left}{loss}{gates}"

    def _left(self, progress: Progress, seconds: float) -> str:
        """The remaining time of the phase at the mean speed so far."""
        done, remaining = progress.step - self._first, progress.total - progress.step
        return f", about {duration(seconds / done * remaining)} left" if done > 0 and remaining > 0 else ""

    def _picture(self, progress: Progress, seconds: float) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            _UNITS[progress.phase],
            ProgressBar(progress.total, progress.step, width=40),
            f"{progress.step}/{progress.total}",
        )
        for layer, gate in enumerate(progress.gates):
            word = "open" if gate > 0.99 else "closed" if gate < 0.01 else f"{gate:.2f}"
            style = "green" if gate > 0.5 else "red"
            bar = ProgressBar(1.0, gate, width=40, complete_style=style, finished_style=style)
            grid.add_row(f"layer {layer}", bar, word)
        return Group(Text(self._line(progress, seconds).split("  gates")[0]), grid)
