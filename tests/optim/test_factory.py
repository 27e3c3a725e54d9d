"""What is wrong with an optimizer's settings is said before weights are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from everydream.errors import ConfigError
from everydream.optim import factory, table
from everydream.optim.groups import Group
from everydream.optim.table import ROWS
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights


class NoDecay(torch.optim.SGD):
    """A class of one's own, named as tests.optim.test_factory.NoDecay."""

    def __init__(self, params: Any, lr: float, epsilon: float = 0.5, twist: int = 1) -> None:
        super().__init__(params, lr=lr)
        self.epsilon, self.twist = epsilon, twist


OWN = "tests.optim.test_factory.NoDecay"

REFUSED = [
    ("adamx", {}, "Did you mean 'adamw'?"),
    ("AdamW8bit", {}, "Did you mean 'adamw8bit'?"),
    ("", {}, "'' is not an optimizer"),
    ("adamw", {"amsgradd": True}, "args.amsgradd is not an argument of torch.optim.AdamW. Did you mean 'amsgrad'?"),
    ("lion", {"use_tritn": True}, "Did you mean 'use_triton'?"),
    ("adamw", {"lr": 1.0}, "args.lr is set by 'lr'"),
    ("adamw", {"eps": 1.0}, "args.eps is set by 'epsilon'"),
    ("adamw", {"params": []}, "args.params is not an argument"),
    ("muon", {"ns_step": 5}, "Did you mean 'ns_steps'?"),
    ("adamw8bit", {"amsgrad": True}, "AdamW8bit does not support amsgrad"),
    ("torch.optim.AdamX", {}, "torch.optim has no AdamX. Did you mean 'Adam'?"),
    ("nowhere_to_be_found.Opt", {}, "(No module named 'nowhere_to_be_found'): install the package that has it"),
    ("broken_optimizers.Opt", {}, "broken_optimizers cannot be imported (no such card)"),
    ("torch.optim.LBFGS", {}, "cannot make a step with its settings (none): "),
    ("torch.optim.SparseAdam", {}, "SparseAdam does not support dense gradients"),
    ("torch.nn.Linear", {}, "not a subclass of torch.optim.Optimizer"),
    ("torch.optim", {}, "not a subclass of torch.optim.Optimizer"),
    ("torch.optim.RMSprop", {"alfa": 0.9}, "Did you mean 'alpha'?"),
]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of one's own that raises at its import."""
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('no such card')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name, args, words", REFUSED)
def test_refused_with_the_nearest(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        factory.check(name, args)
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", table.ROWS)
def test_an_unknown_argument_is_refused_by_every_row(name: str) -> None:
    with pytest.raises(ConfigError, match=r"args\.no_such_thing is not an argument"):
        factory.check(name, {"no_such_thing": 1})


def test_all_bad_arguments_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        factory.check("adamw", {"one": 1, "two": 2, "betas": (0, 0)})
    assert len(refusal.value.problems) == 3


@pytest.mark.parametrize(
    "settings", [{"betas": (0.9, 1.5)}, {"epsilon": -1.0}, {"weight_decay": -1.0}, {"lr": -1.0}, {"betas": (0.9,)}]
)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_values_out_of_range_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        factory.check(name, {}, **settings)


def test_whatever_a_constructor_raises_is_a_refusal_in_json() -> None:
    with pytest.raises(ConfigError, match=r"refuses its settings \(betas \[0\.9\]\): tuple index out of range"):
        factory.check("torch.optim.AdamW", {}, betas=(0.9,))


@pytest.mark.parametrize("name", [*table.ROWS, "torch.optim.NAdam"])
def test_an_lr_of_0_moves_nothing(name: str) -> None:
    factory.check(name, {}, lr=0.0)
    net = Net()
    before = weights(net)
    optimizer = optimizer_of(net, name, lr=0.0, weight_decay=0.1)
    train(net, optimizer, 2, data())
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    assert_same(before, weights(net))


def test_an_lr_of_0_beside_lions_decoupled_decay() -> None:
    factory.check("lion", {"decoupled_weight_decay": True}, lr=0.0, weight_decay=0.1)


def test_three_betas_only_where_there_are_three() -> None:
    factory.check("ademamix8bit", {}, betas=(0.9, 0.999, 0.9999))
    with pytest.raises(ConfigError, match="takes 3 betas"):
        factory.check("ademamix8bit", {}, betas=(0.9, 0.999))


@pytest.mark.parametrize("name", [name for name, row in table.ROWS.items() if row.extra])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, table.ROWS[name].package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'everydream\[{table.ROWS[name].extra}\]'"):
        factory.check(name, {})


def test_a_hyperparameter_that_lion_does_not_have_is_noted_once_and_it_runs() -> None:
    notes = factory.check("lion", {}, betas=(0.9, 0.99), epsilon=1e-8)
    assert notes == ["epsilon 1e-08 is not used: lion_pytorch.Lion has no such setting"]
    optimizer_of(Net(), "lion", epsilon=1e-8)


def test_a_dotted_class_gets_what_its_constructor_takes() -> None:
    notes = factory.check(OWN, {"twist": 3}, epsilon=0.25, weight_decay=0.1)
    assert notes == [f"weight_decay 0.1 is not used: {OWN} has no such setting"]
    optimizer = optimizer_of(Net(), OWN, lr=0.1, epsilon=0.25, weight_decay=0.1, args={"twist": 3})
    assert isinstance(optimizer, NoDecay)
    assert (optimizer.epsilon, optimizer.twist, optimizer.param_groups[0]["lr"]) == (0.25, 3, 0.1)


def test_a_dotted_class_has_its_librarys_defaults() -> None:
    optimizer = optimizer_of(Net(), "torch.optim.NAdam")
    assert optimizer.defaults == {**torch.optim.NAdam([torch.nn.Parameter(torch.zeros(1))]).defaults, "lr": 1e-6}


def test_args_stand_over_what_the_row_fixes() -> None:
    assert optimizer_of(Net(), "adamw", args={"fused": False}).param_groups[0]["fused"] is False
    by_foreach = optimizer_of(Net(), "adamw", args={"foreach": True}).param_groups[0]
    assert (by_foreach["foreach"], by_foreach["fused"]) == (True, None)
    assert optimizer_of(Net(), "muon", args={"adjust_lr_fn": "original"}).param_groups[0]["adjust_lr_fn"] == "original"
    assert optimizer_of(Net(), "sgd", args={"momentum": 0.9}).param_groups[0]["momentum"] == 0.9


def test_libraries_are_imported_only_when_chosen() -> None:
    code = (
        "import sys; from everydream.optim import factory; factory.check('adamw', {});"
        "print([m for m in ('bitsandbytes', 'lion_pytorch', 'prodigyopt', 'schedulefree') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_table_groups_and_schedules_need_no_torch() -> None:
    code = (
        "import sys; from everydream.optim import groups, schedules, table;"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_schedule_free_comes_in_training_mode_and_switches() -> None:
    net = Net()
    optimizer = optimizer_of(net, "schedulefree_adamw")
    assert optimizer.param_groups[0]["train_mode"] is True
    factory.set_mode(optimizer, training=False)
    assert optimizer.param_groups[0]["train_mode"] is False
    factory.set_mode(optimizer, training=True)
    assert optimizer.param_groups[0]["train_mode"] is True
    factory.set_mode(optimizer_of(net, "adamw"), training=False)  # no effect, no error


class Lookahead(torch.optim.AdamW):
    """Zhang et al. 2019: an optimizer with another one inside."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.optimizer = torch.optim.AdamW(self.param_groups, lr=lr)


class Counting(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.state["calls"] = self.state.get("calls", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("cls, why", [(Lookahead, "another optimizer inside"), (Counting, "belongs to no parameter")])
def test_what_a_checkpoint_would_not_have_is_refused(cls: type, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        factory.check(f"{__name__}.{cls.__name__}", {})


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_undo_channels_last_say_so(name: str) -> None:
    """So that the weights of the others alone are laid out so."""
    conv = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = factory.make(name, [Group("unet", "all", ("weight", "bias"), (conv.weight, conv.bias))])
    for p in conv.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert kept != factory.makes_contiguous(name)


class Leaving(torch.optim.SGD):
    """As lion-pytorch's triton does where it is not installed."""

    def __init__(self, params: Any, lr: float) -> None:
        raise SystemExit


class Passing(torch.optim.AdamW):
    def __init__(self, params: Any, **others: Any) -> None:
        super().__init__(params, **others)


def test_a_class_that_ends_the_program_is_refused() -> None:
    with pytest.raises(ConfigError, match="SystemExit"):
        factory.check(f"{__name__}.Leaving", {})


def test_what_a_class_passes_on_is_taken() -> None:
    name = f"{__name__}.Passing"
    assert factory.check(name, {"amsgrad": True}, betas=(0.5, 0.6), epsilon=1e-3, weight_decay=0.3) == []
    assert factory.takes_weight_decay(name) and not factory.takes_weight_decay("torch.optim.Rprop")
    with pytest.raises(ConfigError, match="Did you mean 'amsgrad'"):
        factory.check(name, {"amsgradd": True})
