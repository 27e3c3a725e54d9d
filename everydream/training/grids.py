"""Pictures side by side with labels. A grid's PNG says how each of its pictures was made, and where it lies.

Small pictures are enlarged by a whole factor without smoothing: what is in the file is what the model made.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

MIN_SIDE = 192  # px; smaller pictures are enlarged to at least this, for the labels to fit
GAP, MARGIN, LINE, TEXT = 12, 16, 18, 14  # px
BACKGROUND, INK, FAINT = (250, 250, 248), (28, 28, 30), (120, 120, 124)
LABEL_LINES = 2
KEY = "everydream"  # of the text in the PNG
# Pillow's own font has Latin letters only; these are tried for others, by the names that systems give them.
LAST_LATIN, PUNCTUATION = 0x24F, range(0x2000, 0x2070)
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """`facts`: how it was made, plain JSON; label and note are drawn under the picture, the note in grey."""

    image: Image.Image
    label: str
    note: str
    facts: Mapping[str, Any]


def draw(cells: Sequence[Cell], title: str, columns: int | None = None) -> tuple[Image.Image, list[dict[str, Any]]]:
    """The grid, and its cells' facts, each with the "box" (left, top, right, bottom) of its picture."""
    images = [enlarged(cell.image) for cell in cells]
    width, height = max(i.width for i in images), max(i.height for i in images)
    columns = columns or columns_for(len(cells))
    rows = math.ceil(len(cells) / columns)
    label_height = (LABEL_LINES + 1) * LINE + 4
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * (width + GAP) - GAP,
            2 * MARGIN + LINE + GAP + rows * (height + label_height + GAP) - GAP,
        ),
        BACKGROUND,
    )
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN - 2), shortened(title, canvas.width - 2 * MARGIN), fill=INK, font=font(title, TEXT + 2))
    facts = []
    for i, (cell, image) in enumerate(zip(cells, images, strict=True)):
        left = MARGIN + i % columns * (width + GAP)
        top = MARGIN + LINE + GAP + i // columns * (height + label_height + GAP)
        canvas.paste(image, (left, top))
        write_label(pen, cell, left, top + height + 4, width)
        facts.append({**cell.facts, "box": [left, top, left + image.width, top + image.height]})
    return canvas, facts


def write_label(pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int, width: int) -> None:
    lines = wrapped(cell.label, width, LABEL_LINES)
    for line in lines:
        pen.text((left, top), line, fill=INK, font=font(line, TEXT))
        top += LINE
    pen.text((left, top), shortened(cell.note, width, TEXT - 2), fill=FAINT, font=font(cell.note, TEXT - 2))


def columns_for(count: int) -> int:
    """One row up to 4, else somewhat wider than high."""
    return count if count <= 4 else math.ceil(math.sqrt(count * 1.5))


def enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, math.ceil(MIN_SIDE / min(image.size)))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def font(text: str, size: int) -> Font:
    if any(ord(letter) > LAST_LATIN and ord(letter) not in PUNCTUATION for letter in text):
        for name in WIDE_FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def shortened(text: str, width: int, size: int = TEXT) -> str:
    """The start of the text that fits into `width` pixels, with … where it was cut."""
    letters = font(text, size)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """Broken at spaces into at most `lines`; the last one is shortened."""
    letters, words = font(text, TEXT), text.split()
    found: list[str] = []
    while words and len(found) < lines - 1:
        count = len(words)
        while count > 1 and letters.getlength(" ".join(words[:count])) > width:
            count -= 1
        found.append(shortened(" ".join(words[:count]), width))
        words = words[count:]
    return [*found, shortened(" ".join(words), width)] if words else found


def png(image: Image.Image, about: Mapping[str, Any]) -> bytes:
    """With `about` as JSON in the file's text."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(about, ensure_ascii=False))
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_grid(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """A grid and what its PNG says about itself. Raises OSError, ValueError where it is not one of ours."""
    with Image.open(path) as image:
        image.load()
        return image.convert("RGB"), json.loads(image.text[KEY]) if KEY in getattr(image, "text", {}) else {}


def cells_of(path: Path) -> tuple[int, list[tuple[Image.Image, dict[str, Any]]]]:
    """The step of a grid, and its pictures cut out again, each with how it was made."""
    image, about = read_grid(path)
    cells = [
        (image.crop(cell["box"]), {k: v for k, v in cell.items() if k != "box"}) for cell in about.get("cells", [])
    ]
    return about.get("step", 0), cells


def before_after(first: Path, last: Path, per_block: int = 6) -> Image.Image | None:
    """Pictures made alike at two steps, one above the other. None where the two have none in common."""
    before_step, before = cells_of(first)
    after_step, after = cells_of(last)
    pairs = [(old, new, facts) for old, facts in before for new, others in after if facts == others]
    if not pairs:
        return None
    blocks = math.ceil(len(pairs) / per_block)
    columns = math.ceil(len(pairs) / blocks)
    width, height = max(old.width for old, _, _ in pairs), max(old.height for old, _, _ in pairs)
    side = 92  # px, for the words at the left
    block_height = 2 * (height + GAP) + LABEL_LINES * LINE + 2 * GAP
    size = (2 * MARGIN + side + columns * (width + GAP) - GAP, 2 * MARGIN + blocks * block_height - 2 * GAP)
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for i, (old, new, facts) in enumerate(pairs):
        left, top = MARGIN + side + i % columns * (width + GAP), MARGIN + i // columns * block_height
        for n, (image, word, step) in enumerate(((old, "before", before_step), (new, "after", after_step))):
            y = top + n * (height + GAP)
            canvas.paste(image, (left, y))
            if i % columns == 0:
                pen.text((MARGIN, y + height // 2 - LINE), word, fill=INK, font=font(word, TEXT + 4))
                pen.text((MARGIN, y + height // 2 + 6), f"step {step}", fill=FAINT, font=font("", TEXT - 1))
        for n, line in enumerate(wrapped(facts.get("prompt", ""), width, LABEL_LINES)):
            pen.text((left, top + 2 * (height + GAP) - 4 + n * LINE), line, fill=INK, font=font(line, TEXT))
    return canvas
