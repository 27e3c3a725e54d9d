"""One launch, looked at from all sides: exit code, console, the exact files, and other libraries opening them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end import launching
from tests.tiny import make_pictures
from tests.training.runs import lines, only_run, options

pytestmark = pytest.mark.launch

CHECKPOINT = {
    "MANIFEST.json",
    "data.json",
    "ema.safetensors",
    "model/model_index.json",
    "model/scheduler/scheduler_config.json",
    "model/text_encoder/config.json",
    "model/text_encoder/model.safetensors",
    "model/tokenizer/merges.txt",
    "model/tokenizer/special_tokens_map.json",
    "model/tokenizer/tokenizer_config.json",
    "model/tokenizer/vocab.json",
    "model/unet/config.json",
    "model/unet/diffusion_pytorch_model.safetensors",
    "model/vae/config.json",
    "model/vae/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
    "state.json",
}
METRICS = {
    "step", "epoch", "images_seen", "loss", "lr_unet", "lr_text_encoder", "grad_norm_unet", "grad_norm_text_encoder",
    "images_per_s", "data_wait_s", "memory_bytes", "ema_decay",
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    make_pictures(folder / "pictures", 5, captions=[f"a thing, number {i}" for i in range(5)])
    (folder / "prompts.json").write_text('{"steps": 2, "size": [32, 32], "prompts": ["a thing", "another"]}')
    words = options(
        tiny_model,
        folder / "pictures",
        folder,
        max_steps=4,
        log_step=2,
        save_every_n_steps=2,
        ema_decay_rate=0.9,
        save_single_file=True,
        sample_prompts=folder / "prompts.json",
        tensorboard=True,
        quiet=False,
    )
    done = launching.run(launching.accelerate(["--num_processes", 1], *words), folder)
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    assert done.stdout == ""
    return folder


def test_the_run_folder_holds_what_the_documentation_says(launched: Path) -> None:
    run = only_run(launched)
    for step in (2, 4):
        checkpoint = run / "checkpoints" / f"step-{step:010d}"
        assert {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} == CHECKPOINT
        assert (run / "exports" / f"my_project-step-{step:010d}.safetensors").is_file()
    assert json.loads((run / "config.json").read_text())["format"] == "everydream-config-1"
    assert lines(run / "events.jsonl")[-1]["code"] == 0
    assert (run / "report.html").is_file()
    assert (run / "samples" / "before_after.png").is_file()
    assert list(run.rglob("events.out.tfevents*"))
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [2, 4]
    for line in lines(run / "metrics.jsonl"):
        assert line.keys() == METRICS
        assert all(math.isfinite(value) for value in line.values())


def test_the_console_says_where_everything_is(launched: Path) -> None:
    said, run = (launched / "stderr.txt").read_text(), only_run(launched)
    for path in ("checkpoints/step-0000000004", "exports/my_project-step-0000000004.safetensors", "report.html"):
        assert str(run / path) in said
    assert "Warning" not in said
    assert "Traceback" not in said


def test_diffusers_opens_the_checkpoint_and_the_single_file(launched: Path, tiny_model: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    run = only_run(launched)
    checkpoint = run / "checkpoints" / "step-0000000004"
    pipeline = DiffusionPipeline.from_pretrained(checkpoint / "model")
    ours = load_file(checkpoint / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    theirs = pipeline.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    export = run / "exports" / "my_project-step-0000000004.safetensors"
    single = StableDiffusionPipeline.from_single_file(str(export), config=str(tiny_model), local_files_only=True)
    average = {
        k.removeprefix("unet."): v for k, v in load_file(checkpoint / "ema.safetensors").items() if k[:5] == "unet."
    }
    for name, tensor in single.unet.state_dict().items():
        assert tensor.equal(average[name].half().float().to(tensor.dtype)), name


def test_config_json_repeats_the_run(launched: Path, tmp_path: Path) -> None:
    run = only_run(launched)
    words = ["--config", run / "config.json", "--logdir", tmp_path / "logs", "--max_steps", 2, "--quiet"]
    done = launching.run(launching.python(*words), tmp_path)
    assert done.returncode == 0, done.stderr
    first = lines(run / "metrics.jsonl")[0]
    again = lines(only_run(tmp_path) / "metrics.jsonl")[0]
    assert {k: first[k] for k in ("loss", "grad_norm_unet")} == {k: again[k] for k in ("loss", "grad_norm_unet")}
