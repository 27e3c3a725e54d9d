"""Which pictures a root holds, and what the files beside them say. Only reads; never follows a link in a circle."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everydream.data.captions import FOLDER_FILES, SIDECARS, Values, read_folder_file, read_manifest, read_sidecar
from everydream.data.pictures import EXTENSIONS, MASK, UNREADABLE
from everydream.data.problems import Problem, Unfit

MANIFESTS = ("manifest.json", "manifest.jsonl", "metadata.jsonl")  # first found in a folder wins
NOT_OURS = frozenset({"thumbs.db", "desktop.ini"})  # what file managers leave; hidden files are left out anyway
LONELY = "caption files and masks without a picture"
SECOND = "second caption files and masks of a picture: where two say something, the first counts"
SECOND_MANIFEST = "second manifests in a folder, not used"


@dataclass(frozen=True, slots=True)
class Root:
    """A place with pictures: a folder, or a manifest (.json, .jsonl). `name` begins the identities in it."""

    name: str
    path: Path
    default_caption: str | None = None  # instance_prompt or class_prompt


def roots_of(name: str, paths: tuple[Path, ...], default_caption: str | None = None) -> list[Root]:
    """One root is called `name`; several are called name-0, name-1, …"""
    if len(paths) == 1:
        return [Root(name, paths[0], default_caption)]
    return [Root(f"{name}-{index}", path, default_caption) for index, path in enumerate(paths)]


@dataclass(slots=True)
class Found:
    """A picture file and what was said about it."""

    identity: str
    path: Path
    mask: Path | None
    values: Values
    source: str  # of the caption: manifest, sidecar, default, name


@dataclass(slots=True)
class Findings:
    """Filled while walking."""

    pictures: list[Found] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    listed: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))  # title of a note → files
    unread: Counter[str] = field(default_factory=Counter)  # ending → files that have no part in training

    def add(self, other: Findings) -> None:
        self.pictures += other.pictures
        self.problems += other.problems
        self.unread += other.unread
        for title, paths in other.listed.items():
            self.listed[title] += paths

    def stop(self, path: Path, reason: str, advice: str) -> None:
        """A problem that no bad_images skips."""
        self.problems.append(Problem(path, reason, advice, skippable=False))

    def attempt(self, path: Path, read: Callable[[Path], object], skippable: bool) -> object | None:
        """`read(path)`; None and a problem where that fails."""
        try:
            return read(path)
        except Unfit as error:
            self.problems.append(Problem(path, error.reason, error.advice, skippable))
        except OSError as error:
            self.problems.append(
                Problem(path, f"cannot be read ({error.strerror})", "check its permissions", skippable)
            )
        return None


def find(root: Root) -> Findings:
    """Every picture under the root, in no particular order."""
    findings = Findings()
    if root.path.is_dir():
        walked = list(_walk(root.path, findings, ()))
        _find_in(root, root.path, walked, _manifests_in(root.path, walked, findings), findings)
        findings.unread += Counter(ending for _, names in walked for ending in map(_unread, names) if ending)
    elif root.path.suffix.lower() in (".json", ".jsonl") and root.path.is_file():
        named = _entries_of(root.path, findings)
        beside = Findings(problems=findings.problems)  # what else lies there is nobody's business
        base = root.path.parent
        _find_in(root, base, _named_in(base, named, findings), named, beside)
        findings.pictures += beside.pictures
        findings.listed[SECOND] += beside.listed[SECOND]
    else:
        there = "neither a folder nor a manifest" if root.path.exists() else "does not exist"
        findings.stop(root.path, there, "name a folder with pictures")
    if not findings.pictures and not findings.problems:
        findings.stop(root.path, "no pictures in it", "put pictures in it")
    return findings


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


Walked = tuple[Path, list[str]]  # a folder, its file names


def _find_in(root: Root, base: Path, walked: Sequence[Walked], named: dict[str, Values], findings: Findings) -> None:
    """`named`: path relative to `base` → what a manifest says of it."""
    pictures: set[str] = set()
    for folder, names in walked:
        prefix = _prefix(folder, base)
        pictures |= {prefix + nfc(name) for name in names if _is_picture(name)}
        for found in _pictures_in(folder, names, f"{root.name}/{prefix}", findings):
            entry = named.get(found.identity.partition("/")[2], Values())
            found.source = found.source if entry.caption is None else "manifest"
            found.values = entry.over(found.values)
            findings.pictures.append(_with_default(found, root))
    for image in sorted(set(named) - pictures):
        reason = "not a picture that is read" if os.path.exists(base / image) else "not there"
        findings.problems.append(
            Problem(base / image, f"named in the manifest, but {reason}", "mend the manifest or add the picture")
        )


def _prefix(folder: Path, base: Path) -> str:
    """What stands before its files' names in an identity."""
    return "" if folder == base else nfc(folder.relative_to(base).as_posix()) + "/"


# --- manifests ---


def _manifests_in(base: Path, walked: Sequence[Walked], findings: Findings) -> dict[str, Values]:
    """What the manifests of all folders say, each of its own folder and those below."""
    named: dict[str, Values] = {}
    for folder, names in walked:
        manifests = sorted((name for name in names if name.lower() in MANIFESTS), key=_manifest_order)
        findings.listed[SECOND_MANIFEST] += [folder / name for name in manifests[1:]]
        for name in manifests[:1]:
            _merge(named, folder / name, _prefix(folder, base), findings)
    return named


def _manifest_order(name: str) -> tuple[int, str]:
    return MANIFESTS.index(name.lower()), name


