"""A copy is the file that its tensors would have made, does not change with training, and uses its memory again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from everydream.training import snapshot
from everydream.training.snapshot import HostMemory, finished
from everydream.training.storage import DISK, Content, write_file
from everydream.training.tensorfile import DTYPES, Tensors

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def some_tensors(device: str) -> dict[str, torch.Tensor]:
    odd = {str(dtype): torch.randint(0, 2, (3, 5)).to(device=device, dtype=dtype) for dtype in DTYPES}
    return {
        **odd,
        "empty": torch.zeros(0, 3, device=device),
        "scalar": torch.tensor(0.5, device=device),
        "on the host": torch.tensor(7.0),
        "trained": torch.rand(5, device=device, requires_grad=True),
        "transposed": torch.rand(4, 6, device=device).t(),
        "a slice": torch.rand(9, 9, device=device)[2:, ::3],
    }


def written(path: Path, content: Content) -> bytes:
    path.unlink(missing_ok=True)
    write_file(DISK, path, content)
    return path.read_bytes()


@devices
@pytest.mark.parametrize("piece", [64, snapshot.PIECE])
def test_the_copy_is_the_file_byte_by_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, piece: int
) -> None:
    monkeypatch.setattr(snapshot, "PIECE", piece)
    files = {"a": Tensors(some_tensors(device)), "b": Tensors({"w": torch.rand(100, device=device)}, {"format": "np"})}
    laid = HostMemory().copy(files, finished(files))
    for name, file in files.items():
        assert written(tmp_path / name, laid[name]) == written(tmp_path / "plain", file)
        assert all(piece.is_pinned() == (device == "cuda") for piece in laid[name].pieces)


def test_training_does_not_reach_the_copy(tmp_path: Path) -> None:
    weight = torch.rand(4)
    laid = HostMemory().copy({"a": Tensors({"w": weight})})
    expected = written(tmp_path / "a", Tensors({"w": weight.clone()}))
    weight.zero_()
    assert written(tmp_path / "a", laid["a"]) == expected


def test_the_next_copy_takes_the_same_memory_and_another_layout_its_own(tmp_path: Path) -> None:
    memory = HostMemory()
    files = {"a": Tensors({"w": torch.rand(1000), "v": torch.rand(3, 3)}), "b": Tensors({"w": torch.rand(10)})}
    assert memory.missing(files) == 4 * 1009 + 40
    places = []
    for _ in range(2):
        laid = memory.copy(files)
        places.append([piece.data_ptr() for name in files for piece in laid[name].pieces])
        files = {
            name: Tensors({key: tensor + 1 for key, tensor in file.tensors.items()}) for name, file in files.items()
        }
        assert memory.missing(files) == 0
    assert places[0] == places[1]
    larger = {**files, "b": Tensors({"w": torch.rand(11)})}
    assert memory.missing(larger) == 44
    assert written(tmp_path / "a", memory.copy(larger)["b"]) == written(tmp_path / "a", larger["b"])
    renamed = {"b": Tensors({"x": torch.rand(11)})}  # the names are not in the memory
    assert memory.missing(renamed) == 0
    assert written(tmp_path / "a", memory.copy(renamed)["b"]) == written(tmp_path / "a", renamed["b"])


def test_each_card_is_waited_for_by_its_own_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """An average may be on another card than the model."""
    cards = [torch.device("cuda", i) for i in (0, 1)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda card: SimpleNamespace(record_event=lambda: f"on {card}"))
    on = {
        str(card): SimpleNamespace(is_cuda=card.type == "cuda", device=card) for card in [*cards, torch.device("cpu")]
    }
    assert finished({"a": Tensors(on)}) == {card: f"on {card}" for card in cards}  # type: ignore[arg-type]
    assert finished({"a": Tensors({"w": torch.zeros(1)})}) == {}
