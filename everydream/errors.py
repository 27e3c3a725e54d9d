"""Failures that are the user's to mend: message = where + value + what to do. Everything else is an assertion of ours.

Exit codes (README, docs/reliability.md): 0 done · 2 settings or data · 3 diverged · 4 no valid checkpoint ·
5 cannot save · 128+n stopped by signal n, and saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ " Did you mean 'batch_size'?", or nothing where no name is near."""
    names = list(names)
    near = get_close_matches(name, names, n=1) or get_close_matches(name.lower(), names, n=1)
    near = near or [one for one in names if name and (one.startswith(name) or sorted(one) == sorted(name))]
    return f" Did you mean {near[0]!r}?" if near else ""


class EveryDreamError(Exception):
    """Printed without a traceback; `exit_code` is the script's exit status."""

    exit_code = 1


class _Problems(EveryDreamError):
    """One or many problems, reported together."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[_Problems], tuple[tuple[str, ...]]]:
        # Data workers send their errors through pickle, which would call __init__ with the joined message.
        return type(self), (self.problems,)


class ConfigError(_Problems):
    """A setting, a settings file or the command line is wrong."""


class DataError(_Problems):
    """A picture, a caption or a data folder is wrong."""


class DivergedError(EveryDreamError):
    """The loss or the gradients stay non-finite."""

    exit_code = 3


class CheckpointError(EveryDreamError):
    """Checkpoints exist, and none of them is valid."""

    exit_code = 4


class SaveError(EveryDreamError):
    """Checkpoints cannot be written."""

    exit_code = 5


class Stopped(EveryDreamError):
    """Stopped by a signal, after saving."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type[Stopped], tuple[int]]:
        return type(self), (self.signum,)  # to the other processes, as _Problems
