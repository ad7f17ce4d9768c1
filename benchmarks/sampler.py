"""Continuous batching against a static batch, and a prompt that is read once against once an episode.

    uv run python benchmarks/sampler.py [--slots 16] [--episodes 96] [--repeats 3]

Each comparison runs in one process, its two sides by turns, after a call of each that compiles. Lengths are geometric:
a fresh model at a high temperature writes every token about as often, and three of its 102 end a turn. The static batch
is the same sampler, with as many episodes a call as there are slots. Tokens are those that were sampled. Figures are
medians; results go to benchmarks/results/sampler/cpu.json.
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
from datetime import date
from pathlib import Path

import jax
import numpy as np

from ppojax.envs import Calculator, Task
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer import char_tokenizer
from ppojax.rollout.collect import Collector
from ppojax.rollout.sampler import SamplerDef
from ppojax.rollout.stop import stop_table
from ppojax.types import Row

RESULT = Path(__file__).parent / "results" / "sampler" / "cpu.json"
TOKENIZER = char_tokenizer("".join(map(chr, range(32, 127))))
SPEC = DecoderSpec(layers=4, width=256, heads=4, kv_heads=4, head_width=64, ffn=768, vocab=TOKENIZER.vocab_size)
ENDS = (*TOKENIZER.eos_ids, 40, 60)  # tokens that end a turn


def collector(slots: int, turn_tokens: int, system: str, group_size: int, segment: int) -> Collector:
    """One-turn episodes that any token of `ENDS` closes."""
    sampler = SamplerDef(
        ModelDef(SPEC, remat="none"), MeshConfig().build(), 1024, turn_tokens, segment, temperature=8.0
    )
    env = Calculator(max_turns=1, system=system)
    table = stop_table(TOKENIZER.token_bytes(), (), ENDS)
    return Collector(env, TOKENIZER, sampler, jax.numpy.asarray(table), group_size, 16, slots, workers=4)


def timed(play: Callable[[int], list[Row]], n: int) -> tuple[float, list[int]]:
    """Sampled tokens a second, and the length of each episode."""
    start = time.perf_counter()
    rows = play(n)
    seconds = time.perf_counter() - start
    lengths = [int(row.action.sum()) for row in rows]
    return sum(lengths) / seconds, lengths


def compare(name: str, sides: dict[str, Callable[[int], list[Row]]], repeats: int) -> dict:
    """Tokens a second of two ways, by turns."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    lengths: list[int] = []
    for n in range(repeats + 1):
        for side, play in sides.items():
            rate, lengths = timed(play, n)
            if n:
                rates[side].append(rate)
    median = {side: statistics.median(values) for side, values in rates.items()}
    first, second = median
    print(f"{name}: {median[first]:.0f} tokens/s {first}, {median[second]:.0f} {second}; ", end="")
    print(f"{median[second] / median[first]:.2f} times; lengths {min(lengths)} to {max(lengths)}", flush=True)
    return {
        "tokens_per_s": rates,
        "ratio": median[second] / median[first],
        "length": {"mean": float(np.mean(lengths)), "max": max(lengths), "episodes": len(lengths)},
    }


def batching(slots: int, episodes: int, repeats: int) -> dict:
    """Waves of as many episodes as slots, each as long as its longest; against slots that are filled again."""
    play, params, tasks = collector(slots, 512, "", 1, 16), policy(), tasks_of(episodes)

    def static(n: int) -> list[Row]:
        key = jax.random.key(n)
        return [row for at in range(0, episodes, slots) for row in play(params, tasks[at : at + slots], key).rows]

    def continuous(n: int) -> list[Row]:
        return list(play(params, tasks, jax.random.key(n)).rows)

    return compare("batching", {"static": static, "continuous": continuous}, repeats)


def sharing(slots: int, repeats: int) -> dict:
    """Groups of 8 with a prompt of about 700 tokens and answers of at most 32."""
    once, params = collector(slots, 32, "Use the calculator. " * 32, 8, 16), policy()
    each, tasks = replace(once, share_prompts=False), tasks_of(slots // 4)

    def played(collector: Collector) -> Callable[[int], list[Row]]:
        return lambda n: list(collector(params, tasks, jax.random.key(n)).rows)

    return compare("prompts", {"read by each": played(each), "read once": played(once)}, repeats)


def policy() -> Params:
    """A fresh model."""
    return init(ModelDef(SPEC), jax.random.key(0))


def tasks_of(count: int) -> list[Task]:
    """Tasks of the calculator."""
    return list(Calculator().tasks("train", 0)[:count])


def main() -> None:
    """Run both comparisons and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": date.today().isoformat(),
        "model": SPEC.model_dump(include={"layers", "width", "heads", "ffn", "vocab"}),
        "settings": vars(settings),
        "batching": batching(settings.slots, settings.episodes, settings.repeats),
        "prompts": sharing(settings.slots, settings.repeats),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
