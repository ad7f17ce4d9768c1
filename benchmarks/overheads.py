"""What advantages, losses, critics and noise cost beside the actor's update, at 4096 tokens a row, on a CPU.

    uv run python benchmarks/overheads.py [--cores 2] [--repeats 2] [--tokens 4096] [--return-memory] [--dry]

One process, which keeps freed memory as a run does; every figure is the median over repeats after the first call, and
updates take turns, so that what else the machine does slows all of them alike. The actor has 4 blocks of width 256; the
quarter-size critic has one of its blocks, an ensemble two such critics. A loss is timed as value and gradient with the
model's statistics given; shares are of the actor's update, which is only a part of a step. Results go to
benchmarks/results/overheads_<cores>core.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS, PROMPT, VOCAB = 1, 512, 8192
BLOCKS, WIDTH = 4, 256
LOSSES = (
    "ppo",
    "dppo",
    "dppo_topk",
    "cispo",
    "gspo",
    "reinforce",
    "minirl",
    "dis",
    "ipo",
    "drpo",
    "cppo",
    "nll",
    "value",
)


def rows_of(tokens: int) -> list[Any]:
    """Rows of one prompt and one answer, which fill them up."""
    import numpy as np

    from ppojax.types import Ending, Recorded, Row

    rng, rows = np.random.default_rng(0), []
    for b in range(ROWS):
        action = np.arange(tokens - 1) >= PROMPT
        reward, count = np.zeros(tokens - 1, np.float32), int(action.sum())
        reward[-1] = 1.0
        top = Recorded(rng.integers(0, VOCAB, (count, 20)).astype(np.int32), np.full((count, 20), -4.0, np.float32))
        token = rng.integers(1, VOCAB, tokens - 1).astype(np.int32)
        logp = np.where(action, -9.0, 0.0).astype(np.float32)
        rows.append(Row(token, action, logp, reward, 0, b, 0, Ending.TERMINATED, recorded=top))
    return rows


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time calls in turn, after a first one of each, which compiles; say how long they took."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[name].append(time.perf_counter() - start)
    for name, found in times.items():
        print(f"{name:24} {min(found):.4f} to {max(found):.4f} s", flush=True)
    return times


def small_parts(experience: Any, repeats: int) -> dict[str, list[float]]:
    """Advantages, and each loss with its gradient towards the model's statistics."""
    import jax
    import jax.numpy as jnp
    from pydantic import TypeAdapter

    from ppojax.advantages import GAE, Group
    from ppojax.experience.batch import make_batch
    from ppojax.losses import Loss, ValueLoss
    from ppojax.types import TokenStats

    def named(name: str) -> Any:
        settings = {"type": "dppo", "support": "topk"} if name == "dppo_topk" else {"type": name}
        return TypeAdapter(Loss).validate_python(settings)

    estimators = {"gae": GAE(), "group": Group(baseline="mean", scale="std")}
    calls: dict[str, Callable[[], Any]] = {
        f"advantage/{name}": partial(make_batch, experience, estimator=one) for name, one in estimators.items()
    }
    batch = make_batch(experience, estimator=GAE())
    logp_BT = experience.logp_behavior_BT + 0.1
    topk = jnp.full((*experience.action_index_BA.shape, 20), -4.0)
    for name in LOSSES:
        if name == "value":
            run = jax.jit(jax.value_and_grad(lambda v, b: ValueLoss()(v, b).sum))
            calls["loss/value"] = partial(run, experience.value_MBT, batch)
            continue

        def total(x: Any, b: Any, loss: Any) -> Any:
            return loss(TokenStats(x[0], x[1], topk_logp=topk), b).sum

        run = jax.jit(jax.value_and_grad(total), static_argnames="loss")
        calls[f"loss/{name}"] = partial(run, (logp_BT, -logp_BT), batch, loss=named(name))
    return seconds(calls, 10 * repeats)


