"""Bytes of optimizer state, counted from shapes alone, so that --dry_run can say them before weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everydream.optim.groups import takes_muon
from everydream.optim.table import Row, row_of

Shape = Sequence[int]
BLOCK = 256  # bitsandbytes: one float32 scale for so many 8-bit values
SMALL = 4096  # bitsandbytes: tensors with fewer elements keep float32 state


def state_bytes(name: str, shapes: Iterable[Shape], args: Mapping[str, Any] | None = None) -> int | None:
    """Of the state of one part's optimizer after its first step; None for a class that is not in the table.

    Left out: a number a tensor (AdamW's count of steps) and bitsandbytes' two tables of 1 KiB each.
    """
    row = row_of(name)
    if row is None or row.moments is None:
        return None
    return sum(_bytes(row, shape, args or {}) for shape in shapes)


def _bytes(row: Row, shape: Shape, args: Mapping[str, Any]) -> int:
    count = math.prod(shape)
    if row.name == "adafactor":  # a row and a column of each matrix
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if row.name == "muon":
        return (4 if takes_muon(shape) else 8) * count
    if row.name == "sgd":
        return 4 * count if args.get("momentum") else 0
    assert row.moments is not None and row.moments == int(row.moments), row
    if row.state_bits == 8 and count >= SMALL:
        return int(row.moments) * (count + 4 * math.ceil(count / BLOCK))
    return int(row.moments) * 4 * count
