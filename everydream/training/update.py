"""One optimizer update: micro-batches forward and backward, one small host read, then the step.

Shapes: B pictures of a micro-batch, C channels, H × W of the latents, K × 77 tokens.
Update loss (docs/objective.md) = Σ_subject wᵢlᵢ / N_subject + prior_loss_weight · Σ_class wⱼlⱼ / N_class, N over all
processes and the accumulation. Micro-batches are always full, so N is known beforehand and each micro-batch is divided
by its share; DDP's mean over processes does the rest.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from everydream.draws import torch_seed
from everydream.optim.clip import part_norms, scale_gradients
from everydream.optim.fused import FusedBackward

if TYPE_CHECKING:
    from accelerate import Accelerator

    from everydream.data.batch import Batch
    from everydream.diffusion.objectives import Objective
    from everydream.models.family import Family
    from everydream.runtime import Ranks, StopRequest
    from everydream.training.feed import Stream
    from everydream.training.profile import NoProfile
    from everydream.training.schedule import NoSchedule

SIGNALS = (2, 15, 1)  # SIGINT, SIGTERM, SIGHUP: the same numbers everywhere


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on after an update. Sums are over all processes and micro-batches."""

    loss_sum: float = 0.0
    prior_sum: float = 0.0
    norms: Mapping[str, float] = field(default_factory=dict)
    stop_signal: int = 0
    save_is_due: bool = False
    failed_saves: int = 0
    is_abandoned: bool = False

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.loss_sum, self.prior_sum, *self.norms.values())))

    @property
    def norm(self) -> float:
        return math.sqrt(sum(norm * norm for norm in self.norms.values()))


