"""The data in words, for the start of a run and for --dry_run: both print these lines, so they show the same counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from everydream.data.buckets import is_small
from everydream.data.plan import Plan, updates_in
from everydream.data.problems import listed, shown
from everydream.data.scan import Sample


def bucket_lines(plan: Plan) -> list[str]:
    """One line a bucket: size, pictures that are trained, and those that are not."""
    lines = []
    for (width, height), drawn in plan.drawn.items():
        never = len(plan.buckets[width, height]) - len(drawn)
        lines.append(f"{width}×{height}: {len(drawn)} pictures" + (f", {never} never (multiply 0)" if never else ""))
    return lines


def size_notes(samples: Mapping[str, Sample], plan: Plan) -> list[str]:
    """Pictures smaller than their bucket, pictures that lose much of themselves, buckets that one batch empties."""
    small, cropped, few = [], [], []
    for (width, height), identities in plan.drawn.items():
        for sample in (samples[identity] for identity in identities):
            at = f"{shown(sample.path)} ({sample.width}×{sample.height} for {width}×{height})"
            if is_small(sample.width, sample.height, (width, height)):
                small.append(at)
            kept = min(sample.width / width, sample.height / height) / max(sample.width / width, sample.height / height)
            if kept < 0.5:
                cropped.append(f"{at}: {kept:.0%} of it is used")
        if 0 < len(identities) < plan.batch_size:
            few.append(f"{width}×{height}: {len(identities)}")
    lists = [
        ("pictures smaller than the size they are trained at, so they are enlarged", small),
        ("pictures of which the crop keeps less than half", cropped),
        (f"buckets with fewer pictures than batch_size {plan.batch_size}: one picture can be twice in a batch", few),
    ]
    return [listed(title, items) for title, items in lists if items]


def rest_lines(plan: Plan, epochs: int, grad_accum: int, processes: int) -> list[str]:
    """What `max_epochs` leaves untrained at its end."""
    waiting = plan.waiting(epochs)
    micro_batches = plan.micro_batches(epochs)
    rest = micro_batches - updates_in(plan, epochs, grad_accum, processes) * grad_accum * processes
    lines = []
    if waiting:
        places = ", ".join(f"{width}×{height}: {count}" for (width, height), count in waiting.items())
        lines.append(f"{sum(waiting.values())} pictures of the last epoch fill no batch and are not trained ({places})")
    if rest:
        lines.append(
            f"the last {rest} of {micro_batches} batches fill no update of {grad_accum * processes} and are not trained"
        )
    return lines


def long_captions(samples: Sequence[Sample], count: Callable[[str], int], limit: int) -> list[str]:
    """Captions of more than `limit` tokens (75 for each chunk); `count(caption)` counts them without specials."""
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.caption not in counts:
            counts[sample.caption] = count(sample.caption)
    long = [(counts[s.caption], s) for s in samples if counts[s.caption] > limit]
    title = f"{len(long)} captions have more than {limit} tokens; the rest of them is cut off (max_caption_chunks)"
    return [listed(title, [f"{shown(sample.path)}: {tokens} tokens" for tokens, sample in long])] if long else []
