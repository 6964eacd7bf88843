"""The whole configuration of a run: typed, validated, and addressed by dotted keys.

The same keys (`optim.lr`, `data.dataset`, ...) name a value on the command line, in a search space, in TensorBoard's
HPARAMS tab and in the results table. Each field states its own bounds; `RunConfig.resolve` fills in what depends on
other fields and refuses combinations that cannot run. Nothing here imports torch, so errors come at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mamba.errors import ConfigError

DATASET_SIDES = {"digits": 8, "cifar10": 32, "cifar100": 32, "folder": 224}
"""Side in pixels that `data.img_size` takes when it is not given."""

SizeName = Literal["mamba_tiny", "mamba_small", "mamba_base", "vim_tiny", "vim_small", "vim_base"]

MODEL_SIZES: dict[SizeName, tuple[int, int]] = {
    "mamba_tiny": (128, 16),
    "mamba_small": (192, 24),
    "mamba_base": (384, 32),
    "vim_tiny": (192, 24),
    "vim_small": (384, 24),
    "vim_base": (768, 24),
}
"""Named models: (d_model, depth)."""


def default_patch_size(img_size: int) -> int:
    """16 to 256 tokens for the image sizes in use: 2 up to 16 pixels, 4 up to 64, 16 above."""
    return 2 if img_size <= 16 else 4 if img_size <= 64 else 16


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error, type(self))) from None


class DataConfig(_Group):
    """Images, splits and augmentation."""

    dataset: Literal["digits", "cifar10", "cifar100", "folder"] = "cifar10"
    """digits ships with scikit-learn; cifar10 and cifar100 download into `data.root`; folder reads
    `data.root`/{train,test or val}/<class>/<image>."""
    root: Path = Path("data")
    """Where the data set lies or is downloaded to."""
    img_size: int | None = Field(None, ge=4)
    """Side in pixels that images are resized to; None: 8 for digits, 32 for CIFAR, 224 for folder."""
    batch_size: int = Field(128, ge=1)
    """Images per optimizer step, over all workers and accumulation steps together."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Part of the training set, class by class, kept for validation; 0 trains on all of it and selects nothing."""
    augment: Literal["none", "basic", "randaugment", "autoaugment"] = "basic"
    """basic: crop with padding (an eighth of the side, 4 pixels at 32) and flip; the others add RandAugment
    (2 operations, magnitude 9) or AutoAugment (CIFAR-10 policy)."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability of erasing a random rectangle of the normalised image."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup's Beta distribution; 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of cutmix's Beta distribution; 0: off. With both on, each mixed batch takes one of them at random."""
    mix_prob: float = Field(0.5, ge=0, le=1)
    """Part of the batches that mixup or cutmix is applied to."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are augmented: cpu, by loader processes; gpu, where the training set then lies in GPU memory; auto:
    gpu where there is one and the decoded images take at most an eighth of its memory (CIFAR: 150 MB)."""
    loader_workers: int | None = Field(None, ge=0)
    """Loader processes per training worker; None: its CPUs less one (16 at most), 0 where nothing is augmented."""


