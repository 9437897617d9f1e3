"""Work of many small decompositions: one BLAS thread each, and several of them side by side."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

from threadpoolctl import threadpool_limits

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function on one BLAS thread.

    For thousands of decompositions of some hundred rows: threads gain nothing there, and on a machine with other work
    they wait for one another in spin loops (seen: 200 s in place of 6 s).
    """

    @wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        with threadpool_limits(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


def side_by_side(work: Callable[[T], R], items: Iterable[T], most: int | None = None) -> Iterator[R]:
    """`work` of every item, in their order, in as many threads as the machine has cores (`most` at most).

    For work that lets go of the interpreter (decompositions, solvers), under `one_thread`. Items are taken as there is room for them, so that
    a generator's are not all in memory at once; an error comes where its item stands, and nothing new is begun after it.
    """
    threads = max(1, min(os.cpu_count() or 1, most or os.cpu_count() or 1))
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
