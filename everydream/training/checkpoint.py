"""Checkpoints: a folder that is whole or is not there.

    checkpoints/step-0000001200/   immutable once it has this name
        …                          model/, optimizer.safetensors, ema.safetensors, state.json, data.json
        MANIFEST.json              name → bytes, sha256; its own hash; written last

A save writes a temporary folder beside the others, every file synced, the manifest last, and then renames it. So a
process killed at any instant, or a power cut, leaves the old checkpoints and perhaps the new one, never a part of it.
safetensors loads flipped bits without complaint, hence the hashes. Nothing here needs torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from everydream.errors import SaveError
from everydream.training.storage import (
    DISK,
    Bytes,
    Content,
    Files,
    Written,
    make_folders,
    remove_tree,
    removed_on_error,
    sha256_of,
    write_file,
)

FORMAT = "everydream-checkpoint-1"
MANIFEST = "MANIFEST.json"
SAVING, DELETING = ".saving-", ".deleting-"  # folders under way; a crash may leave them, `clean` removes them
_NAME = re.compile(r"step-(\d{10})")


def name_of(step: int) -> str:
    return f"step-{step:010d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def folders(checkpoints: Path) -> list[Path]:
    """The folders named as checkpoints, valid or not, highest step first."""
    if not checkpoints.is_dir():
        return []
    named = [path for path in checkpoints.iterdir() if step_of(path) is not None]
    return sorted(named, key=lambda path: path.name, reverse=True)


# Writing


def commit(checkpoints: Path, step: int, contents: Mapping[str, Content], files: Files = DISK) -> Path:
    """Write a checkpoint; when this returns it survives a power cut. `contents`: relative name with slashes → content.

    A valid checkpoint of this step that is there already is left as it is: a run is a function of its settings, so it
    would be the same. Raises SaveError, with nothing half-written left.
    """
    final = checkpoints / name_of(step)
    temporary = checkpoints / (SAVING + final.name)
    try:
        make_folders(files, checkpoints)
        if final.exists():
            if not verify(final):
                return final
            delete(final, files)
        remove_tree(files, temporary)
        with removed_on_error(temporary, files):
            _write(temporary, step, contents, files)
            files.rename(temporary, final)
        files.sync_folder(checkpoints)
    except OSError as error:
        raise SaveError(_why(error, final)) from error
    return final


def _write(folder: Path, step: int, contents: Mapping[str, Content], files: Files) -> None:
    files.make_folder(folder)
    made = {folder}
    written = {}
    for name, content in sorted(contents.items()):
        path = folder / name
        for parent in reversed(path.relative_to(folder).parents[:-1]):
            if folder / parent not in made:
                files.make_folder(folder / parent)
                made.add(folder / parent)
        written[name] = write_file(files, path, content)
    write_file(files, folder / MANIFEST, Bytes(_manifest(step, written)))
    for path in sorted(made, reverse=True):  # a file's name is only durable once the folder that holds it is
        files.sync_folder(path)


def _manifest(step: int, written: Mapping[str, Written]) -> bytes:
    listed = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in written.items()}
    content = {"format": FORMAT, "step": step, "files": listed}
    return json.dumps({**content, "sha256": _own_hash(content)}, indent=1).encode()


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _why(error: OSError, path: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        reason += f" ({free / 1e9:.2f} GB free there): make room, or set keep_last to keep fewer checkpoints"
    return f"cannot save {path}: {reason}"


# Reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash. Raises ValueError saying what is wrong with it."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from error
    try:
        content = json.loads(text)
        own_hash = content.pop("sha256")
        whole = own_hash == _own_hash(content)
        written_by = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST}: not whole ({type(error).__name__}: {error})") from error
    if written_by != FORMAT:
        raise ValueError(f"{MANIFEST}: format {written_by!r}, this program reads {FORMAT!r}")
    if not whole:
        raise ValueError(f"{MANIFEST}: its own hash does not match its content")
    return content


def verify(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a line a problem; none: every file is as it was written, byte for byte.

    Without `hashes` only names and sizes are looked at, which costs no reading.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    named = step_of(folder)
    problems = [] if named in (None, manifest["step"]) else [f"{MANIFEST}: of step {manifest['step']}"]
    for name, file in manifest["files"].items():
        problem = _problem(folder, name, Written(file["bytes"], file["sha256"]), hashes)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _problem(folder: Path, name: str, expected: Written, hashes: bool) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "points out of the checkpoint"
    path = folder / relative
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is missing"
        if found.st_size != expected.size:
            return f"{found.st_size} bytes, {expected.size} were written"
        if hashes and sha256_of(path) != expected:
            return "its bytes have changed since they were written (sha256)"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    path: Path
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path} cannot be used: {'; '.join(self.problems)}"


@dataclass(frozen=True)
class Found:
    path: Path | None
    skipped: tuple[Skipped, ...]


def find_latest(checkpoints: Path, before: int | None = None) -> Found:
    """The valid checkpoint of the highest step (below `before`), with the ones above it that were skipped."""
    skipped: list[Skipped] = []
    for folder in folders(checkpoints):
        if before is not None and (step_of(folder) or 0) >= before:
            continue
        problems = verify(folder)
        if not problems:
            return Found(folder, tuple(skipped))
        skipped.append(Skipped(folder, tuple(problems)))
    return Found(None, tuple(skipped))


# Removing


def delete(folder: Path, files: Files = DISK) -> None:
    """By rename first, so that a checkpoint half deleted never has a checkpoint's name."""
    doomed = folder.with_name(DELETING + folder.name)
    remove_tree(files, doomed)
    files.rename(folder, doomed)
    files.sync_folder(folder.parent)
    remove_tree(files, doomed)


def clean(folder: Path, files: Files = DISK, name: str = "") -> list[Path]:
    """Remove what a killed process left half-written or half-deleted; only for the holder of the run's lock.

    `name`: only what begins so, in a folder that others write to as well.
    """
    if not folder.is_dir():
        return []
    left = [path for path in sorted(folder.iterdir()) if path.name.startswith((SAVING + name, DELETING + name))]
    for path in left:
        remove_tree(files, path)
    return left