class ModelConfig(_Group):
    """Architecture. What is None comes from the named model or from the image size."""

    name: SizeName = "mamba_small"
    """Named size: mamba_tiny (d 128, 16 blocks), mamba_small (192, 24), mamba_base (384, 32); and Vision Mamba as
    published: vim_tiny (192, 24), vim_small (384, 24), vim_base (768, 24)."""
    checkpoint: Path | None = None
    """Checkpoint or run folder to start from (fine-tuning): its weights, its widths, pruned or not, and its masks. Of
    the other keys only `model.drop_path` and `model.sync_batchnorm` count then."""
    d_model: int | None = Field(None, ge=1)
    """Width of the residual stream."""
    depth: int | None = Field(None, ge=1)
    """Number of blocks."""
    patch_size: int | None = Field(None, ge=1)
    """Side of a patch in pixels; None: 2 up to 16 pixels, 4 up to 64, 16 above; with stem conv 4."""
    stride: int | None = Field(None, ge=1)
    """Pixels from one patch to the next; None: patch_size; less makes patches overlap (Vim's + variants: 8)."""
    stem: Literal["patch", "conv"] = "patch"
    """From the image to tokens: one linear map of each patch; conv: three 3x3 convolutions with batch norm, to a
    quarter of the side."""
    sync_batchnorm: bool = True
    """On several GPUs the stem's batch norm takes its statistics over all of them, not over each one's share."""
    class_token: Literal["none", "start", "middle", "double"] | None = None
    """Where class tokens go, whose features the head reads (of double, head and tail, the mean); none: the mean over
    all tokens. None: none; Vim: middle."""
    pos_embed: Literal["learned", "rope", "both", "none"] = "learned"
    """Positions: learned, added once; rope: 2D rotary, turning what the mixer of each block reads."""
    scan_order: Literal["raster", "snake", "column"] = "raster"
    """The patches' order in the sequence: row after row; snake: every other row backwards; column after column."""
    mixer: Literal["forward", "bidirectional", "bidirectional_shared", "multiscale"] | None = None
    """Scans of a block. forward: one; bidirectional: also one from the end, merged by a learned projection;
    bidirectional_shared: both on one projection, averaged (Vim); multiscale: at 1, 2 and 4 tokens a step, merged.
    None: forward; Vim: bidirectional_shared."""
    expand: float = Field(2.0, gt=0)
    """Inner width of the SSM over d_model."""
    d_state: int = Field(16, ge=1, le=256)
    """States per channel of the scan."""
    d_conv: int = Field(4, ge=1)
    """Taps of the causal convolution."""
    mlp_ratio: float | None = Field(None, ge=0)
    """Hidden width of the MLP over d_model; 0: no MLP. None: 4; Vim: 0."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: drop probability of the last block, rising linearly from 0 at the first."""

    @property
    def is_vim(self) -> bool:
        return self.name.startswith("vim_")

    def filled(self, img_size: int) -> ModelConfig:
        """With every value that is None taken from the named model or the image size, `checkpoint` excepted."""
        width, depth = MODEL_SIZES[self.name]
        patch_size = self.patch_size or (4 if self.stem == "conv" else default_patch_size(img_size))
        follows = {
            "d_model": width,
            "depth": depth,
            "patch_size": patch_size,
            "stride": patch_size,
            "class_token": "middle" if self.is_vim else "none",
            "mixer": "bidirectional_shared" if self.is_vim else "forward",
            "mlp_ratio": 0.0 if self.is_vim else 4.0,
        }
        return self.model_copy(update={key: v for key, v in follows.items() if getattr(self, key) is None})


def _check_model(model: ModelConfig, side: int) -> None:
    """Raises ConfigError where a filled model config does not fit images of this side, or itself."""
    patch, stride, d_model = model.patch_size, model.stride, model.d_model
    assert patch is not None and stride is not None and d_model is not None and model.mlp_ratio is not None
    if model.stem == "conv":
        for key, value in (("patch_size", patch), ("stride", stride)):
            if value != 4:
                raise ConfigError(f"model.{key} {value} does not go with model.stem 'conv'; valid: 4 (its strides)")
        if side % 4:
            raise ConfigError(f"data.img_size {side} does not go with model.stem 'conv'; valid: a multiple of 4")
    if stride == patch and side % patch:
        raise ConfigError(
            f"data.img_size {side} is not divisible by model.patch_size {patch}; "
            f"valid patch sizes: {', '.join(str(p) for p in range(1, side + 1) if side % p == 0)}"
        )
    if patch > side:
        raise ConfigError(f"model.patch_size {patch} is larger than data.img_size {side}; it must not be")
    if stride > patch or (side - patch) % stride:
        valid = [s for s in range(1, patch + 1) if (side - patch) % s == 0]
        raise ConfigError(
            f"model.stride {stride} does not lead from one end of data.img_size {side} to the other with "
            f"model.patch_size {patch}; valid strides: {', '.join(map(str, valid))}"
        )
    if model.pos_embed in ("rope", "both") and d_model % 4:
        raise ConfigError(f"model.pos_embed '{model.pos_embed}' needs a model.d_model divisible by 4, got {d_model}")
    if model.class_token == "start" and model.mixer in ("forward", "multiscale"):
        raise ConfigError(
            f"model.class_token 'start' with model.mixer '{model.mixer}' sees no image: scans go on from it; "
            "valid mixers: bidirectional, bidirectional_shared; valid class tokens: none, middle, double"
        )
    for key, ratio in (("expand", model.expand), ("mlp_ratio", model.mlp_ratio)):
        if ratio and int(ratio * d_model) < 1:
            raise ConfigError(f"model.{key} {ratio:g} of model.d_model {d_model} gives no channel; choose more")


