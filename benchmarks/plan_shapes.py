"""Plans of published shapes with mini-critics on 1, 8 and 64 H200s and on a v5p slice: no accelerator is needed.

    pip install 'ppojax[plan-cuda]' 'ppojax[plan-tpu]'
    python benchmarks/plan_shapes.py [--shape qwen3_8b] [--target h200:8]
    python benchmarks/plan_shapes.py --estimate      # by formula, in seconds; leaves compiled plans as they are
    python benchmarks/plan_shapes.py --table

Nothing runs: the programs are compiled for the target, and times are arithmetic (docs/planner.md). Each plan is written
to benchmarks/results/plan/; `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console

from ppojax.config import Config
from ppojax.planning import table
from ppojax.planning.advice import advise
from ppojax.planning.planner import Assumed, make_plan
from ppojax.planning.targets import parse_target

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "plan"
PRICE = 2.5  # dollars a device and hour, for the cost column only
SHAPES = {
    "qwen2_5_1_5b": "qwen2_5_1_5b",
    "qwen2_5_7b": "qwen2_5_7b",
    "qwen3_8b": "qwen3_8b_tools",
    "qwen3_30b_a3b": "qwen3_30b_a3b",
    "long_context": "long_context",
}
SEGMENTS = {"long_context": 2}  # rows of an episode
MOE = "qwen3_30b_a3b"
TARGETS = ("h200:1", "h200:8", "h200:8x8", "v5p:2x2x4")


def changes(shape: str, target: str) -> list[str]:
    """What differs from the recipe for a node: the meshes, and the rows of a step where there are 64 devices."""
    if target == "h200:1":
        axes = ["mesh.expert=1"] if shape == MOE else []
        return [*axes, "mesh.fsdp=1", "rollout.mesh=null", "rollout.slots=64"]
    if target == "v5p:2x2x4":
        axes = (
            ["mesh.fsdp=8", "rollout.mesh={expert: 16}"]
            if shape == MOE
            else ["mesh.fsdp=16", "rollout.mesh={data: 16}"]
        )
        return [*axes, f"update.microbatch_rows={128 if shape == 'qwen2_5_1_5b' else 16}"]
    if target == "h200:8x8":
        sampling = "rollout.mesh={data: 8, expert: 8}" if shape == MOE else "rollout.mesh={data: 64}"
        rows = {"qwen2_5_1_5b": 512, "qwen2_5_7b": 128}.get(shape, 64)
        return ["mesh.data=8", sampling, "rollout.prompts=512", "rollout.slots=2048", f"update.microbatch_rows={rows}"]
    return []


def write(shape: str, name: str, compiling: bool) -> None:
    """Plan one shape for one target."""
    path = OUT / f"{shape}_{name.replace(':', '_')}.json"
    if not compiling and path.exists() and json.loads(path.read_text())["compiled"]:
        return
    target, start = parse_target(name), time.perf_counter()
    config = Config.load(f"config={HERE.parent / 'configs' / 'h200' / SHAPES[shape]}.yaml", *changes(shape, name))
    assumed = Assumed(segments=SEGMENTS.get(shape, 1))
    report = make_plan(config, target, assumed, compiling=compiling)
    found = table.record(report, PRICE, [] if report.fits else advise(report, assumed))
    found |= {
        "shape": shape,
        "recipe": SHAPES[shape],
        "segments": assumed.segments,
        "changes_to_the_recipe": changes(shape, name),
        "date": time.strftime("%Y-%m-%d"),
    }
    found["planned_in_s"] = round(time.perf_counter() - start, 1)
    OUT.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=150)
    console.print(table.head_line(report), table.memory_table(report), table.time_table(report, PRICE))
    console.print(table.program_table(report) if report.programs else "", *report.notes, sep="\n")
    if report.compiling is not None:
        console.print(
            f"compiled in {report.compiling.wall_s:.0f} s, {report.compiling.processor_s:.0f} s of processors"
        )


def show() -> None:
    """Print the plans that have been written, as Markdown."""
    print("| shape | target | mesh | processor s | peak GiB | fits | step s | tokens/s a device | MFU | $ a step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for name in TARGETS:
            path = OUT / f"{shape}_{name.replace(':', '_')}.json"
            if not path.exists():
                continue
            p = json.loads(path.read_text())
            mesh = " x ".join(f"{axis} {n}" for axis, n in p["mesh"].items() if n > 1) or "1"
            how = "estimate" if p["compiling"] is None else f"{p['compiling']['processor_s']:.0f}"
            print(
                f"| {shape} | {name} | {mesh} | {how} | {p['peak']['bytes'] / 2**30:.1f} ({p['peak']['while']}) "
                f"| {'yes' if p['fits'] else 'no'} | {p['step_s']:.1f} | {p['tokens_per_s_per_device']:.0f} "
                f"| {p['mfu']:.1%} | {p['cost']['step']:.2f} |"
            )


def main() -> None:
    """Write plans, or print those that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        show()
        return
    for shape in SHAPES if options.shape is None else (options.shape,):
        for target in TARGETS if options.target is None else (options.target,):
            if shape == "long_context" and target != "h200:8":
                continue
            write(shape, target, not options.estimate)


if __name__ == "__main__":
    main()
