"""Convert: python scripts/convert.py MODEL TARGET [--dtype float16]

MODEL is a run's folder (its newest checkpoint that is whole), a checkpoint, a diffusers folder, an original single file
or a hub id. TARGET is what is to be made: a name that ends with .safetensors becomes a single file in the original
Stable Diffusion layout, any other a diffusers folder.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import named_if_missing

with named_if_missing():
    from everydream.errors import ConfigError, EveryDreamError, SaveError
    from everydream.models.family import read_facts
    from everydream.training.runfolder import model_in, require_average

if TYPE_CHECKING:
    from torch import Tensor

    from everydream.models.files import FileContent

DTYPES = ("float16", "bfloat16", "float32")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")
    parser.add_argument("--average", action="store_true", help="of a checkpoint: its averaged weights (ema_decay_rate)")
    parser.add_argument("--title", help="in a single file's metadata (default: its name)")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="if MODEL does not say"
    )
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read .ckpt and .bin files; only tensors are loaded"
    )
    try:
        convert(parser.parse_args())
    except EveryDreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def convert(options: argparse.Namespace) -> None:
    """Raises ConfigError, and SaveError where TARGET cannot be written; nothing half-written stays."""
    if options.target.exists():
        raise ConfigError(f"TARGET {options.target} exists: give a name that is free, or remove it first")
    model, average_file = model_in(options.model)
    average = load_average(require_average(average_file)) if options.average else {}
    facts = read_facts(model, options.revision, options.allow_pickle, options.prediction_type)
    import torch  # only once the arguments are right

    from everydream.models.writing import folder, single_file

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.target.suffix == ".safetensors":
        title, date = options.title or options.target.stem, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        save(options.target, single_file(facts, dtype=dtype, title=title, date=date, replaced=average))
    else:
        save(options.target, folder(facts, dtype=dtype, replaced=average))
    print(options.target)


def save(target: Path, contents: FileContent | dict[str, FileContent]) -> None:
    """A file, or a folder of files: whole or not at all."""
    from everydream.training.bag import as_content
    from everydream.training.storage import (
        DISK,
        make_folders,
        remove_tree,
        removed_on_error,
        write_atomically,
        write_file,
    )

    try:
        if not isinstance(contents, dict):
            write_atomically(target, as_content(contents))
            return
        temporary = target.with_name(f".saving-{target.name}")
        remove_tree(DISK, temporary)
        with removed_on_error(temporary, DISK):
            for name, content in contents.items():
                make_folders(DISK, (temporary / name).parent)
                write_file(DISK, temporary / name, as_content(content))
            DISK.rename(temporary, target)
        DISK.sync_folder(target.parent)
    except OSError as error:
        raise SaveError(f"TARGET {target} cannot be written: {error.strerror or error}") from None


def load_average(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


if __name__ == "__main__":
    with named_if_missing():
        sys.exit(main())
