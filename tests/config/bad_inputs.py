"""Wrong inputs and where each must be reported; run as a program, it reports what `resolve` says of each.

A case: files, arguments, and for each expected problem its exact place and words from its message. Nothing here imports
pytest, so that the program shows what the settings import.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from everydream.config.resolve import resolve
from everydream.config.schema import PartFile, Settings, TextEncoderFreezing, ValidationSettings
from everydream.errors import ConfigError


class Case(NamedTuple):
    name: str
    files: dict[str, str]
    argv: list[str]
    problems: list[tuple[str, str]]  # place, words


HEAD = '{\n"base_model": "model",\n"data_root": "pictures"'
TRAIN = ["--config", "train.json"]
OPTIMIZER = HEAD + ',\n"optimizer_config": "optimizer.json"}'
VALIDATION = HEAD + ',\n"validation_config": "validation.json"}'


def train(name: str, line: str, words: str, at: int | None = 4) -> Case:
    """train.json whose fourth line is `line`; a place without column."""
    return Case(name, {"train.json": f"{HEAD},\n{line}\n}}"}, TRAIN, [(f"train.json:{at}:", words)])


def optimizer(name: str, text: str, *problems: tuple[str, str]) -> Case:
    return Case(name, {"train.json": OPTIMIZER, "optimizer.json": text}, TRAIN, list(problems))


def validation(name: str, text: str, *problems: tuple[str, str]) -> Case:
    return Case(name, {"train.json": VALIDATION, "validation.json": text}, TRAIN, list(problems))


def typo(key: str) -> str:
    """One edit away, by turns a letter dropped, doubled, swapped or replaced; never another key."""
    middle = len(key) // 2
    edits = (
        key[:middle] + key[middle + 1 :],
        key[:middle] + key[middle] + key[middle:],
        key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :] if middle else key + "x",
        key[:middle] + "x" + key[middle + 1 :],
    )
    return next(one for one in (*edits[len(key) % 4 :], key + "_") if one != key and not one.startswith(("_", "-")))


def typos() -> list[Case]:
    unknown = "is not a setting. Did you mean"
    cases: list[Case] = []
    for key in Settings.model_fields:
        said = f"--{typo(key)} {unknown} '--"
        line = Case(
            f"typo of --{key}", {"train.json": HEAD + "}"}, [*TRAIN, f"--{typo(key)}", "1"], [("command line:", said)]
        )
        cases += [train(f"typo of {key}", f'"{typo(key)}": 1', unknown), line]
    for key in PartFile.model_fields:
        text = f'{{"base":\n{{"lr": 1,\n"{typo(key)}": 1}}}}'
        cases.append(
            optimizer(f"typo of base.{key}", text, ("optimizer.json:3:", f"base.{typo(key)} {unknown} '{key}'"))
        )
    for key in TextEncoderFreezing.model_fields:
        text = f'{{"text_encoder_freezing":\n{{\n"{typo(key)}": 1}}}}'
        said = f"text_encoder_freezing.{typo(key)} {unknown} '{key}'"
        cases.append(optimizer(f"typo of {key} in freezing", text, ("optimizer.json:3:", said)))
    for key in ValidationSettings.model_fields:
        said = f"{typo(key)} {unknown} '{key}'"
        cases.append(validation(f"typo of validation {key}", f'{{\n\n"{typo(key)}": 1}}', ("validation.json:3:", said)))
    return cases


def types() -> list[Case]:
    wrong = {bool: '"true"', int: '"4"', float: '"0.5"', str: "3", Path: "3", tuple: "3"}
    from everydream.config.kinds import kinds

    cases = []
    for key, kind in kinds(Settings).items():
        value = wrong[kind.types[0]] if kind.types else '"what"'
        cases.append(Case(f"type of {key}", {"train.json": replaced(key, value)}, TRAIN,
                          [(f"train.json:{line_of(key)}:", f"{key} is {value}, but must be")]))  # fmt: skip
        if bool not in kind.types:
            cases.append(Case(f"true for {key}", {"train.json": replaced(key, "true")}, TRAIN,
                              [(f"train.json:{line_of(key)}:", f"{key} is true, but must be")]))  # fmt: skip
    return cases


def line_of(key: str) -> int:
    return {"base_model": 2, "data_root": 3}.get(key, 4)


def replaced(key: str, value: str) -> str:
    lines = {"base_model": '"model"', "data_root": '"pictures"'} | {key: value}
    return "{\n" + ",\n".join(f'"{name}": {one}' for name, one in lines.items()) + "\n}"


HAND_WRITTEN = [
    train("lr with a colon", '"lr:": 1e-6', "\"lr:\" is not a setting. Did you mean 'lr'?"),
    train("unknown and null", '"batch_sise": null', "batch_sise is not a setting. Did you mean 'batch_size'?"),
    train("upper case", '"Batch_Size": 4', "Batch_Size is not a setting. Did you mean 'batch_size'?"),
    train("nothing near", '"zzz": 4', "zzz is not a setting."),
    train("empty key", '"": 4', '"" is not a setting.'),
    train("duplicate key", '"batch_size": 1,\n"batch_size": 1', "batch_size stands here a second time", 5),
    train("null then value is a duplicate too", '"lr": null,\n"lr": 1', "lr stands here a second time", 5),
    train("NaN", '"lr": NaN', "NaN is not a number"),
    train("Infinity", '"lr": Infinity', "Infinity is not a number"),
    train("minus Infinity", '"lr": -Infinity', "-Infinity is not a number"),
    train("1e400", '"lr": 1e400', "1e400 is too large"),
    train("trailing comma", '"lr": 1,', "a comma before '}'"),
    train("trailing comma in a list", '"plugins": ["a.B",]', "a comma before ']'"),
    train("slash comment", '"lr": 1 // fast', "JSON has no comments"),
    train("block comment", '/* fast */ "lr": 1', "JSON has no comments"),
    train("hash comment", '# fast\n"lr": 1', "JSON has no comments"),
    train("single quotes", "'lr': 1", "double quotes"),
    train("no quotes", "lr: 1", "a key in double quotes"),
    train("Python's True", '"wandb": True', "write true"),
    train("Python's None", '"lr": None', "write null"),
    train("missing colon", '"lr" 1', "':'"),
    train("missing comma", '"lr": 1 "seed": 2', "','"),
    train("leading zero", '"seed": 007', "not a number as JSON writes it"),
    train("hexadecimal", '"seed": 0xff', "not a number as JSON writes it"),
    train("bare point", '"lr": .5', "a value"),
    train("line break in a string", '"run_name": "a\nb"', "line break"),
    train("half a surrogate", '"run_name": "\\ud800"', "surrogate"),
    train("whole number with a point", '"batch_size": 4.0', "batch_size is 4.0, but must be a whole number"),
    train("half a picture", '"batch_size": 1.5', "batch_size is 1.5"),
    train("list for a number", '"batch_size": [4]', "batch_size is [4]"),
    train("object for a number", '"lr": {"value": 1}', 'lr is {"value": 1}'),
    train("zero where 1 is least", '"batch_size": 0', "batch_size is 0, but must be a whole number ≥ 1"),
    train("below zero", '"lr": -1e-6', "lr is -1e-06, but must be a number ≥ 0"),
    train("above one", '"cond_dropout": 1.01', "cond_dropout is 1.01, but must be a number ≥ 0 and ≤ 1"),
    train("percent", '"flip_p": 50', "flip_p is 50"),
    train("seed below -1", '"seed": -2', "seed is -2"),
    train("seed above 63 bits", '"seed": 9223372036854775808', "seed is 9223372036854775808"),
    train("ema of 1", '"ema_decay_rate": 1', "ema_decay_rate is 1, but must be a number > 0 and < 1"),
    train("four chunks", '"max_caption_chunks": 4', "max_caption_chunks is 4"),
    train("unknown loss", '"loss_type": "mes"', "Did you mean 'mse'?"),
    train("unknown schedule", '"lr_scheduler": "cosin"', "Did you mean 'cosine'?"),
    train("unknown precision", '"mixed_precision": "float16"', 'mixed_precision is "float16", but must be one of'),
    train("fp8", '"mixed_precision": "fp8"', 'mixed_precision is "fp8", but must be one of "no", "fp16", "bf16"'),
    train("unknown dtype", '"weights_dtype": "bf16"', "Did you mean 'bfloat16'?"),
    train("unknown attention", '"attn_type": "flash"', 'attn_type is "flash"'),
    train("compile with a word", '"compile": "fast"', 'compile is "fast", but must be "max" or true or false'),
    train("color by name", '"alpha_color": "white"', '"#rrggbb"'),
    train("project name with a slash", '"project_name": "a/b"', "project_name is"),
    train("project name that hides", '"project_name": ".a"', "project_name is"),
    train("empty project name", '"project_name": ""', "project_name is"),
    train("empty text", '"instance_prompt": ""', "a text that is not empty"),
    train("empty path", '"logdir": ""', "logdir is"),
    train("NUL in a path", '"logdir": "a\\u0000b"', "logdir is"),
    train("a name too long for any disk", f'"sample_prompts": "{"x" * 5000}"', "sample_prompts: there is no file"),
    train("plugin without package", '"plugins": ["Stop"]', "plugins is"),
    train("plugin as text", '"plugins": "a.B"', "plugins is"),
    train("device", '"ema_device": "gpu"', "ema_device is"),
    train("optimizer in train.json", '"optimizer": "lion"', "optimizer is not a setting. It belongs into optimizer"),
    train("betas in train.json", '"betas": [0.9, 0.99]', "betas is not a setting. It belongs into optimizer.json"),
    train("a mode of validation in train.json", '"val_split_mode": "none"', "It belongs into the validation file"),
    train("an action in train.json", '"dry_run": true', "It is said on the command line alone: --dry_run"),
    train("a word where a list belongs", '"ema_use": "previews"', 'Write ["previews"].'),
    train("a number for an old switch", '"save_full_precision": "float16"',
          'save_full_precision is "float16", but must be true or false.'),
    train("decay of 0.0 steps", '"lr_decay_steps": 0.0', "lr_decay_steps is 0.0, but must be a whole number"),
    train("a count beyond all runs", f'"max_steps": 1{"0" * 250}', "but must be a whole number ≥ 1 and ≤ 10^9"),
    train("a batch beyond all memory", '"grad_accum": 1000000000', "must be a whole number ≥ 1 and ≤ 10^6"),
    train("project name of one space", '"project_name": " "', "project_name is"),
    train("project name with a dot at its end", '"project_name": "a."', "project_name is"),
    train("project name beyond a disk's bytes", f'"project_name": "{"字" * 70}"', "200 bytes"),
    train("a key with a line break, twice", '"_a\\nb": 1, "_a\\nb": 1', '"_a\\nb" stands here a second time'),
    train("an hour beyond all clocks", '"process_timeout_minutes": 1e300', "process_timeout_minutes is 1e+300"),
    train("format of a record", '"format": "x"', 'format is "x"'),
    Case("empty file", {"train.json": ""}, TRAIN, [("train.json:1:1:", "the file ends")]),
    Case("a list", {"train.json": "[1]"}, TRAIN, [("train.json:1:", "must hold an object")]),
    Case("two objects", {"train.json": "{}\n{}"}, TRAIN, [("train.json:2:1:", "the file should end here")]),
    Case("cut off", {"train.json": HEAD}, TRAIN, [("train.json:3:24:", "the file ends")]),
    Case("no such file", {}, TRAIN, [("train.json:", "there is no such file")]),
    Case("a folder", {}, ["--config", "pictures"], [("pictures:", "cannot be read: Is a directory")]),
    Case("nothing required", {"train.json": "{}"}, TRAIN,
         [("train.json:", "base_model is missing"), ("train.json:", "data_root is missing")]),
    Case("required are null", {"train.json": '{"base_model": null, "data_root": null}'}, TRAIN,
         [("train.json:", "base_model is missing"), ("train.json:", "data_root is missing")]),
    Case("no pictures", {"train.json": '{"base_model": "model",\n"data_root": []}'}, TRAIN,
         [("train.json:2:", "data_root is []")]),
    Case("a number among folders", {"train.json": '{"base_model": "model",\n"data_root": ["pictures", 3]}'}, TRAIN,
         [("train.json:2:", 'data_root is ["pictures", 3]')]),
    optimizer("unknown optimizer", '{\n"optimizer": "adamw8bits"}',
              ("optimizer.json:2:", "'adamw8bits' is not an optimizer. Did you mean 'adamw8bit'?")),
    optimizer("unknown optimizer, nested", '{"base": {"optimizer": "lion"},\n"text_encoder_overrides": {\n'
              '"optimizer": "prodigi"}}', ("optimizer.json:3:", "Did you mean 'prodigy'?")),
    optimizer("duplicate in base", '{"base": {"lr": 1,\n"lr": 2}}', ("optimizer.json:2:1:", "lr stands here a second")),
    optimizer("trailing comma in base", '{"base": {\n"lr": 1,\n}}', ("optimizer.json:2:8:", "a comma before '}'")),
    optimizer("betas as a number", '{\n\n"betas": 0.9}', ("optimizer.json:3:", "betas is 0.9, but must be a list")),
    optimizer("betas of 1", '{"betas": [0.9, 1.0]}', ("optimizer.json:1:", "betas is [0.9, 1.0]")),
    optimizer("three betas", '{"optimizer": "adamw",\n"betas": [0.9, 0.99, 0.999]}',
              ("optimizer.json:2:", "adamw takes 2")),
    optimizer("lr as text, nested", '{"base": {\n"lr": "1e-6"}}', ("optimizer.json:2:", 'base.lr is "1e-6", but')),
    optimizer("overrides as text", '{"base": {},\n"text_encoder_overrides": "none"}',
              ("optimizer.json:2:", 'text_encoder_overrides is "none", but must be an object')),
    optimizer("a key beside base", '{"base": {"lr": 1},\n"weight_decay": 0.1}',
              ("optimizer.json:2:", "weight_decay stands beside base")),
    optimizer("args as a list", '{\n"args": [1]}', ("optimizer.json:2:", "args is [1], but must be an object")),
    optimizer("scale as text", '{\n"text_encoder_lr_scale": "half"}', ("optimizer.json:2:", "lr_scale is")),
    optimizer("scale below 0", '{\n"text_encoder_lr_scale": -1}', ("optimizer.json:2:", "text_encoder_lr_scale is -1")),
    optimizer("layers below 0", '{"text_encoder_freezing": {\n"unfreeze_last_n_layers": -1}}',
              ("optimizer.json:2:", "text_encoder_freezing.unfreeze_last_n_layers is -1")),
    optimizer("unknown block", '{"base": {},\n"text_encoder": {"lr": 1}}',
              ("optimizer.json:2:", "text_encoder is not a setting. Did you mean 'text_encoder_")),
    optimizer("two mistakes", '{"betas": 1,\n"lr": "x"}',
              ("optimizer.json:1:", "betas is 1"), ("optimizer.json:2:", "lr is")),
    optimizer("a text", '"adamw"', ("optimizer.json:1:", "must hold an object")),
    validation("unknown mode", '{\n"val_split_mode": "auto"}', ("validation.json:2:", "Did you mean 'automatic'?")),
    validation("all held out", '{\n"auto_split_proportion": 1}', ("validation.json:2:", "auto_split_proportion is 1")),
    validation("manual without folder", '{\n"val_split_mode": "manual"}', ("validation.json:2:", "contradict")),
    validation("folders as a list", '{\n"extra_manual_datasets": ["a"]}', ("validation.json:2:", "extra_manual")),
    Case("no --config", {"train.json": HEAD + "}"}, [],
         [("command line:", "base_model is missing"), ("command line:", "add --config train.json")]),
    Case("launcher's fp8", {"train.json": HEAD + "}"}, [*TRAIN, "ACCELERATE_MIXED_PRECISION=fp8"],
         [("launcher:", 'mixed_precision is "fp8"')]),
    Case("every source at once", {"train.json": OPTIMIZER[:-1] + ',\n"seed": "x"}', "optimizer.json": '{"lr": true}'},
         [*TRAIN, "--wandb", "maybe"],
         [("command line:", '--wandb is "maybe"'), ("train.json:5:", 'seed is "x"'),
          ("optimizer.json:1:", "lr is true")]),
]  # fmt: skip

CASES = [*typos(), *types(), *HAND_WRITTEN]


def said(case: Case, folder: Path) -> list[str] | None:
    """The problems `resolve` raises, or None where it accepts the case."""
    environ = dict(word.split("=", 1) for word in case.argv if word.startswith("ACCELERATE"))
    for name in ("train.json", "optimizer.json", "validation.json"):
        (folder / name).unlink(missing_ok=True)
    for name, text in case.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    try:
        resolve([word for word in case.argv if not word.startswith("ACCELERATE")], environ)
    except ConfigError as error:
        return list(error.problems)
    return None


def main() -> None:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "pictures").mkdir()
        os.chdir(folder)
        before = {path.name for path in folder.iterdir()}
        result["said"] = [said(case, folder) for case in CASES]
        result["made"] = sorted({path.name for path in folder.iterdir()} - before - {"train.json", "optimizer.json"})
        os.chdir("/")
    heavy = ("torch", "numpy", "diffusers", "transformers", "accelerate", "PIL", "rich")
    result["imported"] = [module for module in heavy if module in sys.modules]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
