"""The door of scripts/train.py: settings, or an end with exit code 0 (--help, --print_config) or 2 (errors).

Everything here runs before torch is imported: a mistake is answered in under half a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from everydream.config.redact import clean
from everydream.config.resolve import Resolved, resolve
from everydream.errors import ConfigError


def settings_or_exit(argv: Sequence[str]) -> Resolved:
    """Only rank 0 prints; results go to stdout, all else to stderr."""
    from everydream.config import show

    if "--help" in argv or "-h" in argv:
        _print(show.help_text())
        sys.exit(0)
    try:
        resolved = resolve(argv, os.environ)
    except ConfigError as error:
        _print(*error.problems, to_stderr=True)
        sys.exit(error.exit_code)
    if resolved.action in ("print_config", "print_config_json"):
        if resolved.notes:
            _print(*resolved.notes, to_stderr=True)
        _print(show.config_json(resolved) if resolved.action == "print_config_json" else show.config_table(resolved))
        sys.exit(0)
    return resolved


def _print(*texts: str, to_stderr: bool = False) -> None:
    if not _is_rank_0():
        return
    try:
        print(*map(clean, texts), sep="\n", file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except BrokenPipeError:  # `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_rank_0() -> bool:
    """From the launcher's variables: neither torch nor accelerate is imported yet."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")
