"""Training on the screen: bars for the steps and for each gate, or plain lines without a terminal.

What is printed is shown as it is: square brackets in names are no markup, and a character that the console's
encoding does not have is written as an escape.
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

from fastgate.training.phases import DENSE, Progress

_TITLES = {DENSE: "dense fine-tune", "prune": "self-prune"}
_PLAIN_LINES = 10  # a phase, without a terminal


def console(*, stderr: bool = False) -> Console:
    """The console for everything that the commands print."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_what_cannot_be_encoded_as_escapes() -> None:
    """A console that is not UTF-8, or a file name that is not, does not end a program that prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Display:
    """A listener for `finetune`: call it with each Progress, inside its `with` block.

    plain: lines even on a terminal, for one of several processes that print to it.
    """

    def __init__(self, console: Console, plain: bool = False):
        self.console, self.plain = console, plain
        self.live: Live | None = None
        self._start, self._at = 0.0, ("", 0)  # of the training under way, and where it is
        self._said = ("", "", -1)

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

    def __call__(self, progress: Progress) -> None:
        phase, step = self._at
        if progress.phase != phase or progress.step <= step:
            self._start = time.monotonic()
        self._at = (progress.phase, progress.step)
        seconds = time.monotonic() - self._start
        if self.live is not None:
            self.live.update(self._picture(progress, seconds))
            if progress.step == progress.total:
                self.console.print(self._line(progress, seconds), soft_wrap=True)
            return
        said = (progress.phase, progress.stage, progress.step * _PLAIN_LINES // max(progress.total, 1))
        if said != self._said:
            self._said = said
            self.console.print(self._line(progress, seconds), soft_wrap=True)

    def _line(self, progress: Progress, seconds: float) -> str:
        loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
        stage = f" ({progress.stage})" if progress.stage else ""
        gates = "  gates " + " ".join(f"{gate:.2f}" for gate in progress.gates) if progress.gates else ""
        steps = f"step {progress.step} of {progress.total}"
        return f"{_TITLES[progress.phase]}{stage}: {steps}, {seconds:.0f} s{loss}{gates}"

    def _picture(self, progress: Progress, seconds: float) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            "steps", ProgressBar(progress.total, progress.step, width=40), f"{progress.step}/{progress.total}"
        )
        for layer, gate in enumerate(progress.gates):
            word = "open" if gate > 0.99 else "closed" if gate < 0.01 else f"{gate:.2f}"
            style = "green" if gate > 0.5 else "red"
            bar = ProgressBar(1.0, gate, width=40, complete_style=style, finished_style=style)
            grid.add_row(f"layer {layer}", bar, word)
        return Group(Text(self._line(progress, seconds).split("  gates")[0]), grid)
