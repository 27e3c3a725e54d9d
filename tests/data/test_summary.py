"""What the data report says, in numbers that training then has."""

from __future__ import annotations

from pathlib import Path

from everydream.data.loader import Loader
from everydream.data.plan import updates_in
from everydream.data.summary import bucket_lines, long_captions, rest_lines, size_notes
from tests.data.pictures import png, write
from tests.data.sets import dataset_of, make_set, source_of


def test_bucket_counts_are_those_that_training_uses(tmp_path: Path) -> None:
    source = source_of(make_set(tmp_path), 1)
    trained: dict[str, set[str]] = {}
    for batch in Loader(dataset_of(source), [("subject", index) for index in range(source.plan.micro_batches(1))]):
        height, width = batch.pixels_BCHW.shape[2:]
        trained.setdefault(f"{width}×{height}", set()).update(batch.identities)
    assert sorted(bucket_lines(source.plan)) == sorted(
        f"{size}: {len(names)} pictures" for size, names in trained.items()
    )


def test_small_cropped_and_few_pictures_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "small.png", png(20, 20))
    write(tmp_path, "long.png", png(400, 16))
    write(tmp_path, "good.png", png(32, 32))
    source = source_of(tmp_path, 2)
    notes = "\n".join(size_notes(source.samples, source.plan))
    assert "small.png (20×20 for 32×32)" in notes and "good.png" not in notes
    assert "long.png (400×16 for 64×16): 16% of it is used" in notes
    assert "64×16: 1" in notes and "32×32: 2" not in notes


def test_pictures_that_are_never_drawn_do_not_fill_a_batch(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        write(tmp_path, f"{stem}.png", png(32, 32, ord(stem)))
    write(tmp_path, "tall/c.png", png(16, 64))
    write(tmp_path, "tall/multiply.txt", "0")
    write(tmp_path, "a.yaml", "multiply: 0")
    source = source_of(tmp_path, 2)
    assert bucket_lines(source.plan) == [
        "16×64: 0 pictures, 1 never (multiply 0)", "32×32: 1 pictures, 1 never (multiply 0)"
    ]  # fmt: skip
    (note,) = size_notes(source.samples, source.plan)
    assert "fewer pictures than batch_size 2" in note and "32×32: 1" in note and "16×64" not in note


def test_the_rests_are_what_is_not_trained(tmp_path: Path) -> None:
    source = source_of(make_set(tmp_path), 2)
    plan = source.plan
    text = "\n".join(rest_lines(plan, 3, 2, 2))
    waiting = sum(plan.waiting(3).values())
    rest = plan.micro_batches(3) - 4 * updates_in(plan, 3, 2, 2)
    assert f"{waiting} pictures of the last epoch" in text and f"the last {rest} of {plan.micro_batches(3)}" in text
    assert 39 - waiting - 2 * rest == 2 * 4 * updates_in(plan, 3, 2, 2)
    assert rest_lines(source_of(tmp_path, 1).plan, 3, 1, 1) == []


def test_captions_over_the_limit_are_counted_and_listed(tmp_path: Path) -> None:
    for name, words in (("a", 80), ("b", 75), ("c", 76)):
        write(tmp_path, f"{name}.png", png())
        write(tmp_path, f"{name}.txt", "word " * words)
    samples = list(source_of(tmp_path).samples.values())
    (note,) = long_captions(samples, lambda caption: len(caption.split()), 75)
    assert note.startswith("2 captions have more than 75 tokens") and "a.png: 80 tokens" in note and "b.png" not in note
    assert long_captions(samples, lambda caption: len(caption.split()), 150) == []
