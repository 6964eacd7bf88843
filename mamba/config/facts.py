"""What a config has to know of data sets and of methods of pruning, to fill in what follows and to say what has no
effect. The facts of those that ship stand here, since a command line is read before the rooms that own them are
imported; entries that are added from outside bring theirs along (`mamba.config.choices.Registry`)."""

from __future__ import annotations

from typing import NamedTuple

from mamba.config.choices import added


class DatasetFacts(NamedTuple):
    """Of a word of `data.dataset`."""

    side: int | None
    """In pixels, that `data.img_size` takes when it is not given; None: it has none of its own."""
    rooted: bool = True
    """It lies in `data.root`."""
    files: bool = False
    """Its images are files, so that `data.fit`, `data.cache`, `data.strict` and `data.split_from` count."""


class MethodFacts(NamedTuple):
    """Of a word of `prune.method`."""

    chooses: bool
    """It chooses whole units that stay, by `prune.score` and `prune.fillback_rate`."""
    decays: bool
    """What leaves is decayed while it trains, as `prune.ceiling` and its like say."""


class MixerFacts(NamedTuple):
    """Of a word of `model.mixer`."""

    back_after: int | None
    """Blocks after which some scan has gone from the last token to the first; None: none ever does."""


DATASETS = {
    "digits": DatasetFacts(8, rooted=False),
    "cifar10": DatasetFacts(32),
    "cifar100": DatasetFacts(32),
    "folder": DatasetFacts(224, files=True),
}
METHODS = {
    "none": MethodFacts(chooses=False, decays=False),
    "magnitude": MethodFacts(chooses=False, decays=False),
    "refill": MethodFacts(chooses=True, decays=False),
    "rsst": MethodFacts(chooses=True, decays=True),
}
MIXERS = {
    "forward": MixerFacts(None),
    "bidirectional": MixerFacts(1),
    "bidirectional_shared": MixerFacts(1),
    "multiscale": MixerFacts(None),
    "alternating": MixerFacts(2),
    "cross": MixerFacts(2),
}


def reads(key: str, word: str, words: tuple[str, ...]) -> bool:
    """Whether a key's word is one of these, or one that was added: of that it is not known what it reads."""
    return word in words or word in added(key)
