"""Several files replaced at once: a kill or a full disk at any point leaves the old ones or the new ones."""

import itertools
import os
import signal
from pathlib import Path

import pytest

from fastgate.models import atomic_files

NAMES = ("config.json", "fastgate.json", "model.safetensors", "extra/vocab.txt")


def killed(folder: Path, moment: int) -> bool:
    """Write in a process that dies before its call number `moment` to the system; whether it died."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        for name in ("replace", "fsync", "unlink", "mkdir", "open", "rmdir"):
            setattr(os, name, killing(getattr(os, name), calls, moment))
        write(folder, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killing(function, calls, moment):
    def wrapped(*args, **kwargs):
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def write(folder: Path, text: str) -> None:
    with atomic_files.replace_files(folder, "notice") as staging:
        for name in NAMES:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(f"{text} {name}")


def texts(folder: Path) -> set[str]:
    """The first word of what a reader finds in each file."""
    return {atomic_files.find(folder, name).read_text().split()[0] for name in NAMES}


def test_the_files_of_others_stay(tmp_path):
    folder = tmp_path / "a" / "b"
    write(folder, "old")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "extra" / "mine").write_text("mine")
    write(folder, "new")
    assert texts(folder) == {"new"} and not atomic_files.is_interrupted(folder)
    assert (folder / ".git" / "HEAD").read_text() == "ref" and (folder / "extra" / "mine").exists()
    assert sorted(os.listdir(folder)) == [
        ".git", "config.json", "extra", "fastgate.json", "model.safetensors"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_all_old_or_all_new(tmp_path):
    outcomes = []
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        write(folder, "old")
        died = killed(folder, moment)
        seen = texts(folder)
        assert seen in ({"old"}, {"new"}), moment
        outcomes.append((seen.pop(), atomic_files.is_interrupted(folder)))
        plain = [(folder / name).read_text().split()[0] for name in NAMES]
        assert len(set(plain)) == 1 or plain[0] == "notice", "transformers would read a mix"
        atomic_files.finish(folder)
        assert {(folder / name).read_text().split()[0] for name in NAMES} == {outcomes[-1][0]}
        write(folder, "third")
        assert texts(folder) == {"third"}
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        if not died:
            break
    assert {("old", False), ("new", True), ("new", False)} == set(outcomes) and len(outcomes) > 25


def test_an_error_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(OSError, match="disk full"),
        atomic_files.replace_files(tmp_path / "a" / "b", "notice") as staging,
    ):
        (staging / "config.json").write_text("half")
        raise OSError("disk full")
    assert not (tmp_path / "a").exists()
    write(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt), atomic_files.replace_files(tmp_path / "x", "notice") as staging:
        (staging / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert texts(tmp_path / "x") == {"old"}
    assert not [name for name in os.listdir(tmp_path / "x") if name.startswith(".")]


def test_an_interrupted_commit_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    write(tmp_path / "x", "old")
    monkeypatch.setattr(atomic_files, "finish", lambda folder: None)
    write(tmp_path / "x", "new")
    assert atomic_files.is_interrupted(tmp_path / "x") and texts(tmp_path / "x") == {"new"}
