"""scripts/train.py's door: exit codes, stdout for results only, rank 0 speaks, nothing heavy, nothing made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from everydream.config import show
from everydream.config.cli import settings_or_exit
from everydream.config.kinds import kinds
from everydream.config.schema import (
    SECTIONS,
    OptimizerFile,
    PartFile,
    Settings,
    TextEncoderFreezing,
    ValidationSettings,
)
from tests.config.conftest import Desk

ROOT = Path(__file__).parents[2]


def leave(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        settings_or_exit(argv)
    printed = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, printed.out, printed.err


def test_help_ends_with_0_and_names_every_setting(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = leave(capsys, "--help")
    assert (code, err) == (0, "")
    for key in Settings.model_fields:
        assert f"  --{key}  (" in out
    for title in SECTIONS.values():
        assert f"\n{title}\n" in out
    assert leave(capsys, "-h", "--nonsense") == (0, out, "")


def test_errors_end_with_2_on_stderr(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = leave(capsys, "--batch_sise", "3")
    assert (code, out) == (2, "")
    assert "--batch_sise is not a setting" in err
    assert "Traceback" not in err


def test_print_config_prints_its_result_alone_on_stdout(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.train(batch_size=2)
    code, out, err = leave(capsys, "--config", "train.json", "--batch_size", "3", "--print_config", "json")
    assert code == 0
    assert json.loads(out)["batch_size"] == {
        "value": 3, "origin": "command line", "overrides": [{"origin": "train.json", "value": 2}],
    }  # fmt: skip
    assert err == "batch_size 3 from command line overrides 2 from train.json\n"
    code, out, _ = leave(capsys, "--config", "train.json", "--print_config")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["batch_size"].split()[1:] == ["2", "train.json:4"]
    assert set(rows) == set(json.loads(leave(capsys, "--config", "train.json", "--print_config", "json")[1]))


def test_what_is_printed_for_programs_is_json_whatever_stands_in_it(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", '", "value')
    desk.write("optimizer.json", {"args": {"api_key": "x"}})
    said = 'what?key=1", "é" https://a.b/?token=t'
    argv = ["--config", "train.json", "--instance_prompt", said, "--optimizer_config", "optimizer.json"]
    desk.train()
    code, out, _ = leave(capsys, *argv, "--print_config", "json")
    assert (code, json.loads(out)["instance_prompt"]["value"]) == (0, 'what?key=1", "é" https://a.b/?***')
    assert json.loads(out)["optimizer.base.args"]["value"] == {"api_key": "***"}


DOOR = "import sys; from everydream.config.cli import settings_or_exit; settings_or_exit(sys.argv[1:])"


def door(desk: Desk, *argv: str | bytes, out: int | None = None, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", DOOR, *argv], stdout=out or subprocess.PIPE, stderr=subprocess.PIPE, check=False,
        cwd=desk.folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )  # fmt: skip


def test_names_that_stdout_cannot_write_are_escaped(desk: Desk) -> None:
    words = [*desk.train(), "--cache_dir", b"\xffcaf\xc3\xa9", "--print_config"]
    for form in ([], ["json"]):
        done = door(desk, *words, *form, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\\udcffcaf" in done.stdout
    assert json.loads(done.stdout)["cache_dir"]["value"].endswith("\udcffcafé")
    assert door(desk, "--help", PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_a_full_stdout_is_said_without_a_traceback(desk: Desk) -> None:
    with open("/dev/full", "wb") as full:
        done = door(desk, "--help", out=full.fileno())
    assert done.returncode == 5
    assert done.stderr == b"the result cannot be written to stdout: No space left on device\n"


def test_a_dry_run_goes_on_for_it_reads_pictures(desk: Desk) -> None:
    assert settings_or_exit([*desk.train(), "--dry_run"]).action == "dry_run"


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_only_rank_0_speaks(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    for argv, code in ((["--help"], 0), (["--nonsense"], 2), ([*desk.train(), "--print_config"], 0)):
        assert leave(capsys, *argv) == (code, "", "")


def test_differences_are_what_is_not_the_default(desk: Desk) -> None:
    desk.write("optimizer.json", {"optimizer": "adamw", "betas": [0.9, 0.999], "text_encoder_lr_scale": 1})
    resolved = desk.resolve(batch_size=4, cond_dropout=0.1, optimizer_config="optimizer.json")
    lines = show.differences(resolved).splitlines()
    assert [line.split()[0] for line in lines] == [
        "base_model", "data_root", "cond_dropout", "optimizer_config", "optimizer.base.optimizer",
    ]  # fmt: skip
    assert "train.json:5" in lines[2]


@pytest.mark.parametrize("model", [Settings, PartFile, OptimizerFile, TextEncoderFreezing, ValidationSettings])
def test_every_field_is_described_with_its_range_and_its_null(model: type) -> None:
    for key, one in model.model_fields.items():  # type: ignore[attr-defined]
        text = one.description or ""
        assert text.endswith("."), key
        kind = kinds(model)[key]
        for word in kind.bounds.replace(" and", "").split():
            if word[0].isdigit():
                number = word.removesuffix(".0")
                nobodys = number == "10^9" or (number, kind.bounds[0]) == ("0", ">")
                assert number in text or nobodys, (key, number, text)
        if kind.nullable and not one.is_required() and model is Settings:
            assert "ull" in text, key


def test_the_script_answers_without_torch_and_makes_nothing(desk: Desk) -> None:
    desk.train()
    program = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        f"try: runpy.run_path({str(ROOT / 'scripts/train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "names = ('torch', 'accelerate', 'diffusers', 'rich', 'numpy', 'PIL')\n"
        "heavy = [name for name in names if name in sys.modules]\n"
        "print('heavy', heavy, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    before = sorted(desk.folder.rglob("*"))
    for argv, code in ((["--help"], 0), (["--config", "train.json", "--print_config"], 0), (["--lr", "x"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False, cwd=desk.folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "heavy []" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(desk.folder.rglob("*")) == before


def test_a_reader_that_leaves_early_is_no_error(desk: Desk) -> None:
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'scripts/train.py'} --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
