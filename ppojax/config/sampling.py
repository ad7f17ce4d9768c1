"""Which settings of sampling cannot hold together with those of what learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppojax.rollout.mismatch import Mismatch
from ppojax.settings import Contradiction

if TYPE_CHECKING:
    from ppojax.config.root import Config


def sampling(config: Config) -> Iterator[Contradiction]:
    """List them."""
    yield from _asynchrony(config)
    yield from _records(config)
    if config.rollout.exact:
        yield from _exact(config)


def _asynchrony(config: Config) -> Iterator[Contradiction]:
    rollout, loss = config.rollout, config.loss
    if rollout.mode == "sync":
        if rollout.max_staleness > 1:
            yield Contradiction(
                ("rollout.max_staleness", "rollout.mode"),
                "episodes are played with the weights that learn from them",
                "set rollout.mode=one_step_off, or rollout.max_staleness=1",
            )
        return
    if rollout.mismatch.stale_steps:
        yield Contradiction(
            ("rollout.mode", "rollout.mismatch.stale_steps"),
            "weights are old already",
            "set rollout.max_staleness to the steps that they are to be old, and rollout.mismatch.stale_steps=0",
        )
    if not loss.off_policy:
        yield Contradiction(
            ("rollout.mode", "loss.type"),
            "older weights play, and this loss takes what they drew for the policy's own",
            "give it the ratio to the sampler: ppo and gspo loss.anchor=behavior or loss.correction.method=truncate, "
            "cispo loss.anchor=behavior, reinforce loss.importance_weight=true; all other losses but nll have it",
        )


def _records(config: Config) -> Iterator[Contradiction]:
    rollout, loss = config.rollout, config.loss
    if rollout.cuts and rollout.record_hidden:
        yield Contradiction(
            ("rollout.top_k", "rollout.top_p", "rollout.min_p", "rollout.record_hidden"),
            "hidden states do not tell what was cut off the distribution, and the exact gap would be of another one",
            "set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or rollout.record_hidden=false",
        )
    if rollout.mismatch.logit_noise and config.records.hidden:
        asked = ("loss.support", "loss.compare_supports") if loss.records.hidden else ("rollout.record_hidden",)
        yield Contradiction(
            ("rollout.mismatch.logit_noise", *asked),
            "hidden states do not tell the noise on the logits, and the policy would be compared with another one",
            "set rollout.mismatch.logit_noise=0 (they have rollout.mismatch.hidden_noise), or leave them out "
            "(rollout.record_hidden=false, and with dppo loss.support=binary or topk and loss.compare_supports=false)",
        )


def _exact(config: Config) -> Iterator[Contradiction]:
    """What keeps the trainer's computation from being the sampler's too."""
    model, rollout = config.model, config.rollout
    dropout = 0.0 if model.lora is None else model.lora.dropout
    wrong = [
        ("model.dtype", model.dtype == "float32", "float32", "rounding to fewer bits is not the same everywhere"),
        ("rollout.dtype", rollout.dtype in (None, "float32"), "null", "sampler and trainer compute in two types"),
        ("rollout.mode", rollout.mode == "sync", "sync", "what is recorded is of older weights"),
        ("rollout.mesh", rollout.mesh is None, "null", "another mesh adds in another order"),
        ("rollout.top_k", not rollout.cuts, "0, rollout.top_p=1, rollout.min_p=0", "the trainer's policy is not cut"),
        ("rollout.mismatch", rollout.mismatch == Mismatch(), "{}", "gaps are put in on purpose"),
        ("model.remat", model.remat == "full", "full", "what blocks keep for the backward pass changes the program"),
        ("model.lora.dropout", dropout == 0, "0", "an update drops inputs of its own"),
        ("actor.perturb", config.actor.perturb is None, "null", "an update adds noise of its own"),
        ("update.shared_prefix", not config.update.shared_prefix, "false", "shared prompts have other shapes"),
    ]
    for key, holds, value, why in wrong:
        if not holds:
            yield Contradiction(("rollout.exact", key), why, f"set {key}={value}, or rollout.exact=false")
