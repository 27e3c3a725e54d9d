"""Roots → samples: every picture and caption checked, every problem in one report.

A sample's identity is `<root name>/<NFC relative POSIX path>`; samples are sorted by it, never by directory order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everydream.data.captions import caption_from_name, is_camera_name
from everydream.data.folders import Findings, Found, Root, find, nfc
from everydream.data.gate import Checked, Progress, check_pictures, no_progress
from everydream.data.problems import Problem, Unfit, listed, shown
from everydream.data.verify import PictureFacts
from everydream.errors import DataError


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its caption. None for a value: the run's setting counts."""

    identity: str
    path: Path
    width: int  # upright, that is after EXIF orientation
    height: int
    caption: str
    multiply: float
    cond_dropout: float | None
    flip_p: float | None
    loss_scale: float
    shuffle_tags: bool | None
    mask_path: Path | None
    content: str  # digest of the file's bytes
    mask_content: str | None = None


@dataclass(frozen=True, slots=True)
class Scan:
    """The good samples, everything that is wrong, and what the user should know."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def usable(self, bad_images: str = "error") -> tuple[Sample, ...]:
        """The samples, where `bad_images` ("error", "skip") allows to go on. Raises DataError with every problem."""
        fatal = [problem for problem in self.problems if bad_images == "error" or not problem.skippable]
        if fatal:
            hint = "" if bad_images == "skip" else " (bad_images: skip leaves bad pictures out)"
            count = f"{len(fatal)} problem{'s' * (len(fatal) > 1)} in the data{hint}:"
            raise DataError([count, *map(str, fatal)])
        if not self.samples:
            raise DataError(["no usable pictures:", *map(str, self.problems)])
        return self.samples


def scan(
    roots: Sequence[Root],
    *,
    max_image_megapixels: float = 100.0,
    masked_loss: bool = False,
    workers: int = 4,
    cache_dir: Path | None = None,
    remember: bool = True,
    progress: Progress = no_progress,
) -> Scan:
    """Find, read and decode everything once. `progress` may raise to stop; what was checked so far is kept."""
    findings = Findings()
    notes: list[str] = []
    for root in roots:
        found = find(root)
        notes += _notes_of(root, found)
        findings.add(found)
    notes += _unused_prompt(roots, findings)
    pictures = _unique(findings)
    masks = {found.mask for found in pictures if found.mask is not None}
    checked = check_pictures(
        [*(found.path for found in pictures), *(masks if masked_loss else ())],
        max_megapixels=max_image_megapixels,
        workers=workers,
        memory=None if cache_dir is None else cache_dir / "scan",
        remember=remember,
        progress=progress,
    )
    samples = [sample for found in pictures if (sample := _sample(found, checked, masked_loss, findings)) is not None]
    if masks and not masked_loss:
        notes.append(f"{len(masks)} masks are without effect: masked_loss is off")
    notes += _notes(findings, samples)
    return Scan(tuple(samples), tuple(sorted(findings.problems, key=lambda p: shown(p.path))), tuple(notes))


def _unique(findings: Findings) -> list[Found]:
    counts = Counter(found.identity for found in findings.pictures)
    for found in findings.pictures:
        if counts[found.identity] > 1:
            reason = "another file has the same name once Unicode is normalised (NFC)"
            findings.problems.append(Problem(found.path, reason, "rename one of them", skippable=False))
    unique = [found for found in findings.pictures if counts[found.identity] == 1]
    return sorted(unique, key=lambda found: found.identity)


def _sample(found: Found, checked: dict[Path, Checked], masked_loss: bool, findings: Findings) -> Sample | None:
    picture = checked[found.path]
    if isinstance(picture, Unfit):
        findings.problems.append(Problem(found.path, picture.reason, picture.advice))
        return None
    mask: Checked | None = checked[found.mask] if masked_loss and found.mask is not None else None
    if mask is not None:
        problem = mask if isinstance(mask, Unfit) else _mask_problem(picture, mask)
        if problem is not None:
            assert found.mask is not None
            findings.problems.append(Problem(found.mask, problem.reason, problem.advice))
            return None
        assert isinstance(mask, PictureFacts)
    values = found.values
    return Sample(
        identity=found.identity,
        path=found.path,
        width=picture.width,
        height=picture.height,
        caption=caption_from_name(nfc(found.path.stem)) if values.caption is None else values.caption,
        multiply=1.0 if values.multiply is None else values.multiply,
        cond_dropout=values.cond_dropout,
        flip_p=values.flip_p,
        loss_scale=1.0 if values.loss_scale is None else values.loss_scale,
        shuffle_tags=values.shuffle_tags,
        mask_path=found.mask if mask else None,
        content=picture.content,
        mask_content=mask.content if mask else None,
    )


def _mask_problem(picture: PictureFacts, mask: PictureFacts) -> Unfit | None:
    if abs(mask.width * picture.height / (mask.height * picture.width) - 1) > 0.02:
        return Unfit(
            f"the mask is {mask.width}×{mask.height}, its picture {picture.width}×{picture.height}",
            "give the mask the picture's shape",
        )
    if mask.peak == 0:
        return Unfit("the mask is black everywhere, so nothing would be learned", "mend or remove it")
    return None


# --- notes ---


def _notes_of(root: Root, findings: Findings) -> list[str]:
    """Where the captions of one root come from."""
    notes = []
    named = [found for found in findings.pictures if found.source == "name"]
    if named and len(named) < len(findings.pictures):
        title = (
            f"{root.name}: {len(named)} of {len(findings.pictures)} pictures have no caption; their file names are used"
        )
        notes.append(listed(title, [shown(found.path) for found in named]))
    cameras = [found for found in named if is_camera_name(found.path.stem)]
    if named and len(cameras) * 2 > len(named):
        prompt = {"subject": "instance_prompt", "class": "class_prompt"}.get(root.name.partition("-")[0])
        advice = f"set {prompt} or write captions" if prompt else "write captions"
        title = f"{root.name}: most file names are a camera's, and they are the captions: {advice}"
        notes.append(listed(title, [shown(found.path.name) for found in cameras], limit=5))
    return notes


def _unused_prompt(roots: Sequence[Root], findings: Findings) -> list[str]:
    prompted = any(root.name.startswith("subject") and root.default_caption for root in roots)
    if not prompted or not findings.pictures or any(found.source == "default" for found in findings.pictures):
        return []
    return ["instance_prompt is without effect: every picture has a caption"]


def _notes(findings: Findings, samples: Sequence[Sample]) -> list[str]:
    empty = [shown(sample.path) for sample in samples if not sample.caption]
    same = Counter(sample.content for sample in samples)
    copies = [shown(sample.path) for sample in samples if same[sample.content] > 1]
    lists = [
        ("pictures that are there more than once, byte for byte", copies),
        (f"{len(empty)} captions are empty: these pictures train the unconditional prompt", empty),
        *((title, [shown(path) for path in paths]) for title, paths in findings.listed.items()),
    ]
    notes = [listed(title, items) for title, items in lists if items]
    if findings.unread:
        counts = ", ".join(f"{count} {shown(ending)}" for ending, count in sorted(findings.unread.items()))
        notes.append(f"files that are not read: {counts}")
    return notes
