"""The laws of a run, on a tiny model in this process: 6 steps = 3 + resume + 3, and what must change nothing."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from everydream.models.family import read_facts
from everydream.models.tensors import PartReader
from everydream.models.writing import single_file
from everydream.optim.table import ROWS
from everydream.training import snapshot
from everydream.training.bag import as_content
from everydream.training.storage import write_atomically
from tests.tiny import make_pictures
from tests.training.runs import assert_same_tensors, lines, metrics, only_run, options, start, tensors

if TYPE_CHECKING:
    from everydream.training.turns import Trainer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 7, captions=[f"a thing, number {i}, red" for i in range(7)])
    return folder


def straight_and_broken(model: Path, pictures: Path, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """6 steps in one go; and 6 of which a run of 3 was resumed."""
    straight = options(model, pictures, folder / "straight", max_steps=6, lr_decay_steps=None, **settings)
    assert start(*straight) == 0
    broken = options(model, pictures, folder / "broken", max_steps=6, save_every_n_steps=3, **settings)
    assert start(*broken) == 0
    run = only_run(folder / "broken")
    shutil.rmtree(run / "checkpoints" / "step-0000000006")
    assert start(*broken, "--resume", "latest") == 0
    return only_run(folder / "straight"), run


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
def test_six_steps_are_three_and_resume_and_three(
    optimizer: str, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "optimizer.json"
    file.write_text(f'{{"optimizer": "{optimizer}"}}')
    settings = {"optimizer_config": file, "ema_decay_rate": 0.9, "grad_accum": 2, "flip_p": 0.5, "shuffle_tags": True,
                "clip_grad_norm": 1.0, "write_schedule": True}  # fmt: skip
    straight, broken = straight_and_broken(tiny_model, pictures, tmp_path, **settings)
    name = "checkpoints/step-0000000006"
    assert_same_tensors(tensors(straight / name), tensors(broken / name))
    assert metrics(straight) == metrics(broken)
    assert lines(straight / "schedule.jsonl") == lines(broken / "schedule.jsonl")


def test_the_mission_rows_are_in_the_table() -> None:
    assert {"adamw", "adamw8bit", "lion"} <= set(ROWS)


def test_class_pictures_at_weight_0_change_nothing(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "class", 3, seed=9)
    adamw = tmp_path / "optimizer.json"
    adamw.write_text('{"optimizer": "adamw"}')
    plain = options(tiny_model, pictures, tmp_path / "plain", optimizer_config=adamw, max_steps=3)
    with_class = options(
        tiny_model,
        pictures,
        tmp_path / "with",
        optimizer_config=adamw,
        max_steps=3,
        class_data_root=tmp_path / "class",
        class_prompt="a thing",
        prior_loss_weight=0,
    )
    assert start(*plain) == start(*with_class) == 0
    name = "checkpoints/step-0000000003"
    assert_same_tensors(tensors(only_run(tmp_path / "plain") / name), tensors(only_run(tmp_path / "with") / name))


def test_prior_preservation_trains_as_many_class_as_subject_pictures(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = {"class_data_root": tmp_path / "class", "class_prompt": "a thing", "num_class_images": 3,
                "max_steps": 4, "write_schedule": True, "prior_loss_weight": 0.5}  # fmt: skip
    assert start(*options(tiny_model, pictures, tmp_path, **settings)) == 0
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    run = only_run(tmp_path)
    schedule = lines(run / "schedule.jsonl")
    assert [line.get("class", False) for line in schedule] == [False, True] * 4
    last = metrics(run)[-1]
    assert (last["images_seen"], last["class_images_seen"]) == (8, 8)
    assert {"loss", "loss_prior"} <= last.keys()


def test_validation_and_previews_leave_no_trace(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"steps": 2, "size": [32, 32], "prompts": ["a thing"]}')
    watch = tmp_path / "validation.json"
    watch.write_text(
        '{"val_split_mode": "none", "stabilize_training_loss": true, "every_n_epochs": 0, "every_n_steps": 2}'
    )
    plain = options(tiny_model, pictures, tmp_path / "plain", ema_decay_rate=0.9)
    watched = options(
        tiny_model,
        pictures,
        tmp_path / "watched",
        ema_decay_rate=0.9,
        sample_prompts=prompts,
        sample_steps=2,
        validation_config=watch,
    )
    assert start(*plain) == start(*watched) == 0
    seen = metrics(only_run(tmp_path / "watched"))
    assert [line["step"] for line in seen if "loss_train_fixed" in line] == [0, 2, 4, 6]
    assert [line for line in seen if "loss" in line] == metrics(only_run(tmp_path / "plain"))
    name = "checkpoints/step-0000000006"
    assert_same_tensors(tensors(only_run(tmp_path / "plain") / name), tensors(only_run(tmp_path / "watched") / name))
    assert (only_run(tmp_path / "watched") / "samples" / "before_after.png").is_file()


def test_each_use_of_the_average_is_a_choice(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"steps": 2, "size": [32, 32], "prompts": ["a thing"]}')
    watch = tmp_path / "validation.json"
    watch.write_text('{"val_split_mode": "none", "stabilize_training_loss": true, "every_n_epochs": 1}')

    def made(use: str) -> dict[str, object]:
        settings = {"ema_decay_rate": 0.9, "ema_use": use, "sample_prompts": prompts, "sample_steps": 3, "max_steps": 3,
                    "validation_config": watch, "save_single_file": True, "lr": 1e-2,
                    "cache_dir": tmp_path / "cache"}  # fmt: skip
        assert start(*options(tiny_model, pictures, tmp_path / use, **settings)) == 0
        run = only_run(tmp_path / use)
        (single,) = (run / "exports").glob("*.safetensors")
        return {
            "previews": Image.open(run / "samples" / "step-0000000003.png").tobytes(),
            "validation": [line for line in metrics(run) if "loss_train_fixed" in line][-1]["loss_train_fixed"],
            "exports": b"".join(t.numpy().tobytes() for _, t in sorted(load_file(single).items())),
        }

    none, every = made("[]"), made('["previews", "validation", "exports"]')
    for use in every:
        assert none[use] != every[use], use
        assert made(use) == {**none, use: every[use]}


def test_fused_backward_gives_the_same_weights(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    adamw = tmp_path / "optimizer.json"
    adamw.write_text('{"optimizer": "adamw"}')
    plain = options(tiny_model, pictures, tmp_path / "plain", optimizer_config=adamw, max_steps=3)
    fused = options(tiny_model, pictures, tmp_path / "fused", optimizer_config=adamw, max_steps=3, fused_backward=True)
    assert start(*plain) == start(*fused) == 0
    name = "checkpoints/step-0000000003"
    assert_same_tensors(tensors(only_run(tmp_path / "plain") / name), tensors(only_run(tmp_path / "fused") / name))


@pytest.mark.parametrize("settings", [
    {"optimizer": "adamw"}, {"optimizer": "adamw", "fused_backward": True}, {"optimizer": "schedulefree_adamw"},
    {"optimizer": "adamw", "plugins": "tests.training.test_laws.Eraser"},
], ids=lambda settings: "-".join(map(str, settings.values())))  # fmt: skip
def test_however_slowly_a_save_is_copied_it_holds_the_weights_of_its_step(
    settings: dict[str, Any], tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = snapshot._copy

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)  # many steps
        copy(*arguments)

    monkeypatch.setattr(snapshot, "_copy", slow)
    optimizer = tmp_path / "optimizer.json"
    optimizer.write_text(f'{{"optimizer": "{settings["optimizer"]}"}}')
    others = {key: value for key, value in settings.items() if key != "optimizer"}
    for way in (True, False):
        words = options(tiny_model, pictures, tmp_path / str(way), optimizer_config=optimizer, ema_decay_rate=0.9,
                        max_steps=3, save_every_n_steps=1, background_save=way, **others)  # fmt: skip
        assert start(*words) == 0
    for step in (1, 2):
        name = f"checkpoints/step-{step:010d}"
        assert_same_tensors(tensors(only_run(tmp_path / "True") / name), tensors(only_run(tmp_path / "False") / name))


@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at .grad of inner tensors, and warns itself
def test_only_training_runs_compiled_code(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class pictures, previews and validation have shapes of their own, each of which would take minutes."""
    from torch._dynamo.testing import CompileCounter

    counter, compile_ = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compile_(self, backend=counter, dynamic=False))
    torch.compiler.reset()
    (tmp_path / "prompts.json").write_text('{"steps": 2, "size": [32, 32], "prompts": ["a thing"]}')
    (tmp_path / "validation.json").write_text(
        '{"val_split_mode": "none", "stabilize_training_loss": true, "every_n_epochs": 0, "every_n_steps": 2, '
        '"batch_size": 3}'
    )
    words = options(tiny_model, pictures, tmp_path, compile=True, max_steps=3, class_data_root=tmp_path / "class",
                    class_prompt="a thing", num_class_images=3, sample_prompts=tmp_path / "prompts.json",
                    sample_steps=2, validation_config=tmp_path / "validation.json")  # fmt: skip
    assert start(*words) == 0
    assert len(metrics(only_run(tmp_path))) > 3, "validation's lines too"
    assert counter.frame_count == 1


