"""A run on a cluster of Modal containers, one process in each.

    modal run --detach launch/modal_app.py --arguments "config=configs/my.yaml run.name=my mesh.data=2 mesh.fsdp=8"

Each container takes all GPUs of its host. Modal sets no variables that say who is who, so this file does, as `ppojax`
reads them (ppojax/processes/resolve.py). A Modal volume shows a container's files to others only after a commit: keep
`mesh.fsdp`, `mesh.expert` and `mesh.tensor` inside a container, as above, so that process 0 alone has what a checkpoint
holds, or mount a network file system at /runs.

Was run: imported with modal 1.6.4, without an account; as a whole with a stand-in for `modal`, by the tests.
Was not run: on Modal.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

import modal

NODES = int(os.environ.get("PPOJAX_NODES", "2"))
GPU = os.environ.get("PPOJAX_GPU", "H200:8")
PORT = 8476

image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("bubblewrap")
    .pip_install("uv")
    .add_local_dir(".", "/app", copy=True, ignore=[".git", ".venv", "runs"])
    .run_commands("cd /app && uv sync --locked --extra cuda")
)
app = modal.App("ppojax", image=image)
runs = modal.Volume.from_name("ppojax-runs", create_if_missing=True)


def environment(rank: int, addresses: Sequence[str]) -> dict[str, str]:
    """Say who is who, as `ppojax` reads it; addresses of IPv6 stand in brackets before the port."""
    head = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return {
        "PPOJAX_COORDINATOR": f"{head}:{PORT}",
        "PPOJAX_PROCESS_COUNT": str(len(addresses)),
        "PPOJAX_PROCESS_INDEX": str(rank),
    }


@app.function(
    gpu=GPU,
    timeout=24 * 3600,
    volumes={"/runs": runs},
    retries=modal.Retries(max_retries=10, initial_delay=0.0),
)
@modal.clustered(size=NODES, rdma=True)
def train(arguments: str) -> None:
    """Train in this container; a run that was stopped and saved is started anew by Modal."""
    cluster = modal.Cluster.from_context()
    command = ["uv", "run", "--locked", "python", "-m", "ppojax.train", *shlex.split(arguments)]
    env = {**os.environ, **environment(cluster.container_rank(), cluster.container_ips())}
    try:
        subprocess.run([*command, "run.dir=/runs", "resume=true"], cwd="/app", env=env, check=True)
    finally:
        runs.commit()


@app.local_entrypoint()
def main(arguments: str = "config=configs/quickstart.yaml") -> None:
    """Start the cluster."""
    train.remote(arguments)
