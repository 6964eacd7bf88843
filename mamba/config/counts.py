"""Which keys count where: what each kind of work reads of a config, and what has no effect beside other values.

Whatever was typed and would change nothing is refused, since the result would be believed to be of it. A whole config
of a file, a preset or a checkpoint may hold more than counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from mamba.config.facts import DATASETS, METHODS, reads
from mamba.config.keys import dotted_keys
from mamba.config.schema import RunConfig
from mamba.errors import ConfigError

Work = Literal["train", "rounds", "plan", "rsst_plan", "own_plan", "own_rsst_plan", "measure", "finetune"]

TRAINING_DATA = frozenset(
    {
        *("batch_size", "augment", "magnitude", "magnitude_std", "crop", "crop_scale", "random_erasing", "cutout"),
        *("repeats", "mixup", "cutmix", "mix_prob", "mix_off_epochs", "device", "loader_workers", "prefetch_factor"),
    }
)
"""Keys of data.* that say how the training images are used; all others decide which images there are."""
BESIDE_CHECKPOINT = ("model.new_head", "model.new_size", "model.drop_path", "model.sync_batchnorm")
"""Of model.*, the keys that count beside a checkpoint."""

ALWAYS = ("name", "out", "trial", "seed", "scaling", "model.checkpoint")
TRAINING = (*ALWAYS, "data", "model", "optim", "ema", "distill", "eval", "penalty", "checkpoint", "tracking")
IMAGES = tuple(key for key in dotted_keys() if key.startswith("data.") and key[5:] not in TRAINING_DATA)
MEASURING = (*ALWAYS, *IMAGES, "eval.batch_size", "optim.amp", "tracking")
CUTS = tuple(key for key in dotted_keys() if key.startswith("cut.") and key != "cut.finetune_epochs")
COUNTS: dict[Work, tuple[str, ...]] = {
    "train": TRAINING,
    "rounds": (*TRAINING, "prune"),
    "plan": (*ALWAYS, *IMAGES, "eval.batch_size", "optim.amp", "cut.repair"),
    "rsst_plan": (*TRAINING, "cut.repair"),
    "own_plan": (*ALWAYS, *IMAGES, "eval.batch_size", "optim.amp", *CUTS),
    "own_rsst_plan": (*TRAINING, *CUTS),
    "measure": (*MEASURING, "cut"),
    "finetune": (*TRAINING, "cut"),
}
"""Keys, and groups of keys, that each kind of work reads."""
WORDS: dict[Work, str] = {
    "train": "a training (train.py)",
    "rounds": "rounds of pruning (prune.py)",
    "plan": "a plan (prune.py --plan)",
    "rsst_plan": "a plan after training under a penalty (prune.py --plan --penalty.kind)",
    "own_plan": "a cut of one's own (prune.py --plan own)",
    "own_rsst_plan": "a cut of one's own after training under a penalty (prune.py --plan own --penalty.kind)",
    "measure": "cuts of a trained model (ablate.py, tune.py with kind measure)",
    "finetune": "cuts that are fine-tuned (cut.finetune_epochs)",
}


def trains_first(config: RunConfig, given: Iterable[str]) -> bool:
    """Whether a penalty was asked for beside a plan: the model is then trained under it first. One of the run that made
    the model, whose config is taken over, does not count: that run is over."""
    return config.penalty.kind != "off" and "penalty.kind" in given


def work_of(plan: str, config: RunConfig, given: Iterable[str]) -> Work:
    """What a plan of this name does."""
    if plan == "own":
        return "own_rsst_plan" if trains_first(config, given) else "own_plan"
    return "rsst_plan" if trains_first(config, given) else "plan"


def counts(key: str, work: Work) -> bool:
    """Whether a key is read in this kind of work, whatever the others are."""
    read = COUNTS[work]
    return key != "prune.round" and (key in read or key.partition(".")[0] in read)


def check_given(works: Sequence[Work], given: Iterable[str], configs: Sequence[RunConfig]) -> None:
    """Refuse what was typed and would change nothing.

    Args:
        works: what is going to be done; a key has to count in one of them.
        given: the keys that were typed.
        configs: with their values, of all that is going to be done; a key has to have an effect in one of them.

    Raises:
        ConfigError: the key, and where it counts or what keeps it from counting.
    """
    flat = configs[0].flat()
    for key in given:
        here = [work for work in works if counts(key, work)]
        if not here:
            there = [WORDS[work] for work in COUNTS if counts(key, work)]
            where = f"it counts in {', '.join(there)}" if there else "it is set by the rounds themselves"
            raise ConfigError(f"--{key} {flat[key]} has no effect in {WORDS[works[0]]}: {where}; leave it out")
        reasons = [idle(config, work).get(key) for work in here for config in configs]
        if all(reasons):
            raise ConfigError(f"--{key} {flat[key]} has no effect: {reasons[0]}; leave it out, or change that too")


def idle(config: RunConfig, work: Work) -> dict[str, str]:
    """Keys that have no effect with the other keys as they are, and which of those it is."""
    data, model, optim = config.data, config.model, config.optim
    distill, penalty, prune = config.distill, config.penalty, config.prune
    found: dict[str, str] = {}

    def when(off: bool, because: str, *keys: str) -> None:
        if off:
            found.update(dict.fromkeys(keys, because))

    when(not (data.mixup or data.cutmix), "data.mixup and data.cutmix are 0", "data.mix_prob", "data.mix_off_epochs")
    when(data.mix_prob == 0, "data.mix_prob is 0", "data.mixup", "data.cutmix", "data.mix_off_epochs")
    when(data.augment == "none", "data.augment is none", "data.crop", "data.crop_scale")
    one_way = "data.augment is none, so training shows each image in one way"
    when(data.augment == "none", one_way, "eval.tta_views", "eval.tta_always")
    when(
        not reads("data.augment", data.augment, ("randaugment_inc",)),
        f"data.augment is {data.augment}",
        "data.magnitude",
        "data.magnitude_std",
    )
    when(data.crop != "resized", f"data.crop is {data.crop}", "data.crop_scale")
    of, source = DATASETS[data.dataset], f"data.dataset is {data.dataset}"
    when(not of.files, source, "data.fit", "data.cache", "data.strict", "data.split_from")
    when(not of.rooted, source, "data.root")
    when(data.split_from is not None, "data.split_from says which images", "data.split_seed", "data.val_fraction")
    when(data.val_fraction == 0, "data.val_fraction is 0", "data.split_seed", "eval.every")
    when(
        not reads("optim.schedule", optim.schedule, ("wsd",)),
        f"optim.schedule is {optim.schedule}",
        "optim.decay_epochs",
    )
    muon = reads("optim.optimizer", optim.optimizer, ("muon",))
    when(not muon, f"optim.optimizer is {optim.optimizer}", "optim.muon_momentum")
    when(optim.warmup_epochs == 0, "optim.warmup_epochs is 0", "optim.warmup")
    when(not config.ema.enabled, "ema.enabled is False", "ema.decay")
    when(distill.alpha == 0, "distill.alpha is 0", "distill.temperature", "distill.teacher")
    when(distill.teacher is None, "there is no distill.teacher", "distill.temperature", "distill.alpha")
    when(distill.teacher is not None and distill.alpha == 1, "distill.alpha is 1", "optim.label_smoothing")
    when(penalty.strength == 0, "penalty.strength is 0", "penalty.kind", "penalty.target", "penalty.exponent")
    when(penalty.kind == "off", "penalty.kind is off", "penalty.strength", "penalty.target", "penalty.exponent")
    when(config.eval.tta_views == 1, "eval.tta_views is 1", "eval.tta_always")
    when(config.scaling.num_workers in (0, 1), "one process trains", "model.sync_batchnorm", "scaling.min_workers")
    cuts = work in ("measure", "finetune")
    if model.checkpoint is None:
        normed = reads("model.stem", model.stem, ("conv",))
        when(not normed, f"model.stem is {model.stem}", "model.sync_batchnorm")
        when(not cuts, "there is no model.checkpoint", "model.new_head")
        when(model.pos_embed in ("learned", "none"), f"model.pos_embed is {model.pos_embed}", "model.rope_grid")
    else:
        own = [k for k in dotted_keys() if k.startswith("model.") and k not in ("model.checkpoint", *BESIDE_CHECKPOINT)]
        when(True, "model.checkpoint brings its own", *own)
    when(model.checkpoint is None or cuts, "there is no model.checkpoint", "model.new_size")
    if work == "rounds":
        facts, method = METHODS[prune.method], f"prune.method is {prune.method}"
        when(not facts.chooses, method, "prune.score", "prune.fillback_rate")
        when(not facts.decays, method, "prune.ceiling", "prune.schedule", "prune.grow_fraction", "prune.exponent")
        when(
            not reads("prune.schedule", prune.schedule, ("power",)),
            f"prune.schedule is {prune.schedule}",
            "prune.exponent",
        )
        rates = {"ssm": prune.ssm_rate, "mlp": prune.mlp_rate}
        parts = ("ssm", "mlp") if prune.target == "both" else (prune.target,)
        when(all(rates[part] is not None for part in parts), "each part has a rate of its own", "prune.rate")
    cut = config.cut
    if cuts or work in ("own_plan", "own_rsst_plan"):
        when(cut.layer is not None, "cut.layer is the only one", "cut.scope")
        when(not cut.structured, "cut.structured is False", "cut.gate_elements")
        when(cut.linear_gate == 0, "cut.linear_gate is 0", "cut.gate_elements")
    if cuts:
        when(True, "cut.finetune_epochs says how long a cut model is trained", "optim.epochs")
        short = optim.warmup_epochs >= 0.2 * cut.finetune_epochs > 0
        when(short, "fine-tuning warms up for a fifth of cut.finetune_epochs at most", "optim.warmup_epochs")
        fixed = cut.finetune_epochs == 0 and cut.criterion in ("l1", "l2") and not cut.repair
        when(fixed, "nothing in such a cut is random", "seed")
    return found
