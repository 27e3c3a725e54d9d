"""From settings to a trainer: the only place where settings meet the program. The order matters, and is numbered.

Stages 1 to 5, which write nothing and read no weights, are in prepare.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from everydream.config.redact import for_others
from everydream.config.show import differences
from everydream.data.loader import Loader
from everydream.errors import DataError
from everydream.models.family import load
from everydream.optim import factory
from everydream.optim.clip import grad_holders
from everydream.optim.ema import EMA, NoEMA
from everydream.optim.groups import freeze, guard, table_lines
from everydream.optim.schedules import base_lrs, lr_factor
from everydream.runtime import is_lost_process, settled_objects
from everydream.training import feed
from everydream.training.bag import Bag, no_exports
from everydream.training.checkpoint import folders, step_of
from everydream.training.clock import Due
from everydream.training.exports import SingleFiles
from everydream.training.inputs import make_class_pictures, make_inputs, make_validation
from everydream.training.log import NullLog, RunLog
from everydream.training.plan_text import plan_sections
from everydream.training.prepare import Prepared
from everydream.training.previews import NoPreviews, Previews
from everydream.training.profile import make_profile
from everydream.training.records import has_finished
from everydream.training.report import write_report
from everydream.training.resuming import begin_run, what_differs
from everydream.training.runfolder import Run
from everydream.training.sampling import Parts
from everydream.training.saver import Saver
from everydream.training.schedule import NoSchedule, Schedule
from everydream.training.trainer import train
from everydream.training.turns import Part, Trainer, forget_peak, memory_total
from everydream.training.update import FusedUpdate, Update

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Build:
    """Stages 6 to 10: weights, class pictures, the run's folder, caches and optimizers, the loop."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.settings, self.ranks = prepared, prepared.settings, prepared.ranks
        self.console, self.stop = prepared.console, prepared.stop
        self.log = NullLog()
        self.folder: Path | None = None
        self.loader: Loader | None = None
        self.saver: Saver | None = None
        self.running: Trainer | None = None
        self._said: set[str] = set()
        self._held = prepared.old_run  # its lock is ours until the end

    def run(self) -> int:
        """Returns the signal that ended the run, 0 for none."""
        start, total = self.prepared.start, self.prepared.clock.total_steps
        if start.checkpoint is not None and start.state.step >= total and not self._owes():
            self.console.say(f"{start.folder} is finished already, at step {start.state.step}: nothing to do")
            return 0
        self._say_start()
        trainer = self.trainer()
        try:
            with settled_objects():
                signum = train(trainer)
        except (DataError, RuntimeError) as error:
            if isinstance(error, DataError) or is_lost_process(error):
                self._rescue(trainer)
            raise
        self._say_results(trainer, signum)
        return signum

    def _rescue(self, trainer: Trainer) -> None:
        try:
            rescued = trainer.rescue()
        except Exception as error:  # the first error is the one to be told
            todo = "Go on from the last checkpoint with --resume latest."
            self.log.event("save_failed", f"what was learnt could not be saved: {error!r}", "warning", todo=todo)
            return
        if rescued:
            self.log.event("rescued", f"step {self.state.step} is saved; go on with --resume latest")

    def stopped_by(self, signum: int) -> str:
        return f"stopped by signal {signum}, " + (
            "and saved" if self.state.step else "before there was anything to save"
        )

    def _owes(self) -> bool:
        """Whether a stop came between the run's last update and its last preview or validation, and nothing since."""
        assert self.prepared.start.folder is not None
        state, validation = self.prepared.start.state, self.prepared.resolved.validation
        previews = self.settings.sample_prompts is not None and self.settings.sample_steps
        owes = (previews and state.previewed < state.step) or (validation and state.validated < state.step)
        return bool(owes) and not has_finished(self.prepared.start.folder)

    def cache(self) -> int:
        self._say_start()
        self.load()
        make_inputs(self.prepared, self.family, self.sets)
        for note in dict.fromkeys(self.prepared.notes):
            if note not in self._said:
                self.console.say(note)
        self.console.say(f"the caches are in {self.prepared.cache_dir}")
        return 0

    def close(self, code: int, reason: str) -> None:
        if self.saver is not None:
            self.saver.join()
        if self.running is not None:
            with contextlib.suppress(Exception):  # what is wrong is being told already
                self.running.report_saves(goes_on=False)
        if self.loader is not None:
            self.loader.close()
        self.log.close(code, reason)
        if self._held is not None:
            self._held.lock.release()

    def load(self) -> None:
        prepared, settings, ranks = self.prepared, self.settings, self.ranks
        # 6. Weights.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
        self.family = load(
            prepared.facts,
            train=prepared.parts,
            weights_dtype=DTYPES[settings.weights_dtype],
            device=ranks.device,
            clip_skip=settings.clip_skip,
        )
        self.family.set_sampling(
            prediction_type=prepared.objective.prediction, zero_terminal_snr=settings.enable_zero_terminal_snr
        )
        self.family.enable(
            gradient_checkpointing=settings.gradient_checkpointing,
            attn_type=settings.attn_type,
            compile=settings.compile,
            channels_last=ranks.device.type == "cuda" and not self._lays_weights_itself(),
            one_backward=prepared.per_update == 1 and not prepared.has_class,
        )
        # 7. Class pictures, made with the base model before it changes.
        self.sets = {"subject": prepared.subject}
        if prepared.has_class:
            make_class_pictures(prepared, self.family)
            samples = prepared.class_pictures()
            prepared.compare("class", samples)
            self.sets["class"] = prepared.picture_set("class", samples)

    def _lays_weights_itself(self) -> bool:
        chosen = self.prepared.resolved.optimizers.get("unet")
        return "unet" in self.prepared.parts and factory.makes_contiguous(chosen.optimizer)

    def trainer(self) -> Trainer:
        self.load()
        self._begin()
        self._make_state()
        return self._make_trainer(self._make_update())

    def _begin(self) -> None:
        # 8. The run's folder and its log: from here on things are written.
        prepared, settings, ranks, start = self.prepared, self.settings, self.ranks, self.prepared.start
        self.state = start.state
        prepared.notes += what_differs(start, ranks.count, torch.get_num_threads())
        self.state.processes, self.state.threads = ranks.count, torch.get_num_threads()
        self.folder, self._held = begin_run(
            start, self._held, prepared.record, settings.logdir, settings.project_name, ranks
        )
        self.single_files = self._single_files()
        if ranks.is_main:
            self.single_files.clean(start.state.step)
        self._open_log()

    def _make_state(self) -> None:
        # 9. Caches, optimizers, average; the checkpoint's state into them.
        assert self.folder is not None
        prepared, start = self.prepared, self.prepared.start
        self.inputs = make_inputs(prepared, self.family, self.sets)
        named = {part: self.family.parameters_of(part) for part in prepared.parts}
        for part, frozen in prepared.frozen.items():
            freeze(named[part], frozen)
        self.groups = prepared.groups_of(named)
        guard([group for groups in self.groups.values() for group in groups], named)
        trained = {part: {n: p for n, p in all_.items() if p.requires_grad} for part, all_ in named.items()}
        self.parts = {part: self._part(part) for part in prepared.parts}
        self.ema = self._ema(trained)
        self.bag = Bag(
            checkpoints=self.folder / "checkpoints",
            family=self.family,
            state=self.state,
            optimizers={name: part.optimizer for name, part in self.parts.items()},
            trained=trained,
            ema=self.ema,
            fingerprints=prepared.fingerprints,
            scaler=prepared.accelerator.scaler,
            exports=self.single_files.of if self.settings.save_single_file else no_exports,
            changed_at=start.state.step if self.settings.resume_changed else -1,
        )
        if start.checkpoint is not None:
            prepared.notes += self.bag.restore(start.checkpoint, weights=False)
        self._say_notes()

    def _make_update(self) -> Update:
        # 10. The loop.
        assert self.folder is not None
        prepared, settings, ranks = self.prepared, self.settings, self.ranks
        stream = feed.Stream(tuple(self.sets), prepared.accumulation, ranks.rank, ranks.count)
        items = feed.Items(stream, self.state.step, prepared.clock.total_steps)
        on_card = ranks.device.type == "cuda"
        workers = self.inputs.worker_count(settings.num_workers, on_card)
        self.loader = Loader(self.inputs.training, items, num_workers=workers, pin_memory=on_card)
        optimizers = {name: part.optimizer for name, part in self.parts.items()}
        return (FusedUpdate if settings.fused_backward else Update)(
            accelerator=prepared.accelerator,
            ranks=ranks,
            stop=self.stop,
            denoiser=prepared.accelerator.prepare(self.family.denoiser).train(),
            family=self.family,
            objective=prepared.objective,
            optimizers=optimizers,
            parameters={part: grad_holders(optimizer) for part, optimizer in optimizers.items()},
            batches=self.loader,
            stream=stream,
            batch_size=settings.batch_size,
            prior_loss_weight=settings.prior_loss_weight,
            clip_norm=settings.clip_grad_norm,
            seed=settings.seed,
            schedule=Schedule(ranks) if settings.write_schedule else NoSchedule(),
            profile=make_profile(settings.profile_steps, self.folder, self.log, ranks.device.type),
        )

    def _make_trainer(self, update: Update) -> Trainer:
        assert self.folder is not None
        prepared, settings = self.prepared, self.settings
        self.saver = Saver(
            self.folder / "checkpoints",
            background=settings.background_save,
            keep_last=settings.keep_last,
            last=prepared.start.checkpoint,
            beside={(config := Run(self.folder).config): config.read_bytes()} if self.ranks.is_main else {},
        )
        self.running = trainer = Trainer(
            state=self.state,
            clock=prepared.clock,
            class_epoch=self.sets["class"].plan.epoch_of if "class" in self.sets else lambda micro_batch: 0,
            update=update,
            parts=self.parts,
            ema=self.ema,
            ema_use=settings.ema_use,
            ranks=self.ranks,
            log=self.log,
            saver=self.saver,
            bag=self.bag,
            previews=self._previews(),
            validation=make_validation(self.inputs, update, prepared),
            plugins=prepared.plugins,
            denoiser=update.denoiser,
            report_due=self._due(settings.log_step),
            preview_due=self._due(settings.sample_steps, at_ends=True, last=self.state.previewed),
            validation_due=self._validation_due(),
            save_due=self._due(settings.save_every_n_steps, settings.save_every_n_epochs),
            save_every_s=settings.ckpt_every_n_minutes and settings.ckpt_every_n_minutes * 60,
            profile=update.profile,
        )
        self.log.start(self.state.step, prepared.clock.total_steps, settings.max_epochs, memory_total())
        prepared.plugins.after_build(trainer)
        forget_peak()
        return trainer

    def _open_log(self) -> None:
        if not self.ranks.is_main:
            return
        assert self.folder is not None
        settings, start = self.settings, self.prepared.start
        record = for_others(self.prepared.record["settings"])
        trackers = [name for name, on in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb)) if on]
        self.log = RunLog(
            self.folder,
            self.console,
            project=settings.project_name,
            run_name=settings.run_name,
            settings=record,
            trackers=trackers,
            report=write_report,
            resumed_step=start.state.step if start.checkpoint else None,
        )
        kind = "start" if start.checkpoint is None else "resume"
        after = f", going on after step {start.state.step}" if start.checkpoint else ""
        self.log.event(kind, f"run folder: {self.folder}{after}", from_step=start.state.step)
        self.log.event("plan", sections=plan_sections(self.prepared))

    def _part(self, name: str) -> Part:
        settings, groups = self.settings, self.groups[name]
        chosen = self.prepared.resolved.optimizers[name]
        may_be_flat = settings.weights_dtype == "float32" and not settings.fused_backward
        optimizer = factory.make(
            chosen.optimizer,
            groups,
            lr=chosen.lr,
            betas=chosen.betas,
            epsilon=chosen.epsilon,
            weight_decay=chosen.weight_decay,
            args=chosen.args,
            device=self.ranks.device,
            rounding_seed=settings.seed if settings.weights_dtype == "bfloat16" else None,
            flat=may_be_flat and factory.flat_pays(chosen.optimizer, groups, self.ranks.device, self.ranks.count),
        )
        horizon = self.prepared.horizons[name]
        if chosen.lr_decay_steps is None:
            self.state.lr_horizon = horizon
        factor = partial(lr_factor, name=chosen.lr_scheduler, warmup_steps=chosen.lr_warmup_steps, decay_steps=horizon)
        return Part(name, optimizer, base_lrs(optimizer), factor)

    def _ema(self, trained: Mapping[str, Mapping[str, torch.nn.Parameter]]) -> EMA | NoEMA:
        settings = self.settings
        if settings.ema_decay_rate is None:
            return NoEMA()
        named = {f"{part}.{name}": p for part, parameters in trained.items() for name, p in parameters.items()}
        return EMA(named, settings.ema_decay_rate, settings.ema_update_interval, settings.ema_device)

    def _due(
        self, steps: int | None = None, epochs: float | None = None, *, at_ends: bool = False, last: int | None = None
    ) -> Due:
        # A checkpoint is the end of its turn: what was due on its step has been done, unless a stop cut it short.
        done = self.state.step if self.prepared.start.checkpoint else -1
        last = done if last is None else last
        return Due(self.prepared.clock, steps, epochs, at_start=at_ends, at_end=at_ends, last=last)

    def _validation_due(self) -> Due:
        chosen = self.prepared.resolved.validation
        if chosen is None:
            return self._due()
        return self._due(chosen.every_n_steps, chosen.every_n_epochs, at_ends=True, last=self.state.validated)

    def _previews(self) -> NoPreviews:
        prepared, settings = self.prepared, self.settings
        if settings.sample_prompts is None or not settings.sample_steps:
            return NoPreviews()
        assert self.folder is not None
        return Previews(
            settings.sample_prompts,
            self.folder,
            lambda: Parts.of(self.family, settings.max_caption_chunks),
            self.log,
            self.ranks,
            defaults=prepared.sampling,
            captions=[sample.caption for sample in prepared.subject.samples],
            autocast=prepared.accelerator.autocast,
            stop=lambda: self.stop.signum,
        )

    def _single_files(self) -> SingleFiles:
        assert self.folder is not None
        settings = self.settings
        return SingleFiles(
            self.folder,
            settings.save_ckpt_dir or self.folder / "exports",
            settings.project_name,
            DTYPES[settings.save_dtype],
            json.dumps(for_others(self.prepared.record), ensure_ascii=False),
            averaged="exports" in settings.ema_use,
            is_shared=settings.save_ckpt_dir is not None,
        )

    # What a person reads

    def _say_start(self) -> None:
        """Before weights are read: whoever sees a mistake here has not waited for it."""
        for line in differences(self.prepared.resolved).splitlines():
            self.console.say(line)
        self._said = {*self.prepared.warnings, *self.prepared.notes}
        for warning, todo in self.prepared.warnings.items():
            self.console.say(f"{warning}\n  {todo}", "warning")
        for note in dict.fromkeys(self.prepared.notes):
            self.console.say(note)

    def _say_notes(self) -> None:
        for warning in self.prepared.start.warnings:
            self.log.event("resume", warning, "warning", todo="The newest whole checkpoint is used.")
        for warning, todo in self.prepared.warnings.items():
            self.log.event("note", warning, "warning", todo=todo, show=warning not in self._said)
        for note in dict.fromkeys(self.prepared.notes):
            self.log.event("note", note, show=note not in self._said)
        for line in table_lines([group for groups in self.groups.values() for group in groups]):
            self.console.say(line)

    def _say_results(self, trainer: Trainer, signum: int) -> None:
        """Where everything is."""
        assert self.folder is not None
        grid = trainer.previews.before_after() if not signum else None
        newest = next(iter(folders(self.folder / "checkpoints")), None)
        exports = [path for path in (self.bag.exports(step_of(newest) or 0) if newest else ()) if path.is_file()]
        rows = {"checkpoint": newest, "single file": exports[0] if exports else None, "before and after": grid,
                "report": self.folder / "report.html"}  # fmt: skip
        self.console.close()
        for name, path in rows.items():
            if path is not None:
                self.console.say(f"{name + ':':18}{path}")
        if signum:
            self.console.say(self.stopped_by(signum) + ("; go on with --resume latest" if self.state.step else ""))