class OptimConfig(_Group):
    """AdamW, its schedule, precision."""

    epochs: int = Field(300, ge=1)
    """Passes over the training set."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the head; not scaled by batch size."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; never on A_log, D, biases, norms and embeddings."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second-moment decay."""
    warmup_epochs: float = Field(20.0, ge=0)
    """Length of the warm-up in epochs (fractions allowed)."""
    warmup: Literal["linear", "exponential"] = "exponential"
    """Shape of the warm-up; exponential is (1 - e^(-5p)) / (1 - e^-5)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: block i of L gets layer_decay^(L-1-i), embeddings layer_decay^L; 1: off."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; None: no clipping."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimizer step: the same result as the whole batch at once, in less memory; but for stem conv,
    whose batch norm takes its statistics over each micro-batch."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Part of the target spread over all classes."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 on GPUs that have it, fp16 on other GPUs, off on CPU."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model's blocks with torch.compile; auto: on a GPU, where the run trains on 500,000 images or more,
    which is about when it has won back the time that compiling takes."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """Record the whole optimizer step as a CUDA graph and replay it, so that launches cost no time; auto: on a GPU,
    except in fp16, which cannot be recorded (its loss scale is decided on the host)."""
    max_skipped: int = Field(20, ge=1)
    """Stop after this many optimizer steps in a row with a non-finite loss or gradient (each is skipped)."""


class EmaConfig(_Group):
    """Moving average of the weights."""

    enabled: bool = True
    """Keep an exponential moving average of weights and buffers, and validate it beside the raw weights."""
    decay: float = Field(0.9999, ge=0, lt=1)
    """Largest decay per step; it warms up as (1 + t) / (10 + t), so that a short run is not stuck at its start."""


class DistillConfig(_Group):
    """Distillation: the outputs of a trained model as a second target."""

    teacher: Path | None = None
    """Checkpoint or run folder of the teacher, of any architecture, for the same classes and image size; None: off."""
    temperature: float = Field(4.0, gt=0)
    """What both models' logits are divided by before their softmaxes are compared."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher: alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy."""


class EvalConfig(_Group):
    """Validation and the final test."""

    every: int = Field(1, ge=1)
    """Validate each N epochs (and always after the last)."""
    batch_size: int = Field(512, ge=1)
    """Images per forward pass and worker."""
    tta_views: int = Field(1, ge=1, le=10)
    """Views averaged per test image: the image, its mirror image, then shifts of both; 1: off."""


