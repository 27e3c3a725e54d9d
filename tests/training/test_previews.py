"""Previews: diffusers' numbers, the training untouched, trouble told, the same pictures on any number of processes."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everydream.models.family import Family, load, read_facts
from everydream.runtime import Ranks
from everydream.training import grids, sampling
from everydream.training.console import Console
from everydream.training.log import RunLog
from everydream.training.previews import NoPreviews, Previews, guidance_columns, untouched_randomness
from everydream.training.prompts import SCHEDULERS, Picture, Sampling, pictures
from everydream.training.records import grid_files
from everydream.training.sampling import Parts, batches, sample
from tests.models.pipeline import pipeline_of
from tests.training.processes import on_processes

DEFAULTS = Sampling(seed=3, width=64, height=64, guidance=(4.0,), steps=3, size_step=8)


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> Family:
    return load(read_facts(str(tiny_model)), train=("unet", "text_encoder"))


@pytest.fixture(scope="module")
def pipeline(family: Family) -> Any:
    made = pipeline_of(family)
    made.set_progress_bar_config(disable=True)
    return made


class OneRank(Ranks):
    rank, count, is_main, device = 0, 1, True, torch.device("cpu")

    def __init__(self) -> None:
        """Without an accelerator."""


class Run:
    """Previews of a tiny model in a folder, and what was told."""

    def __init__(self, folder: Path, family: Family, prompts: str = "red star\nthe red\n", **options: Any) -> None:
        self.folder, self.stream = folder, io.StringIO()
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text(prompts, encoding="utf-8")
        self.log = RunLog(folder, Console("normal", self.stream))
        options = {"parts": lambda: Parts.of(family), "defaults": DEFAULTS, **options}
        parts = options.pop("parts")
        self.previews = Previews(self.prompts, folder, parts, self.log, OneRank(), **options)  # type: ignore[arg-type]

    def __call__(self, step: int) -> list[Path]:
        return self.previews(step)

    @property
    def told(self) -> str:
        return self.stream.getvalue()


# --- sampling


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy to diffusers' own schedulers
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_makes_the_pictures_of_diffusers_pipeline(
    scheduler: str, family: Family, pipeline: Any
) -> None:
    from diffusers import schedulers

    wanted = [
        Picture("red star", "the", 3, 64, 64, 4.0, 4, scheduler),
        Picture("the red", "", 4, 64, 64, 4.0, 4, scheduler),
    ]
    ours = sample(Parts.of(family), wanted)
    cls, extra = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(schedulers, cls).from_config(
        {k: v for k, v in family.scheduler_config.items() if k[0] != "_"}, **extra
    )
    theirs = pipeline(
        [p.prompt for p in wanted], negative_prompt=[p.negative_prompt for p in wanted], width=64, height=64,
        num_inference_steps=4, guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(p.seed) for p in wanted],
    ).images  # fmt: skip
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1, "more than rounding of a pixel"


def test_without_guidance_there_is_no_negative_prompt(family: Family) -> None:
    (one,) = pictures([replace(DEFAULTS, prompt="red", guidance=(1.0,))])
    parts = Parts.of(family)
    assert sample(parts, [one])[0].tobytes() == sample(parts, [replace(one, negative_prompt="star")])[0].tobytes()


def test_a_picture_does_not_depend_on_the_others_of_its_batch(family: Family) -> None:
    made = pictures([replace(DEFAULTS, prompt="red star", seed=seed) for seed in (1, 2)])
    together, alone = sample(Parts.of(family), made)[1], sample(Parts.of(family), made[1:])[0]
    assert np.abs(np.asarray(together, int) - np.asarray(alone, int)).max() <= 1


def test_dropped_parts_are_read_again_and_not_kept(tiny_model: Path) -> None:
    family = load(read_facts(str(tiny_model)), train=("unet",))
    made = pictures([replace(DEFAULTS, prompt="red star")])
    before = sample(Parts.of(family), made)[0]
    family.drop_vae()
    family.drop_text_encoder()
    assert sample(Parts.of(family), made)[0].tobytes() == before.tobytes()
    assert family.vae is None


def test_long_prompts_use_as_many_chunks_as_the_training(family: Family) -> None:
    long = "star " * 100
    assert Parts.of(family).is_too_long(long)
    parts = Parts.of(family, chunks=2)
    assert not parts.is_too_long(long)
    assert parts.encode([long]).shape[1] == 2 * 77


def test_alike_pictures_share_a_batch() -> None:
    small, wide = replace(DEFAULTS, prompt="a"), replace(DEFAULTS, prompt="b", width=128)
    assert batches(pictures([small, wide, small, small, wide]), 2) == [[0, 2], [3], [1, 4]]


def test_a_sampler_needs_no_diffusers(tiny_model: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from everydream.models.family import load, read_facts\n"
        "from everydream.training.sampling import Parts, sample\n"
        "from everydream.training.prompts import Picture\n"
        f"family = load(read_facts({str(tiny_model)!r}), train=('unet',))\n"
        "sample(Parts.of(family), [Picture('x', '', 1, 64, 64, 4.0, 1, 'ddim')])\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules), 'seconds of import before the first step'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- previews


def test_a_grid_is_written_with_how_each_picture_was_made(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family)
    (path,) = run(20)
    assert path == tmp_path / "samples" / "step-0000000020.png" == grid_files(tmp_path)[20]
    step, cells = grids.cells_of(path)
    assert step == 20
    assert [facts["prompt"] for _, facts in cells] == ["red star", "the red"]
    expected = sample(Parts.of(family), pictures([replace(DEFAULTS, prompt=p) for p in ("red star", "the red")]))
    for (image, _), made in zip(cells, expected, strict=True):
        assert image.tobytes() == grids.enlarged(made).tobytes(), "what is in the file is what the model made"


def test_previews_leave_the_training_as_it_was(tmp_path: Path, family: Family) -> None:
    family.denoiser.train()
    family.denoiser.unet.down_blocks[0].eval()  # type: ignore[union-attr, index]
    modes = [module.training for module in family.denoiser.modules()]
    weights = {name: p.clone() for name, p in family.denoiser.named_parameters()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    run = Run(tmp_path, family, "red star")
    run.prompts = run.previews.prompts_file = tmp_path / "prompts.json"
    run.prompts.write_text('[{"prompt": "red", "scheduler": "euler_a"}, {"prompt": "the", "seed": -1}]')
    assert run(1)
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert [module.training for module in family.denoiser.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in family.denoiser.named_parameters())
    assert all(p.grad is None and not p.is_inference() for p in family.denoiser.parameters())


@pytest.mark.long
def test_previews_compile_nothing(tmp_path: Path, tiny_model: Path) -> None:

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    family = load(read_facts(str(tiny_model)), train=("unet",))
    family.denoiser.unet.compile(dynamic=False, backend=backend)  # type: ignore[union-attr, operator]
    assert Run(tmp_path, family)(0)
    assert not graphs, "other shapes than the training's: minutes of compiling for a few pictures"
    sample(Parts.of(family), pictures([replace(DEFAULTS, prompt="red", steps=1)]))
    assert graphs, "outside of previews it is compiled"


def test_randomness_is_restored_after_a_failure_too() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), untouched_randomness():
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_the_prompts_file_is_read_anew_each_time(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family, "red star")
    run(0)
    run.prompts.write_text("the red\nstar\n")
    (path,) = run(10)
    assert [facts["prompt"] for _, facts in grids.cells_of(path)[1]] == ["the red", "star"]


def test_a_broken_prompts_file_is_told_once_and_training_goes_on(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family, "")
    assert run(0) == run(10) == []
    assert run.told.count("has no prompts") == 1
    assert "read again for the next preview" in run.told
    run.prompts.write_text("red star")
    assert run(20)


def out_of_memory_above(batch: int) -> Callable[..., Any]:
    real = sampling.sample

    def fake(parts: Parts, made: list[Picture], **options: Any) -> list[Image.Image]:
        if len(made) > batch:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
        return real(parts, made, **options)

    return fake


def test_out_of_memory_makes_smaller_batches(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "sample", out_of_memory_above(1))
    run = Run(tmp_path, family)
    (path,) = run(0)
    assert len(grids.cells_of(path)[1]) == 2
    assert run.previews.batch_size == 1, "the next preview does not run into it again"
    assert "warning" not in run.told


def test_no_memory_at_all_is_told_and_training_goes_on(
    tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "sample", out_of_memory_above(0))
    run = Run(tmp_path, family)
    assert run(0) == []
    assert "CUDA out of memory" in run.told
    assert "Ask for smaller pictures" in run.told


def test_one_prompt_that_fails_leaves_the_others(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family)
    run.previews.prompts_file = tmp_path / "prompts.json"
    run.previews.prompts_file.write_text('["red star", {"prompt": "too many", "steps": 2000}]')
    (path,) = run(0)
    assert len(grids.cells_of(path)[1]) == 1
    assert "'too many': ConfigError: sample_prompts: 2000 steps" in run.told


def test_a_long_prompt_is_told(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family, "star " * 100)
    run(0), run(1)
    assert run.told.count("more tokens than the model reads") == 1


def test_a_signal_ends_the_preview_between_two_steps(tmp_path: Path, family: Family) -> None:
    asked: list[int] = []

    def stop() -> int:
        asked.append(1)
        return 15 if len(asked) > 3 else 0

    run = Run(tmp_path, family, stop=stop)
    assert run(0) == []
    assert not grid_files(tmp_path)
    assert len(asked) < 8
    assert "warning" not in run.told


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family)
    (tmp_path / "samples").write_text("in the way")
    assert run(0) == []
    assert "cannot be written" in run.told


def test_before_and_after(tmp_path: Path, family: Family) -> None:
    run = Run(tmp_path, family)
    assert run.previews.before_after() is None, "nothing yet"
    run(0)
    assert run.previews.before_after() is None, "one step is no comparison"
    run.prompts.write_text("the red\nanother\n")
    run(10)
    path = run.previews.before_after()
    assert path == tmp_path / "samples" / "before_after.png"
    run.prompts.write_text("nothing in common")
    run(20)
    assert run.previews.before_after() is None


def test_several_processes_make_what_one_makes(tmp_path: Path, tiny_model: Path) -> None:
    def work(folder: Path) -> Callable[[Any], list[Path]]:
        def run(ranks: Any) -> list[Path]:
            family = load(read_facts(str(tiny_model)), train=("unet",))
            made = Run(folder, family, "red star\nthe red\nstar\nred", batch_size=1)
            made.previews.ranks = ranks
            return made(5)

        return run

    results = {}
    for count in (1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        results[count] = on_processes(count, work(folder))
    assert results[3] == [[tmp_path / "3" / "samples" / "step-0000000005.png"], [], []], "rank 0 writes"
    assert results[1][0][0].read_bytes() == results[3][0][0].read_bytes()


def test_a_process_that_ran_out_of_memory_before_divides_the_work_as_the_others_do(
    tmp_path: Path, family: Family
) -> None:
    def work(ranks: Any) -> list[list[Path]]:
        run = Run(tmp_path / str(ranks.count), family)
        run.previews.ranks, run.previews.batch_size = ranks, 1 if ranks.rank == 1 else 4
        return [run(0), run(5)]

    (tmp_path / "2").mkdir()
    first, second = on_processes(2, work)
    assert [len(paths) for paths in first] == [1, 1]
    assert second == [[], []]


def test_one_process_that_cannot_make_its_parts_leaves_no_other_waiting(tmp_path: Path, family: Family) -> None:
    def work(ranks: Any) -> list[Path]:
        def parts() -> Parts:
            if ranks.rank == 1:
                raise torch.OutOfMemoryError("no room")
            return Parts.of(family)

        run = Run(tmp_path, family, parts=parts)
        run.previews.ranks = ranks
        return run(0)

    first, second = on_processes(2, work)
    assert isinstance(first, RuntimeError)
    assert str(first) == "process 1: OutOfMemoryError('no room')"
    assert isinstance(second, torch.OutOfMemoryError)


def test_previews_off_do_nothing(tmp_path: Path) -> None:
    assert NoPreviews()(0) == []
    assert NoPreviews().before_after() is None


# --- grids


def cell(name: str, size: tuple[int, int] = (64, 64), **facts: Any) -> grids.Cell:
    return grids.Cell(Image.new("RGB", size, "red"), name, "note", {"prompt": name, **facts})


def test_a_grid_keeps_its_pictures_and_can_be_cut_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)) for _ in range(5)]
    image, facts = grids.draw([grids.Cell(i, f"p{n}", "", {"n": n}) for n, i in enumerate(images)], "title")
    path = tmp_path / "grid.png"
    path.write_bytes(grids.png(image, {"step": 3, "cells": facts}))
    step, cells = grids.cells_of(path)
    assert step == 3
    assert [facts["n"] for _, facts in cells] == [0, 1, 2, 3, 4]
    for (cut, _), made in zip(cells, images, strict=True):
        assert cut.tobytes() == made.resize((320, 192), Image.Resampling.NEAREST).tobytes()


def test_large_pictures_are_not_enlarged() -> None:
    assert grids.enlarged(Image.new("RGB", (512, 768))).size == (512, 768)


def test_a_grid_has_a_row_a_prompt_where_guidances_differ() -> None:
    made = pictures([replace(DEFAULTS, prompt=p, guidance=(1.0, 4.0, 7.0)) for p in "ab"])
    assert guidance_columns(made) == 3
    assert guidance_columns(pictures([replace(DEFAULTS, prompt=p) for p in "ab"])) is None


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (5, 3), (9, 4), (24, 6)])
def test_columns(count: int, columns: int) -> None:
    assert grids.columns_for(count) == columns


def test_labels_fit_their_picture() -> None:
    long = "a very long prompt with many words in it, and then some more of them " * 3
    lines = grids.wrapped(long, 192, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert all(grids.font(line, grids.TEXT).getlength(line) <= 192 for line in lines)
    assert grids.wrapped("", 192, 2) == []
    assert grids.wrapped("short", 192, 2) == ["short"]
    assert len(grids.wrapped("x" * 500, 192, 2)) == 1


def test_a_picture_that_is_no_grid_has_no_cells(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert grids.cells_of(tmp_path / "x.png") == (0, [])


def test_before_after_pairs_pictures_made_alike(tmp_path: Path) -> None:
    for step, names in ((0, "abc"), (7, "cbx")):
        image, facts = grids.draw([cell(name) for name in names], "")
        (tmp_path / f"{step}.png").write_bytes(grids.png(image, {"step": step, "cells": facts}))
    image = grids.before_after(tmp_path / "0.png", tmp_path / "7.png")
    assert image is not None
    red = np.all(np.asarray(image) == (255, 0, 0), axis=-1)
    assert red.sum() == 4 * 192 * 192, "two pairs"
