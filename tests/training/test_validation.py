from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from everydream.data import scan
from everydream.data.buckets import assign, bucket_sizes
from everydream.data.dataset import Augmentation, MicroBatches, Source
from everydream.data.folders import Root
from everydream.data.plan import Draw
from everydream.diffusion.noise import NoiseSampler
from everydream.diffusion.times import TimeSampler
from everydream.draws import generator
from everydream.errors import DataError
from everydream.training.validation import FixedPlan, NoValidation, Validation, choose, refuse_shared, split, still
from tests.tiny import make_pictures
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
    def __init__(self, name: str, draws: Sequence[Draw]) -> None:
        rows = [generator(0, name, d.sample, d.repeat).standard_normal(6, dtype="float32") for d in draws]
        self.x_BC = torch.from_numpy(np.stack(rows))

    def to(self, device: Any) -> FakeBatch:
        return self


class FakeDataset:
    def __getitem__(self, item: tuple[str, Sequence[Draw]]) -> FakeBatch:
        return FakeBatch(*item)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).eval()


PLANS = {
    "loss_val": FixedPlan(BUCKETS, 4),
    "loss_train_fixed": FixedPlan({(64, 64): [str(i) for i in range(40)]}, 7),
    "loss_val_empty": FixedPlan({}, 4),
}


def validation(ranks: Any, net: nn.Module, stop: Any = lambda: 0) -> Validation:
    return Validation(FakeDataset(), PLANS, lambda batch: net(batch.x_BC).square().flatten(), ranks, stop)


def test_a_sets_loss_is_the_mean_over_its_pictures() -> None:
    net = model()
    (values,) = on_processes(1, lambda ranks: validation(ranks, net)(0))
    for name in ("loss_val", "loss_train_fixed"):
        x = FakeBatch(name, [Draw(*draw) for draw in draws(PLANS[name])]).x_BC
        assert values[name] == pytest.approx(net(x).square().mean().item(), rel=1e-6)
    assert set(values) == {"loss_val", "loss_train_fixed"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_processes_get_the_result_of_one_to_the_bit(count: int) -> None:
    net = model()
    (alone,) = on_processes(1, lambda ranks: validation(ranks, net)(0))
    assert on_processes(count, lambda ranks: validation(ranks, net)(0)) == [alone] * count


def test_validation_takes_no_gradient_and_touches_no_generator() -> None:
    net = model()
    before, had_graph = torch.get_rng_state(), []
    net.register_forward_hook(lambda module, inputs, output: had_graph.append(output.requires_grad))
    first, second = on_processes(1, lambda ranks: [validation(ranks, net)(step) for step in (0, 7)])[0]
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert had_graph and not any(had_graph)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_signal_ends_validation_between_two_batches_without_a_result(count: int) -> None:
    seen: list[int] = []

    def work(ranks: Any) -> Any:
        signals = iter([0, 15])
        return Validation(
            FakeDataset(), PLANS, lambda batch: seen.append(1) or torch.ones(1), ranks, lambda: next(signals)
        )(0)

    assert on_processes(count, work) == [{}] * count
    assert len(seen) == count


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_on_one_process_is_raised_on_all(count: int) -> None:
    broken = FakeBatch("loss_val", PLANS["loss_val"].micro_batch(1)).x_BC

    def loss_of(batch: Any) -> torch.Tensor:
        if torch.equal(batch.x_BC, broken):
            raise RuntimeError("out of memory")
        return torch.ones(1)

    results = on_processes(count, lambda ranks: Validation(FakeDataset(), PLANS, loss_of, ranks, lambda: 0)(0))
    assert ["out of memory" in str(result) for result in results] == [True] * count


def real(folder: Path, seed: int = 1) -> tuple[MicroBatches, dict[str, list[str]]]:
    """The data layer on seven small pictures of two shapes; every augmentation asked for beside the pictures."""
    make_pictures(folder, 7, size=[(64, 64), (96, 32)], captions="red, star, {i}")
    for name, value in (("flip_p", "0.5"), ("cond_dropout", "0.5"), ("loss_scale", "3"), ("multiply", "2")):
        (folder / f"{name}.txt").write_text(value)
    samples = scan.scan([Root("validation", folder)]).usable()
    assert all(sample.loss_scale == 3 and sample.flip_p == 0.5 for sample in samples)
    buckets = assign([(s.identity, s.width, s.height) for s in samples], bucket_sizes(64, 8))
    dataset = MicroBatches(
        {"loss_val": Source.of(map(still, samples), buckets, Augmentation())},
        seed,
        times=TimeSampler(0, 1000, 1000),
        noise=NoiseSampler(),
        tokenize=lambda captions, chunks: np.zeros((len(captions), chunks, 77), dtype=np.int64),
    )
    return dataset, buckets


def test_noise_and_timesteps_of_real_pictures_are_the_same_each_time_and_nothing_is_augmented(tmp_path: Path) -> None:
    dataset, buckets = real(tmp_path)

    def looks(batch_size: int, dataset: MicroBatches = dataset) -> dict[Any, Any]:
        plan, seen = FixedPlan(buckets, batch_size), {}
        for draws_B in map(plan.micro_batch, range(len(plan))):
            batch = dataset["loss_val", draws_B]
            assert not any(batch.flips) and all(batch.captions) and (batch.weights_B == 1).all()
            for i, draw in enumerate(draws_B):
                seen[draw] = (int(batch.t_B[i]), batch.noise_BCHW[i].numpy().tobytes(), batch.crops[i])
        return seen

    first = looks(4)
    assert first == looks(4) == looks(1)
    assert len(first) == 7 * 5 and len(set(first.values())) == len(first)
    assert not set(first.values()) & set(looks(4, real(tmp_path, seed=2)[0]).values())


def test_no_validation_measures_nothing() -> None:
    assert NoValidation()(0) == {}
