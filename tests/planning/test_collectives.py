from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppojax.mesh import MeshConfig
from ppojax.planning.collectives import Collective, collectives
from ppojax.planning.program import inspect

MESH = {"data": 1, "fsdp": 2, "expert": 1, "tensor": 4}


def program(line: str, loop: str = "") -> str:
    """A program with one operation inside a loop."""
    return f"""HloModule jit_f

%body (p: s32[]) -> s32[] {{
  {line}
}}

%condition (p: s32[]) -> pred[] {{
  ROOT %yes = pred[] constant(true)
}}

ENTRY %main (p: s32[]) -> s32[] {{
  ROOT %w = s32[] while(%p), condition=%condition, body=%body{loop}
}}
"""


@pytest.mark.parametrize(
    ("operation", "groups", "expected"),
    [
        # 2 of fsdp: device i talks to i + 4; half of the result comes from the other one.
        ("bf16[256,128]{1,0} all-gather(%x)", "[4,2]<=[2,4]T(1,0)", ("all-gather", ("fsdp",), 32768)),
        ("(bf16[128,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%x)", "{{0,4},{1,5},{2,6},{3,7}}", None),
        ("f32[64]{0} all-reduce(%x)", "mesh['a'=2,'b'=4] {'b'}", ("all-reduce", ("tensor",), 2 * 0.75 * 256)),
        ("f32[16]{0} reduce-scatter(%x)", "[2,4]<=[8]", ("reduce-scatter", ("tensor",), 3 * 64)),
        ("s8[80]{0} all-to-all(%x)", "{}", ("all-to-all", ("fsdp", "tensor"), 70)),
        # Named in part: a device and the one two places on, within 4.
        ("f32[2]{0} all-reduce(%x)", "mesh['a'=2,'b'=4] {'b':(1)2}", ("all-reduce", ("tensor",), 8)),
        # Along the second axis of the mesh, whose devices are listed in another order.
        (
            *("f32[64]{0} all-gather(%x)", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}"),
            ("all-gather", ("tensor",), 192),
        ),
        ("f32[2]{0} all-reduce(%x)", "strange[8]", ("all-reduce", ("?",), 8)),
    ],
)
def test_one_collective(operation: str, groups: str, expected: tuple | None) -> None:
    kind, axes, size = expected or ("all-gather", ("fsdp",), 32768)
    line = f"%y = {operation}, channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert collectives(program(line), MESH) == (Collective(kind, axes, 1, size, turn=True),)
    trips = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert collectives(program(line, trips), MESH) == (Collective(kind, axes, 5, 5 * size, turn=False),)


def test_pairs_and_groups_of_one() -> None:
    pairs = "%y = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}"
    assert collectives(program(pairs), MESH) == (Collective("collective-permute", ("tensor",), 1, 16.0, turn=True),)
    alone = "%y = f32[4]{0} all-reduce(%x), replica_groups=[8,1]<=[8]"
    assert collectives(program(alone), MESH) == ()


def test_a_compiled_program() -> None:
    """A matrix split over fsdp is gathered in each of 3 turns; XLA's own numbers are the oracle of its memory."""
    mesh = MeshConfig(fsdp=2).build()

    def shape(dims: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, u: (jnp.tanh(h @ u), None), x, w)[0]

    lowered = jax.jit(f).lower(shape((3, 16, 16), None, "fsdp", None), shape((8, 16), "fsdp"))
    found = inspect("f", lowered, mesh)
    assert found.collectives == (Collective("all-gather", ("fsdp",), 3, 3 * 16 * 16 * 4 / 2),)
    stats = lowered.compile().memory_analysis()
    assert found.memory.arguments == stats.argument_size_in_bytes == 3 * 8 * 16 * 4 + 4 * 16 * 4
    assert found.memory.new == stats.temp_size_in_bytes + stats.output_size_in_bytes
    assert found.seconds > 0
