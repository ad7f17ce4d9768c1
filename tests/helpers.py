"""Small models and random experience for tests."""

from __future__ import annotations

import jax
import numpy as np

from ppojax.experience.pack import layout_of, pack
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, init
from ppojax.models.spec import DecoderSpec
from ppojax.models.value_head import LinearHead
from ppojax.types import Ending, Experience, Layout, Row

SPEC = DecoderSpec(layers=2, width=32, heads=4, kv_heads=4, head_width=8, ffn=64, vocab=48)
ACTOR = ModelDef(SPEC)
CRITIC = ModelDef(SPEC.model_copy(update={"layers": 1}), head=LinearHead())


def random_rows(prompts: int, group: int, seed: int = 0, vocab: int = 48) -> list[Row]:
    """Ragged rows of two turns with an observation between them, `group` of each prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        prompt = rng.integers(1, vocab, rng.integers(3, 9))
        for g in range(group):
            turn, seen, answer = rng.integers(2, 6), rng.integers(1, 4), rng.integers(1, 5)
            mask = np.repeat([False, True, False, True], [len(prompt), turn, seen, answer])
            token = np.concatenate([prompt, rng.integers(1, vocab, turn + seen + answer)]).astype(np.int32)
            reward = np.zeros(len(token), np.float32)
            reward[-1] = rng.integers(0, 3) / 4
            logp = np.where(mask, -rng.random(len(token)) * 4, 0).astype(np.float32)
            ending = Ending.TRUNCATED if rng.random() < 0.2 else Ending.TERMINATED
            rows.append(Row(token, mask, logp, reward, p, p * group + g, 0, ending))
    return rows


def random_experience(
    prompts: int = 4, group: int = 2, seed: int = 0, share: bool = False, mesh: MeshConfig | None = None
) -> tuple[Experience, Layout]:
    """Packed random rows, with their layout (plain unless `share`)."""
    rows = random_rows(prompts, group, seed)
    layout = layout_of(rows, group=group if share else 1, prompt_bucket=4)
    built = (mesh or MeshConfig()).build()
    return pack(rows, batch=len(rows), bucket=4, actions=16, mesh=built, layout=layout), layout


def params(model: ModelDef = ACTOR, seed: int = 0) -> dict:
    """Fresh parameters; a critic's head is drawn too, so that values are not all zero."""
    drawn = init(model, jax.random.key(seed))
    if model.head is not None:
        drawn["value_head"] = 0.3 * jax.random.normal(jax.random.key(seed + 1), drawn["value_head"].shape)
    return drawn
