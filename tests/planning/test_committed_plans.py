"""The plans that are committed are those of the recipes as they are now."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ppojax.config import Config
from ppojax.mesh import AXES
from ppojax.planning.workload import workload_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "h200").glob("*.yaml"))
PLANS = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results" / "plan").glob("*.json"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_node_as_compiled(path: Path) -> None:
    node = [p for p in PLANS if p["recipe"] == path.stem and p["target"]["name"] == "h200:8"]
    assert len(node) == 1 and node[0]["compiled"] and node[0]["fits"] and node[0]["changes_to_the_recipe"] == []


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan['shape']}-{plan['target']['name']}")
def test_a_plan_is_of_its_recipe(plan: dict[str, Any]) -> None:
    config = Config.load(f"config={ROOT}/configs/h200/{plan['recipe']}.yaml", *plan["changes_to_the_recipe"])
    work = workload_of(config, segments=plan["segments"])
    assert plan["workload"] == work._asdict() | {"layout": asdict(work.layout)}
    assert plan["mesh"] == dict(zip(AXES, config.mesh.shape, strict=True))
    assert plan["fits"] == (plan["peak"]["bytes"] <= plan["limit_bytes"]) and (
        plan["fits"] or len(plan["changes"]) == 3
    )