def _merge(named: dict[str, Values], manifest: Path, prefix: str, findings: Findings) -> None:
    for image, values in _entries_of(manifest, findings).items():
        if image.startswith("../"):
            findings.stop(
                manifest, f"it names {image!r}, outside of its folder", "put the manifest beside the pictures"
            )
        elif prefix + image in named:
            findings.stop(manifest, f"it names {image!r}, as a manifest above it does", "keep one entry a picture")
        else:
            named[prefix + image] = values


def _entries_of(manifest: Path, findings: Findings) -> dict[str, Values]:
    def read(path: Path) -> dict[str, Values]:
        return read_manifest(path, lambda problem: findings.stop(path, problem.reason, problem.advice))

    entries = findings.attempt(manifest, read, skippable=False) or {}
    assert isinstance(entries, dict)
    return entries


def _named_in(base: Path, named: Collection[str], findings: Findings) -> list[Walked]:
    """The folders of these pictures; of their files the pictures and what is called as they are."""
    images: dict[str, set[str]] = {}
    for image in named:
        folder, name = posixpath.split(image)
        images.setdefault(folder, set()).add(name)
    walked = []
    for at, wanted in images.items():
        if os.path.isdir(base / at):
            names = [entry.name for entry in _scanned(base / at, findings)]
            walked.append((base / at, [name for name in names if nfc(name) in wanted or not _is_picture(name)]))
    return walked


# --- folders ---


def _walk(folder: Path, findings: Findings, above: tuple[tuple[int, int], ...]) -> Iterator[Walked]:
    """(folder, its file names), depth first; hidden entries are left out. `above`: the folders we are in."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            findings.stop(folder, "a link to a folder that it lies in", "remove the link")
            return
    except OSError as error:
        _closed(folder, error, findings)
        return
    entries = _scanned(folder, findings)
    folders = {entry.name for entry in entries if _is_folder(entry)}
    yield folder, [entry.name for entry in entries if entry.name not in folders]
    for name in sorted(folders):
        yield from _walk(folder / name, findings, (*above, here))


def _scanned(folder: Path, findings: Findings) -> list[os.DirEntry[str]]:
    """By name, without the hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        _closed(folder, error, findings)
        return []


def _closed(folder: Path, error: OSError, findings: Findings) -> None:
    findings.stop(folder, f"cannot be opened ({error.strerror})", "check its permissions and links")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if it is named like a picture, the gate says so
        return False


def _pictures_in(folder: Path, names: list[str], prefix: str, findings: Findings) -> Iterator[Found]:
    """With what the files beside them say. `prefix` begins their identities."""
    defaults = _folder_values(folder, names, findings)
    pictures = [name for name in names if _is_picture(name)]
    stems = {_stem(name) for name in pictures}
    beside: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)  # several: a.txt and a.TXT, NFC and NFD
    for name in filter(_is_companion, names):
        beside[_stem(name), _ending(name)].append(folder / name)
        if _stem(name) not in stems:
            findings.listed[LONELY].append(folder / name)
    for name in pictures:
        path = folder / name
        if not _usable_name(path, findings):
            continue
        values = _said([path for ending in SIDECARS for path in beside[_stem(name), ending]], findings)
        if values is None:
            continue
        masks = beside[_stem(name), MASK]
        findings.listed[SECOND] += masks[1:]
        source = "sidecar" if values.caption is not None else "name"
        yield Found(prefix + nfc(name), path, masks[0] if masks else None, values.over(defaults), source)


def _said(sidecars: Sequence[Path], findings: Findings) -> Values | None:
    """What these say together; None and a problem where one cannot be read."""
    values = Values()
    for sidecar in sidecars:
        read = findings.attempt(sidecar, read_sidecar, skippable=True)
        if read is None:
            return None
        assert isinstance(read, Values)
        if values.contradicts(read):
            findings.listed[SECOND].append(sidecar)
        values = values.over(read)
    return values


def _folder_values(folder: Path, names: list[str], findings: Findings) -> Values:
    values = {}
    for name in names:
        key = FOLDER_FILES.get(name.lower())
        if key in values:
            findings.stop(folder / name, "another file has the same name but for its case", "keep one of them")
        elif key is not None:
            values[key] = findings.attempt(folder / name, read_folder_file, skippable=False)
    return Values(**values)  # type: ignore[arg-type]


def _ending(name: str) -> str:
    """In lower case."""
    return MASK if name.lower().endswith(MASK) else Path(name).suffix.lower()


def _stem(name: str) -> str:
    return nfc(name[: len(name) - len(_ending(name))])


def _is_picture(name: str) -> bool:
    return _ending(name) in EXTENSIONS | UNREADABLE


def _is_companion(name: str) -> bool:
    """A caption or a mask, which wants a picture beside it."""
    return name.lower() not in FOLDER_FILES and _ending(name) in (*SIDECARS, MASK)


def _unread(name: str) -> str:
    """The ending of a file that has no part in training."""
    has_part = _is_picture(name) or _is_companion(name) or name.lower() in (*FOLDER_FILES, *MANIFESTS, *NOT_OURS)
    return "" if has_part else _ending(name) or "without ending"


def _usable_name(path: Path, findings: Findings) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        findings.problems.append(Problem(path, "its name is not UTF-8", "rename it"))
        return False
    if path.suffix.lower() in UNREADABLE:
        findings.problems.append(Problem(path, f"{path.suffix} pictures cannot be read", "convert it to JPEG or PNG"))
        return False
    return True


def _with_default(found: Found, root: Root) -> Found:
    if found.values.caption is None and root.default_caption is not None:
        found.source, found.values = "default", Values(caption=root.default_caption).over(found.values)
    return found
