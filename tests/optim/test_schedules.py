"""Pure functions of the step: bounded, warm-up rises, decay falls and never rises again after its end."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everydream.optim import table
from everydream.optim.schedules import CYCLES, SCHEDULES, base_lrs, lr_factor, set_lr
from tests.optim.problem import Net, optimizer_of

names = pytest.mark.parametrize("name", SCHEDULES)
decaying = pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
steps = st.integers(0, 3000)


def test_settings_know_exactly_these_schedules() -> None:
    assert tuple(SCHEDULES) == table.SCHEDULES


@names
@given(step=steps, warmup=st.integers(0, 500), decay=st.integers(1, 2000))
def test_factor_is_between_0_and_1(name: str, step: int, warmup: int, decay: int) -> None:
    assert 0.0 <= lr_factor(step, name, warmup, decay) <= 1.0


@names
@given(warmup=st.integers(1, 500), decay=st.integers(501, 2000))
def test_warm_up_rises_evenly_from_above_zero_to_full(name: str, warmup: int, decay: int) -> None:
    factors = [lr_factor(step, name, warmup, decay) for step in range(warmup + 1)]
    assert factors[0] == 1 / (warmup + 1)
    assert factors[warmup] == 1.0
    assert all(math.isclose(b - a, factors[0], rel_tol=1e-9) for a, b in itertools.pairwise(factors))


@decaying
@given(warmup=st.integers(0, 500), decay=st.integers(1, 2000), after=steps)
def test_decay_ends_at_its_end_and_never_rises_again(name: str, warmup: int, decay: int, after: int) -> None:
    assert lr_factor(decay + after, name, warmup, decay) == 0.0
    assert decay <= warmup or lr_factor(decay - 1, name, warmup, decay) > 0.0  # the last update of the decay counts


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial"])
@given(warmup=st.integers(0, 100), decay=st.integers(101, 1000))
def test_after_warm_up_it_only_falls(name: str, warmup: int, decay: int) -> None:
    factors = [lr_factor(step, name, warmup, decay) for step in range(warmup, decay + 3)]
    assert all(b <= a for a, b in itertools.pairwise(factors))


@given(warmup=st.integers(0, 50), cycle=st.integers(5, 100))
def test_restarts_rise_only_at_a_restart(warmup: int, cycle: int) -> None:
    decay = warmup + CYCLES * cycle
    factors = [lr_factor(step, "cosine_with_restarts", warmup, decay) for step in range(warmup, decay + 3)]
    rises = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(factors)) if b > a]
    assert rises == [cycle * k for k in range(1, CYCLES)]
    assert all(math.isclose(factors[i], 1.0) for i in (0, *rises))


def test_constant_needs_no_end_and_the_others_do() -> None:
    assert lr_factor(10**9, "constant") == 1.0
    with pytest.raises(AssertionError, match="decay_steps"):
        lr_factor(0, "cosine")


def test_known_values() -> None:
    half = {"constant": 1.0, "linear": 0.5, "cosine": 0.5, "polynomial": 0.25}
    for name, value in half.items():
        assert math.isclose(lr_factor(60, name, 20, 100), value)
    assert math.isclose(lr_factor(30, "cosine", 20, 100), 0.5 * (1 + math.cos(math.pi / 8)))


def test_each_group_keeps_its_own_base_and_setting_twice_is_setting_once() -> None:
    optimizer = optimizer_of(Net(), "muon", lr=0.5)  # two groups
    base = base_lrs(optimizer)
    for _ in range(2):
        assert set_lr(optimizer, base, 0.5) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    set_lr(optimizer, base, 1.0)
    assert base_lrs(optimizer) == base
