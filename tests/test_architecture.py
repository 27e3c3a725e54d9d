"""The import arrows of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FREE = {"errors", "draws", "optim.table"}  # import nothing of ours, and all may import them
PACKAGES = {"config", "data", "diffusion", "models", "optim", "training"}
ALLOWED: dict[str, set[str]] = {
    "process": set(),
    "runtime": set(),
    "config": {"config"},
    "data": {"data"},
    "diffusion": {"diffusion"},
    "optim": {"optim"},
    "models": {"models", "diffusion"},
    "training": {"process", "runtime", *PACKAGES} - {"config"},
    "scripts": {"config", "training", "__main__"},
    "__main__": {"config", "training"},
}
EXTRA = {  # file -> what it may import beyond its package's arrows
    "everydream/__main__.py": {"process"},  # the launcher's end and signals, before anything else
    "everydream/training/run.py": {"config"},  # settings stop at these two doors
    "everydream/training/build.py": {"config"},
    "scripts/sample.py": {"models"},
    "scripts/convert.py": {"models"},
}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "PIL", "bitsandbytes", "lion_pytorch"}


def modules() -> list[Path]:
    return sorted([*ROOT.glob("everydream/**/*.py"), *ROOT.glob("scripts/*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def home_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "scripts":
        return "scripts"
    return parts[1] if parts[1] in PACKAGES else ".".join(parts[1:])


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, without the leading `everydream.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            module = node.module or ""
            if module == "everydream" or module.startswith("everydream."):
                # `from everydream.optim import table` names the module in the alias.
                found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "everydream"}
    return {name.removeprefix("everydream").lstrip(".") for name in found}


def is_free(module: str) -> bool:
    return any(module == free or module.startswith(free + ".") for free in FREE)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    home = home_of(path)
    if home == "__init__":
        assert not imported(path)
        return
    own = name_of(path).removeprefix("everydream/").removesuffix(".py").replace("/", ".")
    if is_free(own):
        assert not imported(path), f"{name_of(path)} must import nothing of ours"
        return
    allowed = ALLOWED[home] | EXTRA.get(name_of(path), set())
    for module in imported(path):
        first = module.split(".")[0]
        assert is_free(module) or first in allowed or first == "__version__", f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if home_of(p) in {"config", "errors"} or name_of(p) == "everydream/optim/table.py"],
    ids=name_of,
)
def test_settings_import_nothing_heavy(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & HEAVY, f"{name_of(path)}:{node.lineno}"


def test_families_are_named_in_models_alone() -> None:
    for path in modules():
        if home_of(path) != "models":
            assert "sdxl" not in path.read_text().lower(), name_of(path)


def test_allowed_files_exist() -> None:
    assert all((ROOT / name).exists() for name in EXTRA)
