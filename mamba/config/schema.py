"""The whole configuration of a run: typed, validated, and addressed by dotted keys.

The same keys (`optim.lr`, `data.dataset`, ...) name a value on the command line, in a search space, in TensorBoard's
HPARAMS tab and in the results table. Each field states its own bounds; what fields say of each other is in
`mamba.config.resolve`. Nothing here imports torch, so errors come at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mamba.config import resolve, trackers
from mamba.config.keys import Group, Keyed
from mamba.config.resolve import is_range
from mamba.errors import ConfigError

SizeName = Literal["mamba_tiny", "mamba_small", "mamba_base", "vim_tiny", "vim_small", "vim_base"]
Target = Literal["ssm", "mlp", "both"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a folder can be called: names stay inside of the folder that they are for."""
MAX_SIDE, MAX_WIDTH, MAX_DEPTH, MANY = 4096, 65_536, 1_000, 1_000_000
"""Far above what runs, so that a slip of the finger is refused at once."""


class DataConfig(Group):
    """Images, splits and augmentation."""

    dataset: Literal["digits", "cifar10", "cifar100", "folder"] = "cifar10"
    """digits ships with scikit-learn; cifar10 and cifar100 download into `data.root`; folder reads
    `data.root`/{train,test or val}/<class>/<image>."""
    root: Path = Path("data")
    """Where the data set lies or is downloaded to."""
    img_size: int | None = Field(None, ge=4, le=MAX_SIDE)
    """Side in pixels that images are resized to; None: 8 for digits, 32 for CIFAR, 224 for folder."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How an image of a folder becomes a square. crop: the largest square in its middle; pad: all of it, with black
    bars; stretch: all of it, out of proportion."""
    cache: Literal["auto", "decoded", "files"] = "auto"
    """Of an image folder. decoded: every image is decoded once, into a file that is mapped into memory; files: loader
    processes decode them in every epoch, with random crops of the originals, and memory does not grow with the data
    set; auto: decoded up to 8 GiB of pixels (57,000 images at 224)."""
    strict: bool = False
    """Refuse an image folder that holds anything that is not read, instead of saying so in a line."""
    batch_size: int = Field(128, ge=1, le=MANY)
    """Images per optimizer step, over all workers and accumulation steps together."""
    val_fraction: float | None = Field(None, ge=0, lt=1)
    """Part of the training set, class by class, kept for validation; 0 trains on all of it and selects nothing. None:
    that of the model that the run starts from, else 0.1."""
    split_seed: int | None = Field(None, ge=0, lt=2**32)
    """Seed of the validation split. None: that of the model that the run starts from, else `seed`."""
    split_from: Path | None = None
    """Of an image folder: a run's folder or a checkpoint, whose validation images are this run's too, as far as they
    are here; all others train. For a model whose folder has grown or shrunk since. None: that of the model that the run
    starts from, where it has one, else a split by `data.split_seed`."""
    augment: Literal["none", "basic", "randaugment", "randaugment_inc", "autoaugment", "autoaugment_imagenet"] = "basic"
    """basic: crop and flip; the others add a policy. randaugment: torchvision's (2 operations, magnitude 9);
    randaugment_inc: timm's "rand-m9-mstd0.5-inc1" (2 of 15 operations, each with probability 0.5, at a level around
    `data.magnitude`); autoaugment, autoaugment_imagenet: the policies found on CIFAR-10 and on ImageNet."""
    magnitude: float = Field(9.0, ge=0, le=10)
    """randaugment_inc: mean level of its operations."""
    magnitude_std: float = Field(0.5, ge=0)
    """randaugment_inc: deviation of that level, which stays within 0 to 10."""
    crop: Literal["pad", "resized"] = "pad"
    """Of every `data.augment` but none. pad: shifted by up to an eighth of the side (4 pixels at 32), black outside;
    resized: a random part of the image, resized to the whole side."""
    crop_scale: float = Field(0.8, gt=0, le=1)
    """Crop resized: smallest part of the image's area; its sides' ratio is between 3/4 and 4/3."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability of erasing a random rectangle of the normalised image."""
    cutout: int = Field(0, ge=0, le=MAX_SIDE)
    """Side in pixels of the square that is erased from every normalised image, anywhere; 0: off."""
    repeats: int = Field(1, ge=1, le=1024)
    """Repeated augmentation: each image is this many times in a batch, augmented in as many ways, and an epoch of as
    many steps as ever sees this part of the images; 1: off."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup's Beta distribution; 0: off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of cutmix's Beta distribution; 0: off. With both on, each mixed batch takes one of them at random."""
    mix_prob: float = Field(0.5, ge=0, le=1)
    """Part of the batches that mixup or cutmix is applied to; 1: all."""
    mix_off_epochs: int = Field(0, ge=0, le=MANY)
    """Epochs at the end in which nothing is mixed."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are augmented: cpu, by loader processes; gpu, where the training set then lies in GPU memory; auto:
    gpu where there is one and the decoded images take at most an eighth of its memory (CIFAR: 150 MB)."""
    loader_workers: int | None = Field(None, ge=0, le=1024)
    """Loader processes per training worker; None: its CPUs less one (16 at most), 0 where nothing is augmented."""
    prefetch_factor: int = Field(4, ge=1, le=1024)
    """Batches that each loader process makes ahead."""


