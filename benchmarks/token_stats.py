"""The token statistics against the naive way and against peers: time, rate, memory, in one run.

    python benchmarks/token_stats.py [--repeats 5] [--seconds 360] [--shapes 8192x2048x151936 ...]

On a CPU small shapes in float32; on a GPU bfloat16 at a vocabulary of 151,936, with torch's naive path, Liger's fused
loss and cut-cross-entropy where they are installed. Everything of a shape is compiled first and then timed in turn,
`--repeats` times over, a plain matrix product among them; figures are medians, of the product the best. FLOPs are those
of the products that the naive way needs (2 T D V forward, three times that with the backward, and 2 T D V for a
reference), so that computing logits again counts as time and not as work. No shape is begun after `--seconds`. Results
go to benchmarks/results/token_stats/<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_args

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
import jax.numpy as jnp

from ppojax.kernels import Implementation, token_stats

OUT = Path(__file__).resolve().parent / "results" / "token_stats"
SHAPES = {
    "cpu": ["512x576x49152", "2048x576x49152"],
    "gpu": [f"{T}x{D}x151936" for T, D in [(8192, 2048), (8192, 4096), (32768, 2048)]]
    + [f"{T}x{D}x151936" for T, D in [(8192, 1536), (32768, 4096), (32768, 1536)]],
}
ASKED = {"logp": {}, "divergence": {"kl": True, "tv": True}}
PEERS = ("torch naive", "liger", "cut-cross-entropy")
# Of the plain product: on a CPU few, since fresh memory for its result costs more than the product.
GEMM_WORDS = {"cpu": 2048, "gpu": 16_384}


class Job(NamedTuple):
    """Something to time: a call that returns when it is done."""

    name: str
    asked: str
    backward: bool
    call: Callable[[], Any]
    flops: float
    temp_bytes: int | None = None


class Shape(NamedTuple):
    """Tokens, width, vocabulary."""

    T: int
    D: int
    V: int

    def flops(self, asked: str, backward: bool) -> float:
        """Of the products of the naive way."""
        return 2.0 * self.T * self.D * self.V * ((3 if backward else 1) + (asked != "logp"))


def arrays(shape: Shape, dtype: Any) -> dict[str, jax.Array]:
    """Hidden states of order 1 and heads that give logits of order 3; a reference near the policy."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (shape.T, shape.D), dtype)
    head = jax.random.normal(keys[1], (shape.V, shape.D), dtype) * jnp.asarray(3 / shape.D**0.5, dtype)
    other = hidden + jax.random.normal(keys[2], hidden.shape, dtype) * jnp.asarray(0.1, dtype)
    return {
        "hidden": hidden,
        "head": head,
        "target": jax.random.randint(keys[3], (shape.T,), 0, shape.V),
        "other": other,
    }


def jax_jobs(name: Any, shape: Shape, x: dict[str, jax.Array]) -> Iterator[Job]:
    """Compile an implementation's forward, and forward with backward, for what is asked."""
    for asked, settings in ASKED.items():

        def total(hidden: jax.Array, head: jax.Array, target: jax.Array, other: jax.Array) -> Any:
            reference = (other, jax.lax.stop_gradient(head)) if settings else None  # noqa: B023
            stats = token_stats(hidden, head, target, reference=reference, implementation=name, **settings)  # noqa: B023
            found = [v for v in stats if v is not None]
            return sum((v.sum() for v in found), jnp.float32(0)), found

        for backward in (False, True):
            function = jax.value_and_grad(total, (0, 1), has_aux=True) if backward else total
            arguments = tuple(x.values())
            program = jax.jit(function).lower(*arguments).compile()
            memory = program.memory_analysis()
            temp = None if memory is None else memory.temp_size_in_bytes
            call = lambda run=program, a=arguments: jax.block_until_ready(run(*a))  # noqa: E731
            yield Job(name, asked, backward, call, shape.flops(asked, backward), temp)


def gemm_job(shape: Shape, x: dict[str, jax.Array]) -> Job:
    """The product with some of the head's words, accumulated in float32: the rate to reach."""
    words = min(GEMM_WORDS.get(jax.default_backend(), 16_384), shape.V)
    part = x["head"][:words].copy()
    run = jax.jit(lambda hidden, part: jnp.matmul(hidden, part.T, preferred_element_type=jnp.float32))
    times = 16

    def call() -> None:
        for _ in range(times):
            run(x["hidden"], part).block_until_ready()

    return Job("gemm", "", False, call, 2.0 * times * shape.T * shape.D * words)