class Update:
    """`flags()` gives rank 0's (save is due, failed saves in a row): they travel with the one host read. `settle()` is
    called before weights and optimizer state change: a save may still be copying them."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        ranks: Ranks,
        stop: StopRequest,
        denoiser: torch.nn.Module,
        family: Family,
        objective: Objective,
        optimizers: Mapping[str, torch.optim.Optimizer],
        parameters: Mapping[str, Sequence[torch.nn.Parameter]],
        batches: Iterator[Batch],
        stream: Stream,
        batch_size: int,
        prior_loss_weight: float,
        clip_norm: float | None,
        seed: int,
        schedule: NoSchedule,
        profile: NoProfile,
    ) -> None:
        self.accelerator, self.ranks, self.stop = accelerator, ranks, stop
        self.denoiser, self.family, self.objective = denoiser, family, objective
        self.optimizers, self.parameters, self.batches = optimizers, parameters, batches
        self.stream, self.clip_norm, self.seed = stream, clip_norm, seed
        self.pictures = batch_size * stream.accumulation  # of one kind, on this process
        self.has_class = "class" in stream.kinds
        self.prior_loss_weight = prior_loss_weight
        self.schedule, self.profile = schedule, profile
        self.flags: Callable[[], tuple[bool, int]] = lambda: (False, 0)
        self.settle: Callable[[], None] = lambda: None
        self.data_wait_s = 0.0
        self._seen: list[tuple[Batch, torch.Tensor]] = []
        self._sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self._indices = range(0)
        self._abandoned = False

    def begin(self, step: int) -> None:
        """Forget the last update. Dropout and optimizers that draw get a generator that a resume finds again."""
        torch.manual_seed(torch_seed(self.seed, "update", step, self.ranks.rank))
        self._seen.clear()
        self._sums.zero_()
        self._abandoned = False
        self._indices = self.stream.indices(step)
        self.schedule.begin(step)

    def micro_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This process's micro-batches of the update, subject and class in turn; True with the last."""
        items = [(index, kind) for index in self._indices for kind in self.stream.kinds]
        for index, kind in items:
            # Several processes must agree before one may leave, which costs a message: they do so once an update.
            if self.stop.signum and self.ranks.count == 1:
                self._abandoned = True
                return
            began = time.perf_counter()
            with self.profile("data wait"):
                batch = next(self.batches)
            self.data_wait_s += time.perf_counter() - began
            self.schedule.see(index, batch)
            yield batch.to(self.ranks.device), (index, kind) == items[-1]

    def gradients_stay_local(self, unless: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients once an update, with its last micro-batch."""
        return contextlib.nullcontext() if unless else self.accelerator.no_sync(self.denoiser)

    def loss(self, batch: Batch) -> torch.Tensor:
        """This micro-batch's share of the update's loss. Noise maths in float32, whatever the network computes in."""
        with self.profile("forward"):
            loss_B = self.example_losses(batch) * batch.weights_B
        self._seen.append((batch, loss_B.detach()))
        self._sums[int(batch.is_class)] += loss_B.detach().sum()
        return loss_B.sum() * ((self.prior_loss_weight if batch.is_class else 1.0) / self.pictures)

    def example_losses(self, batch: Batch) -> torch.Tensor:
        """pixels_u8 → raw latents (mean, std) → latents → noisy latents → prediction → loss_B."""
        if batch.moments_BMCHW is None:
            assert batch.pixels_BCHW is not None
            mean_BCHW, std_BCHW = self.family.encode_pixels(batch.pixels_BCHW)
        else:
            mean_BCHW, std_BCHW = batch.moments_BMCHW.unbind(1)
        latents_BCHW = self.family.latents(mean_BCHW, std_BCHW, batch.vae_noise_BCHW)
        noisy_BCHW = self.objective.path.add_noise(latents_BCHW, batch.noise_BCHW, batch.t_B)
        text = batch.tokens_BKL if batch.text_BLD is None else batch.text_BLD
        prediction_BCHW = self.denoiser(noisy_BCHW, batch.t_B, text, batch.perturbation_BLD)
        return self.objective.loss(prediction_BCHW, latents_BCHW, batch.noise_BCHW, batch.t_B, batch.mask_B1HW)

    def backward(self, loss: torch.Tensor) -> None:
        with self.profile("backward"):
            self.accelerator.backward(loss)

    def agree(self) -> Verdict:
        """The one host read of an update: sums, gradient norms, stop and save flags, the same on every process."""
        if self._abandoned:
            self.drop_gradients()
            return Verdict(stop_signal=self.stop.signum, is_abandoned=True)
        with self.profile("agree"):
            verdict = self._agree()
            if not verdict.is_finite:
                self.drop_gradients()
            return verdict

    def _agree(self) -> Verdict:
        if self.accelerator.scaler is not None:
            for optimizer in self.optimizers.values():
                self.accelerator.scaler.unscale_(optimizer)
        norms = self.norms().double()  # equal on all processes: gradients were exchanged
        stops = [float(self.stop.signum == signum) for signum in SIGNALS]
        flags = [float(flag) for flag in self.flags()]
        # From pinned memory, or the copy would wait until the card has done all of backward.
        told = torch.tensor([*stops, *flags], dtype=torch.float64, pin_memory=self.ranks.device.type == "cuda")
        shared = self.ranks.sum(torch.cat([self._sums, told.to(self.ranks.device, non_blocking=True)]))
        loss_sum, prior_sum, *others = torch.cat([shared, norms]).tolist()
        stops, (due, failed, *parts) = others[: len(SIGNALS)], others[len(SIGNALS) :]
        return Verdict(
            loss_sum=loss_sum,
            prior_sum=prior_sum,
            norms=dict(zip(self.parameters, parts, strict=True)),
            stop_signal=next((signum for signum, asked in zip(SIGNALS, stops, strict=True) if asked), 0),
            save_is_due=due > 0,
            failed_saves=int(failed),
        )

    def norms(self) -> torch.Tensor:
        return part_norms(self.parameters)

    def apply(self, verdict: Verdict) -> None:
        """Clip by the norm over all trained parameters, and step. Only called with finite gradients."""
        with self.profile("save"):
            self.settle()
        with self.profile("optimizer"):
            self._apply(verdict)
            self.drop_gradients()

    def drop_gradients(self) -> None:
        """As soon as they are used: what a turn does has their memory, and a CUDA graph's replay may not meet them."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _apply(self, verdict: Verdict) -> None:
        if self.clip_norm is not None and verdict.norm > self.clip_norm:
            scale_gradients(self.parameters, self.clip_norm / verdict.norm)
        scaler = self.accelerator.scaler
        for optimizer in self.optimizers.values():
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def has_torn(self, verdict: Verdict) -> bool:
        """Whether a part of a non-finite update has reached the weights."""
        return False

    @property
    def may_lower_loss_scale(self) -> bool:
        """float16's loss scale is found by trying: while it can fall, an overflow does not mean divergence."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def lower_loss_scale(self) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def suspects(self) -> list[str]:
        """Identities of the pictures whose loss is not finite, on all processes; all of the update's if none is."""
        bad = [
            name
            for batch, loss_B in self._seen
            for name, is_bad in zip(batch.identities, (~loss_B.isfinite()).tolist(), strict=True)
            if is_bad
        ]
        all_bad = [name for names in self.ranks.gather(bad) for name in names]
        if all_bad:
            return all_bad
        mine = [name for batch, _ in self._seen for name in batch.identities]
        return [name for names in self.ranks.gather(mine) for name in names]


class FusedUpdate(Update):
    """`fused_backward`: each parameter is updated as its gradient is ready; there is no moment with all gradients.

    So the loss is read before backward, and a gradient that is not finite leaves the model torn: some parameters have
    made the step and others not. The trainer then goes back to the last good checkpoint.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fused = FusedBackward(self.optimizers, self.parameters)

    def backward(self, loss: torch.Tensor) -> None:
        self.settle()
        self.fused.begin()  # here, not with the update: one that a signal ends before its picture leaves no trace
        if math.isfinite(loss.item()):
            super().backward(loss)

    def norms(self) -> torch.Tensor:
        return self.fused.norms()

    def _apply(self, verdict: Verdict) -> None:
        """Done in backward."""

    def has_torn(self, verdict: Verdict) -> bool:
        return math.isfinite(verdict.loss_sum + verdict.prior_sum)
