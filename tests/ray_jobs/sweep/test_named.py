"""Actors of sweeps are called by what they do."""

from __future__ import annotations

from ray.tune.trainable.function_trainable import FunctionTrainable

from ray_jobs.sweep import named


def test_actors_carry_their_experiment_and_processes_their_trial(tmp_path, monkeypatch):
    """They were called ImplicitFunc, all of them."""
    titles = []
    monkeypatch.setattr(named, "show", titles.append)
    monkeypatch.setattr(FunctionTrainable, "train", lambda self: {"done": True})
    kind = named.named(lambda config: None, tmp_path / "search")
    actor = object.__new__(kind)
    assert kind.__name__ == repr(actor) == "trial of search"
    for trial in ("trial-0000", "trial-0001"):  # one actor, used again
        actor.config = {"trial": trial}
        assert actor.train() == {"done": True}
    assert titles == ["trial-0000 of search", "trial-0001 of search"]
