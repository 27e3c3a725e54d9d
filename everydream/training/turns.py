"""What a turn of the loop does besides training: report, preview, validate, save, skip, roll back, stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from everydream.errors import DivergedError, SaveError
from everydream.optim.factory import has_two_sets, set_mode
from everydream.optim.schedules import set_lr
from everydream.runtime import is_lost_process, no_compiled_code
from everydream.training.divided import on_main
from everydream.training.profile import NoProfile
from everydream.training.saver import FAILURES, Saver

if TYPE_CHECKING:
    from pathlib import Path

    from everydream.optim.ema import EMA, NoEMA
    from everydream.runtime import Ranks
    from everydream.training.bag import Bag
    from everydream.training.clock import Clock, Due
    from everydream.training.log import NullLog
    from everydream.training.plugins import Plugins
    from everydream.training.previews import NoPreviews
    from everydream.training.state import TrainState
    from everydream.training.update import Update, Verdict

SKIPS_BEFORE_ROLL_BACK = 3
ROLL_BACKS_BEFORE_END = 2


@dataclass(frozen=True)
class Part:
    """The UNet or the text encoder: what trains it, and its learning rate as a function of the step."""

    name: str
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]
    lr_factor: Callable[[int], float]

    def set_lr(self, step: int) -> float:
        return set_lr(self.optimizer, self.base_lrs, self.lr_factor(step))


@dataclass
class Trainer:
    """A run under way. Made by Build.trainer; train() drives it."""

    state: TrainState
    clock: Clock
    class_epoch: Callable[[int], int]  # of a micro-batch
    update: Update
    parts: Mapping[str, Part]
    ema: EMA | NoEMA
    ema_use: Collection[str]  # "previews", "validation"
    ranks: Ranks
    log: NullLog
    saver: Saver
    bag: Bag
    previews: NoPreviews
    validation: Callable[[int], Mapping[str, float]]
    plugins: Plugins
    denoiser: torch.nn.Module
    report_due: Due
    preview_due: Due
    validation_due: Due
    save_due: Due
    save_every_s: float | None = None
    profile: NoProfile = field(default_factory=NoProfile)
    stop_signal: int = 0
    save_is_due: bool = False  # by the clock on rank 0's wall
    verdict: Verdict | None = None
    lrs: Mapping[str, float] = field(default_factory=dict)
    _stop_reason: str = ""
    _last_save: float = field(default_factory=time.monotonic)
    _last_report: float = field(default_factory=time.perf_counter)
    _images_at_report: int = 0
    _whole_at: int = -1  # the step whose update was made in all its parts

    def __post_init__(self) -> None:
        self.update.flags, self.update.settle = self._flags, self.saver.settle
        self._images_at_report = self.state.images_seen

    # A turn

    def report(self) -> None:
        """A line of metrics.jsonl every log_step updates: the mean loss over the pictures since the last line."""
        self.report_saves()
        state = self.state
        self._whole_at = state.step
        if not self.report_due(state.step) or self.verdict is None:
            return
        now = time.perf_counter()
        values: dict[str, float] = {"epoch": state.epoch, "images_seen": state.images_seen}
        values["loss"] = state.loss_sum / state.loss_count if state.loss_count else math.nan
        if state.prior_count:
            values["loss_prior"] = state.prior_sum / state.prior_count
        if state.class_images_seen:
            values["class_images_seen"] = state.class_images_seen
        values |= {f"lr_{name}": lr for name, lr in self.lrs.items()}
        values |= {f"grad_norm_{name}": norm for name, norm in self.verdict.norms.items()}
        values |= self.ema.metrics(state.step)
        values["images_per_s"] = (state.images_seen - self._images_at_report) / (now - self._last_report)
        values["data_wait_s"] = self.update.data_wait_s
        values["memory_bytes"] = memory_bytes()
        self.log.metrics(state.step, values)
        self._last_report, self._images_at_report, self.update.data_wait_s = now, state.images_seen, 0.0
        state.loss_sum = state.prior_sum = 0.0
        state.loss_count = state.prior_count = 0

    def preview(self) -> None:
        if self.preview_due(self.state.step):
            made: Sequence[Path] = ()
            with self.profile("preview"), self._failure_is_reported("the preview"), self.evaluating("previews"):
                made = self.previews(self.state.step)
            if not self._stop_at_once() or made:
                self.state.previewed = self.state.step

    def validate(self) -> None:
        if self.validation_due(self.state.step):
            values: Mapping[str, float] = {}
            with self.profile("validation"), self._failure_is_reported("the validation"), self.evaluating("validation"):
                with no_compiled_code():
                    values = self.validation(self.state.step)
                if values:
                    self.log.metrics(self.state.step, values)
            if not self._stop_at_once() or values:
                self.state.validated = self.state.step

    def save(self) -> None:
        """What is due on this step, or what a stop or the end of the run asks for. Never at step 0."""
        step, is_last = self.state.step, self.is_over()
        if step == 0:
            return
        due = self.save_due(step) or self.save_is_due
        if is_last and not due:
            due = self.save_due.last != step or on_main(self.ranks, self.saver.has_failed)
        if due:
            self._save(wait=is_last)
        if is_last:
            on_main(self.ranks, self.saver.require)
        if not due:
            return
        if self.plugins.has("after_save"):
            self.saver.settle()  # a plugin may change what it likes
            self.plugins.after_save(self)

    def _save(self, *, wait: bool) -> None:
        step = self.state.step
        self.save_due.last, self.save_is_due, self._last_save = step, False, time.monotonic()
        if self.ranks.is_main:
            with self.profile("save"):
                self.log.sync()
                optimizers = self.bag.capture()  # with the training weights, before averaged ones take their place
                with averaged(self.parts):
                    self.saver.save(step, *self.bag.contents(optimizers), wait=wait)
                    if any(has_two_sets(part.optimizer) for part in self.parts.values()):
                        self.saver.settle()
        self.report_saves(goes_on=not wait)

    def rescue(self) -> bool:
        """A picture cannot be read any more, or a process has died: rank 0 alone saves what was learnt until now."""
        if not self.ranks.is_main or not 0 < self.state.step == self._whole_at != self.save_due.last:
            return False
        self._save(wait=True)
        return self.saver.failures == 0

    def is_over(self) -> bool:
        return bool(self.stop_signal or self._stop_reason) or self.state.step >= self.clock.total_steps

    def finish(self) -> int:
        self.profile.close()
        self.plugins.before_exit(self)
        return self.stop_signal

    # After an update

    def average(self) -> None:
        with self.profile("ema"):
            self.ema.update(self.state.step)

    def set_learning_rates(self) -> None:
        self.lrs = {name: part.set_lr(self.state.step) for name, part in self.parts.items()}

    def advance(self, verdict: Verdict) -> None:
        state, update = self.state, self.update
        pictures = update.pictures * self.ranks.count
        state.step += 1
        state.images_seen += pictures
        state.class_images_seen += pictures * update.has_class
        index = state.step * self.clock.per_update
        state.epoch, trained_epoch = self.clock.plan.epoch_of(index), self.clock.plan.epoch_of(index - 1)
        state.class_epoch, trained_class_epoch = self.class_epoch(index), self.class_epoch(index - 1)
        state.is_epoch_new = state.epoch > trained_epoch
        state.is_class_epoch_new = state.class_epoch > trained_class_epoch
        shown = {f"lr_{name}": lr for name, lr in self.lrs.items()}
        if verdict.is_finite:
            state.loss_sum += verdict.loss_sum
            state.loss_count += pictures
            state.prior_sum += verdict.prior_sum
            state.prior_count += pictures * update.has_class
            shown["loss"] = verdict.loss_sum / pictures
        self.verdict = verdict
        self.profile.step()
        update.schedule.tell(self.log)
        self.stop(verdict)
        self.save_is_due = verdict.save_is_due
        self.log.progress(state.step, shown | {"trained_epoch": trained_epoch, "images_seen": state.images_seen})
        if verdict.failed_saves >= FAILURES:
            self.report_saves(goes_on=False)
            raise SaveError(f"{verdict.failed_saves} saves in a row failed, see the warnings above. Nothing was lost "
                            "before them: make room, then go on with --resume latest")  # fmt: skip

    def stop(self, verdict: Verdict) -> None:
        self.stop_signal = self.stop_signal or verdict.stop_signal

    def stop_after_this_step(self, reason: str) -> None:
        """For plugins, on every process alike: the run ends after this turn, saved, with exit code 0."""
        self._stop_reason = reason
        self.log.event("stopped_by_plugin", reason, step=self.state.step)

    def skip(self, verdict: Verdict) -> None:
        """A non-finite loss or gradient never reaches the weights. Raises DivergedError after too many."""
        state, names = self.state, self.update.suspects()
        state.skipped_steps.append(state.step)
        kind = "gradient" if all(map(math.isfinite, (verdict.loss_sum, verdict.prior_sum))) else "loss"
        left_out = f"step {state.step}: the {kind} is not finite, so this update was left out"
        if kind == "gradient" and self.update.may_lower_loss_scale:  # how float16's scale is found; no picture's fault
            self.log.event("skipped", f"{left_out}, and float16's loss scale lowered", show=False, samples=names)
        else:
            self.log.event(
                "skipped",
                f"{left_out}. Pictures: {', '.join(names)}",
                level="warning",
                todo="Look at these pictures and captions. If it happens with others too, lower lr or set "
                "clip_grad_norm.",
                samples=names,
            )
        self.update.lower_loss_scale()
        too_many = self._skips_in_a_row() >= SKIPS_BEFORE_ROLL_BACK and not self.update.may_lower_loss_scale
        if too_many or self.update.has_torn(verdict):
            self._roll_back()

    def _skips_in_a_row(self) -> int:
        since = self.state.rollbacks[-1][0] if self.state.rollbacks else 0
        skipped, step = set(self.state.skipped_steps), self.state.step
        while step > since and step in skipped:
            step -= 1
        return self.state.step - step

    def _roll_back(self) -> None:
        """Reload the last checkpoint from before the trouble and go on after the pictures that led here."""
        state, advice = self.state, "Lower lr, set clip_grad_norm, or leave out the pictures named above"
        if len(state.rollbacks) + 1 >= ROLL_BACKS_BEFORE_END:
            raise DivergedError(f"step {state.step}: diverged again after a roll-back. {advice}")
        on_main(self.ranks, self.saver.join)
        first = state.step - max(0, self._skips_in_a_row() - 1)
        step, told = self.bag.reload_latest(before=first)
        if step is None:  # keep_last has let it go: updates left out since then have not touched the weights
            step, told = self.bag.reload_latest(before=state.step)
        for line in told:
            self.log.event("roll_back", line, "warning", todo="Training goes on without it.")
        steps = self.ranks.gather(step)
        if step is None or set(steps) != {step}:
            unlike = (
                "" if set(steps) == {step} else " that all processes see: logdir is not one folder for all machines"
            )
            raise DivergedError(f"step {state.step}: diverged, and no checkpoint to go back to{unlike}. {advice}")
        state.rollbacks.append([state.step, step])
        message = f"step {state.step}: back to the weights of step {step}, going on with the pictures after this step"
        self.log.event("rolled_back", message, "warning", todo=advice + ".", to=step)

    # Helpers

    def _stop_at_once(self) -> bool:
        """Whether a signal has reached any process: previews and validation end at once then, and so does the run."""
        signums = self.ranks.gather(self.update.stop.signum)
        self.stop_signal = self.stop_signal or next(filter(None, signums), 0)
        return bool(self.stop_signal)

    def _flags(self) -> tuple[bool, int]:
        """Rank 0's clock and saver, for all: they travel with the update's host read."""
        due = self.save_every_s is not None and time.monotonic() - self._last_save >= self.save_every_s
        return due and self.ranks.is_main, self.saver.failures * self.ranks.is_main

    def report_saves(self, *, goes_on: bool = True) -> None:
        """What became of the saves that have ended since. `goes_on`: the run does."""
        for saved in self.saver.outcomes():
            if saved.error is not None:
                todo = "Make room, or mend the folder."
                todo += " Training goes on and tries again at the next interval." if goes_on else ""
                self.log.event("save_failed", str(saved.error), "warning", todo=todo, of_step=saved.step)
                continue
            for warning in saved.warnings:
                self.log.event("save", warning, "warning", todo="The checkpoint itself is safe.", of_step=saved.step)
            self.log.event("saved", f"saved {saved.path}", "debug", of_step=saved.step, path=str(saved.path),
                           seconds=saved.seconds, held_s=saved.held_s, exported=[str(path) for path in saved.exported],
                           deleted=[str(path) for path in saved.deleted])  # fmt: skip

    @contextlib.contextmanager
    def evaluating(self, what: str) -> Iterator[None]:
        """EMA's or averaged weights in place, layers in eval mode; exactly the training weights afterwards."""
        self.saver.settle()
        with averaged(self.parts), self.ema.applied() if what in self.ema_use else contextlib.nullcontext():
            self.denoiser.eval()
            try:
                yield
            finally:
                self.denoiser.train()

    @contextlib.contextmanager
    def _failure_is_reported(self, what: str) -> Iterator[None]:
        """A preview or a validation that fails is no reason to lose a run."""
        try:
            yield
        except Exception as error:
            if is_lost_process(error):
                raise
            self.log.event(what.removeprefix("the "), f"{what} at step {self.state.step} failed: {error!r}", "warning",
                           todo="Training goes on.")  # fmt: skip


@contextlib.contextmanager
def averaged(parts: Mapping[str, Part]) -> Iterator[None]:
    """Schedule-free optimizers keep two points: they train at one and are meant to be used at the other."""
    switching = [part.optimizer for part in parts.values() if has_two_sets(part.optimizer)]
    weights = [p for optimizer in switching for group in optimizer.param_groups for p in group["params"]]
    kept = [weight.detach().clone() for weight in weights]
    for optimizer in switching:
        set_mode(optimizer, training=False)
    try:
        yield
    finally:
        for optimizer in switching:
            set_mode(optimizer, training=True)
        # Switching back rounds, the copies do not: a save or a preview leaves no trace in the run.
        with torch.no_grad():
            for weight, copy in zip(weights, kept, strict=True):
                weight.copy_(copy)


def forget_peak() -> None:
    """What came before training (encoding pictures, making class pictures) is not its peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_bytes() -> int:
    """Peak of the card's memory; without a card, what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def memory_total() -> int:
    """What memory_bytes is measured against."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    import psutil

    return psutil.virtual_memory().total
