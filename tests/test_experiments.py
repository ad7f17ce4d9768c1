"""The experiments under benchmarks/experiments: every run of both scales is one that the trainer would take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ppojax.config import Config
from ppojax.settings import load_config

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "experiments"))

import critics
import stability
from many import Run

pytestmark = pytest.mark.slow  # hundreds of configs


def found(runs: list[Run]) -> dict[tuple[str, str], Config]:
    """The config of each method and setting."""
    return {(run.method, run.setting): load_config(Config, run.arguments).config for run in runs}


@pytest.mark.parametrize(("scale", "layers"), [(critics.SMALL, 4), (critics.LARGER, 30)])
def test_the_runs_of_the_experiment_on_critics(scale: critics.Scale, layers: int, tmp_path: Path) -> None:
    configs = found(critics.runs(scale, tmp_path, 1, None, ()))
    assert len(configs) == 27
    for (method, horizon), config in configs.items():
        episodes = config.rollout.prompts * config.rollout.group_size
        assert episodes == scale.horizons[horizon].episodes and config.rollout.group_size == int(method.split("_")[1])
        assert config.env.max_turns == int(horizon)
    sizes = {method: configs[method, "4"].critic.model.layers for method in ("whole_8", "half_8", "quarter_8")}
    assert sizes == {"whole_8": layers, "half_8": layers // 2, "quarter_8": layers // 4}
    assert configs["pair_8", "4"].critic.count == 2
    for horizon in scale.horizons:
        load_config(Config, scale.lesson(horizon, tmp_path))


@pytest.mark.parametrize("larger", [False, True])
def test_the_runs_of_the_experiment_on_stability(larger: bool) -> None:
    configs = found(stability.runs(larger, 1, None, ()))
    assert len(configs) == 33
    assert {config.rollout.mismatch.hidden_noise for config in configs.values()} == {0.0, 0.2, 0.6}
    assert {config.update.minibatches for config in configs.values()} == {8}
