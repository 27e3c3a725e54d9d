"""Laws of the plan: counts, no duplicates, one size a micro-batch, the same whoever asks."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream.data.captions import parse_value
from everydream.data.plan import Draw, Plan, updates_in
from everydream.data.problems import Unfit
from everydream.errors import DataError
from everydream.training.feed import Stream

SIZES = [(64, 64), (128, 64), (64, 128), (192, 64)]
MULTIPLIES = [0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0, 1.0, 1.0, 1.5, 2.0, 3.7]


def make(counts: list[int], batch_size: int, seed: int = 7, multiplies: dict[str, float] | None = None, **more) -> Plan:
    buckets = {size: [f"subject/{size}-{at}.png" for at in range(n)] for size, n in zip(SIZES, counts, strict=False)}
    return Plan(buckets, batch_size, seed, multiplies=multiplies, **more)


def stream(plan: Plan, epochs: int) -> list[tuple[Draw, ...]]:
    return [plan.micro_batch(index) for index in range(plan.start[0], plan.micro_batches(epochs))]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
    chosen = draw(st.lists(st.sampled_from(MULTIPLIES), min_size=sum(counts), max_size=sum(counts)).filter(any))
    names = [f"subject/{size}-{at}.png" for size, n in zip(SIZES, counts, strict=False) for at in range(n)]
    start = draw(st.sampled_from([(0, 0), (0, 0), (17, 3)]))
    return make(
        counts, draw(st.integers(1, 6)), draw(st.integers(0, 99)), dict(zip(names, chosen, strict=True)), start=start
    )


@settings(max_examples=60, deadline=None)
@given(plan=plans(), epochs=st.integers(1, 6))
def test_every_draw_comes_exactly_once(plan: Plan, epochs: int) -> None:
    epochs += plan.start[1]
    batches = stream(plan, epochs)
    draws = [draw for batch in batches for draw in batch]
    assert len(set(draws)) == len(draws)
    asked = sum(plan.draws_in(epoch) for epoch in range(plan.start[1], epochs))
    assert len(draws) + sum(plan.waiting(epochs).values()) == asked
    assert all(count < plan.batch_size for count in plan.waiting(epochs).values())
    size_of = {identity: size for size, identities in plan.buckets.items() for identity in identities}
    for index, batch in enumerate(batches, plan.start[0]):
        assert len(batch) == plan.batch_size
        assert len({size_of[draw.sample] for draw in batch}) == 1
        assert max(draw.epoch for draw in batch) == plan.epoch_of(index) < epochs
        assert min(draw.epoch for draw in batch) >= plan.start[1]


@settings(max_examples=30, deadline=None)
@given(plan=plans(), batch_size=st.integers(1, 6))
def test_multiply_gives_floor_or_ceiling_each_epoch_and_the_exact_mean(plan: Plan, batch_size: int) -> None:
    rates = {}
    one = Plan(plan.buckets, 1, plan.seed, multiplies=_multiplies(plan))  # of batch size 1 nothing waits
    epochs = 20
    counts = Counter((draw.sample, draw.epoch) for (draw,) in stream(one, epochs))
    repeats = {}
    for (draw,) in stream(one, epochs):
        repeats.setdefault((draw.sample, draw.epoch), set()).add(draw.repeat)
    assert all(drawn == set(range(counts[key])) for key, drawn in repeats.items())
    for identity, multiply in _multiplies(plan).items():
        share = Fraction(multiply).limit_denominator(1000)
        per_epoch = [counts[identity, epoch] for epoch in range(epochs)]
        assert set(per_epoch) <= {int(share), -int(-share // 1)}
        rates[identity] = sum(per_epoch)
        assert abs(sum(per_epoch) - epochs * share) < 1


@settings(max_examples=60, deadline=None)
@given(multiply=st.floats(0, 10_000), epochs=st.integers(1, 3000))
def test_every_multiply_that_is_let_pass_keeps_its_sense(multiply: float, epochs: int) -> None:
    """Positive stays positive, and E epochs draw floor or ceiling of E times as many."""
    try:
        multiply = parse_value("multiply", multiply)
    except Unfit:
        assert 0 < multiply < 0.001
        return
    if not multiply:
        return
    (identity,) = identities = (f"subject/{SIZES[0]}-0.png",)
    plan = make([1], 1, multiplies=dict.fromkeys(identities, multiply))
    assert plan.drawn == {SIZES[0]: (identity,)}
    (share,) = (Fraction(int(rate.p[0]), int(rate.q[0])) for rate in plan._rates.values())
    assert share > 0 and abs(share - Fraction(multiply)) <= Fraction(multiply) / 2
    drawn = plan.micro_batches(epochs)
    assert drawn in (int(epochs * share), -int(-epochs * share // 1))


def _multiplies(plan: Plan) -> dict[str, float]:
    """Back from the plan's rates."""
    never = {identity: 0.0 for identities in plan.buckets.values() for identity in identities}
    return never | {
        identity: float(Fraction(int(p), int(q)))
        for size, rate in plan._rates.items()
        for identity, p, q in zip(plan.buckets[size], rate.p, rate.q, strict=True)
    }


