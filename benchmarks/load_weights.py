"""Time and peak memory of loading a checkpoint of 1.5 billion parameters (Qwen2.5-1.5B's shapes, random bfloat16).

    python benchmarks/load_weights.py [--folder /tmp/ppojax_load]

Writes the checkpoint once (3.1 GB in four files), then loads it in fresh processes, to float32 and to bfloat16, on one
device and over the four devices of an fsdp x tensor mesh, and writes results/load_weights_cpu.json. Memory is that of
the process over what it had with jax started: its resident set, files mapped into memory included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = (("float32", 1), ("bfloat16", 1), ("float32", 4))


def write(folder: Path) -> None:
    """Random weights, a block of them over and over, as `export` writes them."""
    import jax
    import ml_dtypes
    import numpy as np

    from ppojax.models.families import FAMILIES
    from ppojax.models.forward import ModelDef, abstract_params
    from ppojax.models.hf_write import Origin, write_hf
    from ppojax.models.spec import DecoderSpec, RopeSpec

    shape = {"layers": 28, "width": 1536, "heads": 12, "kv_heads": 2, "head_width": 128, "ffn": 8960, "vocab": 151_936}
    spec = DecoderSpec(**shape, rope=RopeSpec(theta=1e6), norm_eps=1e-6, tied=True, qkv_bias=True)
    block = (np.random.default_rng(0).normal(size=1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    params = jax.tree.map(lambda p: np.resize(block, p.shape), abstract_params(ModelDef(spec)))
    write_hf(folder, FAMILIES["qwen2"], spec, params, Origin(), shard_bytes=900_000_000)


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(folder: Path, dtype: str, devices: int) -> dict[str, float]:
    """Load once; say how long it took and what it held."""
    import jax

    from ppojax.mesh import MeshConfig
    from ppojax.models.source import find_source

    mesh = None if devices == 1 else MeshConfig(fsdp=devices // 2, tensor=2).build()
    jax.block_until_ready(jax.numpy.zeros(8))
    before, start = resident(), time.perf_counter()
    params = jax.block_until_ready(find_source(str(folder)).place(dtype, mesh))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    return {
        "dtype": dtype,
        "devices": devices,
        "seconds": round(seconds, 2),
        "target_gb": round(size / 1e9, 3),
        "peak_gb": round((peak - before) / 1e9, 3),
        "peak_with_start_gb": round(peak / 1e9, 3),
        "peak_over_target": round((peak - before) / size, 3),
        "peak_with_start_over_target": round(peak / size, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ppojax_load"))
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(arguments.folder, arguments.one[0], int(arguments.one[1]))))
        return
    if not arguments.folder.exists():
        subprocess.run([sys.executable, "-c", _WRITE, str(arguments.folder)], check=True, cwd=HERE)
    results = []
    for dtype, devices in CASES:
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--one", dtype, str(devices)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
        results.append(json.loads(out.stdout))
        print(results[-1], flush=True)
    import jax

    files = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    record = machine | {"jax": jax.__version__, "checkpoint_gb": round(files / 1e9, 3), "results": results}
    (HERE / "results/load_weights_cpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")


_WRITE = "import sys, pathlib; from load_weights import write; write(pathlib.Path(sys.argv[1]))"

if __name__ == "__main__":
    main()
