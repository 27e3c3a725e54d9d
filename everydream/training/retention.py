"""Which checkpoints stay: the newest `keep_last` that verify, and each with a file named KEEP in it."""

from __future__ import annotations

from pathlib import Path

from everydream.training.checkpoint import delete, folders, step_of, verify
from everydream.training.storage import DISK, Files

KEEP = "KEEP"
SUPERSEDED = "superseded-"

Signature = tuple[tuple[str, int, int], ...]


class Retention:
    """`keep_last` None keeps all."""

    def __init__(self, checkpoints: Path, keep_last: int | None, files: Files = DISK) -> None:
        assert keep_last is None or keep_last >= 1, f"keep_last {keep_last}: the newest checkpoint is never deleted"
        self._checkpoints, self._keep_last, self._files = checkpoints, keep_last, files
        self._sound: dict[Path, Signature] = {}  # read through in this process, and not touched since

    def apply(self) -> list[Path]:
        """Delete what is older than the newest `keep_last` valid ones; returns what went. Raises OSError.

        The newest is read through each time, and if it is damaged nothing is deleted; an older one is read again only
        when its files' sizes or times have changed, so that keeping many does not mean reading them all at each save.
        """
        found = folders(self._checkpoints)
        if self._keep_last is None or len(found) <= self._keep_last or not self._is_sound(found[0], read=True):
            return []
        kept = 0
        for n, path in enumerate(found):
            kept += self._is_sound(path)
            if kept == self._keep_last:
                return self._delete(found[n + 1 :])
        return []

    def _is_sound(self, path: Path, *, read: bool = False) -> bool:
        now = _signature(path)
        if read or self._sound.get(path) != now:
            self._sound.pop(path, None)
            if verify(path):
                return False
            self._sound[path] = now
        return True

    def _delete(self, paths: list[Path]) -> list[Path]:
        doomed = [path for path in paths if not (path / KEEP).exists()]
        for path in doomed:
            delete(path, self._files)
            self._sound.pop(path, None)
        return doomed


def _signature(folder: Path) -> Signature:
    entries = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in entries)


def supersede(checkpoints: Path, step: int, files: Files = DISK) -> list[Path]:
    """Set aside the checkpoints after `step`, from where the run goes on anew; returns their new places.

    They keep their content under another name. Left as they were, the next resume would find a future that the run
    has not reached again.
    """
    aside = []
    for path in folders(checkpoints):
        if (step_of(path) or 0) > step:
            target = _free_name(path.with_name(SUPERSEDED + path.name))
            files.rename(path, target)
            aside.append(target)
    if aside:
        files.sync_folder(checkpoints)
    return aside


def _free_name(path: Path) -> Path:
    n, free = 1, path
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}-{n}")
    return free
