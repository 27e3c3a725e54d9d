from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everydream.data import scan
from everydream.draws import generator
from everydream.errors import DataError
from everydream.training.validation import FixedPlan, NoValidation, Validation, choose, refuse_shared, split, still
from tests.training.processes import on_processes


@dataclass(frozen=True)
class Sample:
    identity: str
    content: str


def samples(n: int, copies: int = 1) -> list[Sample]:
    return [Sample(f"subject/{i:03d}-{c}.png", f"digest {i}") for i in range(n) for c in range(copies)]


@pytest.mark.parametrize(("n", "share", "held_out"), [(10, 0.15, 2), (10, 0.01, 1), (100, 0.15, 15), (2, 0.5, 1)])
def test_the_share_held_out_is_the_one_asked_for(n: int, share: float, held_out: int) -> None:
    trained, out = split(samples(n), share, 0)
    assert len(out) == held_out
    assert sorted([*trained, *out], key=lambda s: s.identity) == samples(n)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_never_stands_on_both_sides_under_two_names(seed: int) -> None:
    pictures = samples(20, copies=3)
    trained, out = split(pictures, 0.3, seed)
    assert not {s.content for s in trained} & {s.content for s in out}
    assert len({s.content for s in out}) == 6 and len(out) == 18


def test_the_split_is_a_function_of_seed_and_content_alone() -> None:
    pictures = samples(40)
    chosen = {s.content for s in split(pictures, 0.25, 1)[1]}
    renamed = [replace(s, identity=f"other/{len(pictures) - i}.png") for i, s in enumerate(pictures)][::-1]
    assert {s.content for s in split(renamed, 0.25, 1)[1]} == chosen
    assert {s.content for s in split(pictures, 0.25, 2)[1]} != chosen


def test_a_larger_share_holds_the_smaller_one_and_a_new_picture_moves_at_most_one() -> None:
    def held(n: int, share: float) -> set[str]:
        return {s.content for s in split(samples(n), share, 3)[1]}

    assert held(40, 0.1) < held(40, 0.3)
    assert len(held(40, 0.25) - held(41, 0.25)) <= 1


def test_every_picture_is_as_likely_to_be_held_out() -> None:
    counts = {s.content: 0 for s in samples(10)}
    for seed in range(500):
        for sample in split(samples(10), 0.3, seed)[1]:
            counts[sample.content] += 1
    assert sum((count - 150) ** 2 for count in counts.values()) / 105 < 27.9  # χ², 9 degrees: once in a thousand


@pytest.mark.parametrize(("n", "share", "side"), [(0, 0.5, "train on"), (1, 0.5, "train on"), (3, 0.99, "train on")])
def test_a_split_that_leaves_a_side_empty_is_refused(n: int, share: float, side: str) -> None:
    with pytest.raises(DataError, match=f"leaves none to {side}"):
        split(samples(n), share, 0)


def test_the_fixed_training_pictures_are_not_the_held_out_ones_order() -> None:
    """Otherwise those with the lowest keys left after the split would always be the ones looked at."""
    trained, _ = split(samples(100), 0.5, 0)
    again = choose(trained, 0.5, 0, "hold out")
    assert choose(trained, 0.5, 0, "fixed training loss") != again


def test_held_out_pictures_that_are_trained_on_are_named() -> None:
    refuse_shared(samples(3), [Sample("validation/x.png", "digest 7")])
    with pytest.raises(DataError) as caught:
        refuse_shared(samples(3), [Sample(f"validation/{i}.png", f"digest {i}") for i in (1, 2, 9)])
    assert [text.split(",")[0] for text in caught.value.problems] == [
        "manual_data_root: validation/1.png is the same picture as subject/001-0.png",
        "manual_data_root: validation/2.png is the same picture as subject/002-0.png",
    ]


BUCKETS = {(64, 64): [f"v/{i}" for i in range(5)], (96, 32): ["v/w"]}


