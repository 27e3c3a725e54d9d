from __future__ import annotations

from typing import Any

import pytest

from everydream.errors import DataError, Stopped
from everydream.training.divided import divided, on_main
from tests.training.processes import on_processes

COUNTS = [1, 2, 3]


def never() -> int:
    return 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_results_are_in_order_on_every_process_and_each_item_is_done_once(count: int, n: int) -> None:
    done: list[int] = []
    shown: list[int] = []

    def work(ranks: Any) -> list[int]:
        def item(i: int) -> int:
            done.append(i)
            return 10 * i

        return divided(ranks, range(n), item, never, shown.extend if ranks.is_main else lambda results: None)

    assert on_processes(count, work) == [[10 * i for i in range(n)]] * count
    assert sorted(done) == list(range(n))
    assert shown == [10 * i for i in range(n)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("error", [DataError("a.png is broken"), Stopped(15), RuntimeError("out of memory")])
def test_the_error_of_one_process_ends_all(count: int, error: Exception) -> None:
    def work(ranks: Any) -> Any:
        def item(i: int) -> int:
            if i == 4:
                raise error
            return i

        return divided(ranks, range(9), item, never)

    results = on_processes(count, work)
    assert results[4 % count] is error
    assert all(str(error) in str(result) for result in results)
    if not isinstance(error, RuntimeError):
        assert all(type(result) is type(error) for result in results)
        assert {result.exit_code for result in results} == {error.exit_code}  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", COUNTS)
def test_a_signal_to_one_process_stops_all_within_one_item(count: int) -> None:
    done: list[int] = []

    def work(ranks: Any) -> Any:
        signals = iter([0, 0, 15, 15])
        return divided(ranks, range(90), done.append, lambda: next(signals) if ranks.rank == count - 1 else 0)

    results = on_processes(count, work)
    assert [(type(result), result.exit_code) for result in results] == [(Stopped, 143)] * count
    assert 2 * count <= len(done) < 3 * count


@pytest.mark.parametrize("count", COUNTS)
def test_on_main_gives_rank_0s_result_and_error_to_all(count: int) -> None:
    assert on_processes(count, lambda ranks: on_main(ranks, lambda: ranks.rank + 7)) == [7] * count

    def fail() -> None:
        raise DataError("no such folder")

    assert [str(error) for error in on_processes(count, lambda ranks: on_main(ranks, fail))] == [
        "no such folder"
    ] * count
