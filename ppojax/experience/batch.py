"""From scored experience to a batch: the one place where an advantage estimator runs."""

from __future__ import annotations

from functools import partial

import jax

from ppojax.advantages import AdvantageEstimator
from ppojax.types import Advantage, Batch, Experience, Recorded


def make_batch(experience: Experience, *, estimator: AdvantageEstimator) -> Batch:
    """Estimate advantages, and returns where critics are trained."""
    out = _estimate(without_records(experience), estimator=estimator)
    return Batch(experience, out.advantage_BT, out.return_MBT)


@partial(jax.jit, static_argnames=("estimator",))
def _estimate(experience: Experience, *, estimator: AdvantageEstimator) -> Advantage:
    return estimator(experience)


def without_records(experience: Experience) -> Experience:
    """Leave out the large arrays that only the policy's update reads."""
    return experience._replace(recorded=Recorded(), hidden_ref_BAD=None)
