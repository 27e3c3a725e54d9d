"""docs/settings.md and docs/from_everydream2.md, from the schema and the table of old keys."""

from __future__ import annotations

from collections.abc import Iterator

from everydream.config.kinds import kinds
from everydream.config.legacy import (
    ALIASES,
    RETIRED,
    RETIRED_FREEZING,
    RETIRED_OPTIMIZER,
    RETIRED_VALIDATION,
    VALIDATION_ALIASES,
)
from everydream.config.schema import (
    SECTIONS,
    OptimizerFile,
    PartFile,
    Settings,
    TextEncoderFreezing,
    Tree,
    ValidationSettings,
)
from everydream.config.sources import show

NOTE = "<!-- Generated from everydream/config by `python -m everydream.config.generate`: edit there. -->"

INTRODUCTION = """\
# Settings

Settings come from the command line, from `train.json` (`--config train.json`), from the optimizer file that
`optimizer_config` names, from `accelerate launch` (`mixed_precision` alone) and from the defaults below:

**command line > train.json > optimizer.json > launcher > default**

- In a file `null` is the same as leaving the key out; `0` and `false` are values. On the command line `--key null`
  hides what the files and the launcher say, so that the default holds.
- Paths on the command line are relative to the working directory, those in a file to the file's folder. `~` is your
  home folder.
- Without `--config` no file is read. Without `optimizer_config` no optimizer file is.
- On the command line: `--batch_size 4` or `--batch_size=4`; `--wandb`, `--no_wandb` or `--wandb false`;
  `--data_root one two` or `--data_root one --data_root two`. Names are never abbreviated.
- Files are strict JSON: a key twice, a trailing comma, a comment with slashes or NaN is an error, with its line.
  Comments are the keys `doc`, `$schema` and those that begin with `_` or `-`.
- Everything wrong is reported at once, before anything is loaded; the exit code is 2. Settings that have no effect, or
  that hide another, are said.

See what a run will do: `python scripts/train.py --config train.json --print_config` prints every setting with its
value and where it came from, `--print_config json` the same for programs; `--dry_run` also reads the pictures and
prints the plan.

Every run writes `config.json` into its folder; `--config <run folder>/config.json` repeats the run. Its values stand
where train.json's and optimizer.json's stood: the command line wins over them, and `--optimizer_config` beside it
replaces all its optimizer values. `resume`, `resume_changed`, `accept_data_changes`, `--dry_run` and `--print_config`
are not recorded. Tokens and passwords are written as `***`.
"""

OPTIMIZER_PAGE = """\
## The optimizer file

`optimizer.json` in one of two forms: flat, with the keys of the table at the top, for both parts; or nested, with
them in `base` (the UNet, and what the text encoder inherits) and in `text_encoder_overrides` (where it differs: null
inherits, 0 does not). betas, epsilon, weight_decay and args are inherited only where both parts use the same optimizer;
another optimizer begins with its own defaults. What the chosen optimizer does not have is reported as unused.
[optimizers.md](optimizers.md) says what each is for.
"""


def settings_page() -> str:
    lines = [NOTE, "", INTRODUCTION]
    sections: dict[str, list[str]] = {}
    for key in Settings.model_fields:
        title = SECTIONS.get(key, next(reversed(sections), ""))
        sections.setdefault(title, []).append(key)
    for title, keys in sections.items():
        lines += [f"## {title}", "", *_table(Settings, keys), ""]
    lines += [OPTIMIZER_PAGE, *_table(PartFile), "", "Beside them:", "", *_table(OptimizerFile), ""]
    lines += ["In `text_encoder_freezing`:", "", *_table(TextEncoderFreezing), ""]
    lines += ["## The validation file", "", "What `validation_config` names.", "", *_table(ValidationSettings), ""]
    return "\n".join(lines)


def _table(model: type[Tree], keys: list[str] | None = None) -> Iterator[str]:
    yield "| Setting | Takes | Default | Meaning |"
    yield "|---|---|---|---|"
    for key in keys or model.model_fields:
        one = model.model_fields[key]
        default = "required" if one.is_required() else f"`{show(one.default)}`"
        yield f"| `{key}` | {_cell(kinds(model)[key].phrase())} | {default} | {_cell(one.description or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


