"""Every policy loss, with settings in which it masks, clips or corrects some of the tokens of random rows."""

from __future__ import annotations

import math

from ppojax.losses import (
    CISPO,
    CPPO,
    DIS,
    DPPO,
    DRPO,
    GSPO,
    IPO,
    Aggregation,
    Correction,
    KLPenalty,
    MiniRL,
    PPOClip,
    Reinforce,
)
from ppojax.losses.policy import PolicyLoss

LOSSES: dict[str, PolicyLoss] = {
    "reinforce": Reinforce(),
    "reinforce without weights": Reinforce(importance_weight=False),
    "cispo": CISPO(clip_high=0.5),
    "cispo low": CISPO(clip_low=0.2, clip_high=0.5),
    "cispo old": CISPO(anchor="old", clip_high=0.5),
    "minirl": MiniRL(),
    "ratios of rare tokens relaxed": MiniRL(anchor="behavior", clip_high=0.28, relax_low=0.3, relax_high=0.4),
    "dis": DIS(clip_high=1.0),
    "ipo": IPO(),
    "drpo": DRPO(),
    "cppo": CPPO(),
    "gspo": GSPO(clip_low=0.1, clip_high=0.2, aggregation=Aggregation()),
    "tis": PPOClip(correction=Correction(method="truncate", high=1.1)),
    "decoupled": PPOClip(correction=Correction(method="truncate", high=math.inf)),
    "icepop": PPOClip(correction=Correction(method="mask", low=0.9, high=1.1)),
    "mis sequence": PPOClip(correction=Correction(method="mask", level="sequence", low=0.8, high=1.25)),
    "rows masked, tokens weighed": PPOClip(
        correction=Correction(method="mask", level="geometric", weight="token", low=0.95, high=1.1)
    ),
    "rows rejected": PPOClip(correction=Correction(method="mask", level="sequence", weight="one", low=0.8, high=1.25)),
    "tis geometric": PPOClip(correction=Correction(method="truncate", level="geometric", low=0.99, high=1.05)),
}
# What differs by what is compared, added or averaged, and not by its own formula.
MORE: dict[str, PolicyLoss] = {
    "dppo": DPPO(delta_low=0.1, delta_high=0.15),
    "dppo kl, old": DPPO(divergence="kl", anchor="old"),
    "dppo topk": DPPO(support="topk", top_k=3, compare_supports=True),
    "dppo full": DPPO(support="full", delta_low=0.3, delta_high=0.3),
    "ppo, clipped twice": PPOClip(dual_clip=1.5, aggregation=Aggregation(mode="constant", constant=7.0)),
    "gspo by rows": GSPO(clip_low=0.1, clip_high=0.2),
    "imitation": PPOClip(positive_nll=0.3, aggregation=Aggregation(mode="seq_mean_token_sum")),
    "entropy and kl": DPPO(entropy_coefficient=0.1, kl=KLPenalty(coefficient=0.3, estimator="k3+")),
}