class ModelConfig(Group):
    """Architecture. What is None comes from the named model or from the image size."""

    name: SizeName = "mamba_small"
    """Named size: mamba_tiny (d 128, 16 blocks), mamba_small (192, 24), mamba_base (384, 32); Vision Mamba's as
    published: vim_tiny (192, 24), vim_small (384, 24), vim_base (768, 24)."""
    checkpoint: Path | None = None
    """Checkpoint or run folder to start from (fine-tuning): its weights, its widths, pruned or not, and its masks. Of
    the other keys only `model.new_head`, `model.new_size`, `model.drop_path` and `model.sync_batchnorm` count then."""
    new_head: bool = False
    """With a checkpoint: a head of new weights, for other classes than it was trained on."""
    new_size: bool = False
    """With a checkpoint: another image size than it was trained at; learned positions are interpolated."""
    d_model: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the residual stream."""
    depth: int | None = Field(None, ge=1, le=MAX_DEPTH)
    """Number of blocks."""
    patch_size: int | None = Field(None, ge=1, le=MAX_SIDE)
    """Side of a patch in pixels; None: 2 up to 16 pixels, 4 up to 64, 16 above; with a stem of convolutions
    `model.stride`."""
    stride: int | None = Field(None, ge=1, le=MAX_SIDE)
    """Pixels from one token to the next. None: patch_size; less makes patches overlap (Vim's + variants: 8). A stem of
    convolutions takes the image to a half, a quarter or an eighth of its side: 2, 4 or 8; None: 4, of cct 2."""
    stem: Literal["patch", "conv", "cct"] = "patch"
    """From the image to tokens: one linear map of each patch; conv: 3x3 convolutions with batch norm; cct: 3x3
    convolutions, ReLU and max pooling, as in Compact Convolutional Transformers (256 tokens of 32 pixels)."""
    stem_layers: int | None = Field(None, ge=1, le=3)
    """Convolutions of stem conv (None: 3) and cct (None: as many as `model.stride` has halvings)."""
    sync_batchnorm: bool = True
    """On several GPUs the stem's batch norm takes its statistics over all of them, not over each one's share."""
    class_token: Literal["none", "start", "middle", "double"] | None = None
    """Where class tokens go, whose features the head reads (of double, head and tail, the mean); none: the mean over
    all tokens. None: none; Vim: middle."""
    head: Literal["auto", "mean", "attention"] = "auto"
    """What the classifier reads: auto: the class tokens, where there are none the mean over all tokens; mean: that
    always; attention: a weighted mean over all tokens, whose weights are learned (as in Compact Transformers)."""
    pos_embed: Literal["learned", "rope", "both", "none"] = "learned"
    """Positions: learned, added once; rope: 2D rotary, turning what the mixer of each block reads."""
    rope_grid: int | None = Field(None, ge=1, le=MAX_SIDE)
    """Patches along a side that rotary positions count to, however many there are: an image of more patches has finer
    steps. None: as many as there are; with `model.new_size`, as many as the checkpoint has."""
    scan_order: Literal["raster", "snake", "column"] = "raster"
    """The patches' order in the sequence: row after row; snake: every other row backwards; column after column."""
    mixer: Literal["forward", "bidirectional", "bidirectional_shared", "multiscale", "alternating", "cross"] | None = (
        None
    )
    """Scans of a block. forward: one; bidirectional: also one from the end, merged by a learned projection;
    bidirectional_shared: both on one projection, averaged (Vim); multiscale: at 1, 2 and 4 tokens a step, merged;
    alternating: one, in every other block from the end; cross: one, in four blocks in turn along the sequence, from its
    end, across (the image transposed), and across from the end. None: forward; Vim: bidirectional_shared."""
    expand: float = Field(2.0, gt=0, le=64)
    """Inner width of the SSM over d_model."""
    d_state: int = Field(16, ge=1, le=256)
    """States per channel of the scan."""
    d_conv: int = Field(4, ge=1, le=64)
    """Taps of the causal convolution."""
    mlp_ratio: float | None = Field(None, ge=0, le=64)
    """Hidden width of the MLP over d_model; 0: no MLP. None: 4; Vim: 0."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: drop probability of the last block, rising linearly from 0 at the first."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Part of the values that training zeroes, after the positions and after both linear maps of each MLP."""
    layer_shuffle: float = Field(0.0, ge=0, le=1)
    """In training a block's mixer reads the tokens in random order with this probability (ShuffleMamba): of the last
    block, rising linearly from 0 at the first."""

    @property
    def is_vim(self) -> bool:
        return self.name.startswith("vim_")

    def filled(self, img_size: int) -> ModelConfig:
        """With every value that is None taken from the named model or the image size, `checkpoint` excepted."""
        return resolve.filled(self, img_size)


class OptimConfig(Group):
    """The optimizer, its schedule, precision."""

    epochs: int = Field(300, ge=1, le=MANY)
    """Passes over the training set."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: for every parameter; muon: orthogonal momentum for the blocks' matrices, AdamW for the rest, at the same
    rates and weight decay."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the head; not scaled by batch size."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up. cosine: falls from there to the end; wsd (warm-up, stable, decay): constant, then linear to
    `optim.min_lr` over the last `optim.decay_epochs`."""
    decay_epochs: float = Field(20.0, ge=0, le=MANY)
    """Length of wsd's decay in epochs (fractions allowed)."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum."""
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
    accumulate: int = Field(1, ge=1, le=MANY)
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
    max_skipped: int = Field(20, ge=1, le=MANY)
    """Stop after this many optimizer steps in a row with a non-finite loss or gradient (each is skipped)."""


class EmaConfig(Group):
    """Moving average of the weights."""

    enabled: bool = True
    """Keep an exponential moving average of weights and buffers, and validate it beside the raw weights."""
    decay: float = Field(0.9999, ge=0, lt=1)
    """Largest decay per step; it warms up as (1 + t) / (10 + t), so that a short run is not stuck at its start."""


class DistillConfig(Group):
    """Distillation: the outputs of a trained model as a second target."""

    teacher: Path | None = None
    """Checkpoint or run folder of the teacher, of any architecture, for the same classes and image size; None: off."""
    temperature: float = Field(4.0, gt=0)
    """What both models' logits are divided by before their softmaxes are compared."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher: alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy."""


class EvalConfig(Group):
    """Validation and the final test."""

    every: int = Field(1, ge=1, le=MANY)
    """Validate each N epochs (and always after the last)."""
    batch_size: int = Field(512, ge=1, le=MANY)
    """Images per forward pass and worker."""
    tta_views: int = Field(1, ge=1, le=10)
    """Views averaged per test image, as far as training shows images in as many ways: the image, its mirror image, then
    shifts of both. Used for the test only where they do better on the validation split; 1: off."""
    tta_always: bool = False
    """Use `eval.tta_views` without comparing, and where there is no validation split."""


class PruneConfig(Group):
    """Rounds of training, pruning and rewinding (`ray_jobs/prune.py`)."""

    method: Literal["none", "magnitude", "refill", "rsst"] = "none"
    """What a round does with the weights that global magnitude pruning gives up. magnitude: zeroes them one by one;
    refill: keeps the best whole units instead and removes the others; rsst: decays the others until they can go."""
    target: Target = "both"
    """Channels of the mixer (its in_proj and out_proj), neurons of the MLP (fc1 and fc2), or both, where there are."""
    rate: float = Field(0.2, gt=0, lt=1)
    """Share of the surviving weights of the target that each round prunes: (1 - rate)^k of them are left after
    round k."""
    ssm_rate: float | None = Field(None, gt=0, lt=1)
    """The rate of the channels' weights, where it is not `prune.rate`. With this or `prune.mlp_rate` given, channels
    and neurons are each ranked among themselves; with neither, all weights together."""
    mlp_rate: float | None = Field(None, gt=0, lt=1)
    """The rate of the neurons' weights, where it is not `prune.rate`."""
    rounds: int = Field(3, ge=1, le=1000)
    """Rounds of pruning, after the dense training that is round 0."""
    round: int = Field(0, ge=0, le=1000)
    """Which round a run is; set by the rounds themselves."""
    rewind_epoch: int = Field(0, ge=0, le=MANY)
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
    """rsst: exponent of schedule power."""
    grow_fraction: float = Field(0.5, gt=0, le=1)
    """rsst: part of a round's epochs in which lambda grows; then the units are cut, and the rest trains on."""


class CutConfig(Group):
    """One cut of a trained model (`ray_jobs/ablate.py`, measure trials): a rate for each component that is cut."""

    linear_out: float = Field(0.0, ge=0, lt=1)
    """The rate of out_proj; docs/PRUNING.md says what each component is."""
    mlp: float = Field(0.0, ge=0, lt=1)
    """The rate of the MLP."""
    linear_gate: float = Field(0.0, ge=0, lt=1)
    """The rate of in_proj's gate rows."""
    linear_in: float = Field(0.0, ge=0, lt=1)
    """The rate of in_proj."""
    conv1d: float = Field(0.0, ge=0, lt=1)
    """The rate of the convolution."""
    linear_B_C: float = Field(0.0, ge=0, lt=1)
    """The rate of x_proj's B and C rows."""
    linear_delta: float = Field(0.0, ge=0, lt=1)
    """The rate of the time step's projection."""
    block: float = Field(0.0, ge=0, lt=1)
    """The share of whole blocks."""
    stem: float = Field(0.0, ge=0, lt=1)
    """The rate of the inner channels of a stem of convolutions (conv, cct)."""
    layer: int | None = Field(None, ge=0, le=MAX_DEPTH)
    """The only block that the cut is made in; None: all."""
    structured: bool = False
    """Remove whole units (each component's structured granularity) instead of zeroing single weights."""
    gate_elements: bool = False
    """In a structured cut: zero single weights of the gate (cut.linear_gate) instead of removing its channels, which
    are those of linear_out and linear_in."""
    criterion: Literal["l1", "l2", "taylor", "wanda", "random"] = "l1"
    """What ranks weights and units."""
    scope: Literal["global", "layerwise"] = "global"
    """Rank over all blocks together, or within each."""
    repair: bool = False
    """After the cut, fit out_proj and fc2 again by least squares on 512 training images: seconds, no training."""
    finetune_epochs: int = Field(0, ge=0, le=MANY)
    """Epochs of training after the cut; 0: measure at once."""

    @property
    def rates(self) -> dict[str, float]:
        """Component, with its granularity where that is not the usual one -> rate, of those that are cut; empty where
        nothing is."""
        parts = ("linear_out", "mlp", "linear_gate", "linear_in", "conv1d", "linear_B_C", "linear_delta")
        rates = {name: rate for name in (*parts, "block", "stem") if (rate := getattr(self, name)) > 0}
        apart = {"linear_gate"} if self.structured and self.gate_elements else set()
        return {f"{name}:element" if name in apart else name: rate for name, rate in rates.items()}


class PenaltyConfig(Group):
    """A sparsity penalty on whole units while training, of any run or of each round."""

    kind: Literal["off", "l1", "group", "mean_l1", "rows"] = "off"
    """l1: the coupled units' L1 norm; group: group lasso over them. The notes' two, each of single tensors: mean_l1:
    the L1 norms of out_proj and fc1, the mean over tensors; rows: the L2 norms of the rows of out_proj, fc1 and fc2,
    summed. The same strength is of another weight in each."""
    target: Target = "both"
    """Whose units: channels of the mixer, neurons of the MLP, or both, where there are."""
    strength: float = Field(1e-4, ge=0)
    """Weight of the penalty in the last epoch; before: strength (epoch / epochs)^exponent."""
    exponent: float = Field(4.0, ge=0)
    """Exponent of the strength over time; 0: the same strength in every epoch."""


class CheckpointConfig(Group):
    """What is kept of a run."""

    every: int = Field(1, ge=1, le=MANY)
    """Save the full training state each N epochs (and always after the last)."""
    keep: int = Field(1, ge=1, le=MANY)
    """Full training states kept; the best by validation is kept besides."""


class ScalingConfig(Group):
    """Processes and devices."""

    num_workers: int | None = Field(None, ge=0, le=4096)
    """Training processes under Ray Train; None: one per GPU of the cluster, else one on CPU; 0: this process,
    without a cluster (tests, debuggers). The least and the most of them, [1, 8] in a file and 1,8 on the command line,
    give `min_workers` too."""
    min_workers: int | None = Field(None, ge=1, le=4096)
    """As few workers as this are enough to go on where a node is lost, from the last checkpoint; of the numbers up to
    num_workers those count that divide the batch. None: num_workers, always."""
    cpus_per_worker: int | None = Field(None, ge=1, le=4096)
    """CPUs reserved for each worker; None: an equal share of the cluster's."""
    max_failures: int = Field(3, ge=0, le=MANY)
    """Times that Ray restarts the run from its last checkpoint when a worker dies."""

    @model_validator(mode="before")
    @classmethod
    def _range(cls, values: Any) -> Any:
        """Both ends of a range of workers, to where each belongs."""
        given = values.get("num_workers") if isinstance(values, dict) else None
        if not is_range(given):
            return values
        if values.get("min_workers") is not None:
            raise ConfigError("scaling.num_workers has its least in its list, and scaling.min_workers is given: leave "
                              "one out")  # fmt: skip
        least, most = resolve.workers_of(given)
        return {**values, "num_workers": most, "min_workers": least}


class TrackingConfig(Group):
    """Where a run's metrics go, besides its own folder."""

    backends: tuple[str, ...] = ("tensorboard",)
    """Any of tensorboard, csv (metrics.csv in the run's folder), wandb and mlflow (each an extra of that name), and
    those of installed packages' entry points; on the command line with commas between them: tensorboard,wandb."""
    project: str | None = Field(None, min_length=1, max_length=100)
    """Project of Weights & Biases, experiment of MLflow. None: mamba-forge."""
    offline: bool = False
    """No network: Weights & Biases writes into the run's folder, for `wandb sync`; MLflow into `out`/mlruns, whatever
    its environment variables say."""

    @field_validator("backends", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return trackers.several(value)


class RunConfig(Keyed):
    """One training run."""

    name: str = Field("run", pattern=NAME, max_length=100)
    """Experiment: the folder under `out` that its trials share."""
    trial: str | None = Field(None, pattern=NAME, max_length=100)
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
    cut: CutConfig = CutConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()

    def with_values(self, values: dict[str, Any]) -> Self:
        if is_range(values.get("scaling.num_workers")):  # it replaces what the config had of both
            values = {"scaling.min_workers": None, **values}
        return super().with_values(values)

    def resolve(self) -> RunConfig:
        """A copy with every value that follows from others, and with absolute paths.

        Raises:
            ConfigError: a combination that cannot run; names the keys, and what is valid.
        """
        return resolve.resolved(self)

    def grow_epochs(self) -> int:
        """Epochs in which rsst's lambda grows."""
        return max(1, round(self.prune.grow_fraction * self.optim.epochs))

    def check_workers(self, num_workers: int, gpu: bool) -> None:
        """Refuse what cannot run on this many processes of this kind.

        Raises:
            ConfigError: names the keys, and what is valid.
        """
        resolve.check_workers(self, num_workers, gpu)
