from __future__ import annotations

import jax
import pytest

from ppojax.errors import ConfigError
from ppojax.mesh import AXES, MeshConfig
from ppojax.models.flops import peak_flops
from ppojax.planning.targets import CHIPS, parse_target
from ppojax.planning.topology import describe, devices_of, mesh_on


@pytest.mark.parametrize(
    ("text", "size", "host_size", "said"),
    [
        ("h200", 1, 1, "h200:1"),
        ("h200:8", 8, 8, "h200:8"),
        ("H200:8x8", 64, 8, "h200:8x8"),
        ("h100:2x4", 8, 4, "h100:2x4"),
        ("v5e:2x4", 8, 8, "v5e:2x4"),
        ("v5p:2x2x4", 16, 16, "v5p:2x2x4"),
        ("cpu:8", 8, 8, "cpu:8"),
    ],
)
def test_a_target_is_read(text: str, size: int, host_size: int, said: str) -> None:
    target = parse_target(text)
    assert (target.size, target.host_size, str(target)) == (size, host_size, said)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("b300:8", "b300 is not known to the planner, expected one of h200, h100, v5e, v5p, v6e, cpu"),
        ("", "nothing is not known to the planner"),
        ("h200:", "expected whole numbers behind h200"),
        ("h200:0", "expected whole numbers behind h200"),
        ("h200:8by8", "expected whole numbers"),
        ("h200:64", "a host holds at most 8 of h200: write h200:8x8"),
        ("h200:2x2x2", "expected hosts x devices"),
        ("v5p:2x4", "a v5p slice has 3 sides: write v5p:2x2x2"),
        ("v5e:8", "a v5e slice has 2 sides: write v5e:2x4"),
    ],
)
def test_an_unknown_target_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_target(text)


def test_peaks_are_those_of_the_log() -> None:
    for chip in CHIPS.values():
        assert chip.platform == "cpu" or peak_flops(chip.name) == chip.flops


def test_a_gpu_is_described_by_its_data_sheet() -> None:
    text = describe(CHIPS["h100"])
    assert "memory_bandwidth: 3350000000000" in text and 'description_str: "NVIDIA H100"' in text


def test_a_mesh_of_host_devices() -> None:
    mesh = mesh_on(MeshConfig(data=2, tensor=4), devices_of(parse_target("cpu:8")))
    assert dict(mesh.shape) == dict(zip(AXES, (2, 1, 1, 4), strict=True))
    assert list(mesh.devices.flat) == jax.devices()
    with pytest.raises(ConfigError, match=r"needs 8 devices, the target has 4"):
        mesh_on(MeshConfig(data=8), devices_of(parse_target("cpu:4")))
    with pytest.raises(ConfigError, match=r"target=cpu:9: this process has 8 host devices"):
        devices_of(parse_target("cpu:9"))
