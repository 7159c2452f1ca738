"""Times that hold on a busy machine: the least of several, to be compared with another of the same test."""

import time
from collections.abc import Callable
from typing import Any


def least_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Processor time of ``work``, the least of ``repeats``."""

    def once() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return min(once() for _ in range(repeats))
