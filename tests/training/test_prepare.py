"""What is checked before anything is written: --dry_run, refusals, processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from everydream.config.compare import changes
from everydream.config.resolve import resolve
from everydream.errors import ConfigError
from everydream.runtime import StopRequest, asked_processes, refuse_lone_process
from everydream.training import build, lock
from everydream.training.console import Console
from everydream.training.prepare import Prepared, accumulation
from tests.tiny import make_pictures
from tests.training.runs import clean_process, lines, only_run, options, start, tensors


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 6, captions="a thing")
    return tmp_path / "pictures"


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_dry_run_prints_the_plan_and_creates_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 7, size=[(64, 64), (96, 64)], captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, max_epochs=3, max_steps=None, grad_accum=2)
    before = everything_in(tmp_path)
    assert start(*words, "--dry_run") == 0
    assert everything_in(tmp_path) == before
    plan = capsys.readouterr().out
    # 4 square and 3 wide pictures in batches of 2: 6 and 4 whole ones in 3 epochs, one wide picture is left over
    for line in ("samples: 7", "total steps: 5", "1 pictures of the last epoch fill no batch", "unet", "text_encoder"):
        assert line in plan


@pytest.mark.parametrize("settings", [
    {"max_steps": 1}, {"max_steps": 4}, {"max_steps": None, "max_epochs": 9}, {"max_steps": 4, "seed": 3}
], ids=str)  # fmt: skip
def test_steps_an_epoch_do_not_depend_on_where_the_run_ends(
    settings: dict[str, object], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 10, captions="a thing")
    assert start(*options(tiny_model, tmp_path / "pictures", tmp_path, batch_size=4, **settings), "--dry_run") == 0
    assert "steps an epoch: 2.5" in capsys.readouterr().out


def test_a_revision_of_a_local_model_is_only_said_to_be_without_effect(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*options(tiny_model, pictures, tmp_path, base_model_revision="main"), "--dry_run") == 0
    assert "base_model_revision" in capsys.readouterr().out


def test_a_model_with_fewer_timesteps_is_trained_over_all_of_them_and_repeated(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "num_train_timesteps": 500}))
    words = options(model, pictures, tmp_path, max_steps=1)
    assert start(*words) == 0
    assert start("--config", only_run(tmp_path) / "config.json", "--logdir", tmp_path / "again") == 0
    assert start(*words, "--timestep_end", "null", "--dry_run") == 0
    assert start(*words, "--timestep_end", "700", "--dry_run") == 2


def test_a_resumed_run_names_the_seed_that_it_keeps(
    tiny_model: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = options(tiny_model, pictures, tmp_path, max_steps=1, seed=-1, quiet=False)
    assert start(*words) == 0
    assert "was drawn" in "".join(capfd.readouterr())
    words[words.index("--max_steps") + 1] = "2"
    assert start(*words, "--resume", "latest") == 0
    assert "was drawn" not in "".join(capfd.readouterr())


def test_instance_prompt_is_the_caption_of_validations_pictures_too(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("pictures", 0), ("held out", 1)):
        make_pictures(tmp_path / name, 4, captions=None, seed=seed)
    validation = tmp_path / "validation.json"
    validation.write_text(json.dumps({"val_split_mode": "manual", "manual_data_root": str(tmp_path / "held out")}))
    words = options(tiny_model, tmp_path / "pictures", tmp_path, validation_config=validation, instance_prompt="a sks")
    with clean_process():
        prepared = Prepared(resolve(words, {}), changes, StopRequest(), Console("quiet"))
    assert {one.caption for samples in prepared.scanned.values() for one in samples} == {"a sks"}


def test_class_pictures_that_only_the_base_model_could_make_are_asked_for_at_once(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(tiny_model, pictures, tmp_path, max_steps=1)
    assert start(*words) == 0
    words[words.index("--max_steps") + 1] = "2"
    make_pictures(tmp_path / "class", 2, captions="a star", seed=4)
    more = ["--resume", "latest", "--resume_changed", "--class_data_root", tmp_path / "class"]
    wanted = ["--class_prompt", "a star", "--num_class_images", 3]
    for action in (["--dry_run"], []):
        assert start(*words, *more, *wanted, *action) == 2
        assert "num_class_images: 3" in capsys.readouterr().err
        lock.release_all()
    assert start(*words, *more) == 0


def test_masks_that_are_not_there_are_said(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*options(tiny_model, pictures, tmp_path, masked_loss=True), "--dry_run") == 0
    assert "masked_loss is without effect" in capsys.readouterr().out


def test_the_dry_run_counts_what_training_uses(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 5, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, max_epochs=3, max_steps=None, write_schedule=True)
    assert start(*words, "--dry_run") == 0
    total = int(capsys.readouterr().out.split("total steps: ")[1].split(",")[0])
    assert start(*words) == 0
    schedule = lines(only_run(tmp_path) / "schedule.jsonl")
    assert [line["step"] for line in schedule] == list(range(1, total + 1))
    names = [name for line in schedule for name in line["samples"]]
    assert sorted(names.count(name) for name in set(names)) == [2, 3, 3, 3, 3]  # 15 draws, 14 in whole batches


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ('["one", {"prompt": "two", "guidance": [1, 7]}]', "pictures a preview: 3"),
        (
            '[{"promt": "one"}]',
            "no previews: sample_prompts: {file}: prompt 1: promt is not known. Did you mean 'prompt'?",
        ),
        ('["one"', "no previews: sample_prompts: {file} is not JSON: Expecting ',' delimiter: line 1 column 7"),
    ],
)
def test_the_dry_run_reads_the_prompts(
    prompts: str, said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(prompts)
    make_pictures(tmp_path / "pictures", 2, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, sample_prompts=file, sample_steps=5)
    assert start(*words, "--dry_run") == 0
    assert said.format(file=file) in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "torch.optim.RMSprop"])
def test_the_dry_run_counts_the_state_that_a_checkpoint_then_holds(
    optimizer: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "optimizer.json"
    file.write_text(f'{{"optimizer": "{optimizer}"}}')
    make_pictures(tmp_path / "pictures", 2, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, optimizer_config=file, max_steps=1,
                    disable_textenc_training=True)  # fmt: skip
    assert start(*words, "--dry_run") == 0
    said = capsys.readouterr().out.split("optimizer state ")[1].splitlines()[0]
    if "." in optimizer:
        assert said == "unknown"
        return
    assert start(*words) == 0
    held = sum(
        t.nbytes
        for name, t in tensors(only_run(tmp_path) / "checkpoints" / "step-0000000001").items()
        if name.startswith("optimizer") and t.dim()
    )
    assert float(said.split()[0]) == pytest.approx(held / {"KB": 1e3, "MB": 1e6}[said.split()[1]], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model": "/nowhere/model"}, "/nowhere/model"),
        ({"ema_decay_rate": 0.9, "ema_device": "mps"}, "ema_device: mps is not there"),
        ({"attn_type": "xformers"}, "attn_type: xformers cannot be imported"),
        ({"data_root": "/nowhere/pictures"}, "/nowhere/pictures"),
        ({"global_batch_size": 3}, "global_batch_size must be a multiple"),
        ({"max_steps": None, "max_epochs": 1, "batch_size": 64}, "gives no update"),
        ({"clip_skip": 3}, "has 3 layers"),
        ({"resume": "/nowhere/run"}, "/nowhere/run"),
        ({"plugins": "nowhere.Plugin"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, object], message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 3, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, **settings)
    assert start(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_broken_picture_ends_the_run_or_is_left_out(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="a thing")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, max_steps=1)
    assert start(*words) == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert start(*words, "--bad_images", "skip") == 0


def test_global_batch_size_is_divided_among_processes() -> None:
    assert accumulation(2, 1, 8, 1) == 4
    assert accumulation(2, 1, 8, 2) == 2
    assert accumulation(2, 3, None, 2) == 3


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"], 2),
        (["python", "accelerate", "launch", "--num-processes=4", "x.py"], 4),
        (["python", "accelerate", "launch", "x.py"], 1),
        (["bash"], 1),
    ],
)
def test_one_process_where_more_were_asked_for_is_refused(command: list[str], wanted: int) -> None:
    assert asked_processes(command) == wanted
    if wanted > 1:
        with pytest.raises(ConfigError, match=f"asked for {wanted} processes and started one"):
            refuse_lone_process({}, command)
        refuse_lone_process({"WORLD_SIZE": str(wanted)}, command)
    else:
        refuse_lone_process({}, command)


@pytest.mark.parametrize("dry", [True, False])
def test_what_has_no_effect_is_said_once_and_before_weights_are_read(
    dry: bool, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optimizer.json").write_text('{"optimizer": "lion", "epsilon": 1e-7}')
    make_pictures(tmp_path / "pictures", 2, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, optimizer_config=tmp_path / "optimizer.json",
                    max_steps=1, huber_delta=2, quiet=False)  # fmt: skip
    said_before = []
    load = build.load
    monkeypatch.setattr(build, "load", lambda *a, **k: said_before.append(capsys.readouterr().err) or load(*a, **k))
    assert start(*words, *(["--dry_run"] if dry else [])) == 0
    text = capsys.readouterr().out if dry else said_before[0]
    for told in ("epsilon 1e-07 from optimizer.json is unused", "huber_delta 2.0 from command line is without effect"):
        assert text.count(told) == 1
    assert "optimizer.base.epsilon" not in text, "a row of what differs would say it twice"
    if not dry:
        notes = [line["message"] for line in lines(only_run(tmp_path) / "events.jsonl") if line["kind"] == "note"]
        assert len([note for note in notes if "epsilon" in note]) == 1
        assert "epsilon" not in capsys.readouterr().err


@pytest.mark.parametrize("dry", [True, False])
def test_the_problems_of_all_sets_come_in_one_report_before_weights_are_read(
    dry: bool, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("pictures", "class", "held", "other")
    for name in names:
        make_pictures(tmp_path / name, 3, captions="a thing")
        (tmp_path / name / f"broken_{name}.png").write_bytes(b"no picture")
    (tmp_path / "validation.json").write_text(
        '{"val_split_mode": "manual", "manual_data_root": "held", "extra_manual_datasets": {"more": "other"}}'
    )
    words = options(tiny_model, tmp_path / "pictures", tmp_path, class_data_root=tmp_path / "class",
                    class_prompt="a thing", validation_config=tmp_path / "validation.json")  # fmt: skip
    monkeypatch.setattr(build, "load", lambda *a, **k: pytest.fail("weights are read"))
    assert start(*words, *(["--dry_run"] if dry else [])) == 2
    said = capsys.readouterr().err
    assert all(said.count(f"broken_{name}.png") == 1 for name in names)


def test_long_captions_are_told_of_every_set(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pictures", "class"):
        make_pictures(tmp_path / name, 2, captions="a thing " * 60)
    words = options(tiny_model, tmp_path / "pictures", tmp_path, class_data_root=tmp_path / "class",
                    class_prompt="a thing")  # fmt: skip
    assert start(*words, "--dry_run") == 0
    plan = capsys.readouterr().out
    assert plan.count("2 captions have more than 75 tokens") == 2 and "class: 2 captions" in plan
    assert plan.count("caption of subject/picture_00") == 2


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ('"cosine", "lr_warmup_steps": 1, "lr_decay_steps": 3', "unet: the learning rate is down at step 3"),
        ('"cosine", "lr_warmup_steps": 3, "lr_decay_steps": 3', "rises for 3 steps, and step 3 ends that"),
        ('"constant_with_warmup", "lr_warmup_steps": 5', "rises for 5 steps, and step 5 ends that"),
        ('"constant_with_warmup", "lr_warmup_steps": 4', ""),
        ('"cosine"', ""),
    ],
)
def test_the_dry_run_says_where_learning_rates_do_not_get(
    schedule: str, said: str, tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "optimizer.json").write_text(f'{{"optimizer": "adamw", "lr": 1e-3, "lr_scheduler": {schedule}}}')
    words = options(tiny_model, pictures, tmp_path, max_steps=5, optimizer_config=tmp_path / "optimizer.json")
    assert start(*words, "--dry_run") == 0
    plan = capsys.readouterr().out
    assert said in plan
    assert said or not ("is down at" in plan or "is never reached" in plan)


def test_wrong_arguments_of_both_parts_optimizers_are_told_at_once(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "optimizer.json").write_text(
        '{"base": {"optimizer": "adamw", "args": {"foo": 1}},'
        ' "text_encoder_overrides": {"optimizer": "lion", "args": {"bar": 1}}}'
    )
    words = options(tiny_model, pictures, tmp_path, optimizer_config=tmp_path / "optimizer.json")
    assert start(*words, "--dry_run") == 2
    told = capsys.readouterr().err
    assert "unet: optimizer 'adamw': args.foo" in told and "text_encoder: optimizer 'lion': args.bar" in told


def test_a_model_that_is_not_trained_is_in_the_memory_plan(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(tiny_model, pictures, tmp_path, disable_unet_training=True)
    assert start(*words, "--dry_run") == 0
    memory = capsys.readouterr().out.split("Memory")[1]
    assert "unet: weights" in memory and "text_encoder: weights" in memory