@settings(max_examples=30, deadline=None)
@given(plan=plans(), grad_accum=st.integers(1, 4), processes=st.integers(1, 4), epochs=st.integers(1, 4))
def test_processes_share_one_stream(plan: Plan, grad_accum: int, processes: int, epochs: int) -> None:
    epochs += plan.start[1]
    updates = updates_in(plan, epochs, grad_accum, processes)
    taken = [
        index
        for update in range(updates)
        for process in range(processes)
        for index in Stream(("subject",), grad_accum, process, processes).indices(update)
    ]
    assert taken == list(range(updates * grad_accum * processes))
    assert plan.micro_batches(epochs) - len(taken) < grad_accum * processes


@settings(max_examples=40, deadline=None)
@given(plan=plans(), data=st.data())
def test_any_place_can_be_asked_first(plan: Plan, data: st.DataObject) -> None:
    total = plan.micro_batches(plan.start[1] + 4)
    if total == plan.start[0]:
        return
    expected = [plan.micro_batch(index) for index in range(plan.start[0], total)]
    index = data.draw(st.integers(plan.start[0], total - 1))
    for fresh in (pickle.loads(pickle.dumps(plan)), make_again(plan)):
        assert fresh.micro_batch(index) == expected[index - plan.start[0]]


def make_again(plan: Plan) -> Plan:
    backwards = {size: identities[::-1] for size, identities in reversed(plan.buckets.items())}
    return Plan(backwards, plan.batch_size, plan.seed, multiplies=_multiplies(plan), start=plan.start)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("grad_accum, processes", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_five_epochs_take_each_picture_five_times_less_the_rests(batch_size, grad_accum, processes) -> None:
    plan = make([7, 5, 1], batch_size)
    updates = updates_in(plan, 5, grad_accum, processes)
    shares = [Stream(("subject",), grad_accum, rank, processes) for rank in range(processes)]
    indices = [index for update in range(updates) for share in shares for index in share.indices(update)]
    draws = [draw for index in indices for draw in plan.micro_batch(index)]
    assert len(set(draws)) == len(draws)  # none twice in one epoch
    assert set(Counter(draw.sample for draw in draws).values()) <= {3, 4, 5}
    rest = (plan.micro_batches(5) - len(indices)) * batch_size + sum(plan.waiting(5).values())
    assert len(draws) == 5 * 13 - rest


def test_epochs_and_seeds_differ_and_names_too() -> None:
    orders = {
        tuple(draw.sample for batch in batches for draw in batch)
        for plan in (make([9, 8], 1, 1), make([9, 8], 1, 2), make([9, 8], 1, 1, name="class"))
        for batches in (stream(plan, 1), stream(plan, 2)[17:])
    }
    assert len(orders) == 6


def test_buckets_are_mixed_within_an_epoch() -> None:
    plan = make([40, 40], 4)
    sizes = ["64, 64" in plan.micro_batch(index)[0].sample for index in range(20)]
    assert 0 < sum(sizes[:10]) < 10


def test_fractions_are_stratified_and_have_no_place_they_prefer() -> None:
    names = [f"subject/{(64, 64)}-{at}.png" for at in range(10)]
    first = np.zeros(10)
    for seed in range(400):
        plan = make([10], 1, seed, dict.fromkeys(names, 0.3))
        assert [plan.draws_in(epoch) for epoch in range(10)] == [3] * 10  # never 2 or 4
        for (draw,) in stream(plan, 1):
            first[names.index(draw.sample)] += 1
    assert np.abs(first / 400 - 0.3).max() < 4 * (0.3 * 0.7 / 400) ** 0.5  # four standard deviations


def test_a_bucket_smaller_than_a_batch_waits_over_epochs() -> None:
    plan = make([2], 5)
    assert plan.micro_batches(2) == 0 and plan.micro_batches(3) == 1
    batch = plan.micro_batch(0)
    assert Counter(draw.epoch for draw in batch) == {0: 2, 1: 2, 2: 1}
    assert plan.waiting(3) == {(64, 64): 1}


def test_a_new_start_begins_with_empty_queues_at_its_place() -> None:
    plan = make([5], 2, start=(11, 4))
    assert plan.micro_batches(4) == plan.micro_batches(0) == 11
    assert {draw.epoch for draw in plan.micro_batch(11)} == {4}
    assert plan.micro_batches(6) == 11 + 5
    with pytest.raises(AssertionError, match="before the plan's start"):
        plan.micro_batch(10)


def test_a_signature_tells_the_plans_that_give_other_batches() -> None:
    usual = make([4, 3], 2)
    others = [
        make([4, 3], 1), make([4, 3], 2, 8), make([4, 4], 2), make([3, 4], 2), make([4, 3], 2, name="class"),
        *(make([4, 3], 2, multiplies={"subject/(64, 64)-0.png": rate}) for rate in (0.5, 0.0)),
    ]  # fmt: skip
    assert len({plan.signature for plan in (usual, *others)}) == 1 + len(others)
    assert {stream(plan, 3) == stream(usual, 3) for plan in others} == {False}
    assert usual.signature == make([4, 3], 2, start=(11, 4)).signature == pickle.loads(pickle.dumps(usual)).signature


@pytest.mark.parametrize("multiplies", [None, {"subject/(64, 64)-0.png": 0.0}])
def test_nothing_to_draw_is_an_error(multiplies) -> None:
    with pytest.raises(DataError, match="multiply is 0"):
        make([0 if multiplies is None else 1], 1, multiplies=multiplies)