class PruneConfig(_Group):
    """Rounds of training, pruning and rewinding (`ray_jobs/prune.py`), and the penalties of training."""

    method: Literal["none", "magnitude", "refill", "rsst"] = "none"
    """What a round does with the weights that global magnitude pruning gives up. magnitude: zeroes them one by one;
    refill: keeps the best whole units instead and removes the others; rsst: decays the others until they can go."""
    target: Literal["ssm", "mlp", "both"] = "both"
    """Channels of the mixer (its in_proj and out_proj), neurons of the MLP (fc1 and fc2), or both, where there are."""
    rate: float = Field(0.2, gt=0, lt=1)
    """Share of the surviving weights of the target that each round prunes: (1 - rate)^k of them are left after
    round k."""
    rounds: int = Field(3, ge=1)
    """Rounds of pruning, after the dense training that is round 0."""
    round: int = Field(0, ge=0)
    """Which round a run is; set by the rounds themselves."""
    rewind_epoch: int = Field(0, ge=0)
    """Epoch of the dense training whose weights each round starts from; 0: the initial ones."""
    score: Literal["remain", "magnitude", "l1", "l2", "saliency", "random"] = "remain"
    """Refill and rsst: by what the units that stay are chosen; remain: by how many of their weights survive."""
    fillback_rate: float = Field(0.0, ge=0, le=1)
    """Refill and rsst: share of the other units that is kept beyond floor(surviving weights / fan-in); 1 keeps all."""
    ceiling: float = Field(0.1, ge=0)
    """rsst: lambda at the end of its growth; units that are to go get lambda x weight added to their gradient."""
    schedule: Literal["linear", "x2", "x3", "exp", "power"] = "linear"
    """rsst: how lambda grows to its ceiling, epoch by epoch."""
    exponent: float = Field(4.0, gt=0)
    """Exponent of schedule power, and of the penalty's strength over time."""
    grow_fraction: float = Field(0.5, gt=0, le=1)
    """rsst: part of a round's epochs in which lambda grows; then the units are cut, and the rest trains on."""
    penalty: Literal["off", "l1", "group"] = "off"
    """Sparsity penalty on the target's units while training: their L1 norm, or group lasso."""
    penalty_strength: float = Field(1e-4, ge=0)
    """Weight of the penalty in the last epoch; before: strength (epoch / epochs)^exponent."""
    linear_out: float = Field(0.0, ge=0, lt=1)
    """One cut of a trained model (`ray_jobs/ablate.py`): the rate of out_proj; docs/PRUNING.md says what each is."""
    mlp: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of the MLP."""
    linear_gate: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of in_proj's gate rows."""
    linear_in: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of in_proj."""
    conv1d: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of the convolution."""
    linear_B_C: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of x_proj's B and C rows."""
    linear_delta: float = Field(0.0, ge=0, lt=1)
    """One cut: the rate of the time step's projection."""
    block: float = Field(0.0, ge=0, lt=1)
    """One cut: the share of whole blocks."""
    layer: int | None = Field(None, ge=0)
    """One cut: the only block that it is made in; None: all."""
    structured: bool = False
    """One cut: remove whole units (each component's structured granularity) instead of zeroing single weights."""
    criterion: Literal["l1", "l2", "taylor", "wanda", "random"] = "l1"
    """One cut: what ranks weights and units."""
    scope: Literal["global", "layerwise"] = "global"
    """One cut: rank over all blocks together, or within each."""
    finetune_epochs: int = Field(0, ge=0)
    """Epochs of training after a cut; 0: measure at once."""


class CheckpointConfig(_Group):
    """What is kept of a run."""

    every: int = Field(1, ge=1)
    """Save the full training state each N epochs (and always after the last)."""
    keep: int = Field(1, ge=1)
    """Full training states kept; the best by validation is kept besides."""


class ScalingConfig(_Group):
    """Processes and devices."""

    num_workers: int | None = Field(None, ge=0)
    """Training processes under Ray Train; None: one per GPU of the cluster, else one on CPU; 0: this process,
    without a cluster (tests, debuggers)."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs reserved for each worker; None: an equal share of the cluster's."""
    max_failures: int = Field(3, ge=0)
    """Times that Ray restarts the run from its last checkpoint when a worker dies."""


