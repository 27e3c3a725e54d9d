"""Class pictures for prior preservation, made with the base model where the user's folder has too few.

Ruiz et al. 2023, "DreamBooth", section 3.3: the model's own pictures of the class keep it from forgetting the class.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from everydream.draws import torch_generator
from everydream.errors import ConfigError, DataError, SaveError
from everydream.training.divided import divided, on_main
from everydream.training.lock import Lock
from everydream.training.storage import Bytes, write_atomically

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from everydream.runtime import Ranks

    # prompts, a CPU generator for each → a picture for each
    Generate = Callable[[Sequence[str], Sequence[torch.Generator]], Sequence[Image]]


def file_name(index: int, seed: int) -> str:
    return f"class-{index:06d}-seed-{seed}.png"


def missing(present: Collection[str], wanted: int, seed: int) -> list[int]:
    """Numbers of the pictures still to be made so that the folder holds `wanted`. `present`: its pictures' names.

    Pictures of the user's, or of another seed, count first; the rest are numbered from 0 and made where not there.
    """
    ours = re.compile(r"class-\d{6,}-seed-" + str(seed) + r"\.png")
    others = sum(not ours.fullmatch(name) for name in present)
    return [i for i in range(wanted - others) if file_name(i, seed) not in present]


def generate_missing(
    folder: Path,
    wanted: int,
    prompt: str,
    seed: int,
    generate: Generate,
    *,
    present: Callable[[], Collection[str]],
    ranks: Ranks,
    stop: Callable[[], int],
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda n: None,
    about: Mapping[str, str] | None = None,
) -> int:
    """Fills `folder` up to `wanted` pictures and returns how many were made; on all processes, each making its part.

    `present()`: names of the pictures in the folder, asked on rank 0. `advance(n)`: n more are there. `about` goes into
    each PNG, beside prompt, seed and number. A picture depends on prompt, seed and its number: batches are cut by
    number, so that an interrupted run goes on with the same ones, bit for bit. Where nothing is missing, nothing is
    written. Raises Stopped, ConfigError (another run fills the folder) and DataError (it cannot be written to).
    """

    def make(first: int) -> int:
        numbers = range(first, min(first + batch_size, wanted))
        generators = [torch_generator(seed, "class", i) for i in numbers]
        pictures = generate([prompt] * len(numbers), generators)
        new = [(i, picture) for i, picture in zip(numbers, pictures, strict=True) if i in todo]
        for i, picture in new:
            facts = {"prompt": prompt, "seed": str(seed), "number": str(i), **(about or {})}
            _write(folder / file_name(i, seed), picture, facts)
        return len(new)

    def ask() -> set[int]:
        return set(missing(present(), wanted, seed))

    if not on_main(ranks, ask):
        return 0
    lock = PassingLock(folder / ".everydream.lock")
    try:
        on_main(ranks, lambda: _take(lock))
        todo = on_main(ranks, ask)  # another run may have been at it until now
        firsts = sorted({i - i % batch_size for i in todo})
        return sum(divided(ranks, firsts, make, stop, lambda made: advance(sum(made))))
    finally:
        lock.release()


class PassingLock(Lock):
    """Its file goes with it: the folder is the user's."""

    def take(self, *, sign: bool = True) -> None:
        super().take(sign=sign)
        while self._handle is not None and not self._is_there(self._handle):
            super().release()  # whoever held it removed the file after we had opened it: there must be a new one
            super().take(sign=sign)

    def release(self) -> None:
        if self._handle is not None:
            with suppress(OSError):  # Windows removes no open file, and then it stays
                self._path.unlink()  # while it is held: after that it may be another's
        super().release()

    def _is_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False


def _take(lock: Lock) -> None:
    folder = lock.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
    except ConfigError:
        raise ConfigError(
            f"class_data_root: another run is making pictures in {folder}. Wait for it, or name another folder"
        ) from None
    except (OSError, SaveError) as error:
        raise DataError(f"class_data_root: {folder} cannot be written to ({error}). Name another folder") from error


def _write(path: Path, picture: Image, facts: Mapping[str, str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, value in facts.items():
        info.add_itxt(key, value)
    picture.save(buffer, format="PNG", pnginfo=info)
    try:
        write_atomically(path, Bytes(buffer.getvalue()))
    except OSError as error:
        raise DataError(
            f"class_data_root: {path} cannot be written ({error}). Make room or name another folder"
        ) from error
