"""A run from its settings to its exit code, and what ends it before its time."""

from __future__ import annotations

import os
from collections.abc import Callable

from everydream.config.cli import print_result
from everydream.config.compare import changes
from everydream.config.resolve import Resolved
from everydream.errors import DataError, EveryDreamError, Stopped
from everydream.runtime import StopRequest, is_lost_process
from everydream.training.build import Build
from everydream.training.console import Console
from everydream.training.plan_text import plan_text
from everydream.training.prepare import Prepared
from everydream.training.quiet import quiet_libraries


def run(resolved: Resolved) -> int:
    """The whole run, or the plan of a dry one. Returns the exit code."""
    return _guarded(resolved, Build.run)


def cache(resolved: Resolved) -> int:
    """Only the caches that the run would make, class pictures included. Returns the exit code."""
    return _guarded(resolved, Build.cache)


def _guarded(resolved: Resolved, work: Callable[[Build], int]) -> int:
    """What is the user's to mend is printed without a traceback. `work` returns a signal's number, 0 for none."""
    settings = resolved.settings
    quiet_libraries(settings.verbose)
    stop = StopRequest()
    stop.install()
    is_main = os.environ.get("RANK", "0") == "0"
    level = "verbose" if settings.verbose else "quiet" if settings.quiet or not is_main else "normal"
    console = Console(level)
    build: Build | None = None
    code, reason = 1, "a bug, see the traceback"
    try:
        prepared = Prepared(resolved, changes, stop, console)
        if resolved.action == "dry_run":
            if is_main:
                print_result(plan_text(prepared))
            prepared.ranks.leave()
            return 0
        build = Build(prepared)
        signum = work(build)
        code, reason = (128 + signum, build.stopped_by(signum)) if signum else (0, "finished")
        prepared.ranks.leave()
    except EveryDreamError as error:
        code, reason = error.exit_code, str(error)
        # A picture that one process alone cannot read is told by that one; all else all of them know.
        if is_main or (build is not None and isinstance(error, DataError)):
            console.say(reason, "info" if isinstance(error, Stopped) else "error")
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = (
            f"process {os.environ.get('RANK', '0')} cannot reach the others: at least one died, or gave no answer for "
            f"{settings.process_timeout_minutes:g} minutes ({error}). Its own last words say why. Go on from the last "
            "checkpoint with --resume latest; if it only needed longer, raise process_timeout_minutes"
        )
        console.say(reason, "error")
    finally:
        if build is not None:
            build.close(code, reason)
        console.close()
    return code