class RunConfig(_Group):
    """One training run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Experiment: the folder under `out` that its trials share."""
    trial: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of this run under the experiment; None: date, time and seed."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, order, augmentation and the validation split."""
    out: Path = Path("runs")
    """Root of all results; on a cluster of several machines, a folder that they share."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    prune: PruneConfig = PruneConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scaling: ScalingConfig = ScalingConfig()

    def resolve(self) -> RunConfig:
        """Fill in every value that follows from others, make paths absolute, and refuse what cannot run.

        Raises:
            ConfigError: names the keys, and what is valid.
        """
        side = self.data.img_size or DATASET_SIDES[self.data.dataset]
        model = self.model.filled(side)
        _check_model(model, side)
        if self.data.batch_size % self.optim.accumulate:
            raise ConfigError(
                f"data.batch_size {self.data.batch_size} is not divisible by optim.accumulate {self.optim.accumulate}"
            )
        if self.optim.min_lr > self.optim.lr:
            raise ConfigError(f"optim.min_lr {self.optim.min_lr} is above optim.lr {self.optim.lr}; it must not be")
        if self.optim.warmup_epochs > self.optim.epochs:
            raise ConfigError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} is longer than optim.epochs {self.optim.epochs}; it "
                "must not be: lower it too, 0 is allowed"
            )
        pruned = self.prune.method != "none" or self.prune.penalty != "off"
        if pruned and self.prune.target == "mlp" and model.mlp_ratio == 0 and self.model.checkpoint is None:
            raise ConfigError("prune.target 'mlp' needs an MLP and model.mlp_ratio 0 has none; valid: ssm, both")
        if self.prune.rewind_epoch >= self.optim.epochs:
            raise ConfigError(
                f"prune.rewind_epoch {self.prune.rewind_epoch} is not before the end of optim.epochs "
                f"{self.optim.epochs}; it must be"
            )
        if self.prune.method == "rsst" and self.grow_epochs() >= self.optim.epochs:
            raise ConfigError(
                f"prune.grow_fraction {self.prune.grow_fraction:g} of optim.epochs {self.optim.epochs} leaves no epoch "
                "after the cut; lower it or train for more epochs"
            )
        checkpoint, teacher = self.model.checkpoint, self.distill.teacher
        return self.with_values(
            {
                "model.checkpoint": checkpoint.expanduser().absolute() if checkpoint else None,
                "distill.teacher": teacher.expanduser().absolute() if teacher else None,
                "data.img_size": side,
                "data.root": self.data.root.expanduser().absolute(),
                "out": self.out.expanduser().absolute(),
                **{f"model.{key}": value for key, value in model if key != "checkpoint"},
            }
        )

    def cuts(self) -> dict[str, float]:
        """Component -> rate of the one cut that `prune.*` describes; empty where it cuts nothing."""
        names = ("linear_out", "mlp", "linear_gate", "linear_in", "conv1d", "linear_B_C", "linear_delta", "block")
        return {name: rate for name in names if (rate := getattr(self.prune, name)) > 0}

    def grow_epochs(self) -> int:
        """Epochs in which rsst's lambda grows."""
        return max(1, round(self.prune.grow_fraction * self.optim.epochs))

    def check_workers(self, num_workers: int, gpu: bool) -> None:
        """Refuse what cannot run on this many processes of this kind.

        Raises:
            ConfigError: names the keys, and what is valid.
        """
        shards = max(1, num_workers) * self.optim.accumulate
        if self.data.batch_size % shards:
            raise ConfigError(
                f"data.batch_size {self.data.batch_size} is not divisible by workers x optim.accumulate = "
                f"{max(1, num_workers)} x {self.optim.accumulate}; valid: a multiple of {shards}"
            )
        share = self.data.batch_size // shards
        if shards > 1 and share % 2 and (self.data.mixup or self.data.cutmix):
            raise ConfigError(
                f"data.mixup and data.cutmix pair neighbours, and data.batch_size {self.data.batch_size} over "
                f"{shards} shares (workers x optim.accumulate) leaves {share} each; valid: a multiple of {2 * shards}"
            )
        if share == 1 and self.model.stem == "conv" and self.data.img_size == 4:
            raise ConfigError(
                "model.stem 'conv' makes one token of data.img_size 4, and one image a pass (data.batch_size over "
                "workers x optim.accumulate) leaves its batch norm one value a channel; valid: two images or more"
            )
        if self.data.device == "gpu" and not gpu:
            raise ConfigError("data.device 'gpu' needs a GPU and there is none; valid on CPU: auto, cpu")
        if self.optim.cuda_graph is True and not gpu:
            raise ConfigError("optim.cuda_graph needs a GPU and there is none; valid on CPU: auto, False")
        if self.optim.cuda_graph is True and self.optim.amp == "fp16":
            raise ConfigError("optim.cuda_graph cannot record optim.amp 'fp16'; turn one off, or choose bf16")
        if self.optim.amp == "fp16" and not gpu:
            raise ConfigError("optim.amp 'fp16' needs a GPU and there is none; valid on CPU: auto, bf16, off")

    def with_values(self, values: dict[str, Any]) -> RunConfig:
        """A copy with the given dotted keys replaced, checked like everything else.

        Raises:
            ConfigError: an unknown key, a wrong type, a value out of bounds.
        """
        tree = self.model_dump()
        known = dotted_keys()
        for key, value in values.items():
            if key not in known:
                raise unknown_key(key)
            *groups, leaf = key.split(".")
            node = tree
            for group in groups:
                node = node[group]
            node[leaf] = value
        return RunConfig(**tree)

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, in order of declaration; paths as text."""
        tree = self.model_dump(mode="json")
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
        return flat

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> RunConfig:
        """Read what `to_yaml` wrote.

        Raises:
            ConfigError: the file is missing or unreadable, or holds an unknown key or a bad value.
        """
        try:
            tree = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as a run config: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ConfigError(f"{path} does not hold a run config (a mapping of keys)")
        return cls(**tree)


def dotted_keys() -> dict[str, type[_Group]]:
    """Every dotted key of a run config, with the group that owns it."""
    keys: dict[str, type[_Group]] = {}
    for name, field in RunConfig.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            keys |= {f"{name}.{leaf}": group for leaf in group.model_fields}
        else:
            keys[name] = RunConfig
    return keys


def may_be_none(key: str) -> bool:
    """Whether a dotted key takes None."""
    field = dotted_keys()[key].model_fields[key.rpartition(".")[2]]
    return type(None) in getattr(field.annotation, "__args__", ())


def unknown_key(key: str) -> ConfigError:
    """The error for a key that is none: lists its group's keys, or the groups where there is no such group."""
    known = dotted_keys()
    group = key.split(".")[0]
    siblings = [k for k in known if k.startswith(group + ".")]
    if siblings:
        return ConfigError(f"unknown key '{key}'; valid in {group}: {', '.join(siblings)}")
    groups = sorted({k.split(".")[0] + ".*" for k in known if "." in k})
    plain = [k for k in known if "." not in k]
    return ConfigError(f"unknown key '{key}'; valid: {', '.join(plain + groups)}")


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """All findings of one validation as a sentence, with dotted keys and without pydantic's own vocabulary."""
    group = next((k for k, f in RunConfig.model_fields.items() if f.annotation is model), None)
    findings: dict[str, str] = {}
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # raised by a nested group, already complete
            findings[str(inner)] = str(inner)
            continue
        # a union's location ends in the name of the member that was tried
        path = [str(p) for p in item["loc"] if not re.fullmatch(r"int|float|none|str|bool|literal\[.*\]", str(p))]
        key = ".".join(([group] if group else []) + path)
        if item["type"] == "extra_forbidden":
            findings[key] = str(unknown_key(key))
        elif item["type"] == "literal_error" and item["loc"][-1] != path[-1]:  # the other member is a boolean
            findings[key] = f"{key}: {_lower_first(item['msg'])}, True or False, got {item['input']!r}"
        else:
            findings.setdefault(key, f"{key}: {_lower_first(item['msg'])}, got {item['input']!r}")
    return "; ".join(findings.values())


def _lower_first(text: str) -> str:
    text = text.removeprefix("Input ")
    return text[:1].lower() + text[1:]