def updates(experience: Any, repeats: int) -> dict[str, list[float]]:
    """Optimizer steps of the actor, without and with noise, and of critics."""
    import jax

    from ppojax.advantages import GAE
    from ppojax.experience.batch import make_batch
    from ppojax.losses import DPPO
    from ppojax.mesh import MeshConfig
    from ppojax.models.forward import ModelDef, init, values
    from ppojax.models.perturb import NAME, Perturb
    from ppojax.models.spec import DecoderSpec
    from ppojax.models.value_head import LinearHead
    from ppojax.types import Layout
    from ppojax.update.actor import actor_step
    from ppojax.update.critic import critic_step
    from ppojax.update.settings import ActorConfig, CriticConfig
    from ppojax.update.state import init_state

    mesh, batch = MeshConfig().build(), make_batch(experience, estimator=GAE())
    spec = DecoderSpec(layers=BLOCKS, width=WIDTH, heads=4, kv_heads=4, head_width=64, ffn=704, vocab=VOCAB)
    actor, rows = ModelDef(spec, mesh=mesh), {"layout": Layout(), "microbatch_rows": 1, "mesh": mesh}
    quarter = replace(actor, spec=spec.model_copy(update={"layers": BLOCKS // 4}), head=LinearHead())
    calls: dict[str, Callable[[], Any]] = {}

    def stepping(start: Any, step: Callable[[Any], Any]) -> Callable[[], Any]:
        held = [start]

        def once() -> Any:
            held[0], metrics, *_ = step(held[0])
            return metrics

        return once

    for name, perturb in (("actor", None), ("actor_alp", Perturb())):
        config = ActorConfig(perturb=perturb)
        params = init(actor, jax.random.key(0)) | ({} if perturb is None else {NAME: perturb.start(spec)})
        more = {} if perturb is None else {"noise_key": jax.random.key(1), "perturb": perturb}
        calls[name] = stepping(
            init_state(actor, params, config.build_optimizer(), mesh),
            lambda state, config=config, more=more: actor_step(
                state, batch, model=actor, loss=DPPO(), optimizer=config.optimizer, temperature=1.0, **rows, **more
            ),
        )
    for count in (1, 2):
        config, model = CriticConfig(count=count), replace(quarter, count=count)
        value = jax.numpy.repeat(experience.value_MBT, count, axis=0)
        taught = make_batch(experience._replace(value_MBT=value), estimator=GAE())
        params = init(model, jax.random.key(0))
        calls[f"critic_{count}"] = stepping(
            init_state(model, params, config.build_optimizer(), mesh),
            lambda state, config=config, model=model, taught=taught: critic_step(
                state, taught, model=model, config=config, **rows
            ),
        )
    lone = init(quarter, jax.random.key(0))
    forward = jax.jit(lambda p, e: values(quarter, p, e))
    calls["critic_values"] = partial(forward, lone, experience)
    return seconds(calls, repeats)


def machine(cores: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    return {"cpu": model, "cores": cores, **versions}


def main() -> None:
    """Measure, print shares, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--return-memory", action="store_true", help="what is freed goes back to the system")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    os.sched_setaffinity(0, range(options.cores))
    import jax.numpy as jnp

    from ppojax.experience.pack import pack
    from ppojax.mesh import MeshConfig
    from ppojax.runtime.allocator import keep_freed_memory

    if not options.return_memory:
        keep_freed_memory()
    packed = pack(
        rows_of(options.tokens), batch=ROWS, bucket=options.tokens, actions=options.tokens, mesh=MeshConfig().build()
    )
    experience = packed._replace(
        logp_old_BT=packed.logp_behavior_BT + 0.05, value_MBT=jnp.zeros((1, *packed.token_BT.shape))
    )
    times = small_parts(experience, options.repeats) | updates(experience, options.repeats)
    median = {name: statistics.median(found) for name, found in times.items()}
    shares = {name: value / median["actor"] for name, value in median.items()}
    shares["critic_2 / critic_1"] = median["critic_2"] / median["critic_1"]
    shares["critic_1 with values"] = (median["critic_1"] + median["critic_values"]) / median["actor"]
    for name, share in shares.items():
        print(f"{name:24} {median.get(name, float('nan')):10.4f} s {share:9.3%} of the actor's update")
    if options.dry:
        return
    spread = {name: [min(found), max(found)] for name, found in times.items()}
    shape = {"rows": ROWS, "tokens": options.tokens, "prompt": PROMPT, "blocks": BLOCKS, "width": WIDTH, "vocab": VOCAB}
    results = {"machine": machine(options.cores), "shape": shape, "seconds": median, "spread": spread, "shares": shares}
    out = ROOT / "benchmarks" / "results" / f"overheads_{options.cores}core.json"
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