def torch_jobs(shape: Shape, x: dict[str, jax.Array]) -> Iterator[Job]:
    """The sum of logp on a GPU by torch's naive path and by what else is installed."""
    import torch

    hidden, head = (torch.from_dlpack(x[n]).detach().clone().requires_grad_() for n in ("hidden", "head"))
    target = torch.from_dlpack(x["target"]).long()
    losses = {"torch naive": lambda h, w: torch.nn.functional.cross_entropy((h @ w.T).float(), target, reduction="sum")}
    if installed("liger-kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        losses["liger"] = lambda h, w: liger(w, h, target)
    if installed("cut-cross-entropy"):
        from cut_cross_entropy import linear_cross_entropy

        losses["cut-cross-entropy"] = lambda h, w: linear_cross_entropy(h, w, target, reduction="sum")

    def forward(loss: Any) -> None:
        with torch.no_grad():
            loss(hidden, head)
        torch.cuda.synchronize()

    def both(loss: Any) -> None:
        hidden.grad = head.grad = None
        loss(hidden, head).backward()
        torch.cuda.synchronize()

    for name, loss in losses.items():
        for backward, run in ((False, forward), (True, both)):
            torch.cuda.empty_cache()
            hidden.grad = head.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(loss)
            temp = torch.cuda.max_memory_allocated() - before
            yield Job(name, "logp", backward, lambda run=run, loss=loss: run(loss), shape.flops("logp", backward), temp)


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(fault: Exception) -> str:
    """What went wrong, in a line."""
    return f"{type(fault).__name__}: {fault}".splitlines()[0]


def jobs_of(shape: Shape, dtype: Any) -> tuple[list[Job], dict[str, str]]:
    """All that can run here, and why the rest cannot."""
    x = arrays(shape, dtype)
    jobs, missing = [gemm_job(shape, x)], {}
    for name in get_args(Implementation):
        try:
            jobs += jax_jobs(name, shape, x)
        except Exception as fault:  # whatever a compiler raises, the others are still timed
            missing[name] = first_line(fault)
    if jax.default_backend() == "gpu":
        try:
            jobs += torch_jobs(shape, x)
        except Exception as fault:
            missing["torch"] = first_line(fault)
    return jobs, missing


def ratio_of(bytes_here: int | None, bytes_there: int | None) -> float | None:
    """One memory over another, where both are known."""
    return bytes_here / bytes_there if bytes_here is not None and bytes_there else None


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """Median seconds of every job, taken in turn, and what follows from them."""
    jobs, missing = jobs_of(shape, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    seconds: dict[int, list[float]] = {i: [] for i in range(len(jobs))}
    for i, job in list(enumerate(jobs)):
        try:
            job.call()
        except Exception as fault:
            missing[f"{job.name}, {job.asked}"] = first_line(fault)
            del seconds[i]
    for _ in range(repeats):
        for i in seconds:
            start = time.perf_counter()
            jobs[i].call()
            seconds[i].append(time.perf_counter() - start)
    median = {i: statistics.median(times) for i, times in seconds.items()}
    rate = jobs[0].flops / min(seconds[0])
    naive = {(jobs[i].asked, jobs[i].backward): i for i in median if jobs[i].name == "reference"}
    plain = {(jobs[i].name, jobs[i].backward): s for i, s in median.items() if jobs[i].asked == "logp"}
    rows = []
    for i in list(median)[1:]:
        job = jobs[i]
        beside, alone = naive.get((job.asked, job.backward)), plain.get((job.name, job.backward))
        peers = [plain[peer, job.backward] for peer in PEERS if job.asked == "logp" and (peer, job.backward) in plain]
        rows.append(
            {
                "implementation": job.name,
                "asked": job.asked,
                "pass": "forward+backward" if job.backward else "forward",
                "seconds": median[i],
                "spread": [min(seconds[i]), max(seconds[i])],
                "tflops": job.flops / median[i] / 1e12,
                "share_of_gemm": job.flops / median[i] / rate,
                "time_to_naive": None if beside is None else median[i] / median[beside],
                "time_to_best_peer": median[i] / min(peers) if peers else None,
                "time_to_logp": None if alone is None else median[i] / alone,
                "temp_to_naive": None if beside is None else ratio_of(job.temp_bytes, jobs[beside].temp_bytes),
                "temp_gib": None if job.temp_bytes is None else job.temp_bytes / 2**30,
            }
        )
    return {"shape_TDV": shape, "gemm_tflops": rate / 1e12, "rows": rows, "missing": missing}


def show(found: dict[str, Any]) -> None:
    """Print one shape's table."""
    print(f"\nT, D, V = {tuple(found['shape_TDV'])}; matrix product at {found['gemm_tflops']:.3g} TFLOP/s")
    for row in found["rows"]:
        ratio = "" if row["time_to_naive"] is None else f"{row['time_to_naive']:6.2f} x naive"
        print(
            f"  {row['asked']:11s}{row['pass']:17s}{row['implementation']:18s}{row['seconds'] * 1e3:10.1f} ms"
            f"{row['share_of_gemm']:7.0%} of product{ratio:>15s}{row['temp_gib'] or float('nan'):8.2f} GiB"
        )
    for name, reason in found["missing"].items():
        print(f"  without {name}: {reason}", flush=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("jax", "jaxlib", "torch", "triton", "jax-triton", "liger-kernel", "cut-cross-entropy")
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: installed(name) for name in packages} | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure every shape, print tables, write the raw figures after each."""
    kind = jax.default_backend()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--shapes", nargs="+", default=SHAPES.get(kind, SHAPES["gpu"]))
    options = parser.parse_args()
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(), "repeats": options.repeats, "shapes": []}
    name = kind if kind == "cpu" else jax.devices()[0].device_kind.lower().replace(" ", "_")
    for shape in options.shapes:
        spent = time.perf_counter() - start
        if spent > options.seconds:
            print(f"\nleft out after {spent:.0f} s: {shape}")
            continue
        found = measure(Shape(*map(int, shape.split("x"))), options.repeats)
        show(found)
        results["shapes"].append(found)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
