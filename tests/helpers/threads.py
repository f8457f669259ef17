"""Threads that begin together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def run_in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """work(i) in `count` threads that begin together; what they returned. The first error is raised here."""
    found: list[Any] = [None] * count
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            together.wait()
            found[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
