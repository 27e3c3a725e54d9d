"""Values of an optimizer's state survive JSON exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from everydream.training.tagged import Decoder, Encoder

VALUES: list[Any] = [
    None,
    True,
    0,
    2**70,
    "$tensor",
    0.1 + 0.2,
    -0.0,
    5e-324,
    math.inf,
    -math.inf,
    [1, (2, [3.5, None])],
    {"a": {"$tuple": 1}, "b": (torch.float16, torch.device("cuda:1"))},
]


def through_json(value: Any) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "here"), allow_nan=False)
    return Decoder(encoder.tensors).decode(json.loads(text))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_value_and_type_come_back(value: Any) -> None:
    back = through_json(value)
    assert back == value and repr(back) == repr(value) and type(back) is type(value)


def test_not_a_number_comes_back() -> None:
    assert math.isnan(through_json(math.nan))


def test_tensors_anywhere_come_back_and_stay_shared() -> None:
    one = torch.arange(3)
    back = through_json({"list": [one, one], "view": one[:2]})
    assert torch.equal(back["list"][0], one) and back["list"][0] is back["list"][1]
    assert torch.equal(back["view"], one[:2])