def draws(plan: FixedPlan) -> list[tuple[str, int, int]]:
    return [tuple(draw) for i in range(len(plan)) for draw in plan.micro_batch(i)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_picture_is_looked_at_equally_often_whatever_the_batch_size(batch_size: int) -> None:
    plan = FixedPlan(BUCKETS, batch_size)
    names = sorted(name for names in BUCKETS.values() for name in names)
    assert sorted(draws(plan)) == [(name, 0, repeat) for name in names for repeat in range(6)]
    for i in range(len(plan)):
        batch = plan.micro_batch(i)
        assert len(batch) <= batch_size and len({draw.sample == "v/w" for draw in batch}) == 1


def test_a_large_set_is_looked_at_once_and_a_set_of_none_never() -> None:
    assert len(draws(FixedPlan({(64, 64): [str(i) for i in range(33)]}, 4))) == 33
    assert draws(FixedPlan({}, 4)) == []


def test_the_plan_does_not_depend_on_the_order_of_its_pictures() -> None:
    turned = {size: names[::-1] for size, names in reversed(BUCKETS.items())}
    assert draws(FixedPlan(turned, 4)) == draws(FixedPlan(BUCKETS, 4))


def test_a_measured_sample_is_not_augmented_and_weighs_1() -> None:
    facts = {"width": 64, "height": 48, "caption": "a, b", "mask_path": None, "content": "d"}
    sample = scan.Sample("subject/a.png", Path("a.png"), **facts, multiply=3.0, cond_dropout=None, flip_p=0.5,
                         loss_scale=2.0, shuffle_tags=None)  # fmt: skip
    assert still(sample) == scan.Sample("subject/a.png", Path("a.png"), **facts, multiply=1.0, cond_dropout=0.0,
                                        flip_p=0.0, loss_scale=1.0, shuffle_tags=False)  # fmt: skip


class FakeBatch:
    def __init__(self, name: str, i: int, n: int) -> None:
        rng = generator(0, name, i)
        self.x_BC = torch.from_numpy(rng.standard_normal((n, 6), dtype="float32"))

    def to(self, device: Any) -> FakeBatch:
        return self


def batches(name: str, pictures: int, batch_size: int = 3) -> list[Any]:
    return [
        FakeBatch(name, i, min(batch_size, pictures - start)) for i, start in enumerate(range(0, pictures, batch_size))
    ]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).eval()


SETS = {"loss_val": batches("val", 8), "loss_train_fixed": batches("train", 4), "loss_val_empty": []}


def validation(ranks: Any, net: nn.Module, stop: Any = lambda: 0) -> Validation:
    return Validation(SETS, lambda batch: net(batch.x_BC).square().flatten(), ranks, stop)


def test_a_sets_loss_is_the_mean_over_its_pictures() -> None:
    net = model()
    (values,) = on_processes(1, lambda ranks: validation(ranks, net)(0))
    for name, some in SETS.items():
        if some:
            x = torch.cat([batch.x_BC for batch in some])
            assert values[name] == pytest.approx(net(x).square().mean().item(), rel=1e-6)
    assert set(values) == {"loss_val", "loss_train_fixed"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_processes_get_the_result_of_one_to_the_bit(count: int) -> None:
    net = model()
    (alone,) = on_processes(1, lambda ranks: validation(ranks, net)(0))
    assert on_processes(count, lambda ranks: validation(ranks, net)(0)) == [alone] * count


def test_validation_takes_no_gradient_and_touches_no_generator() -> None:
    net = model()
    before, grad_was_on = torch.get_rng_state(), torch.is_grad_enabled()
    first, second = on_processes(1, lambda ranks: [validation(ranks, net)(step) for step in (0, 7)])[0]
    assert first == second
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled() == grad_was_on
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_signal_ends_validation_between_two_batches_without_a_result(count: int) -> None:
    seen: list[int] = []

    def work(ranks: Any) -> Any:
        signals = iter([0, 15])
        seeing = Validation(SETS, lambda batch: seen.append(1) or torch.ones(1), ranks, lambda: next(signals))
        return seeing(0)

    assert on_processes(count, work) == [{}] * count
    assert len(seen) == count


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_on_one_process_is_raised_on_all(count: int) -> None:
    def loss_of(batch: Any) -> torch.Tensor:
        if batch is SETS["loss_val"][1]:
            raise RuntimeError("out of memory")
        return torch.ones(1)

    results = on_processes(count, lambda ranks: Validation(SETS, loss_of, ranks, lambda: 0)(0))
    assert ["out of memory" in str(result) for result in results] == [True] * count


def test_no_validation_measures_nothing() -> None:
    assert NoValidation()(0) == {}
