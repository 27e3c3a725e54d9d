"""Work divided over the processes of a run: the same results, in the same order, as one process would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from everydream.errors import Stopped
from everydream.runtime import Ranks, portable

Item = TypeVar("Item")
Result = TypeVar("Result")


def divided(
    ranks: Ranks,
    items: Sequence[Item],
    work: Callable[[Item], Result],
    stop: Callable[[], int],
    progress: Callable[[Sequence[Result]], None] = lambda results: None,
) -> list[Result]:
    """Process r works on items r, r + count, …; every process gets every result (small and picklable), in order.

    Between two items all processes tell each other how it went, so that none waits for one that has left: a stop signal
    (`stop()`, 0: none) raises Stopped on all of them within one item, and one's error is raised on all.
    `progress(results)`: these came in, from all processes.
    """
    results: list[Result] = []
    for start in range(0, len(items), ranks.count):
        mine = items[start : start + ranks.count][ranks.rank : ranks.rank + 1]
        done: list[Result] = []
        error: Exception | None = None
        signum = stop()
        if not signum:
            try:
                done = [work(item) for item in mine]
            except Exception as caught:
                error = caught
        told = ranks.gather((signum, done, portable(error, ranks.rank)))
        if error is not None:
            raise error
        for signum, _, others in told:
            if others is not None:
                raise others
            if signum:
                raise Stopped(signum)
        new = [result for _, done, _ in told for result in done]
        progress(new)
        results += new
    return results


def on_main(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """What `work` gives on rank 0, on every process; its error too."""
    result: Result | None = None
    error: Exception | None = None
    if ranks.is_main:
        try:
            result = work()
        except Exception as caught:
            error = caught
    told, others = ranks.broadcast((result, portable(error, 0)))
    if error is not None or others is not None:
        raise error or others
    return told
