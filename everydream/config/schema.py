"""Every setting: its type, default and range, and one string with unit, range, effect and what null means.

Strict and frozen: `"4"` is no number, `true` is no 1. From this file come the command line, `--help`, docs/settings.md
and schemas/*.json (`python -m everydream.config.generate`). A new setting is a field here, a line in train.json, and a
word in compare.py on whether a resume may change it.

Names and defaults are EveryDream2's where it has one that suits. Annotations here are evaluated (no
`from __future__ import annotations`): pydantic would do it anyway, three times slower.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from everydream.optim.table import SCHEDULES as DECAYS

# diffusers' name for a warm-up that no decay follows; `constant` alone has none (parts.py)
SCHEDULES = (*DECAYS, "constant_with_warmup")


def absolute(text: str, folder: Path) -> Path:
    """The path that `text` means when it stands in a file of `folder`; `~` is the home folder; links are kept."""
    return Path(os.path.abspath(folder / os.path.expanduser(text)))


def _path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError("empty")
    return absolute(value, (info.context or {}).get("folder", Path()))


def _paths(value: Any, info: ValidationInfo) -> Any:
    items = value if isinstance(value, tuple) else (value,)
    return tuple(_path(item, info) for item in items)


def _resume(value: Any, info: ValidationInfo) -> Any:
    return value if value == "latest" else _path(value, info)


def _model(value: Any, info: ValidationInfo) -> Any:
    """A path becomes absolute; what is neither there nor written like a path may be a hub id."""
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    path = absolute(value, (info.context or {}).get("folder", Path()))
    written_as_path = value.startswith((".", "/", "~")) or "\\" in value or value.endswith(WEIGHT_FILES)
    written_as_path |= value.count("/") != 1
    return str(path) if written_as_path or os.path.exists(path) else value


def _fits_a_disk(name: str) -> str:
    """Names end at 255 bytes; those made from this one have a date, a step and an ending behind it."""
    if len(name.encode()) > 200:
        raise ValueError("too long")
    return name


_CHARACTER, _AT_ENDS = r"[^/\\:*?\"<>|\x00-\x1f]", r"[^/\\:*?\"<>|\x00-\x1f. ]"
_NAME = f"^{_AT_ENDS}({_CHARACTER}{{0,98}}{_AT_ENDS})?$"
_NAME_IN_WORDS = (
    'a name of up to 100 characters (200 bytes) without / \\ : * ? " < > | and without a dot or space at its ends'
)
_CLASS = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"
_MODEL = "a folder, a single file, or a hub id (owner/name)"
_FOLDERS = "a folder or manifest, or a list of them"
WEIGHT_FILES = (".safetensors", ".ckpt", ".bin", ".pt")
FilePath = Annotated[Path, BeforeValidator(_path)]
Text = Annotated[str, Field(min_length=1, title="a text that is not empty")]
MOST = 10**9  # above what any run counts to
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Few = Annotated[int, Field(ge=1, le=10**6)]  # pictures or batches of one update
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], ...]
Schedule = Literal[SCHEDULES]  # type: ignore[valid-type]


class Tree(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Settings(Tree):
    """What train.json and the command line may say. The sections of `--help` begin at the fields in SECTIONS."""

    project_name: Annotated[str, Field(pattern=_NAME, title=_NAME_IN_WORDS), AfterValidator(_fits_a_disk)] = Field(
        "my_project",
        description="Begins the names of run folders and exported files; --resume latest looks for runs of this name. "
        "Up to 100 characters that file names may have, and 200 bytes.",
    )
    run_name: Text | None = Field(
        None, description="Name of the run in the trackers and in its report. Null: the run folder's name."
    )
    logdir: FilePath = Field(
        Path("logs"), description="Folder in which every run makes a folder of its own. It is made where missing."
    )
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] = Field(
        555,
        description="Start of all randomness, -1 to 2^63 - 1: the same seed gives the same run. "
        "-1 draws one, which is printed and recorded.",
    )
    max_epochs: Count | None = Field(
        100,
        description="End after this many passes over the pictures, 1 or more; with max_steps, whichever comes first. "
        "Left out or null: 100, or without limit where max_steps is set.",
    )
    max_steps: Count | None = Field(
        None,
        description="End after this many optimizer updates, 1 or more; with max_epochs, whichever comes first. "
        "Null: max_epochs alone decides.",
    )
    process_timeout_minutes: Annotated[float, Field(gt=0, le=525600)] = Field(
        30.0,
        description="Minutes after which processes that wait for another one give it up and end the job, above 0, at "
        "most 525600 (a year). "
        "Without effect with one process.",
    )

    base_model: Annotated[str, Field(min_length=1, title=_MODEL), BeforeValidator(_model)] = Field(
        description="The model to start from: a diffusers folder, a single .safetensors file, or a hub id (owner/name)."
    )
    base_model_revision: Text | None = Field(
        None, description="Branch, tag or commit of a hub id. Null: its main branch."
    )
    allow_pickle: bool = Field(
        False, description="true: also read .ckpt and .bin base models (tensors only, never code)."
    )

    data_root: Annotated[tuple[Path, ...], Field(min_length=1, title=_FOLDERS), BeforeValidator(_paths)] = Field(
        description="Folder with the pictures to train on and their captions, searched with its sub-folders; or a "
        "manifest (.json, .jsonl) of the pictures and captions that count; or a list of them."
    )
    resolution: Annotated[int, Field(ge=16, le=8192)] | None = Field(
        None,
        description="Side in pixels of the square whose area pictures are scaled to, 16 to 8192. "
        "Null: the model's own (512 for Stable Diffusion 1.5).",
    )
    batch_size: Few = Field(
        4, description="Pictures in one forward pass of one process, 1 to 10^6. Memory grows with it."
    )
    grad_accum: Few = Field(
        1, description="Micro-batches averaged into one update, 1 to 10^6: a larger batch without its memory."
    )
    global_batch_size: Few | None = Field(
        None,
        description="Pictures in one update over all processes, 1 to 10^6, a multiple of batch_size × processes: "
        "grad_accum follows from it, so that the run may go on with another number of processes. "
        "Null: batch_size × grad_accum × processes.",
    )
    cond_dropout: Share = Field(
        0.04, description="Share of pictures shown with an empty caption, 0 to 1. Needed for guidance to keep working."
    )
    flip_p: Share = Field(
        0.0, description="Chance that a picture is mirrored, 0 to 1. Leave 0 for faces and lettering."
    )
    crop_jitter: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0,
        description="Play of the crop as a share of the picture's shorter side, 0 to 0.5: the crop is smaller by that "
        "share and moves by up to half of it from the middle. 0: centred crops, which can be cached.",
    )
    shuffle_tags: bool = Field(
        False, description="true: the caption's comma-separated parts change their order for each picture and epoch."
    )
    keep_tags: Whole = Field(
        0, description="How many parts at the caption's start shuffle_tags leaves in place, 0 or more."
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Processes that prepare batches, 0 to 256; 0: the training process itself. It never changes what "
        "is trained. Null: chosen from the number of CPU cores.",
    )
    scan_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Processes that check the pictures at the start, 0 to 256; 0: the training process itself. "
        "Null: one for each CPU core.",
    )
    cache_latents: bool | None = Field(
        None,
        description="Encode each picture once and keep the result on disk: far faster epochs. "
        "Null: yes where it changes nothing (crop_jitter 0).",
    )
    cache_dir: FilePath | None = Field(
        None,
        description="Folder for cached latents and text embeddings, shared by all runs. "
        "Null: everydream in $XDG_CACHE_HOME or ~/.cache.",
    )
    bad_images: Literal["error", "skip"] = Field(
        "error", description='What broken pictures do: "error" ends the run before it starts, "skip" leaves them out.'
    )
    max_image_megapixels: Annotated[float, Field(gt=0)] = Field(
        100.0, description="Larger pictures count as broken, in millions of pixels, above 0. Decoding one takes memory."
    )
    alpha_color: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$", title='a color as "#rrggbb"')] = Field(
        "#ffffff", description='What shows through where a picture is transparent, as "#rrggbb". Default: white.'
    )
    masked_loss: bool = Field(
        False,
        description="true: where <picture>.mask.png stands beside a picture, its brightness weighs the loss.",
    )
    max_caption_chunks: Annotated[int, Field(ge=1, le=3)] = Field(
        1, description="Longest caption in chunks of 75 tokens, 1 to 3; what is beyond is cut off, and counted."
    )

    instance_prompt: Text | None = Field(
        None,
        description="Caption of pictures that have none beside them. Null: the file name up to the first '_'.",
    )
    class_data_root: FilePath | None = Field(
        None,
        description="Folder with pictures of what the model must not forget (prior preservation). "
        "Made where missing if num_class_images is set. Null: no prior preservation.",
    )
    class_prompt: Text | None = Field(
        None,
        description="Caption of class pictures that have none, and the prompt that missing ones are made with. "
        "Null: the file name, as for other pictures.",
    )
    num_class_images: Few | None = Field(
        None,
        description="Class pictures wanted, 1 to 10^6; missing ones are made with the base model before training "
        "(needs class_data_root and class_prompt). Null: those that are there.",
    )
    prior_loss_weight: Rate = Field(
        1.0, description="Weight of the class pictures' loss beside the subject's, 0 or more; 0 leaves them out."
    )

    disable_unet_training: bool = Field(False, description="true: the UNet stays as it is.")
    disable_textenc_training: bool = Field(
        False, description="true: the text encoder stays as it is, and its output can be cached."
    )
    clip_skip: Annotated[int, Field(ge=0, le=22)] = Field(
        0, description="How many of the text encoder's last layers are skipped, 0 to 22 (below its number of layers)."
    )

    optimizer_config: FilePath | None = Field(
        None,
        description="File with the optimizer's settings. Null: none is read, and the defaults hold "
        "(adamw8bit, betas 0.9 and 0.999, weight decay 0.01, epsilon 1e-8).",
    )
    lr: Rate | None = Field(
        None,
        description="Learning rate of the UNet, and of the text encoder where it has none of its own, 0 or more. "
        "It wins over the optimizer file's. Null: the optimizer file's, else the optimizer's default (1e-6).",
    )
    text_encoder_lr: Rate | None = Field(
        None,
        description="Learning rate of the text encoder, 0 or more. Null: the optimizer file's "
        "text_encoder_overrides.lr, else lr × text_encoder_lr_scale.",
    )
    lr_scheduler: Schedule | None = Field(
        None,
        description="How the learning rate falls over the run. Null: the optimizer file's, else constant.",
    )
    lr_warmup_steps: Whole | None = Field(
        None,
        description="Updates over which the learning rate rises to its full value, 0 or more; not with lr_scheduler "
        "constant (constant_with_warmup has it). Null: the optimizer file's, else 0.",
    )
    lr_decay_steps: Count | None = Field(
        None,
        description="Update at which the learning rate has fallen to its end, warm-up included, 1 or more. "
        "Null: the optimizer file's, else the run's last.",
    )
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Longest gradient (norm over all trained parameters), above 0; longer ones are shortened to it. "
        "Null: no limit.",
    )

    loss_type: Literal["mse", "huber", "mse_huber", "huber_mse"] = Field(
        "mse",
        description="mse, huber (milder on outliers), or a mix that goes with the timestep: mse_huber from mse at "
        "timestep 0 to huber at the last, huber_mse the other way.",
    )
    huber_delta: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Error above which huber grows linearly, above 0, in units of the noise's deviation."
    )
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Min-SNR weighting: γ, above 0, usually 5. Null: all timesteps weigh the same."
    )
    zero_frequency_noise_ratio: Share = Field(
        0.0, description="Offset noise, 0 to 1: a share of noise that is constant over the picture; 0.02 to 0.1 helps "
        "very dark and bright pictures.",
    )  # fmt: skip
    pyramid_noise_discount: Share | None = Field(
        None, description="Multi-resolution noise: weight of each coarser level, 0 to 1; 0 or null: none."
    )
    enable_zero_terminal_snr: bool = Field(
        False, description="true: the last timestep is pure noise (for v-prediction models)."
    )
    timestep_start: Whole = Field(0, description="First timestep trained on, 0 or more; 0 has the least noise.")
    timestep_end: Count = Field(
        1000, description="Timestep before which training ends, 1 or more, at most the model's number (1000)."
    )
    embedding_perturbation: Rate = Field(
        0.0,
        description="Noise added to the text embedding (deviation × √width), 0 or more; against memorised captions.",
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="What the model predicts. Null: what its scheduler's settings say."
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None,
        description="Precision of the forward pass: no (float32), bf16, or fp16. "
        "Null in a file: what accelerate launch was told, else no; --mixed_precision null: no.",
    )
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision the trained weights are kept in. bfloat16 halves their memory and rounds "
        "stochastically.",
    )
    fused_backward: bool = Field(
        False,
        description="true: each weight is updated as soon as its gradient is there, which is then freed. "
        "Needs one process, no accumulation, no clip_grad_norm, no fp16, no class pictures, no compile.",
    )
    gradient_checkpointing: bool = Field(
        False, description="true: activations are computed twice instead of kept: less memory, about a quarter slower."
    )
    attn_type: Literal["sdp", "slice", "xformers"] = Field(
        "sdp", description="Attention: sdp (torch's own, fast), slice (least memory, slow), xformers (its package)."
    )
    compile: bool | Literal["max"] = Field(
        False,
        description='true: torch.compile the model, "max": and tune its kernels; minutes at the start, faster steps.',
    )
    allow_tf32: bool = Field(True, description="Let float32 matrix products use TF32 on GPUs that have it.")
    deterministic: bool = Field(
        False,
        description="true: a GPU gives the same bits each time, some per cent slower, so that a resume is exact there "
        "too. A CPU always does.",
    )

    ema_decay_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Keep a moving average of the weights, decay between 0 and 1 (0.999), in every checkpoint and for "
        "what ema_use names. Null: none.",
    )
    ema_use: tuple[Literal["previews", "validation", "exports"], ...] = Field(
        ("previews", "validation", "exports"),
        description="What is made with the average; the others are made with the weights as they are trained.",
    )
    ema_update_interval: Count = Field(
        1, description="Optimizer updates between two updates of the average, 1 or more."
    )
    ema_device: (
        Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$", title="cpu, cuda, cuda:1, … or mps")] | None
    ) = Field(None, description="Where the average is kept: cpu, cuda, cuda:1, mps. Null: where the model is trained.")

    save_every_n_epochs: Whole = Field(
        20,
        description="Epochs between two checkpoints, 0 or more; 0: none, and the default where save_every_n_steps is "
        "set. The end of the run always saves.",
    )
    save_every_n_steps: Count | None = Field(
        None, description="Optimizer updates between two checkpoints, 1 or more. Null: epochs and minutes decide."
    )
    ckpt_every_n_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Minutes between two checkpoints, above 0. Null: epochs and steps decide."
    )
    keep_last: Count | None = Field(
        None, description="Checkpoints kept, 1 or more; older ones are deleted, unless a file KEEP stands in them. "
        "Null: all.",
    )  # fmt: skip
    save_ckpt_dir: FilePath | None = Field(
        None, description="Folder for the single files of save_single_file. Null: exports in the run folder."
    )
    save_single_file: bool = Field(
        True, description="Also write each checkpoint as one .safetensors file, as image generators read it."
    )
    save_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="Precision of the single files. Checkpoints keep the training precision."
    )
    background_save: bool = Field(
        True, description="Write checkpoints while training goes on, where memory allows; false: training waits."
    )
    resume: Annotated[Literal["latest"] | Path, BeforeValidator(_resume)] | None = Field(
        None,
        description="Continue a run: latest (of this project_name; none yet: start anew), a run folder, or a "
        "checkpoint. Null: a new run.",
    )
    resume_changed: bool = Field(
        False, description="true: resume although settings of the run itself were changed since."
    )
    accept_data_changes: bool = Field(
        False, description="true: resume although pictures or captions changed; the next epoch takes the new ones."
    )

    sample_prompts: FilePath | None = Field(
        None,
        description="File with the prompts of preview pictures, .txt (one a line) or .json; read anew each time. "
        "Null: no previews.",
    )
    sample_steps: Whole = Field(
        300,
        description="Optimizer updates between two previews, 0 or more; there are also some before training and at its "
        "end. 0: no previews at all.",
    )

    validation_config: FilePath | None = Field(
        None, description="File with validation's settings (see below). Null: no validation."
    )
    validate_every_n_steps: Count | None = Field(
        None, description="Optimizer updates between two validations, 1 or more; it wins over the validation file's. "
        "Null: the validation file's.",
    )  # fmt: skip

    log_step: Count = Field(25, description="Optimizer updates between two lines of metrics, 1 or more.")
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run folder.")
    wandb: bool = Field(False, description="true: report to Weights & Biases (its package; WANDB_API_KEY).")
    write_schedule: bool = Field(
        False, description="true: write schedule.jsonl: each micro-batch's pictures, captions, crops and timesteps."
    )
    profile_steps: Count | None = Field(
        None, description="Updates to record with torch's profiler, 1 or more; the trace is put into the run folder. "
        "Null: none.",
    )  # fmt: skip
    plugins: tuple[Annotated[str, Field(pattern=_CLASS, title="a class as package.Class")], ...] = Field(
        (), description="Classes called at named moments of the run, each as package.Class."
    )
    quiet: bool = Field(False, description="true: print warnings and errors only.")
    verbose: bool = Field(False, description="true: print what libraries say, too, and tracebacks.")


SECTIONS = {  # first field of a section → its title
    "project_name": "Run",
    "base_model": "Model",
    "data_root": "Pictures and captions",
    "instance_prompt": "Dreambooth",
    "disable_unet_training": "What is trained",
    "optimizer_config": "Optimizer and learning rate",
    "loss_type": "Objective",
    "mixed_precision": "Speed and memory",
    "ema_decay_rate": "Average of the weights",
    "save_every_n_epochs": "Checkpoints",
    "sample_prompts": "Previews",
    "validation_config": "Validation",
    "log_step": "Logs and trackers",
}


class PartFile(Tree):
    """optimizer.json: one part's optimizer (the flat form, `base`, or `text_encoder_overrides`)."""

    optimizer: Text | None = Field(
        None, description="A row of docs/optimizers.md (adamw8bit, adamw, lion, …) or any class as package.Class. "
        "Null: adamw8bit.",
    )  # fmt: skip
    lr: Rate | None = Field(
        None, description="Learning rate, 0 or more; train.json's and the command line's win. Null: the optimizer's."
    )
    lr_scheduler: Schedule | None = Field(None, description="How the learning rate falls. Null: constant.")
    lr_warmup_steps: Whole | None = Field(
        None, description="Updates over which the learning rate rises, 0 or more. Null: 0."
    )
    lr_decay_steps: Count | None = Field(
        None, description="Update at which it has fallen to its end, 1 or more. Null: the run's last."
    )
    betas: Betas | None = Field(
        None, description="Decay of the moments, each from 0 to below 1. Null: the optimizer's (0.9, 0.999)."
    )
    epsilon: Rate | None = Field(None, description="Added to the denominator, 0 or more. Null: the optimizer's (1e-8).")
    weight_decay: Rate | None = Field(
        None, description="Share of a weight, times lr, that each update takes off, 0 or more. Null: the optimizer's "
        "(0.01).",
    )  # fmt: skip
    args: dict[str, Any] | None = Field(
        None, description="Anything else for the optimizer's constructor, by its names. Null: nothing."
    )
    no_decay_on_norms: bool | None = Field(None, description="true: no weight decay on norms and biases. Null: false.")


