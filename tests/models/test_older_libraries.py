"""The model/ folder of a checkpoint in an environment of its own with transformers 4 and diffusers 0.3x."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from everydream.models.family import load, read_facts
from everydream.models.writing import single_file
from tests.models.test_sd import snapshot, write
from tests.tiny import make_tiny_model

PACKAGES = ("transformers==4.46.3", "diffusers==0.32.2")

CHECK = """
import sys, torch, transformers, diffusers
from safetensors.torch import load_file
assert transformers.__version__ == "4.46.3" and diffusers.__version__ == "0.32.2"
folder, single = sys.argv[1:]
loaded = {
    "folder": diffusers.DiffusionPipeline.from_pretrained(folder),
    "single": diffusers.StableDiffusionPipeline.from_single_file(single, config=folder, local_files_only=True),
}
stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
for kind, pipeline in loaded.items():
    for part, stem in stems.items():
        stored = load_file(f"{folder}/{part}/{stem}.safetensors")
        named = dict(getattr(pipeline, part).named_parameters())
        assert named.keys() == stored.keys(), (kind, part, named.keys() ^ stored.keys())
        assert all(torch.equal(named[name], tensor) for name, tensor in stored.items()), (kind, part)
        print(kind, part, len(stored))
ids = loaded["folder"].tokenizer("the red star on a sks").input_ids
print(*ids)
"""


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> Path:
    """An interpreter with older libraries, kept from one test run to the next; torch is the one that is here."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("-".join(PACKAGES).replace("==", "-"))
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
        inside = subprocess.run(
            [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        # Searched after the environment's own packages: what it lacks (torch) is found here.
        Path(inside.stdout.strip(), "ours.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
        (folder / "ready").touch()
    return interpreter


def published_like_sd15(folder: Path) -> Path:
    return make_tiny_model(folder, position_ids=True)


def published_like_sd2(folder: Path) -> Path:
    return make_tiny_model(folder, openclip=True, position_ids=True)


def as_the_libraries_here_write_it(folder: Path) -> Path:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    published = make_tiny_model(folder.with_name("published"))
    DiffusionPipeline.from_pretrained(published).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # diffusers and transformers deprecate their own defaults
@pytest.mark.parametrize("make", [published_like_sd15, published_like_sd2, as_the_libraries_here_write_it])
def test_older_libraries_load_every_tensor(python: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    base = make(tmp_path / "base")
    family = load(read_facts(str(base)))
    written = write(family.files(snapshot(family, "unet", "text_encoder")), tmp_path / "model")
    single = single_file(read_facts(str(written)), dtype=None, title="t", date="2026-01-02")
    write({"x.safetensors": single}, tmp_path)
    command = [str(python), "-W", "ignore", "-c", CHECK, str(written), str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *parts, ids = done.stdout.splitlines()
    counts = ("unet 208", "vae 152", "text_encoder 52")
    assert parts == [f"{kind} {count}" for kind in ("folder", "single") for count in counts]
    ours = family.tokenize(["the red star on a sks"])[0, 0].tolist()
    assert [int(i) for i in ids.split()] == ours[: len(ids.split())]
    assert "newly initialized" not in done.stderr
