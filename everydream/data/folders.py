"""Which pictures a root holds, and what the files beside them say. Only reads; never follows a link in a circle."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from everydream.data.captions import FOLDER_FILES, SIDECARS, Values, read_folder_file, read_manifest, read_sidecar
from everydream.data.pictures import EXTENSIONS, MASK, UNREADABLE
from everydream.data.problems import Problem, Unfit

MANIFESTS = ("manifest.json", "manifest.jsonl", "metadata.jsonl")


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
    without_picture: list[Path] = field(default_factory=list)  # captions and masks
    shadowed: list[Path] = field(default_factory=list)  # second sidecars

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
        _find_in_folder(root, findings)
    elif root.path.suffix.lower() in (".json", ".jsonl") and root.path.is_file():
        _find_in_manifest(root, findings)
    else:
        there = "neither a folder nor a manifest" if root.path.exists() else "does not exist"
        findings.problems.append(Problem(root.path, there, "name a folder with pictures", skippable=False))
    if not findings.pictures and not findings.problems:
        findings.problems.append(Problem(root.path, "no pictures in it", "put pictures in it", skippable=False))
    return findings


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# --- folders ---


def _find_in_folder(root: Root, findings: Findings) -> None:
    manifest = _manifest_of(root.path, findings)
    used = set()
    for folder, names in _walk(root.path, findings, ()):
        for found in _pictures_in(folder, names, root, findings):
            relative = found.identity.partition("/")[2]
            if relative in manifest:
                used.add(relative)
                entry = manifest[relative]
                found.source = found.source if entry.caption is None else "manifest"
                found.values = entry.over(found.values)
            findings.pictures.append(_with_default(found, root))
    for image in sorted(set(manifest) - used):
        findings.problems.append(
            Problem(root.path / image, "named in the manifest, but not there", "mend the manifest or add the picture")
        )


def _manifest_of(folder: Path, findings: Findings) -> dict[str, Values]:
    for name in MANIFESTS:
        if (folder / name).is_file():
            entries = findings.attempt(folder / name, read_manifest, skippable=False) or {}
            assert isinstance(entries, dict)
            return {PurePosixPath(image).as_posix(): values for image, values in entries.items()}
    return {}


def _walk(folder: Path, findings: Findings, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its file names), depth first; hidden entries are left out. `above`: the folders we are in."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            findings.problems.append(
                Problem(folder, "a link to a folder that it lies in", "remove the link", skippable=False)
            )
            return
        with os.scandir(folder) as scanned:
            entries = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        findings.problems.append(
            Problem(folder, f"cannot be opened ({error.strerror})", "check its permissions and links", skippable=False)
        )
        return
    folders = {entry.name for entry in entries if _is_folder(entry)}
    yield folder, [entry.name for entry in entries if entry.name not in folders]
    for name in sorted(folders):
        yield from _walk(folder / name, findings, (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if it is named like a picture, the gate says so
        return False


def _pictures_in(folder: Path, names: list[str], root: Root, findings: Findings) -> Iterator[Found]:
    by_key = {(nfc(Path(name).stem), Path(name).suffix.lower()): name for name in names}
    defaults = _folder_values(folder, names, findings)
    pictures = [name for name in names if _is_picture(name)]
    stems = {nfc(Path(name).stem) for name in pictures}
    findings.without_picture += [
        folder / name for name in names if _is_companion(name) and nfc(name[: -len(_ending(name))]) not in stems
    ]
    for name in pictures:
        path, stem = folder / name, nfc(Path(name).stem)
        relative = nfc((folder / name).relative_to(root.path).as_posix())
        if not _usable_name(path, findings):
            continue
        sidecars = [folder / by_key[stem, ending] for ending in SIDECARS if (stem, ending) in by_key]
        sidecars = [sidecar for sidecar in sidecars if sidecar.name.lower() not in FOLDER_FILES]
        findings.shadowed += sidecars[1:]
        values = Values()
        if sidecars:
            read = findings.attempt(sidecars[0], read_sidecar, skippable=True)
            if read is None:
                continue
            assert isinstance(read, Values)
            values = read
        mask = by_key.get((stem + nfc(Path(MASK).stem), Path(MASK).suffix))
        source = "sidecar" if values.caption is not None else "name"
        yield Found(f"{root.name}/{relative}", path, folder / mask if mask else None, values.over(defaults), source)


def _folder_values(folder: Path, names: list[str], findings: Findings) -> Values:
    values = {}
    for name in names:
        if name.lower() in FOLDER_FILES:
            values[FOLDER_FILES[name.lower()]] = findings.attempt(folder / name, read_folder_file, skippable=False)
    return Values(**values)  # type: ignore[arg-type]


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS | UNREADABLE and not name.lower().endswith(MASK)


def _ending(name: str) -> str:
    return MASK if name.lower().endswith(MASK) else Path(name).suffix


def _is_companion(name: str) -> bool:
    """A caption or a mask, which wants a picture beside it."""
    special = name.lower() in FOLDER_FILES or name.lower() in MANIFESTS
    return not special and (_ending(name).lower() in (*SIDECARS, MASK))


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


# --- a manifest alone ---


def _find_in_manifest(root: Root, findings: Findings) -> None:
    """The pictures that it names and no others; folder files and sidecars beside them count as always."""
    entries = findings.attempt(root.path, read_manifest, skippable=False)
    if entries is None:
        return
    assert isinstance(entries, dict)
    by_folder: dict[Path, dict[str, str]] = {}
    for image in entries:
        path = root.path.parent / image
        by_folder.setdefault(path.parent, {})[path.name] = image
    for folder, images in by_folder.items():
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        for name in sorted(set(images) - set(names)):
            findings.problems.append(
                Problem(folder / name, "named in the manifest, but not there", "mend the manifest or add the picture")
            )
        unnamed = {name for name in names if _is_picture(name) and name not in images}
        beside = Findings(problems=findings.problems)
        for found in _pictures_in(folder, [n for n in names if n not in unnamed], Root(root.name, folder), beside):
            image = images[found.path.name]
            entry = entries[image]
            found.identity = f"{root.name}/{PurePosixPath(image).as_posix()}"
            found.source = found.source if entry.caption is None else "manifest"
            found.values = entry.over(found.values)
            findings.pictures.append(_with_default(found, root))