def test_a_cpu_is_deterministic_whether_asked_or_not(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    plain = options(tiny_model, pictures, tmp_path / "plain", max_steps=2)
    asked = options(tiny_model, pictures, tmp_path / "asked", max_steps=2, deterministic=True)
    assert start(*plain) == start(*asked) == 0
    name = "checkpoints/step-0000000002"
    assert_same_tensors(tensors(only_run(tmp_path / "plain") / name), tensors(only_run(tmp_path / "asked") / name))


class Eraser:
    """A plugin that changes weights as soon as it may."""

    def after_save(self, trainer: Trainer) -> None:
        with torch.no_grad():
            for parameter in trainer.denoiser.parameters():
                parameter.mul_(0.5)


def test_a_drawn_seed_is_kept_by_a_resume(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    words = options(tiny_model, pictures, tmp_path, seed=-1, max_steps=4, save_every_n_steps=2)
    assert start(*words) == 0
    run = only_run(tmp_path)
    first = metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-0000000004")
    assert start(*words, "--resume", "latest") == 0
    assert metrics(run) == first


def test_a_schedule_free_class_is_saved_as_its_row_is(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """By what it can do, not by its name: the weights that it is meant to be used with, not those that it trains."""
    made = {}
    for name in ("schedulefree_adamw", "schedulefree.AdamWScheduleFree"):
        optimizer = tmp_path / "optimizer.json"
        optimizer.write_text(f'{{"optimizer": "{name}", "lr": 1e-2}}')
        assert start(*options(tiny_model, pictures, tmp_path / name, optimizer_config=optimizer, max_steps=3)) == 0
        saved = tensors(only_run(tmp_path / name) / "checkpoints" / "step-0000000003")
        made[name] = {key: value for key, value in saved.items() if key.startswith("model")}
        trained = {key: value for key, value in saved.items() if "training_weights" in key}
        assert trained and not any(torch.equal(value, made[name].get(key, value + 1)) for key, value in trained.items())
    assert_same_tensors(*made.values())


def test_what_is_not_trained_of_a_single_file_is_read_once_and_not_by_the_training(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = single_file(read_facts(str(tiny_model)), dtype=None, title="tiny", date="2026-01-01")
    write_atomically(tmp_path / "tiny.safetensors", as_content(made))
    readers, read = list[str](), PartReader.read

    def told(self: PartReader, **how: Any) -> dict[str, torch.Tensor]:
        readers.append(threading.current_thread().name)
        return read(self, **how)

    monkeypatch.setattr(PartReader, "read", told)
    words = options(tmp_path / "tiny.safetensors", pictures, tmp_path, max_steps=3, save_every_n_steps=1,
                    disable_textenc_training=True)  # fmt: skip
    assert start(*words) == 0
    assert readers[-2:] == ["save step 1"] * 2, "autoencoder and text encoder; later saves copy them"
    first, last = (tensors(only_run(tmp_path) / "checkpoints" / f"step-{n:010d}") for n in (1, 3))
    frozen = [name for name in first if name.startswith(("model/vae", "model/text_encoder"))]
    assert frozen and all(torch.equal(first[name], last[name]) for name in frozen)
