"""The decoder with SmolLM2's real weights computes what transformers computes (smollm2_oracle.json)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.models.forward import ModelDef, Params, head_VD, hidden_states, positions
from ppojax.models.gguf import read_gguf
from ppojax.models.smollm2 import find_smollm2
from ppojax.models.tokenizer import Tokenizer
from ppojax.models.tokenizer_files import tokenizer_from_gguf

pytestmark = pytest.mark.slow
ORACLE = json.loads((Path(__file__).parent / "oracle/smollm2_oracle.json").read_text())
LENGTH = 128  # one compilation for all; attention is causal, so what stands behind a text changes nothing
# Two float32 programs over 30 layers. Logits reach 20 to 30, where a unit in the last place is 2e-6; rounding that
# grows by a few units a layer stays under 30 * 4 * 2e-6. A wrong RoPE, norm or permutation is off by whole units.
TOLERANCE = 2.5e-4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_gguf(find_smollm2())


@pytest.fixture(scope="module")
def smollm2() -> tuple[ModelDef, Params]:
    spec, params = read_gguf(find_smollm2())
    return ModelDef(spec, remat="none"), jax.tree.map(jnp.asarray, params)


def logits(smollm2: tuple[ModelDef, Params], ids: list[int]) -> np.ndarray:
    """Logits behind each token of a text, `[n, V]`."""
    model, params = smollm2
    token_BT = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(ids)].set(jnp.array(ids, jnp.int32))
    run = jax.jit(lambda p, t: hidden_states(model, p, t, positions(t)).hidden_BTD[0] @ head_VD(p).T)
    return np.asarray(run(params, token_BT))[: len(ids)]


@pytest.mark.parametrize("case", ORACLE["prompts"], ids=["france", "code", "numbers"])
def test_logits(smollm2: tuple[ModelDef, Params], case: dict) -> None:
    last_V = logits(smollm2, case["ids"])[-1]
    np.testing.assert_allclose(last_V[ORACLE["logit_ids"]], case["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(jax.nn.logsumexp(last_V), case["lse"], rtol=0, atol=TOLERANCE)


def test_logps_of_a_passage(smollm2: tuple[ModelDef, Params]) -> None:
    ids = ORACLE["passage"]["ids"]
    logp_TV = np.asarray(jax.nn.log_softmax(logits(smollm2, ids)[:-1]))
    picked = logp_TV[np.arange(len(ids) - 1), ids[1:]]
    assert len(picked) == 40
    np.testing.assert_allclose(picked, ORACLE["passage"]["logp"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ORACLE["greedy"], ids=["france", "fox", "code", "fruits", "turns"])
def test_greedy_text(smollm2: tuple[ModelDef, Params], tokenizer: Tokenizer, case: dict) -> None:
    """Each token that transformers wrote is the likeliest behind those before it, so that greedy decoding writes it."""
    prompt, wanted = tokenizer.render(case["messages"]), case["continuation"]
    assert prompt == case["prompt"]
    logits_TV = logits(smollm2, prompt + wanted)
    greedy = logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert greedy == wanted
    assert tokenizer.decode(greedy) == case["text"]
