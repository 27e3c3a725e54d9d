"""What the data was, kept in each checkpoint, so that a resume sees whether it still is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from everydream.data.problems import listed
from everydream.data.scan import Sample

Fingerprint = dict[str, str]  # identity → "<picture>:<caption>:<the rest>", plain JSON


def fingerprint(samples: Iterable[Sample]) -> Fingerprint:
    """A digest of each picture's bytes, of its caption, and of the values and the mask beside it."""
    return {
        sample.identity: f"{sample.content[:16]}:{_short(sample.caption)}:"
        + _short(
            sample.multiply,
            sample.cond_dropout,
            sample.flip_p,
            sample.loss_scale,
            sample.shuffle_tags,
            sample.mask_content,
        )
        for sample in samples
    }


def _short(*values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Changes:
    """Identities, sorted; `changed` with what about them."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def lines(self, limit: int = 20) -> list[str]:
        """For the error message or the note."""
        lists = [
            (f"{len(self.changed)} changed", [f"{identity} ({what})" for identity, what in self.changed]),
            (f"{len(self.added)} added", list(self.added)),
            (f"{len(self.removed)} removed", list(self.removed)),
        ]
        return [listed(title, items, limit) for title, items in lists if items]


_PARTS = ("picture", "caption", "values beside it")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> Changes:
    """What differs between two fingerprints."""
    changed = []
    for identity in sorted(before.keys() & now.keys()):
        pairs = zip(_PARTS, before[identity].split(":"), now[identity].split(":"), strict=True)
        what = [part for part, old, new in pairs if old != new]
        if what:
            changed.append((identity, ", ".join(what)))
    return Changes(tuple(sorted(now.keys() - before.keys())), tuple(sorted(before.keys() - now.keys())), tuple(changed))
