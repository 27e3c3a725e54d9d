"""The door of scripts/train.py: settings, or an end with exit code 0 (--help, --print_config) or 2 (errors).

Everything here runs before torch is imported: a mistake is answered in under half a second.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence

from everydream.config.redact import clean
from everydream.config.resolve import Resolved, resolve
from everydream.errors import ConfigError, SaveError


def settings_or_exit(argv: Sequence[str]) -> Resolved:
    """Only rank 0 prints; results go to stdout, all else to stderr."""
    from everydream.config import show

    if "--help" in argv or "-h" in argv:
        print_result(show.help_text())
        sys.exit(0)
    try:
        resolved = resolve(argv, os.environ)
    except ConfigError as error:
        _say(error.problems)
        sys.exit(error.exit_code)
    if resolved.action in ("print_config", "print_config_json"):
        _say(resolved.notes)
        form = show.config_json if resolved.action == "print_config_json" else show.config_table
        print_result(form(resolved))
        sys.exit(0)
    return resolved


def _say(texts: Iterable[str]) -> None:
    if _is_rank_0():
        for text in texts:
            print(clean(text), file=sys.stderr)


def print_result(result: str) -> None:
    """On stdout. What its encoding does not have is escaped: a name of a file may be any bytes."""
    if not _is_rank_0():
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(result, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        if not isinstance(error, BrokenPipeError):  # that is `… --help | head`
            _say([f"the result cannot be written to stdout: {error.strerror}"])
            sys.exit(SaveError.exit_code)


def _is_rank_0() -> bool:
    """From the launcher's variables: neither torch nor accelerate is imported yet."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")
