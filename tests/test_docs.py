"""The documentation against the program: messages are those that it prints, settings and files are there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import each
from everydream.config.legacy import ALIASES
from everydream.config.resolve import resolve
from everydream.config.schema import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
VARIES = "…"


def said() -> Iterator[str]:
    """Every string of the source; what is put into an f-string is VARIES."""
    for path in (ROOT / "everydream").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages() -> list[str]:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    return [found[1] for row in rows if (found := re.match(r"\| `([^`]+)`", row))]


@pytest.fixture(scope="module")
def source() -> str:
    return "\n".join(said())


@pytest.mark.parametrize("message", messages())
def test_the_program_says_what_troubleshooting_explains(message: str, source: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split(VARIES)]
    assert re.search("[^\n]*".join(parts), source)


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_of_the_repository_exist(page: Path) -> None:
    named = re.findall(
        r"\b((?:everydream|scripts|examples|bench|tests|docs|schemas)/[\w./]*\w)", page.read_text("utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_setting_on_a_documented_command_line_is_one() -> None:
    """Of the lines that start the trainer; `--no_flag` is `--flag false`."""
    known = {*Settings.model_fields, *ALIASES, "config", "dry_run", "print_config", "help"}
    unknown = []
    for page in PAGES:
        for words in re.findall(r"scripts/train\.py((?: (?!`)\S+)*)", page.read_text(encoding="utf-8")):
            names = [name.removeprefix("no_") for name in re.findall(r"--(\w+)", words)]
            unknown += [f"{page.name}: {name}" for name in names if name not in known]
    assert unknown == []


def test_every_documented_make_command_is_a_target_with_variables_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE)) | set(
        re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)
    )
    unknown = []
    for page in PAGES:
        for target, rest in re.findall(r"(?:^|`)make ([\w-]+)((?: \w+=\S+)*)", page.read_text("utf-8"), re.MULTILINE):
            words = [target, *re.findall(r"(\w+)=", rest)]
            unknown += [f"{page.name}: {word}" for word in words if word not in known]
    assert unknown == []


def test_a_gpus_own_interpreter_needs_no_environment() -> None:
    for target in ("test-gpu", "bench-gpu"):
        words = ["make", "--dry-run", target, "GPU_PYTHON=some/python"]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "some/python" in said and ".venv" not in said


def test_torch_can_come_from_another_index() -> None:
    words = ["make", "--dry-run", "--always-make", "install", "TORCH_INDEX=https://an.index/cpu"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r'install [^\n]*"torch==[\d.]+" \\\n\t*--index-url "https://an.index/cpu"', said)


@pytest.mark.parametrize("file", ["each.json", "each_batch1.json"])
def test_the_table_of_each_means_is_what_was_measured(file: str) -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "bench" / "results" / file).read_text())
    batch = "" if measured["batch"] == 4 else f", batch {measured['batch']}"
    for row in measured["rows"]:
        told = f"{row['expected']} | {row['ratio']:.2f} | {each.spread(row['ratios'])} |"
        [line] = re.findall(
            rf"^\| {re.escape(row['change'] + batch)}(?: \([^|]*\))? \| {re.escape(told)} (.*) \|$", page, re.M
        )
        said = each.verdict(row["ratios"])
        assert line.startswith(said) or (said == "faster" and line == "no cost that can be seen"), line


@pytest.mark.parametrize(
    ("ratios", "said"), [([0.8, 1.0], "undecided"), ([0.9, 1.1], "undecided"), ([0.8, 0.9], "slower"), ([2], "faster")]
)
def test_pairs_that_disagree_decide_nothing(ratios: list[float], said: str) -> None:
    assert each.verdict(ratios) == said


def test_the_complete_dreambooth_file_is_right(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "dreambooth.md").read_text(encoding="utf-8")
    [content] = [block for block in re.findall(r"```json\n(.*?)```", page, re.S) if block.startswith("{")]
    (tmp_path / "dog.json").write_text(content)
    for name in ("pictures/dog", "pictures/class_dog"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a dog")
    resolved = resolve(["--config", str(tmp_path / "dog.json")], {})
    assert resolved.notes == ()
    assert resolved.settings.max_steps == 12 * 100, "as README and the table say"
    assert '"max_steps": 1200' in (ROOT / "README.md").read_text(encoding="utf-8")
