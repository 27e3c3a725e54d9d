"""Libraries' noise, kept away in one place: a person sees only what they can act on. --verbose lets all of it through.

Called before torch and the others are imported; imports nothing of them. Each row was seen with the pinned versions,
or stands for a kind that was; what a person can act on (a card too old for the installed torch) stays.
"""

from __future__ import annotations

import logging
import os
import warnings

ENVIRONMENT = {  # read by the libraries when they are imported, and by processes that we start
    "BITSANDBYTES_NOWELCOME": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",  # "CLIPImageProcessor requires torchvision", lengths that we check ourselves
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else it warns in each data worker
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # c10d and gloo, on hostnames and missing interfaces
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "KINETO_LOG_LEVEL": "99",  # torch.profiler: "USDT: profiler_start"
    "WANDB_SILENT": "true",
}
LOGGERS = (  # these log warnings that only their developers can use
    "bitsandbytes",  # "Failed to load CPU gemm_4bit_forward": a 4-bit kernel, which no training here uses
    "accelerate",
    "torch.distributed",
    "torch._dynamo",
    "torch._inductor",
    "tensorboard",
    "huggingface_hub",  # "unauthenticated requests"; failed downloads are exceptions
    "absl",
)
WARNING_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # for who maintains the callers
WARNING_MODULES = "diffusers accelerate transformers bitsandbytes torch.distributed torch.utils.checkpoint torch.jit"


def quiet_libraries(verbose: bool = False) -> None:
    """What the person has set in the environment stands."""
    if verbose:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in WARNING_CATEGORIES:
        warnings.filterwarnings("ignore", category=category)
    for module in WARNING_MODULES.split():
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"{module}(\.|$)")


def quiet_bars() -> None:
    """The libraries' own progress bars, of models on this disk. Called after their import; downloads keep theirs."""
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging._tqdm_active = False  # its own switch would turn off the hub's download bars as well
