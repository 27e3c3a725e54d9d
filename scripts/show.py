"""Show: python scripts/show.py PATH [PATH]

PATH is a folder of runs, a run's folder (its recipe and checkpoints, each verified), or a checkpoint (its state, groups
and weights). Two checkpoints: how far the weights went from the first to the second. --quick: do not read the files
through. Exit status 4 if what was asked for has no valid checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import named_if_missing

with named_if_missing():
    from everydream.errors import CheckpointError, ConfigError, EveryDreamError
    from everydream.training.checkpoint import MANIFEST, folders, step_of
    from everydream.training.inspecting import check, show_checkpoint, show_difference, show_run, show_runs, verdict
    from everydream.training.runfolder import Run, runs


def lines(paths: list[Path], quick: bool) -> Iterator[str]:
    """Raises ConfigError for what is none of these, CheckpointError for what has no valid checkpoint."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder. Give a folder of runs, a run's folder, or a checkpoint")
    run = Run(paths[0])
    if len(paths) == 2 or (paths[0] / MANIFEST).exists() or step_of(paths[0].absolute()) is not None:
        for path, problems in check(paths, quick=quick).items():
            if problems:
                raise CheckpointError(f"{path} cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
            yield f"{path}: {verdict(problems, quick)}"
        yield from show_difference(*paths) if len(paths) == 2 else show_checkpoint(paths[0])
    elif run.about:
        checked = check(folders(run.checkpoints), quick=quick)
        yield from show_run(run, checked, quick=quick)
        if checked and all(checked.values()):
            raise CheckpointError(f"{run.folder} has no valid checkpoint")
    elif runs(paths[0]):
        yield from show_runs(paths[0])
    else:
        raise ConfigError(f"{paths[0]} is neither a folder of runs, nor a run's folder, nor a checkpoint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="look at names and sizes only")
    arguments = parser.parse_args()
    if len(arguments.path) > 2:
        parser.error("give one path, or two checkpoints")
    try:
        for line in lines(arguments.path, arguments.quick):
            print(line)
    except EveryDreamError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    with named_if_missing():
        sys.exit(main())
