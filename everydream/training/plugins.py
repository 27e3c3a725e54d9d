"""Code of the user's at named moments of a run: `"plugins": ["my_package.my_module.MyClass"]`, see docs/plugins.md.

A plugin is a class that is made without arguments and has methods named after moments; each gets the trainer. All
processes make and call it alike. Its exceptions end the run and name it: silence would hide that it does not work.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everydream.errors import ConfigError, EveryDreamError, did_you_mean

if TYPE_CHECKING:
    from everydream.training.turns import Trainer

MOMENTS = ("after_build", "after_step", "after_save", "before_exit")


class PluginError(EveryDreamError):
    """A plugin raised."""

    exit_code = 1


class Plugins:
    """Made before the weights are loaded. Raises ConfigError with every plugin that cannot be made."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        made = [(name, *_attempt(name)) for name in names]
        problems = [problem for _, _, found in made for problem in found]
        if problems:
            raise ConfigError(problems)
        self._calls = {
            moment: [(name, getattr(plugin, moment)) for name, plugin, _ in made if hasattr(plugin, moment)]
            for moment in MOMENTS
        }

    def after_build(self, trainer: Trainer) -> None:
        """Everything is made and, on a resume, restored; no step is done yet."""
        self._call("after_build", trainer)

    def after_step(self, trainer: Trainer) -> None:
        """After each update. Whatever it does is done once a step: keep it short."""
        self._call("after_step", trainer)

    def has(self, moment: str) -> bool:
        return bool(self._calls[moment])

    def after_save(self, trainer: Trainer) -> None:
        """A checkpoint was handed to the writer; in the background it may not be on disk yet."""
        self._call("after_save", trainer)

    def before_exit(self, trainer: Trainer) -> None:
        """The run ends in order: done, or stopped and saved."""
        self._call("before_exit", trainer)

    def _call(self, moment: str, trainer: Trainer) -> None:
        for name, method in self._calls[moment]:
            _guarded(name, moment, method, trainer)


def _attempt(name: str) -> tuple[Any, tuple[str, ...]]:
    try:
        return make(name), ()
    except ConfigError as error:
        return None, error.problems


def make(name: str) -> Any:
    """The plugin `package.module.Class`. Modules in the working directory are found too."""
    module_name, _, class_name = name.rpartition(".")
    if os.getcwd() not in sys.path:  # `python scripts/train.py` has scripts/ there instead
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"plugins: {name}: {module_name} cannot be imported ({_told(error)})") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        hint = did_you_mean(class_name, vars(module))
        raise ConfigError(f"plugins: {name}: {module_name} has no class {class_name}." + hint)
    methods = [method for method in dir(cls) if method.startswith(("after_", "before_"))]
    for method in methods:
        if method not in MOMENTS:
            raise ConfigError(f"plugins: {name}: {method} is no moment of a run. Moments: {', '.join(MOMENTS)}")
    if not methods:
        raise ConfigError(f"plugins: {name} has none of the methods {', '.join(MOMENTS)}, so it would do nothing")
    try:
        return cls()
    except Exception as error:
        raise ConfigError(f"plugins: {name} cannot be made ({_told(error)}); it is made without arguments") from error


def _guarded(name: str, moment: str, method: Any, trainer: Trainer) -> None:
    try:
        method(trainer)
    except EveryDreamError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin {name} failed in {moment} at step {trainer.state.step}: {_told(error)}. "
            "Mend it or leave it out, then go on with --resume latest"
        ) from error


def _told(error: Exception) -> str:
    """`ValueError: what it says (file.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