class TextEncoderFreezing(Tree):
    """optimizer.json: which parts of the text encoder are not trained."""

    unfreeze_last_n_layers: Whole | None = Field(
        None, description="Train only this many of its last layers, 0 or more. Null: all layers."
    )
    freeze_embeddings: bool = Field(False, description="true: token and position embeddings stay as they are.")
    freeze_final_layer_norm: bool = Field(False, description="true: the final layer norm stays as it is.")


class OptimizerFile(Tree):
    """optimizer.json beside its parts' keys: the nested form."""

    base: PartFile | None = Field(None, description="The UNet's optimizer, and what the text encoder inherits.")
    text_encoder_overrides: PartFile | None = Field(
        None, description="Where the text encoder differs. Null inherits from base, 0 does not."
    )
    text_encoder_lr_scale: Rate | None = Field(
        None, description="The text encoder's lr as a share of base's, 0 or more, where it has none of its own. "
        "Null: 1.",
    )  # fmt: skip
    text_encoder_freezing: TextEncoderFreezing | None = Field(
        None, description="Which parts of the text encoder are not trained. Null: all are trained."
    )


class ValidationSettings(Tree):
    """The file that validation_config names."""

    val_split_mode: Literal["none", "automatic", "manual"] = Field(
        "automatic",
        description="Where held-out pictures come from: automatic takes them from data_root, manual from "
        "manual_data_root, none holds nothing out.",
    )
    auto_split_proportion: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Share of the pictures that automatic holds out, between 0 and 1."
    )
    manual_data_root: FilePath | None = Field(None, description="Folder of held-out pictures for manual.")
    extra_manual_datasets: dict[str, FilePath] = Field(
        {}, description="Further folders, each with a name, whose loss is logged under it."
    )
    stabilize_training_loss: bool = Field(
        False, description="true: also log the loss of some training pictures with fixed noise and timesteps."
    )
    stabilize_split_proportion: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Share of the training pictures used for that, between 0 and 1; they stay in training."
    )
    every_n_epochs: Rate = Field(
        1.0, description="Epochs between two validations, 0 or more; 0: every_n_steps alone decides."
    )
    every_n_steps: Count | None = Field(
        None, description="Optimizer updates between two validations, 1 or more. Null: every_n_epochs alone decides."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        555, description="Start of validation's own randomness, 0 to 2^63 - 1: the same noise each time."
    )
    batch_size: Few | None = Field(None, description="Pictures in one forward pass, 1 to 10^6. Null: batch_size.")
