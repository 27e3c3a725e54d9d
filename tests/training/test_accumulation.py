"""The law of accumulation on the trainer's own update and a real (tiny) model: N micro-batches of B are one of N·B."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from everydream.data.batch import Batch
from everydream.data.buckets import assign, bucket_sizes
from everydream.data.dataset import Augmentation, MicroBatches, Source
from everydream.data.folders import Root
from everydream.data.plan import Draw
from everydream.data.scan import scan
from everydream.diffusion.noise import NoiseSampler
from everydream.diffusion.objectives import Objective
from everydream.diffusion.paths import NoisePath
from everydream.diffusion.times import TimeSampler
from everydream.models.family import Family, load, read_facts
from everydream.training.feed import Stream
from everydream.training.profile import NoProfile
from everydream.training.schedule import NoSchedule
from everydream.training.update import Update
from tests.tiny import make_pictures

PICTURES = 12  # of each kind in an update
PARTS = ("unet", "text_encoder")
KINDS = ("subject", "class")


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> Family:
    return load(read_facts(str(tiny_model)), train=PARTS, weights_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, family: Family) -> MicroBatches:
    """Twelve pictures of a subject and of its class, with weights from 0.5 to 1.6."""
    sources = {}
    for kind in KINDS:
        for i in range(PICTURES):
            folder = tmp_path_factory.mktemp(f"{kind}{i}", numbered=False)
            make_pictures(folder, 1, captions=f"{kind} star {i}", seed=i)
            (folder / "loss_scale.txt").write_text(str(0.5 + i / 10))
        roots = [Root(f"{kind}-{i:02d}", tmp_path_factory.getbasetemp() / f"{kind}{i}") for i in range(PICTURES)]
        samples = scan(roots).usable()
        buckets = assign([(s.identity, s.width, s.height) for s in samples], bucket_sizes(64, 8))
        sources[kind] = Source.of(samples, buckets, Augmentation(), is_class=kind == "class")
    return MicroBatches(
        sources,
        seed=1,
        times=TimeSampler(0, 1000, 1000),
        noise=NoiseSampler(),
        tokenize=family.tokenize,
        latent_channels=4,
        vae_factor=4,
    )


def batches(dataset: MicroBatches, kinds: tuple[str, ...], batch_size: int, which: range) -> Iterator[Batch]:
    for i in which:
        for kind in kinds:
            names = sorted(dataset.sources[kind].samples)[i * batch_size : (i + 1) * batch_size]
            yield dataset[kind, tuple(Draw(name, 0, 0) for name in names)]


def update_of(
    family: Family,
    dataset: MicroBatches,
    stream: Stream,
    prior: float = 0.5,
) -> Update:
    batch_size = PICTURES // stream.per_update
    return Update(
        accelerator=SimpleNamespace(scaler=None, backward=Tensor.backward),
        ranks=SimpleNamespace(count=1, rank=stream.rank, device=torch.device("cpu")),
        stop=SimpleNamespace(signum=0),
        denoiser=family.denoiser,
        family=family,
        objective=Objective(NoisePath.from_scheduler_config(family.facts.scheduler_config), min_snr_gamma=5.0),
        optimizers={},
        parameters={},
        batches=batches(dataset, stream.kinds, batch_size, stream.indices(0)),
        stream=stream,
        schedule=NoSchedule(),
        profile=NoProfile(),
        batch_size=batch_size,
        prior_loss_weight=prior,
        clip_norm=None,
        seed=0,
    )


def collect(family: Family) -> dict[str, Tensor]:
    """Each part's gradient, flat; and away with it."""
    parts = {part: [p.grad for p in family.parameters_of(part).values() if p.grad is not None] for part in PARTS}
    family.denoiser.zero_grad()
    return {part: torch.cat([gradient.flatten() for gradient in gradients]) for part, gradients in parts.items()}


def gradient(
    family: Family,
    dataset: MicroBatches,
    accumulation: int,
    processes: int = 1,
    prior: float = 0.5,
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Tensor]:
    """Of one whole update: the mean over the processes, as DistributedDataParallel forms it."""
    shares = []
    for rank in range(processes):
        update = update_of(family, dataset, Stream(kinds, accumulation, rank, processes), prior)
        update.begin(0)
        for batch, _ in update.micro_batches():
            update.backward(update.loss(batch))
        shares.append(collect(family))
    return {part: torch.stack([share[part] for share in shares]).mean(0) for part in PARTS}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to each part's norm. Not per weight: CLIP's k_proj.bias has a true gradient of zero."""
    return max(((a[part] - b[part]).norm() / b[part].norm()).item() for part in PARTS)


@pytest.mark.parametrize(("accumulation", "processes"), [(2, 1), (12, 1), (1, 2), (2, 2), (1, 3)])
def test_micro_batches_and_processes_add_up_to_one_batch(
    family: Family, dataset: MicroBatches, accumulation: int, processes: int
) -> None:
    assert distance(gradient(family, dataset, accumulation, processes), gradient(family, dataset, 1)) <= 1e-5


def test_an_update_is_the_formula_written_out(family: Family, dataset: MicroBatches) -> None:
    """Σ_subject wᵢlᵢ/N_subject + prior_loss_weight · Σ_class wⱼlⱼ/N_class, each picture by itself."""
    update = update_of(family, dataset, Stream(KINDS, PICTURES, 0, 1))
    for batch in batches(dataset, KINDS, 1, range(PICTURES)):
        factor = 0.5 if batch.is_class else 1.0
        (factor * batch.weights_B[0] * update.example_losses(batch)[0] / PICTURES).backward()
    by_hand = collect(family)
    assert distance(gradient(family, dataset, 3), by_hand) <= 1e-5


def test_prior_loss_weight_acts_as_predicted(family: Family, dataset: MicroBatches) -> None:
    subject = gradient(family, dataset, 3, kinds=("subject",))
    whole = gradient(family, dataset, 3, prior=1.0)
    of_class = {part: whole[part] - subject[part] for part in PARTS}
    assert all(of_class[part].norm() > 0.1 * subject[part].norm() for part in PARTS)
    half = {part: subject[part] + 0.5 * of_class[part] for part in PARTS}
    assert distance(gradient(family, dataset, 3, prior=0.5), half) <= 1e-5
    assert distance(gradient(family, dataset, 3, prior=0.0), subject) <= 1e-6
