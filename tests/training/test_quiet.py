"""A person sees only what they can act on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from everydream.training.quiet import ENVIRONMENT, LOGGERS, quiet_libraries

NOISY = """
from everydream.training.quiet import quiet_bars, quiet_libraries
quiet_libraries(verbose={verbose})
import accelerate, bitsandbytes, torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch.utils.tensorboard import SummaryWriter
quiet_bars()
with torch.profiler.profile():
    torch.ones(2).sum()
"""


def test_importing_everything_prints_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", NOISY.format(verbose=False)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)


@pytest.mark.usefixtures("untouched")
def test_what_the_person_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with warnings.catch_warnings():
        quiet_libraries()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert {os.environ[name] for name in ENVIRONMENT} > {"true", "error"}
    for name in ENVIRONMENT:
        os.environ.pop(name, None)


@pytest.mark.usefixtures("untouched")
def test_verbose_lets_everything_through() -> None:
    before = warnings.filters[:]
    quiet_libraries(verbose=True)
    assert warnings.filters == before
    assert not set(ENVIRONMENT) & set(os.environ)


def test_warnings_that_a_person_can_act_on_stay() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_libraries()
        text = "Found GPU0 which is of cuda capability 3.0, too old"
        warnings.warn_explicit(text, UserWarning, "cuda.py", 1, module="torch.cuda")
        warnings.warn_explicit("old name", FutureWarning, "x.py", 1, module="diffusers.models")
        warnings.warn_explicit("developer", UserWarning, "x.py", 1, module="accelerate.utils")
    assert [str(warning.message) for warning in seen] == [text]
