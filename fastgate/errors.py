"""The errors that fastgate raises, and the form of their messages."""

from __future__ import annotations


class FastgateError(Exception):
    """Base of every error fastgate raises on purpose."""


class ArgumentError(FastgateError, ValueError):
    """A value passed by the caller cannot be used."""


class NothingPatched(FastgateError, ValueError):
    """No encoder that fastgate knows was found in the model."""


class Unsupported(FastgateError, ValueError):
    """The model or the call needs something that fastgate does not do."""


class CheckpointError(FastgateError, ValueError):
    """A checkpoint is missing, damaged, or from a format this version cannot read."""


class DataError(FastgateError, ValueError):
    """A data file, column or label cannot be used for the task."""


class MissingPackage(FastgateError, ImportError):
    """A package that one of the extras of fastgate installs is missing."""


def format_error(where: str, argument: str, got: object, wanted: str, remedy: str) -> str:
    """The form of every message: `where: argument: got X, wanted Y; remedy`.

    where: the call or the file. argument: what is wrong there. remedy: what the user can do.
    """
    return f"{where}: {argument}: got {got}, wanted {wanted}; {remedy}"
