"""How every command ends: its exit status, and the one line that says why."""

from __future__ import annotations

import errno
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from fastgate.cli.progress import console, escape_unencodable_output
from fastgate.errors import FastgateError

_UsageError: Any = typer.BadParameter.__base__  # of whichever click typer brings
_ARGUMENTS = "fastgate.arguments"  # key in Context.meta: the arguments as the user typed them
_BUG = "a bug in fastgate; please report it with this traceback and the output of `fastgate info`"


class CommandGroup(TyperGroup):
    """Exit status 0: finished. 1: refused, or stopped by the system. 2: wrong usage. 130: Ctrl-C.

    Each but 0 prints one line that says why. A traceback means a bug in fastgate.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        typed = list(args)  # parsing empties the list
        try:
            context = super().make_context(info_name, args, *rest, **extra)
            context.meta[_ARGUMENTS] = typed
            return context
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # it shows the help
                raise
            _end_usage(error)

    def invoke(self, ctx: Any) -> Any:
        escape_unencodable_output()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except FastgateError as error:
            end_command(error, 1)
        except _UsageError as error:
            _end_usage(error)
        except KeyboardInterrupt as error:
            end_command("interrupted", 130, _hint(error))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            reason = error.strerror or str(error).strip().splitlines()[0]
            where = "" if error.filename is None else f"{error.filename}: "
            end_command(f"{where}{reason}", 1, _hint(error))
        except MemoryError as error:
            end_command("out of memory; lower --batch-size or --max-length", 1, _hint(error))
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise
            console(stderr=True).print(f"error: {type(error).__name__}: {_BUG}", style="red", soft_wrap=True)
            raise


def end_command(message: object, status: int, hint: str = "") -> NoReturn:
    """End the command with one line on stderr.

    hint: is printed as it is after the message, because it may hold a command.
    """
    line = " ".join(str(message).split())
    console(stderr=True).print(f"error: {line}{hint}", style="red", soft_wrap=True)
    raise typer.Exit(status)


def typed_command(context: typer.Context, *more: str) -> str:
    """The command as the user typed it, quoted for a shell. more: arguments to add where they are missing."""
    typed = context.meta[_ARGUMENTS]
    return shlex.join(["fastgate", *typed, *(argument for argument in more if argument not in typed)])


def _end_usage(error: Any) -> NoReturn:
    command = error.ctx.command_path if error.ctx else "fastgate"
    end_command(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)


def print_note(note: str) -> None:
    """Print what is worth knowing of a result, on stderr."""
    console(stderr=True).print(f"note: {note}", soft_wrap=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print warnings about results in one line, without the place in the code, and no other warnings."""
    if issubclass(category, RuntimeWarning | UserWarning):
        console(stderr=True).print(f"warning: {' '.join(str(message).split())}", soft_wrap=True)


@contextmanager
def resume_hint(make_hint: Callable[[], str]) -> Iterator[None]:
    """If something from outside ends the run, the error also says how to continue it.

    make_hint: makes that sentence when it is needed.
    """
    try:
        yield
    except (KeyboardInterrupt, OSError, MemoryError) as error:
        error.fastgate_hint = make_hint()  # type: ignore[union-attr]
        raise


def _hint(error: BaseException) -> str:
    hint = getattr(error, "fastgate_hint", "")
    return f"; {hint}" if hint else ""
