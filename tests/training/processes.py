"""Several processes played by threads of one: enough for code that speaks through Ranks alone."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from everydream.runtime import Ranks


class ThreadRanks(Ranks):
    """For one thread of `team`. What is exchanged goes through pickle, as between processes."""

    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.count = team, rank, team.count
        self.is_main, self.device = rank == 0, "cpu"

    def gather(self, item: Any) -> list[Any]:
        self.team.box[self.rank] = pickle.dumps(item)
        self.team.barrier.wait()
        items = [pickle.loads(data) for data in self.team.box]
        self.team.barrier.wait()
        return items

    def broadcast(self, item: Any) -> Any:
        return self.gather(item)[0]


class Team:
    def __init__(self, count: int) -> None:
        self.count = count
        self.box: list[bytes] = [b""] * count
        self.barrier = threading.Barrier(count, timeout=20)  # a process that left the others shows as an error here


def on_processes(count: int, work: Callable[[Any], Any]) -> list[Any]:
    """`work(ranks)` on each; its result, or the exception that it ended with, in rank order."""
    team, results = Team(count), [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(team, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if "torch._dynamo" in sys.modules:  # its stance is a process's, and each thread restores what another had set
        torch.compiler.set_stance("default")
    return results
