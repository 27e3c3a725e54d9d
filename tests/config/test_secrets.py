"""Tokens never reach what is written or printed; exported metadata does not name the home folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everydream.config.cli import settings_or_exit
from everydream.config.redact import clean, for_others, secrets
from tests.config.conftest import Desk

TOKEN = "hf_" + "aB3" * 10
SECRETS = {
    f"a {TOKEN} b": "a *** b",
    "https://me:" + "pass@hub.example/x": "https://***@hub.example/x",
    "https://hub.example/x?token=" + "abc&v=1": "https://hub.example/x?***&v=1",
    '{"url": "https://hub.example/x?token=' + 'abc", "b": 1}': '{"url": "https://hub.example/x?***", "b": 1}',
    "github_pat_" + "x" * 30: "***",
    "sk-" + "x" * 30: "***",
    "AKIA" + "X" * 16: "***",
}


@pytest.mark.parametrize("text", SECRETS)
def test_forms_of_tokens_are_hidden(text: str) -> None:
    assert clean(text, {}) == SECRETS[text]


def test_values_of_secret_variables_are_hidden_wherever_they_stand() -> None:
    environ = {"WANDB_API_KEY": "0123456789abcdef", "MY_PASSWORD": "letmein-please", "HOME": "/home/me", "AUTH": "x"}
    assert secrets(environ) == ("0123456789abcdef", "letmein-please")
    tree = {"a": ["0123456789abcdef", {"b": "say letmein-please now"}], "letmein-please": 1, "n": 3, "x": "x"}
    assert clean(tree, environ) == {"a": ["***", {"b": "say *** now"}], "***": 1, "n": 3, "x": "x"}


def test_values_of_secret_keys_are_hidden() -> None:
    assert clean({"args": {"api_key": "short", "auth_token": "t"}, "keep_tags": 3, "token_count": 77}, {}) == {
        "args": {"api_key": "***", "auth_token": "***"}, "keep_tags": 3, "token_count": 77,
    }  # fmt: skip


def test_harmless_text_stays(desk: Desk) -> None:
    for text in (
        "a sks dog",
        "what?key=1",
        "is this&token=that, or not",
        "owner/name",
        "/data/keys/token.txt",
        "a0b1c2d3e4f5a0b1c2d3e4f5a0b1c2d3e4f5a0b1",
        "step-0000001200",
    ):
        assert clean(text, {"SOME_TOKEN": ""}) == text


def test_the_record_and_what_is_printed_hold_no_token(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    settings = {"run_name": "correct-horse-battery", "instance_prompt": TOKEN, "seed": TOKEN}
    desk.train(**{**settings, "seed": 1})
    assert "correct-horse" not in json.dumps(desk.resolve(**{**settings, "seed": 1}).record())
    assert TOKEN not in json.dumps(desk.resolve(**{**settings, "seed": 1}).record())
    for argv in (
        ["--print_config"],
        ["--print_config", "json"],
        ["--batch_size", TOKEN],
        ["--lr", "correct-horse-battery"],
    ):
        with pytest.raises(SystemExit):
            settings_or_exit(["--config", "train.json", *argv])
        printed = capsys.readouterr()
        assert "***" in printed.out + printed.err
        assert TOKEN not in printed.out + printed.err
        assert "correct-horse" not in printed.out + printed.err


def test_what_others_get_does_not_name_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    tree = {"data_root": ["/home/me/pictures", "/home/meadow"], "logdir": "/home/me", "at": "in /home/me/x and /srv"}
    assert for_others(tree, {}) == {
        "data_root": ["~/pictures", "/home/meadow"], "logdir": "~", "at": "in ~/x and /srv",
    }  # fmt: skip
