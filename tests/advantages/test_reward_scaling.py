"""Rewards on another scale, by hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from ppojax.advantages import GAE, Group
from ppojax.advantages.reward_scaling import RewardScaling
from ppojax.types import Ending, Experience
from small_batch import experience_of

ACTION = [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
REWARD = [[0, 0.2, 0.5, 0], [0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 0]]


def scaled(e: Experience, bootstraps: bool = False, **settings: float) -> np.ndarray:
    return np.asarray(RewardScaling(**settings)(e, bootstraps=bootstraps))


def test_by_hand() -> None:
    """0..1 to -1..1 doubles and takes 1 off at the last action: .7 is .4; 0 is -1; 3 counts as 1; nothing stays so."""
    want = [[0, 0.4, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(scaled(experience_of(ACTION, reward=REWARD)), want, atol=1e-6)
    other = scaled(experience_of(ACTION, reward=REWARD), source_min=-1, source_max=3, target_min=0, target_max=2)
    np.testing.assert_allclose(other.sum(1), [0.85, 0.5, 2, 0], rtol=1e-6)


def test_what_goes_on_with_a_value_is_not_at_its_end() -> None:
    """The value says what is to come, on the new scale; where nothing goes on, a cut episode is as low as a failed."""
    e = experience_of(
        ACTION, reward=REWARD, ending=[Ending.TRUNCATED, Ending.TERMINATED, Ending.CUT, Ending.TERMINATED]
    )
    went_on = [[0, 0.4, 1, 0], [0, 0, -1, 0], [0, 6, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(scaled(e, bootstraps=True), went_on, atol=1e-6)
    np.testing.assert_allclose(scaled(e)[:2], [[0, 0.4, 0, 0], [0, 0, -1, 0]], atol=1e-6)
    assert GAE().bootstraps and not GAE(truncation="zero").bootstraps and not Group().bootstraps


def test_an_episode_of_several_rows_ends_once() -> None:
    """Rows 2, 0 and 3 are one episode of .7 + 3 (held at 1), whose last row has no action."""
    e = experience_of(ACTION, reward=REWARD, ending=[Ending.CUT, Ending.TERMINATED, Ending.CUT, Ending.TERMINATED])
    ids: dict[str, Any] = {"episode_B": [0, 1, 0, 0], "segment_B": [1, 0, 0, 2]}
    e = e._replace(**{name: jnp.asarray(x, jnp.int32) for name, x in ids.items()})
    got = scaled(e)
    np.testing.assert_allclose(got[[0, 2, 3]].sum(), 1.0, atol=1e-5)
    np.testing.assert_allclose(got[2], [0, 6, 0, 0], atol=1e-6)
    assert got[0, 2] < -4 and not got[3].any()


def test_rows_that_do_not_count_stay_alone() -> None:
    e = experience_of(ACTION, reward=REWARD, valid=[True, False, True, True])
    np.testing.assert_allclose(scaled(e)[0], [0, 0.4, 0, 0], atol=1e-6)


def test_ranges_are_checked() -> None:
    with pytest.raises(ValidationError, match=r"source_min \(2\.0\) must be under source_max \(1\.0\)"):
        RewardScaling(source_min=2.0)
    with pytest.raises(ValidationError, match=r"target_min \(1\.0\) must be under target_max \(1\.0\)"):
        RewardScaling(target_min=1.0)
