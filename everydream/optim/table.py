"""The optimizers, one row each: plain strings and numbers, so that settings can be checked without importing torch.

A new optimizer is a row here and one expectation in tests/optim/test_rows.py. `make` and `check` in factory.py turn a
row into an optimizer; docs/optimizers.md says in plain words what each is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

LR = 1e-6  # AdamW's learning rate for fine-tuning all weights of Stable Diffusion; other rows are given relative to it
HYPERPARAMETERS = ("betas", "epsilon", "weight_decay")
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "cosine_with_restarts")  # the functions: schedules.py


@dataclass(frozen=True)
class Row:
    """One optimizer. `summary` is its line in docs/optimizers.md.

    `hyperparameters`: which of betas, epsilon, weight_decay it has; the others, where set, are reported as unused.
    `defaults`: lr and those hyperparameters. `arguments`: our name → the constructor's, where they differ.
    `fixed`: what the factory always passes; `args` in optimizer.json may override it.
    `on_cpu`: what a CPU does differently. `cannot_*`: a reason, empty where there is none.
    """

    name: str
    cls: str
    summary: str
    hyperparameters: tuple[str, ...] = HYPERPARAMETERS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=lambda: {"epsilon": "eps"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    package: str = "torch"
    extra: str | None = None  # pip install everydream[extra]
    state_bits: int = 32  # of each moment, for tensors of at least 4,096 elements
    moments: float | None = 2  # numbers of state a weight, about (memory.py counts exactly); None: not known
    fused_flag: bool = False  # takes fused=True: one kernel for all tensors
    elementwise: bool = False  # each weight is updated from its own gradient and state alone: may be laid flat
    on_cpu: str = ""
    cannot_clip: str = ""
    cannot_schedule: str = ""  # other than constant (with or without warm-up)
    cannot_fuse: str = ""  # fused_backward
    cannot_round: str = ""  # weights_dtype bfloat16 with stochastic rounding

    @property
    def may_fuse(self) -> bool:
        return not self.cannot_fuse

    @property
    def may_round(self) -> bool:
        return not self.cannot_round


_ADAM = {"lr": LR, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
_LION = {"lr": 1e-7, "betas": (0.9, 0.99), "weight_decay": 0.0}
_PAGED = "paging needs CUDA: on a CPU it is {}, and slow"

_ROWS = (
    Row("adamw", "torch.optim.AdamW", "the reference: exact, fast, 8 bytes of state a weight", defaults=_ADAM,
        fused_flag=True, elementwise=True),
    Row("adamw8bit", "bitsandbytes.optim.AdamW8bit", "AdamW with its state in 8 bits: the default on a GPU",
        defaults=_ADAM, package="bitsandbytes", state_bits=8,
        on_cpu="on a CPU a step takes some 25 times as long as adamw's"),
    Row("lion", "lion_pytorch.Lion", "the sign of a momentum: half of AdamW's state; a tenth of its lr",
        hyperparameters=("betas", "weight_decay"), defaults=_LION, package="lion-pytorch", moments=1,
        elementwise=True),
    Row("lion8bit", "bitsandbytes.optim.Lion8bit", "Lion with its momentum in 8 bits: 1 byte of state a weight",
        hyperparameters=("betas", "weight_decay"), defaults=_LION, package="bitsandbytes", state_bits=8, moments=1,
        on_cpu="on a CPU a step takes some 5 times as long as lion's"),
    Row("paged_adamw8bit", "bitsandbytes.optim.PagedAdamW8bit", "adamw8bit whose state may move to host memory",
        defaults=_ADAM, package="bitsandbytes", state_bits=8,
        on_cpu=_PAGED.format("adamw8bit")),
    Row("paged_lion8bit", "bitsandbytes.optim.PagedLion8bit", "lion8bit whose state may move to host memory",
        hyperparameters=("betas", "weight_decay"), defaults=_LION, package="bitsandbytes", state_bits=8, moments=1,
        on_cpu=_PAGED.format("lion8bit")),
    Row("ademamix8bit", "bitsandbytes.optim.AdEMAMix8bit", "AdamW with a second, slow momentum: long runs",
        defaults={**_ADAM, "betas": (0.9, 0.999, 0.9999)}, package="bitsandbytes", state_bits=8, moments=3,
        on_cpu="on a CPU a step takes some 40 times as long as adamw's"),
    Row("adafactor", "torch.optim.Adafactor", "a row and a column of state for each matrix; lr relative to the weights",
        hyperparameters=("weight_decay",),
        # Its step is lr × the tensor's own RMS (about 0.03 in Stable Diffusion), AdamW's is lr: same size of step.
        defaults={"lr": 3e-5, "weight_decay": 0.0}, moments=0),
    Row("muon", "everydream.optim.muon.MuonWithAdamW", "orthogonalised momentum for matrices, AdamW for all else",
        defaults=_ADAM, moments=1.5, fused_flag=True,
        # Update RMS equal to AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that one lr suits both.
        fixed={"adjust_lr_fn": "match_rms_adamw"}),
    Row("sgd", "torch.optim.SGD", "plain gradient descent; no state without `args.momentum`",
        hyperparameters=("weight_decay",), defaults={"lr": 1e-3, "weight_decay": 0.0}, moments=0,
        fused_flag=True, elementwise=True),
    Row("prodigy", "prodigyopt.Prodigy", "AdamW that finds its own lr; leave lr at 1",
        defaults={"lr": 1.0, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0},
        package="prodigyopt", extra="prodigy", moments=4,
        cannot_fuse="its step size is estimated from all parameters of a part together",
        cannot_round="its step size is estimated from all parameters of a part together"),
    Row("schedulefree_adamw", "schedulefree.AdamWScheduleFree", "AdamW that averages instead of decaying its lr",
        defaults={"lr": 5e-6, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0},
        package="schedulefree", extra="schedulefree",
        cannot_schedule="it averages the weights instead of decaying the learning rate; warm-up is fine",
        cannot_fuse="its averaging weight is shared by all parameters of a group",
        cannot_round="it rewrites the weights on every switch between training and evaluation"),
)  # fmt: skip

ROWS: dict[str, Row] = {row.name: row for row in _ROWS}


def is_dotted(name: str) -> bool:
    """`package.Class`, or deeper: any optimizer class that can be imported."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def row_of(name: str) -> Row | None:
    """The row of a name, a row for a dotted class about which nothing is known before it is imported, or None."""
    if name in ROWS:
        return ROWS[name]
    if not is_dotted(name):
        return None
    reason = "nothing is known about this class"
    return Row(name, name, "a class of your own", defaults={"lr": LR}, package=name.split(".")[0], moments=None,
               cannot_fuse=reason, cannot_round=reason)  # fmt: skip


def unknown(name: str) -> str:
    """What to say about a name that is no row."""
    near = get_close_matches(name.lower(), ROWS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is not an optimizer.{hint} Known: {', '.join(ROWS)}, or a class as 'package.Class'."
