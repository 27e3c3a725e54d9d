"""Accelerator, processes, signals: what a run stands on, before any setting of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from everydream.errors import ConfigError, EveryDreamError, Stopped

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Result = TypeVar("Result")


def make_accelerator(mixed_precision: str, timeout_minutes: float) -> Accelerator:
    """The one place where processes meet. Raises ConfigError where the launcher's and our view of the world differ.

    A process that hangs ends the job after `timeout_minutes`; one that dies ends it at once (gloo's connections close;
    on cards the others wait inside NCCL until the launcher ends them, within half a minute).

    Accelerate prepares the model only; accumulation and the data loader are ours, so its own
    accumulation stays at 1 (its backward would divide once more).
    """
    refuse_lone_process(os.environ, parent_command_line())
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    has_cuda = torch.cuda.is_available()
    if mixed_precision == "fp16" and not has_cuda:
        raise ConfigError('mixed_precision "fp16" needs a CUDA card, and none is here: use "no" or "bf16"')
    accelerator = Accelerator(
        cpu=not has_cuda,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=1,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, and each of them believes that it is one of "
            f"{accelerator.num_processes}: they would all do the same work. See docs/distributed.md"
        )
    return accelerator


def set_determinism(wanted: bool) -> None:
    """On a card the same bits each time, by slower kernels (a CPU gives them anyway). Before its first matrix product,
    when cuBLAS reads its variable."""
    import torch

    if wanted == torch.are_deterministic_algorithms_enabled():  # torch's switch imports its compiler
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = False  # it chooses kernels by their time
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 nothing here reads such memory


@contextlib.contextmanager
def settled_objects() -> Iterator[None]:
    """What is there now is left out of Python's search for cycles: half a million objects of the libraries, 0.2 s each
    time, in the middle of a save or a preview."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def no_compiled_code() -> contextlib.AbstractContextManager[Any]:
    """The training's graphs are for its own shapes; compiling others for a few pictures would take minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


def refuse_lone_process(environ: Mapping[str, str], command: list[str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, without a word (accelerate 1.15)."""
    if int(environ.get("WORLD_SIZE", "1")) > 1 or not any("accelerate" in word for word in command[:3]):
        return
    wanted = asked_processes(command)
    if wanted > 1:
        raise ConfigError(
            f"accelerate launch was asked for {wanted} processes and started one. On a CPU use "
            "`accelerate launch --config_file examples/accelerate/cpu_2_processes.yaml` "
            "(--multi_gpu --num_processes 2, without --cpu)"
        )


def asked_processes(command: list[str]) -> int:
    """How many processes an `accelerate launch` command line asks for: the option, else its config file, else 1."""
    text = "\0".join(command)
    option = re.search(r"--num[_-]processes[=\0](\d+)", text)
    if option:
        return int(option[1])
    config = re.search(r"--config[_-]file[=\0]([^\0]+)", text)
    if config and Path(config[1]).is_file():
        line = re.search(r"^num_processes:\s*(\d+)", Path(config[1]).read_text(errors="replace"), re.MULTILINE)
        return int(line[1]) if line else 1
    return 1


def parent_command_line() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").split("\0")


def is_lost_process(error: Exception) -> bool:
    """Whether this says that another process died or hangs. gloo's errors have no class of their own.

    With NCCL a hanging process shows elsewhere: its watchdog says so and ends this process.
    """
    import torch.distributed

    is_gloo = "/gloo/" in str(error) or "caused pair closure" in str(error)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and is_gloo)


class StopRequest:
    """Remembers the first SIGINT, SIGTERM or SIGHUP (a terminal was closed); the loop asks, all ranks agree, the run
    saves and exits 128+n.

    A second Ctrl-C stops at once, without saving, and says so: `last_words`, which a run's log replaces.
    """

    @staticmethod
    def nothing_saved() -> str:
        return "stopped at once: nothing was saved"

    last_words: ClassVar[Callable[[], str]] = nothing_saved

    def __init__(self) -> None:
        self.signum = 0
        self._pid = 0

    def install(self) -> None:
        self._pid = os.getpid()
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            if os.getpid() == self._pid:  # data workers that are forked have this handler too
                with contextlib.suppress(Exception):
                    self._speak()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signum = self.signum or signum

    def _speak(self) -> None:
        """Not with print: what this signal interrupted may be printing itself."""
        words = StopRequest.last_words() if os.environ.get("RANK", "0") == "0" else ""
        if words:
            shown = "\x1b[?25h\n" if os.isatty(2) else ""  # the bar hides the cursor
            os.write(2, f"{shown}{words}\n".encode())

    def raise_if_set(self) -> None:
        """For stages before the first step, where there is nothing to save. Raises Stopped."""
        if self.signum:
            raise Stopped(self.signum)


def portable(error: Exception | None, rank: int) -> Exception | None:
    """As it goes to the other processes: ours as it is, a library's as text, for it may not go through pickle."""
    if error is None or isinstance(error, EveryDreamError):
        return error
    return RuntimeError(f"process {rank}: {error!r}")


class Ranks:
    """What the processes of a run say to each other. With one process every method answers at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes
        self.device = accelerator.device
        self.is_main = accelerator.is_main_process

    def leave(self) -> None:
        """At an end that all processes know of. Threads of gloo that are left to the end of the process may abort it
        there; with other processes in the middle of something, this could wait for them."""
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place, on the device."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.all_reduce(values)
        return values

    def gather(self, item: Any) -> list[Any]:
        """One small picklable object of each rank, in rank order, on every rank."""
        if self.count == 1:
            return [item]
        import torch.distributed

        items: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.count == 1:
            return item
        import torch.distributed

        box = [item]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def refuse_difference(self, items: Mapping[str, Any], what: str) -> None:
        """Raises ConfigError, on all processes, where not all of them have what the first has."""
        first = self.broadcast(items)
        differing = [name for name in sorted({*items, *first}) if items.get(name) != first.get(name)]
        told = self.gather((len(differing), differing[:5]))
        if any(count for count, _ in told):
            raise ConfigError(
                [
                    f"{what} are not the same for all processes:",
                    *(
                        f"  process {rank} differs from process 0 in {count}: {', '.join(names)}{' …' * (count > 5)}"
                        for rank, (count, names) in enumerate(told)
                        if count
                    ),
                    "Give all machines the same files.",
                ]
            )

    def together(self, work: Callable[[], Result]) -> Result:
        """Each process does its share; an error on one of them is raised on all, so that none waits for it."""
        result: Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = next((e for e in self.gather(portable(error, self.rank)) if e is not None), None)
        if failed is not None:
            raise error or failed
        return result  # type: ignore[return-value]

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Rank 0, then the others, which find what it cached."""
        if self.is_main:
            result = self.together(work)
        else:
            self.together(lambda: None)
        if self.count == 1:
            return result
        return self.together(lambda: result if self.is_main else work())
