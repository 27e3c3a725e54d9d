"""Everything that is checked before anything is written and before weights are read: stages 1 to 5 of a run.

`--dry_run` ends here. build.py goes on with stages 6 to 10.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from everydream.data.buckets import bucket_sizes, nearest
from everydream.data.fingerprint import Fingerprint, fingerprint
from everydream.data.folders import find, roots_of
from everydream.data.gate import Progress
from everydream.data.scan import Sample
from everydream.data.summary import long_captions, rest_lines, size_notes
from everydream.diffusion import objectives
from everydream.diffusion.objectives import Objective
from everydream.diffusion.paths import NoisePath
from everydream.diffusion.times import TimeSampler
from everydream.errors import ConfigError, DataError
from everydream.models.family import read_facts, tokenizer_for
from everydream.models.layers import ATTENTION
from everydream.optim import factory
from everydream.optim.groups import Group, freeze_text_encoder, split
from everydream.runtime import Ranks, StopRequest, make_accelerator, set_determinism
from everydream.training.clock import Clock
from everydream.training.console import Console
from everydream.training.pictures import Gate, PictureSet, total_updates
from everydream.training.plugins import Plugins
from everydream.training.prompts import Sampling
from everydream.training.resuming import check_data, check_settings, find_start
from everydream.training.validation import HELD_OUT, TRAINED, choose, refuse_shared
from everydream.training.validation import split as hold_out

PARTS = ("unet", "text_encoder")


class Prepared:
    """A run's settings, checked against its processes, model, optimizers and pictures.

    `resolved` is config.resolve's result; `changes(old record, new record)` config.compare's.
    Raises ConfigError, DataError, CheckpointError, Stopped.
    """

    def __init__(self, resolved: Any, changes: Any, stop: StopRequest, console: Console) -> None:
        self.resolved, self.stop, self.console = resolved, stop, console
        shown = () if resolved.action == "dry_run" else resolved.overridden  # in the table of what differs
        self.notes = [note for note in resolved.notes if note not in shown]  # each said once, at the start
        self.warnings: dict[str, str] = {}  # what to do about each
        self._processes()
        self._where_to_start(changes)
        self._model()
        self._optimizers()
        self._pictures()

    # 1. Processes, and one seed for all of them

    def _processes(self) -> None:
        set_determinism(self.resolved.settings.deterministic)
        self.accelerator = make_accelerator(
            self.resolved.settings.mixed_precision or "no", self.resolved.settings.process_timeout_minutes
        )
        self.ranks = Ranks(self.accelerator)
        self._take_seed(self.ranks.broadcast(self.resolved.settings.seed))
        self.accumulation = accumulation(
            self.settings.batch_size, self.settings.grad_accum, self.settings.global_batch_size, self.ranks.count
        )
        self.per_update = self.accumulation * self.ranks.count
        self.ranks.refuse_difference(self.record["settings"], "settings")

    def _take_seed(self, seed: int) -> None:
        self.resolved = self.resolved.with_seed(seed)
        self.settings = self.resolved.settings

    @property
    def has_class(self) -> bool:
        return self.settings.class_data_root is not None and self.settings.prior_loss_weight > 0

    @property
    def record(self) -> dict[str, Any]:
        """config.json's content."""
        return {**self.resolved.record(), "processes": self.ranks.count}

    # 2. A new run, or a checkpoint

    def _where_to_start(self, changes: Any) -> None:
        settings = self.settings
        resume = None if settings.resume is None else str(settings.resume)
        self.start, self.old_run = find_start(resume, settings.logdir, settings.project_name, self.ranks)
        if self.start.seed is not None and self.resolved.entries["seed"].origin == "drawn":
            self.notes = [note for note in self.notes if not note.startswith(f"seed {settings.seed} ")]
            self._take_seed(self.start.seed)  # seed −1: a run keeps the one that it drew first
        if self.start.anew:
            self.warnings[self.start.anew] = "If there should be one: name its folder with --resume, or its logdir."
        self.notes += check_settings(self.start, self.record, changes, settings.resume_changed)

    # 3. The model, from its small files

    def _model(self) -> None:
        settings = self.settings
        if self.start.model is None:
            is_local = Path(settings.base_model).is_absolute()  # a revision is without effect then, and that was said
            revision = None if is_local else settings.base_model_revision
            self.facts = read_facts(settings.base_model, revision, settings.allow_pickle, settings.prediction_type)
        else:
            self.facts = read_facts(self.start.model)
        self.notes += self.facts.notes
        prediction = settings.prediction_type or self.facts.prediction_type
        steps = self.facts.num_train_timesteps
        is_default = settings.timestep_end == self.resolved.entries["timestep_end"].default  # up to the model's last
        end = min(settings.timestep_end, steps) if is_default else settings.timestep_end
        wrong = objectives.problems(prediction, settings.enable_zero_terminal_snr, settings.timestep_start, end, steps)
        if settings.clip_skip >= self.facts.text_layers:
            wrong.append(f"clip_skip: {settings.clip_skip}, and the text encoder has {self.facts.text_layers} layers")
        wrong += _unavailable(settings.attn_type, settings.ema_device)
        if wrong:
            raise ConfigError(wrong)
        self.times = TimeSampler(settings.timestep_start, end, steps)
        path = NoisePath.from_scheduler_config(self.facts.scheduler_config, settings.enable_zero_terminal_snr)
        self.objective = Objective(
            path.to(self.ranks.device), prediction, settings.min_snr_gamma, settings.loss_type, settings.huber_delta
        )

    # 4. What is trained, with what

    def _optimizers(self) -> None:
        settings = self.settings
        self.plugins = Plugins(settings.plugins)
        off = {"unet": settings.disable_unet_training, "text_encoder": settings.disable_textenc_training}
        self.parts = [part for part in PARTS if not off[part]]
        wrong: dict[str, list[str]] = {}  # and in which parts
        for part in self.parts:
            try:
                self.notes += [note for note in self._check_optimizer(part) if note not in self.notes]
            except ConfigError as error:  # noqa: PERF203 each part is told of
                for problem in error.problems:
                    wrong.setdefault(problem, []).append(part)
        if wrong:
            raise ConfigError([f"{', '.join(parts)}: {problem}" for problem, parts in wrong.items()])
        self.frozen = {part: self._frozen_names(part) for part in self.parts}
        self.groups = self.groups_of(self.facts.shapes)

    def _check_optimizer(self, part: str) -> list[str]:
        chosen = self.resolved.optimizers[part]
        return factory.check(
            chosen.optimizer,
            chosen.args,
            lr=chosen.lr,
            betas=chosen.betas,
            epsilon=chosen.epsilon,
            weight_decay=chosen.weight_decay,
            device=self.ranks.device.type,
        )

    def _frozen_names(self, part: str) -> set[str]:
        if part != "text_encoder":
            return set()
        freezing = self.resolved.freezing
        return freeze_text_encoder(
            list(self.facts.shapes[part]),
            layers=self.facts.text_layers,
            unused_layers=self.settings.clip_skip,
            unfreeze_last_n_layers=freezing.unfreeze_last_n_layers,
            freeze_embeddings=freezing.freeze_embeddings,
            freeze_final_layer_norm=freezing.freeze_final_layer_norm,
        )

    def groups_of(self, named: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Group]]:
        """Part → groups, of shapes or of parameters."""
        chosen = self.resolved.optimizers
        return {
            part: split(
                named[part].items(),
                part,
                chosen[part].weight_decay if factory.takes_weight_decay(chosen[part].optimizer) else None,
                chosen[part].no_decay_on_norms,
                lr=chosen[part].lr,
                frozen=self.frozen[part],
            )
            for part in self.parts
        }

    # 5. Pictures

    def _pictures(self) -> None:
        settings, facts = self.settings, self.facts
        self.cache_dir = settings.cache_dir or default_cache_dir()
        self.resolution = settings.resolution or facts.resolution
        step = facts.vae_factor * facts.unet_factor
        if self.resolution < step:
            raise ConfigError(f"resolution: {self.resolution} is below {step}, the least that this model can take")
        self.gate = Gate(
            sizes=bucket_sizes(self.resolution, step),
            bad_images=settings.bad_images,
            max_image_megapixels=settings.max_image_megapixels,
            masked_loss=settings.masked_loss,
            workers=os.cpu_count() or 1 if settings.scan_workers is None else settings.scan_workers,
            cache_dir=self.cache_dir,
            remember=self.resolved.action != "dry_run",
            ranks=self.ranks,
        )
        width, height = nearest(1, 1, self.gate.sizes)
        self.sampling = Sampling(seed=settings.seed, width=width, height=height, size_step=step)
        self.tokenize = tokenizer_for(facts)
        self.scanned = self._scan_all()
        self._require_class_pictures()
        if settings.masked_loss and not any(one.mask_path for samples in self.scanned.values() for one in samples):
            self.notes.append("masked_loss is without effect: no picture has a mask beside it")
        self.fingerprints: dict[str, Fingerprint] = {}
        self.compare("subject", self.scanned["subject"])
        samples, self.validation_sets = self._hold_out()
        self.subject = self.picture_set("subject", samples)
        plan = self.subject.plan
        total = total_updates(plan, self.per_update, settings.max_epochs, settings.max_steps)
        if total == 0:
            raise ConfigError(
                f"max_epochs {settings.max_epochs} gives no update: an update takes {self.per_update} × "
                f"{settings.batch_size} pictures, and {len(samples)} pictures fill only "
                f"{plan.micro_batches(settings.max_epochs or 1)} batches. Raise max_epochs, or lower grad_accum or "
                "batch_size"
            )
        self.clock = Clock(plan, self.per_update, total)
        self._learning_rates()

    def _learning_rates(self) -> None:
        """Where each part's has come down. A longer run keeps the end that it had."""
        total, kept = self.clock.total_steps, self.start.state.lr_horizon
        self.horizons = {part: self.resolved.optimizers[part].lr_decay_steps or kept or total for part in self.parts}
        for part, horizon in self.horizons.items():
            chosen, warning = self.resolved.optimizers[part], f"{part}: the learning rate"
            ends = total if chosen.lr_scheduler == "constant" else min(horizon, total)
            if ends < total:
                advice = "Set " if self.start.checkpoint is None else "Add --resume_changed --"
                said = f"{warning} is down at step {ends} and stays there until step {total}"
                self.warnings[said] = f"{advice}lr_decay_steps {total} to change that."
            if chosen.lr_warmup_steps and chosen.lr_warmup_steps >= ends:
                said = f"{warning} rises for {chosen.lr_warmup_steps} steps, and step {ends} ends that: "
                todo = "Set lr_warmup_steps lower; it counts optimizer steps."
                self.warnings[said + f"{chosen.lr:g} is never reached"] = todo

    def _begin_plan(self, name: str) -> None:
        """With the first epoch of which nothing was trained."""
        state = self.start.state
        epoch = state.next_class_epoch if name == "class" else state.next_epoch
        state.plan_starts[name] = [state.step * self.per_update, epoch]

    def compare(self, name: str, samples: Sequence[Sample]) -> None:
        """With what the checkpoint was trained on.

        Raises DataError. Subject and class are compared each by itself: new ones of one leave the other's plan alone.
        """
        now = self.fingerprints[name] = fingerprint(samples)
        changed = check_data(self.start, name, now, self.settings.accept_data_changes)
        if changed:
            self._begin_plan(name)
            self.notes += [f"{name} pictures since the checkpoint: {line}" for line in changed]

    def rests(self) -> list[str]:
        """What the end of the run leaves untrained."""
        epochs = self.settings.max_epochs
        if epochs is None or self.clock.total_steps < self.subject.plan.micro_batches(epochs) // self.per_update:
            return []  # max_steps ends the run before
        return rest_lines(self.subject.plan, epochs, self.accumulation, self.ranks.count)

    def _scan_all(self) -> dict[str, Sequence[Sample]]:
        """Every set of pictures that is there, by name. Raises DataError with the problems of all of them."""
        samples: dict[str, Sequence[Sample]] = {}
        problems: list[str] = []
        for name, (roots, caption) in self._roots().items():
            try:
                samples[name] = self.scan(name, roots, caption)
            except DataError as error:  # noqa: PERF203 each set is told of
                problems += error.problems
        if problems:
            raise DataError(problems)
        return samples

    def _roots(self) -> dict[str, tuple[Sequence[Path], str | None]]:
        settings, validation = self.settings, self.resolved.validation
        sets: dict[str, tuple[Sequence[Path], str | None]] = {"subject": (settings.data_root, settings.instance_prompt)}
        folder = settings.class_data_root
        if self.has_class and (settings.num_class_images is None or (folder.is_dir() and self.pictures_in(folder))):
            sets["class"] = ([folder], settings.class_prompt)  # missing ones are made once the model is there
        if validation is not None:
            if validation.val_split_mode == "manual":
                sets["validation"] = ([validation.manual_data_root], settings.instance_prompt)
            sets |= {f"validation-{name}": ([root], None) for name, root in validation.extra_manual_datasets.items()}
        return sets

    def _require_class_pictures(self) -> None:
        """A run that goes on has no base model any more that could make what is missing."""
        wanted, folder = self.settings.num_class_images, self.settings.class_data_root
        if not self.has_class or wanted is None or self.start.checkpoint is None:
            return
        there = len(self.pictures_in(folder)) if folder.is_dir() else 0
        if there < wanted:
            raise ConfigError(
                f"num_class_images: {wanted}, and {folder} holds {there} pictures. They are made with the base model "
                "when a run begins, and this one goes on: set num_class_images null to use what is there, or start anew"
            )

    def class_pictures(self) -> Sequence[Sample]:
        """Checked; once missing ones are made."""
        wanted = self.settings.num_class_images
        if "class" not in self.scanned or len(self.scanned["class"]) < (wanted or 0):
            self.scanned["class"] = self.scan("class", [self.settings.class_data_root], self.settings.class_prompt)
        return self.scanned["class"]

    def scan(self, name: str, roots: Sequence[Path], caption: str | None = None) -> Sequence[Sample]:
        with self.task(f"checking {name} pictures") as progress:
            found = self.gate.check(roots_of(name, tuple(roots), caption), progress)
        self.notes += found.notes
        if self.settings.bad_images == "skip":
            self.notes += [f"left out: {problem}" for problem in found.problems]
        samples = found.usable(self.settings.bad_images)
        self.ranks.refuse_difference(fingerprint(samples), f"{name} pictures and captions")
        limit = (self.facts.max_tokens - 2) * self.settings.max_caption_chunks
        self.notes += [_of(name, line) for line in long_captions(samples, self.tokenize.count, limit)]
        return samples

    def picture_set(self, name: str, samples: Sequence[Sample]) -> PictureSet:
        """Its plan goes on where the checkpoint's was; one that is cut otherwise (--resume_changed) begins anew."""
        state, settings = self.start.state, self.settings

        def made_from(start: Sequence[int]) -> PictureSet:
            begin, epoch = start
            return PictureSet.of(name, samples, self.gate.sizes, settings.batch_size, settings.seed, (begin, epoch))

        made = made_from(state.plan_starts.get(name, (0, 0)))
        how = [made.plan.signature, self.per_update]
        if state.plans.get(name, how) != how:
            self._begin_plan(name)
            made = made_from(state.plan_starts[name])
            epoch = made.plan.start[1]
            self.notes.append(f"{name}: batches are cut otherwise than before, and begin anew with epoch {epoch + 1}")
        state.plans[name] = how
        named = {sample.identity: sample for sample in samples}
        self.notes += [_of(name, line) for line in size_notes(named, made.plan)]
        return made

    def _hold_out(self) -> tuple[Sequence[Sample], dict[str, Sequence[Sample]]]:
        """(trained on, metric → pictures that validation looks at)."""
        samples, chosen = self.scanned["subject"], self.resolved.validation
        sets: dict[str, Sequence[Sample]] = {}
        if chosen is None:
            return samples, sets
        if chosen.val_split_mode == "automatic":
            samples, sets[HELD_OUT] = hold_out(samples, chosen.auto_split_proportion, chosen.seed)
        elif chosen.val_split_mode == "manual":
            sets[HELD_OUT] = self.scanned["validation"]
            refuse_shared(samples, sets[HELD_OUT])
        for name in chosen.extra_manual_datasets:
            sets[f"{HELD_OUT}_{name}"] = self.scanned[f"validation-{name}"]
        if chosen.stabilize_training_loss:
            sets[TRAINED] = choose(samples, chosen.stabilize_split_proportion, chosen.seed, "stabilize")
        return samples, sets

    def pictures_in(self, folder: Path) -> list[str]:
        """Names of the pictures there, unchecked."""
        return [found.path.name for root in roots_of("class", (folder,)) for found in find(root).pictures]

    @contextlib.contextmanager
    def task(self, title: str) -> Iterator[Progress]:
        """A bar that appears once the work knows its size; a signal ends the work."""
        with contextlib.ExitStack() as bar:
            shown: list[Any] = []
            last = [0]

            def progress(done: int, total: int) -> None:
                self.stop.raise_if_set()
                if not total:
                    return
                if not shown:
                    shown.append(bar.enter_context(self.console.task(title, total)))
                shown[0](done - last[0])
                last[0] = done

            yield progress


def _unavailable(attn_type: str, ema_device: str | None) -> list[str]:
    """What this machine lacks."""
    problems: list[str] = []
    try:
        ATTENTION[attn_type]()
    except ConfigError as error:
        problems += error.problems
    kind, _, index = (ema_device or "cpu").partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        problems.append(f"ema_device: {ema_device} is not there (this machine has {there} of {kind})")
    return problems


def _of(name: str, note: str) -> str:
    return note if name == "subject" else f"{name}: {note}"


def accumulation(batch_size: int, grad_accum: int, global_batch_size: int | None, processes: int) -> int:
    """Micro-batches a process adds up for one update."""
    if global_batch_size is None:
        return grad_accum
    rounds, rest = divmod(global_batch_size, batch_size * processes)
    assert not rest, f"global_batch_size {global_batch_size}, {processes} processes × batch_size {batch_size}"
    return rounds


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everydream"
