"""state.json: the run's clock and counters, in plain JSON that only this format's reader takes."""

from __future__ import annotations

import json

import pytest

from everydream.errors import CheckpointError
from everydream.training.state import TrainState


def test_state_comes_back_as_it_was() -> None:
    state = TrainState(step=1200, epoch=3, images_seen=4800, skipped_steps=[7], rollbacks=[[9, 5]], lr_horizon=2000)
    assert TrainState.from_json(state.to_json()) == state
    assert json.loads(state.to_json())["format"] == "everydream-state-1"


@pytest.mark.parametrize(
    "change, expected",
    [({"format": "everydream-state-9"}, "not of the format"), ({"momentum": 1}, "unknown momentum")],
)
def test_another_versions_state_is_refused(change: dict[str, object], expected: str) -> None:
    content = {**json.loads(TrainState().to_json()), **change}
    with pytest.raises(CheckpointError, match=expected):
        TrainState.from_json(json.dumps(content).encode())


def test_not_a_number_never_gets_into_the_file() -> None:
    with pytest.raises(ValueError):
        TrainState(scaler={"scale": float("nan")}).to_json()
