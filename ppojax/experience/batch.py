"""From scored experience to a batch: the one place where an advantage estimator runs."""

from __future__ import annotations

from functools import partial

import jax

from ppojax.advantages import AdvantageEstimator
from ppojax.types import Batch, Experience, Recorded


@partial(jax.jit, static_argnames=("estimator",))
def make_batch(experience: Experience, *, estimator: AdvantageEstimator) -> Batch:
    """Estimate advantages, and returns where critics are trained."""
    out = estimator(experience)
    return Batch(experience, out.advantage_BT, out.return_MBT)


def without_records(experience: Experience) -> Experience:
    """Leave out the large arrays that only the policy's update reads."""
    return experience._replace(recorded=Recorded(), hidden_ref_BAD=None)