EVERYDREAM2_INTRODUCTION = """\
# From EveryDream2

EveryDream2's `train.json` and `optimizer.json`, flat or nested, with or without `doc`, load as they are:

    accelerate launch -q scripts/train.py --config train.json

Each key is a setting of the same name, another name for one, or retired: then the run says in one line what to use.

What to look at when you come from there:

- **Units.** EveryDream2 counts `lr_warmup_steps`, `lr_decay_steps`, `sample_steps`, `log_step` and step-based saving in
  batches. Here a step is an optimizer update, which takes `grad_accum` batches: divide by `grad_accum`.
- **Accumulation** averages: the same `lr` suits any `grad_accum`.
- **Every picture once an epoch.** Batches are not filled with repeated pictures; what does not fill a batch waits for
  the next epoch. `multiply.txt` fractions take turns over the pictures instead of cutting the list.
- **Paths** in a file are relative to that file, not to the working directory.
- **Checkpoints** hold everything a run needs to go on bit for bit (`--resume latest`).
- **Defaults** are this program's ([settings.md](settings.md)): your files keep what they say, but a key that they leave
  out may differ (`loss_type` mse, `zero_frequency_noise_ratio` 0, `gradient_checkpointing` false).

| EveryDream2's key | Here |
|---|---|
"""

# EveryDream2's keys that are settings of the same name → what is different, if anything
SAME_NAME = {
    "attn_type": "",
    "batch_size": "",
    "ckpt_every_n_minutes": "",
    "clip_grad_norm": "over all trained parameters together, on the true gradients",
    "clip_skip": "",
    "cond_dropout": "",
    "data_root": "may also be a list",
    "disable_textenc_training": "",
    "disable_unet_training": "",
    "ema_decay_rate": "with warm-up; kept in float32",
    "ema_device": "null: where the model is trained",
    "ema_update_interval": "in optimizer updates; default 1",
    "embedding_perturbation": "",
    "enable_zero_terminal_snr": "",
    "flip_p": "",
    "grad_accum": "averages",
    "gradient_checkpointing": "default false",
    "keep_tags": "",
    "log_step": "in optimizer updates",
    "logdir": "",
    "loss_type": "mse, huber, mse_huber (mse at timestep 0, huber at the last), huber_mse; default mse",
    "lr": "default 1e-6, or the optimizer's own",
    "lr_decay_steps": "in optimizer updates; 0 is taken as null, which is the whole run",
    "lr_scheduler": "also constant_with_warmup",
    "lr_warmup_steps": "in optimizer updates",
    "max_epochs": "with max_steps, whichever comes first",
    "min_snr_gamma": "right for v-prediction too",
    "mixed_precision": "no, fp16, bf16; null in a file: what accelerate launch says",
    "optimizer_config": "null: no file is read, not even ./optimizer.json",
    "plugins": "classes as package.Class; EveryDream2's own plugins do not fit",
    "project_name": "",
    "pyramid_noise_discount": "",
    "resolution": "null: the model's own",
    "run_name": "",
    "sample_prompts": "",
    "sample_steps": "in optimizer updates",
    "save_ckpt_dir": "for the single files; checkpoints stay in the run folder",
    "save_every_n_epochs": "0: only at the end",
    "seed": "-1 draws one, prints and records it",
    "shuffle_tags": "for each picture and epoch anew",
    "timestep_end": "",
    "timestep_start": "",
    "validation_config": "",
    "wandb": "",
    "write_schedule": "schedule.jsonl in the run folder",
    "zero_frequency_noise_ratio": "default 0",
}


def everydream2_page() -> str:
    keys = sorted({*SAME_NAME, *ALIASES, *RETIRED} - {"sample_every_n_steps", "log_every_n_steps"})
    rows = [f"| `{key}` | {_cell(_became(key))} |" for key in keys]
    further = {**RETIRED_OPTIMIZER, **RETIRED_FREEZING}
    rows += [f"| `{key}` (optimizer.json) | {_cell('retired: ' + old.instead)} |" for key, old in further.items()]
    rows += [f"| `{key}` (validation file) | `{alias.key}` |" for key, alias in VALIDATION_ALIASES.items()]
    rows += [
        f"| `{key}` (validation file) | {_cell('retired: ' + old.instead)} |" for key, old in RETIRED_VALIDATION.items()
    ]
    return NOTE + "\n\n" + EVERYDREAM2_INTRODUCTION + "\n".join(rows) + "\n"


def _became(key: str) -> str:
    if key in RETIRED:
        return f"retired: {RETIRED[key].instead}"
    if key not in ALIASES:
        return f"the same; {SAME_NAME[key]}" if SAME_NAME[key] else "the same"
    alias = ALIASES[key]
    values = [f"{show(old)} is {show(new)}" for old, new in alias.values.items()]
    findlast = '; for "findlast" use --resume latest' if key == "resume_ckpt" else ""
    return f"another name for {alias.key}" + (": " + ", ".join(values) if values else "") + findlast
