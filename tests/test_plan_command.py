"""`python -m ppojax.plan`: its tables, its JSON, and one line for what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest

from ppojax import plan
from ppojax.cli import run_command
from ppojax.plan import PlanConfig
from ppojax.planning.targets import parse_target
from ppojax.planning.topology import NoCompiler, devices_of
from tiny_config import TINY

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ[name])


def command(*arguments: str) -> int:
    return run_command(plan.main, [*TINY, *arguments], PlanConfig)


def test_an_estimate_is_labelled_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert command("target=h200:1", "compile=false", "price=2.5", f"out={out}") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ESTIMATE by formula, nothing compiled" in said and "at $2.5 a device and hour" in said
    written = json.loads(out.read_text())
    assert written["compiled"] is False and written["fits"] is True and written["programs"] == []
    assert set(written["parts"]) == {"gen", "score", "critic", "actor"}
    assert sum(written["memory_bytes"]["actor"].values()) <= written["peak"]["bytes"] <= written["limit_bytes"]
    assert written["cost"]["step"] == pytest.approx(2.5 * written["step_s"] / 3600)


def test_over_memory_is_exit_2_with_three_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("target=cpu:1", "compile=false", "memory_share=0.000001") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "needs" in lines[0] and "expected at most" in lines[0]
    assert all("about" in line and line.startswith("ppojax: error:   ") for line in lines[1:])
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=1")  # the target's


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["target=tpu"], 2, "tpu is not known to the planner, expected one of h200, h100, v5e, v5p, v6e, cpu"),
        (["target=h200:8", "--dry-run"], 0, ""),
        ([], 2, "target"),
        (["target=h200", "out=/dev/null/plan.json", "compile=false"], 73, "cannot be written"),
    ],
)
def test_other_endings(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == code
    assert said in capsys.readouterr().err


def test_without_a_compiler_the_estimate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for target, package in (("h200", "jax_cuda13_plugin"), ("v5e:2x2", "libtpu")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(NoCompiler, match="install ppojax"):
                devices_of(parse_target(target))
            assert command(f"target={target}") == 0
            assert "note: not compiled, all of it is an estimate by formula" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("target", "package", "extra"), [("h200:8", "jax_cuda13_plugin", "plan-cuda"), ("v5e:2x4", "libtpu", "plan-tpu")]
)
def test_a_plan_is_compiled_for_what_is_not_there(target: str, package: str, extra: str, tmp_path: Path) -> None:
    """Its programs, the axes that they send along, and that decoding keeps no whole second cache."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra {extra}): nothing is compiled for {target} here")
    out = tmp_path / "plan.json"
    meshes = ("mesh.fsdp=4", "mesh.tensor=2", "rollout.prompts=8", "update.microbatch_rows=8", "rollout.slots=16")
    cache = ("model.fresh.layers=8", "model.fresh.width=256", "rollout.max_tokens=1024", "rollout.bucket=1024")
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        assert command(f"target={target}", "model.dtype=bfloat16", *meshes, *cache, f"out={out}") == 0
    written = json.loads(out.read_text())
    assert written["compiled"] is True and written["compiling"]["processor_s"] > 0
    programs = {p["name"]: p for p in written["programs"]}
    assert set(programs) == {"prefill", "share", "extend", "decode", "score", "critic", "actor"}
    sent = {name: {axis for c in p["collectives"] for axis in c["axes"]} for name, p in programs.items()}
    assert sent["actor"] == sent["critic"] == sent["decode"] == {"fsdp", "tensor"} and sent["share"] == set()
    cache_bytes = written["memory_bytes"]["decode"]["cache"]
    assert cache_bytes > 8e6
    # Of heads that share no keys XLA turns the keys around, for CUDA; of grouped ones it does not.
    assert programs["decode"]["memory_bytes"]["temporary"] < 0.6 * cache_bytes
    assert programs["share"]["memory_bytes"]["temporary"] < cache_bytes / 2


@pytest.mark.parametrize("path", sorted((CONFIGS / "h200").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_a_node_fit_by_formula(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "planned, not run" in path.read_text().split("\n\n")[0]
    assert run_command(plan.main, [f"config={path}", "target=h200:8", "compile=false"], PlanConfig) == 0
    assert "fits" in capsys.readouterr().out
