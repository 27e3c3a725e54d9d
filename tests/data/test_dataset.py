"""Batches: every picture once an epoch, the same draws for any number of workers, errors with the picture's name."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from everydream.data.batch import Batch
from everydream.data.dataset import Augmentation, MicroBatches, Source
from everydream.data.loader import Loader
from everydream.data.plan import Draw
from everydream.errors import DataError
from tests.data.pictures import encoded, png, smooth, write
from tests.data.sets import dataset_of, draws_of, make_set, noise, perturbation, source_of, times, tokenize

ROOT = Path(__file__).resolve().parents[2]
ALL = Augmentation(cond_dropout=0.3, flip_p=0.5, crop_jitter=0.2, shuffle_tags=True, keep_tags=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set"))


def items(source: Source, epochs: int) -> list[tuple[str, int]]:
    assert source.plan is not None
    return [("subject", index) for index in range(source.plan.micro_batches(epochs))]


@pytest.mark.parametrize("batch_size, workers", [(1, 1), (3, 0), (3, 4), (4, 1)])
def test_ids_over_five_epochs(folder: Path, batch_size: int, workers: int) -> None:
    source = source_of(folder, batch_size)
    with Loader(dataset_of(source), items(source, 5), num_workers=workers) as batches:
        drawn = Counter(
            (identity, epoch)
            for batch in batches
            for identity, epoch in zip(batch.identities, batch.epochs, strict=True)
        )
    assert set(drawn.values()) == {1}
    missing = Counter(dict.fromkeys(source.samples, 5))
    missing.subtract(identity for identity, _ in drawn)
    assert sum(missing.values()) == sum(source.plan.waiting(5).values()) == 65 - len(drawn)
    assert {epoch for (_, epoch) in drawn} == set(range(5))


class Broken:
    latents = None

    def __getitem__(self, item: tuple[str, int]) -> Batch:
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "no constructor takes a message alone")


def test_an_error_of_ours_in_a_worker_is_told_and_leaves_no_worker() -> None:
    """A worker that lives on would keep the program, and its card, for ever."""
    loader = Loader(Broken(), [("subject", 0)], num_workers=2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"in a data worker(?s:.)*no constructor takes") as caught:
        next(loader)
    assert caught.traceback and not multiprocessing.active_children()


def test_the_draws_are_the_same_for_any_number_of_workers_and_from_any_place(folder: Path) -> None:
    source = source_of(folder, 3, ALL)
    dataset, wanted = dataset_of(source), items(source, 4)
    expected = draws_of(Loader(dataset, wanted))
    for workers in (1, 4):
        with Loader(dataset, wanted, num_workers=workers) as batches:
            assert draws_of(batches) == expected
    assert draws_of(Loader(dataset_of(source), wanted[7:])) == expected[21:]  # as after a resume
    shared = [wanted[rank::2] for rank in range(2)]  # as two processes would
    assert sorted(row for part in shared for row in draws_of(Loader(dataset, part))) == sorted(expected)


def test_spawned_workers_draw_the_same(folder: Path) -> None:
    source = source_of(folder, 3, ALL)
    dataset, wanted = dataset_of(source), items(source, 1)
    with Loader(dataset, wanted, num_workers=1, context="spawn") as batches:
        assert draws_of(batches) == draws_of(Loader(dataset, wanted))


SWITCHES = {  # one augmentation: what alone may change with it
    "cond_dropout": (Augmentation(cond_dropout=0.5), {"captions", "tokens_BKL"}),
    "flip_p": (Augmentation(flip_p=0.5), {"flips", "pixels_BCHW"}),
    "crop_jitter": (Augmentation(crop_jitter=0.3), {"crops", "pixels_BCHW"}),
    "shuffle_tags": (Augmentation(shuffle_tags=True), {"captions", "tokens_BKL"}),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_one_augmentation_changes_no_other_draw(folder: Path, name: str) -> None:
    augmentation, may_change = SWITCHES[name]
    plain, changed = source_of(folder), source_of(folder, 3, augmentation)
    differing = set()
    for item in items(plain, 4):
        one, other = dataset_of(plain)[item], dataset_of(changed)[item]
        for field in Batch.__dataclass_fields__:
            a, b = getattr(one, field), getattr(other, field)
            if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
                differing.add(field)
    assert differing == may_change


def test_draws_differ_between_epochs_repeats_pictures_and_purposes(folder: Path) -> None:
    dataset = dataset_of(source_of(folder))
    name = next(iter(dataset.sources["subject"].samples))
    size = dataset.sources["subject"].sizes[name]
    alike = [sample for sample, its in dataset.sources["subject"].sizes.items() if its == size]
    draws = tuple(Draw(sample, epoch, repeat) for sample in alike for epoch in range(3) for repeat in range(2))
    batch = dataset["subject", draws]
    values = torch.cat((batch.noise_BCHW, batch.vae_noise_BCHW)).flatten(1)
    assert len({tuple(row.tolist()) for row in values}) == 2 * len(draws)
    assert len(set(batch.t_B.tolist())) > len(draws) // 2


def test_shares_of_flips_and_dropout_are_those_asked_for(folder: Path) -> None:
    dataset = dataset_of(source_of(folder, 3, Augmentation(cond_dropout=0.3, flip_p=0.25)))
    name = next(iter(dataset.sources["subject"].samples))
    drawn = dataset["subject", tuple(Draw(name, epoch, 0) for epoch in range(1500))]
    for count, share in ((sum(drawn.flips), 0.25), (drawn.captions.count(""), 0.3)):
        assert abs(count / 1500 - share) < 4 * (share * (1 - share) / 1500) ** 0.5
    assert dataset["subject", (Draw(name, 0, 0),)].captions[0] == drawn.captions[0]


def test_values_beside_a_picture_win_over_the_run_s(tmp_path: Path) -> None:
    make_set(tmp_path, 4)
    write(tmp_path, "00.txt", "")
    os.remove(tmp_path / "00.txt")
    write(
        tmp_path,
        "00.yaml",
        "{caption: 'a, b, c, d, e', cond_dropout: 0, flip_p: 1, shuffle_tags: false, loss_scale: 3}",
    )
    everything = Augmentation(cond_dropout=1.0, flip_p=0.0, shuffle_tags=True)
    for batch in Loader(dataset_of(source := source_of(tmp_path, 1, everything)), items(source, 3)):
        own = batch.identities == ("subject/00.png",)
        assert batch.captions == (("a, b, c, d, e",) if own else ("",))
        assert batch.flips == (own,) and batch.weights_B.tolist() == [3.0 if own else 1.0]


def test_tags_are_shuffled_for_each_picture_and_epoch(folder: Path) -> None:
    source = source_of(folder, 1, Augmentation(shuffle_tags=True, keep_tags=1))
    orders: dict[str, set[str]] = {}
    first = Counter()
    for batch in Loader(dataset_of(source), items(source, 8)):
        assert batch.captions[0].startswith("sks, ")
        orders.setdefault(batch.identities[0], set()).add(batch.captions[0])
        tags = [tag.strip().split(" ")[0] for tag in batch.captions[0].split(",")]
        if batch.epochs == (0,):
            first[tuple(tags)] += 1
    assert all(len(seen) > 1 for seen in orders.values())
    assert len(first) > 3  # not one permutation for all pictures


def test_pixels_are_the_crop_of_the_picture(tmp_path: Path) -> None:
    pixels = smooth(48, 32)
    from PIL import Image

    write(tmp_path, "a.png", encoded(Image.fromarray(pixels), "PNG"))
    source = source_of(tmp_path, 1, Augmentation(flip_p=0.5))
    seen = set()
    for batch in Loader(dataset_of(source), items(source, 12)):
        (x0, y0, x1, y1), (flip,) = batch.crops[0], batch.flips
        width, height = source.sizes["subject/a.png"]
        cropped = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=(x0, y0, x1, y1))
        expected = np.asarray(cropped)[:, ::-1] if flip else np.asarray(cropped)
        assert np.array_equal(batch.pixels_BCHW[0].numpy().transpose(1, 2, 0), expected)
        seen.add(flip)
    assert seen == {False, True}


def test_masks_have_mean_one_and_follow_the_flip(tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, :8] = 255
    write(tmp_path, "a.png", png(32, 32))
    write(tmp_path, "b.png", png(32, 32))
    write(tmp_path, "a.mask.png", encoded(Image.fromarray(mask), "PNG"))
    source = source_of(tmp_path, 2, Augmentation(flip_p=0.5), masked_loss=True)
    for batch in Loader(dataset_of(source), items(source, 6)):
        for identity, flip, cells in zip(batch.identities, batch.flips, batch.mask_B1HW[:, 0], strict=True):
            row = [4.0, 4.0, *[0.0] * 6] if identity.endswith("a.png") else [1.0] * 8
            assert cells.tolist() == [row[::-1] if flip else row] * 8
    assert next(Loader(dataset_of(source_of(tmp_path)), [("subject", 0)])).mask_B1HW is None


def test_perturbation_and_chunks_have_the_text_s_shape(folder: Path) -> None:
    source = source_of(folder)
    dataset = dataset_of(source, perturbation=perturbation, text_shape=(154, 6), chunks=2)
    batch = dataset["subject", 0]
    assert batch.perturbation_BLD.shape == (3, 154, 6) and batch.tokens_BKL.shape == (3, 2, 77)
    assert torch.equal(batch.noise_BCHW, dataset_of(source)["subject", 0].noise_BCHW)


def test_a_batch_checks_itself(folder: Path) -> None:
    batch = dataset_of(source_of(folder))["subject", 0]
    for wrong in (
        {"pixels_BCHW": None},
        {"tokens_BKL": None},
        {"t_B": torch.zeros(2)},
        {"captions": ("a",)},
        {"vae_noise_BCHW": batch.vae_noise_BCHW[:, :1]},
        {"moments_BMCHW": torch.zeros(3, 2, 4, 1, 1), "pixels_BCHW": None},
    ):
        with pytest.raises(AssertionError):
            replace(batch, **wrong)
    assert batch.to("cpu").identities == batch.identities


@pytest.mark.parametrize("side", [2, 300])  # in the pipe, in shared memory
def test_a_batch_travels_unchanged(folder: Path, side: int) -> None:
    batch = dataset_of(source_of(folder), perturbation=perturbation, text_shape=(77, side))["subject", 0]
    batch = replace(batch, pixels_BCHW=None, moments_BMCHW=torch.zeros(3, 2, *batch.noise_BCHW.shape[1:]))
    batch = replace(batch, text_BLD=torch.randn(3, 77 * side, side), tokens_BKL=None, weights_B=torch.ones(3).double())
    there = pickle.loads(pickle.dumps(batch))
    for name in Batch.__dataclass_fields__:
        one, other = getattr(batch, name), getattr(there, name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other


def test_sources_are_drawn_in_turn(folder: Path) -> None:
    source = source_of(folder)
    both = {"subject": source, "class": replace(source, is_class=True)}
    dataset = MicroBatches(both, 555, times=times, noise=noise, tokenize=tokenize, vae_factor=4)
    batches = list(Loader(dataset, [(name, index) for index in range(3) for name in both]))
    assert [batch.is_class for batch in batches] == [False, True] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_generator_of_optimizers_and_dropout(folder: Path, workers: int) -> None:
    before = torch.get_rng_state()
    with Loader(dataset_of(source_of(folder, 1, ALL)), [("subject", 0)], num_workers=workers) as batches:
        next(batches)
    assert torch.equal(torch.get_rng_state(), before)


# --- workers ---


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_picture(tmp_path: Path, workers: int) -> None:
    source = source_of(make_set(tmp_path), 3)
    (tmp_path / "05.png").unlink()
    with (
        pytest.raises(DataError) as caught,
        Loader(dataset_of(source), items(source, 1), num_workers=workers) as batches,
    ):
        list(batches)
    assert "05.png: cannot be read" in str(caught.value) and "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_killed_worker_is_told_as_such(folder: Path) -> None:
    loader = Loader(dataset_of(source_of(folder, 1)), [("subject", index) for index in range(10**6)], num_workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(DataError, match="worker was ended"):
        for _ in loader:
            pass
    assert multiprocessing.active_children() == []


def test_closing_ends_the_workers_at_once(folder: Path) -> None:
    source = source_of(folder, 1)
    endless = (("subject", index) for index in range(10**9))
    before = set(threading.enumerate())
    loader = Loader(dataset_of(source), endless, num_workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    for thread in set(threading.enumerate()) - before:  # of queues: told to end, not waited for
        thread.join(60)
        assert not thread.is_alive(), thread
    with pytest.raises(StopIteration):
        next(loader)
    gc.collect()


SIGNALS = """
import os, signal, sys, time
from pathlib import Path
from everydream.data.loader import Loader
from tests.data.sets import dataset_of, source_of

if __name__ == "__main__":
    stop = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: stop.append(number))
    loader = Loader(dataset_of(source_of(Path(sys.argv[1]), 1)), [("subject", i) for i in range(10**6)], num_workers=2)
    for number, batch in enumerate(loader):
        if number == 3:
            print("ready", flush=True)
        if len(stop) == 2 and number > 60:  # it goes on after the signals, as for a save
            break
        time.sleep(0.01)
    loader.close()
    print("stopped by", *stop)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
def test_signals_to_the_whole_group_leave_the_workers_to_the_parent(folder: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SIGNALS, folder]
    process = subprocess.Popen(command, text=True, start_new_session=True, cwd=ROOT, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert (out, err, process.returncode) == ("stopped by 2 15\n", "", 0)


def test_workers_of_a_killed_parent_end(folder: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", SIGNALS, folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail("workers live on")
