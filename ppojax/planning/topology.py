"""Devices that need not exist, to compile for: CUDA through jax's plugin wheels, TPU through libtpu, or host CPUs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from ppojax.errors import ConfigError
from ppojax.mesh import AXES, MeshConfig
from ppojax.planning.targets import Chip, Target


class NoCompiler(Exception):
    """What compiles for a target is not installed; the text says what is missing."""


def devices_of(target: Target) -> list[Any]:
    """The devices of a target, which programs can be compiled for, and not run on.

    Raises:
        NoCompiler: the compiler for it is not installed here.
        ConfigError: no such machine can be described, or this process has too few host devices.
    """
    if target.chip.platform == "cpu":
        return _host(target)
    return _cuda(target) if target.chip.platform == "cuda" else _tpu(target)


def mesh_on(mesh: MeshConfig, devices: list[Any]) -> jax.sharding.Mesh:
    """Lay the first devices out as a mesh, as `MeshConfig.build` does with those of this machine.

    Raises ConfigError where there are too few.
    """
    if mesh.size > len(devices):
        raise ConfigError(
            f"mesh {'x'.join(map(str, mesh.shape))} ({' x '.join(AXES)}) needs {mesh.size} devices, the target has "
            f"{len(devices)}: make the product of mesh.{', mesh.'.join(AXES)} at most {len(devices)}"
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(mesh.shape, AXES, axis_types=types, devices=devices[: mesh.size])


def _host(target: Target) -> list[Any]:
    devices = jax.devices("cpu")
    if target.size > len(devices):
        raise ConfigError(
            f"target={target}: this process has {len(devices)} host devices: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={target.size}"
        )
    return devices[: target.size]


def _cuda(target: Target) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise NoCompiler("jax's CUDA plugin is not installed: install ppojax[plan-cuda], which needs no GPU")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin looks for CUDA's libraries otherwise
    form = "x".join(map(str, (1, *target.sides)))
    found = topologies.get_topology_desc(target.kind, "cuda", target_config=describe(target.chip), topology=form)
    return list(found.devices)


def _tpu(target: Target) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler("libtpu is not installed: install ppojax[plan-tpu], which needs no TPU")
    try:
        return list(topologies.get_topology_desc(str(target), "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"target={target}: libtpu knows no such slice ({reason}); write for instance v5e:2x4"
        ) from error


def describe(chip: Chip) -> str:
    """What XLA wants to know of a Hopper GPU to compile for it: from the data sheet, not dumped from a device."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {(60 if "H200" in chip.name else 50) * 2**20}
  clock_rate_ghz: 1.98
  device_memory_size: {chip.memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.name}"
"""
