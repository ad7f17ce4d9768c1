"""Adapters in PEFT's format: names, shapes and config; and W + scale B A is the merged file, matrix by matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_export import tensors_of

from families import opened
from ppojax.errors import ConfigError, DataError
from ppojax.models.families import FAMILIES
from ppojax.models.families.family import Family
from ppojax.models.families.layout import Rule
from ppojax.models.forward import ModelDef, Params, init
from ppojax.models.hf_write import Origin, write_hf
from ppojax.models.lora import LoRAConfig, combine, merge, split
from ppojax.models.peft_write import write_peft
from ppojax.models.settings import ModelConfig
from ppojax.models.tokenizer import char_tokenizer

LORA = LoRAConfig(rank=2, alpha=3, dropout=0.1)
ATTENTION = LORA.model_copy(update={"targets": ("q", "q_a", "q_b", "k", "v", "kv_a", "kv_b", "o")})


def adapted(case: str, lora: LoRAConfig) -> Params:
    """The checkpoint with random adapters."""
    model = ModelDef(opened(case).spec, lora=lora)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: split(init(model, jax.random.key(0)), lora)[0]))
    noise = [jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    return combine(opened(case).read(), jax.tree.unflatten(tree, noise))


def array(found: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    dtype, shape, data = found
    return np.frombuffer(data, dtype).reshape(shape)


@pytest.mark.parametrize("case", ["llama_bias", "gpt_oss", "deepseek_v3"])
def test_the_product_is_what_a_merge_adds(case: str, tmp_path: Path) -> None:
    lora = LORA if opened(case).spec.moe is None else ATTENTION
    family, spec, params = opened(case).family, opened(case).spec, adapted(case, lora)
    write_peft(tmp_path / "adapter", family, spec, params, LORA, Origin(), base="where/it/is")
    merged = jax.jit(lambda p: merge(p, LORA, "float32"))(params)
    write_hf(tmp_path / "merged", family, spec, merged, Origin(), dtype="float32")
    write_hf(tmp_path / "base", family, spec, split(params, LORA)[1], Origin(), dtype="float32")
    pairs = tensors_of(tmp_path / "adapter")
    merged, base = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "base")
    changed = {name.removesuffix(".weight") for name in base if merged[name] != base[name]}
    assert set(pairs) == {f"base_model.model.{name}.lora_{x}.weight" for name in changed for x in "AB"}
    for name in changed:
        a, b = (array(pairs[f"base_model.model.{name}.lora_{x}.weight"]) for x in "AB")
        w = array(base[f"{name}.weight"])
        assert a.shape == (2, w.shape[1]) and b.shape == (w.shape[0], 2)
        np.testing.assert_allclose(w + 1.5 * b @ a, array(merged[f"{name}.weight"]), rtol=1e-5, atol=1e-5)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_config(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, alpha=2.5, rslora=True, targets=("q", "up"))
    case, origin = opened("llama_bias"), Origin(char_tokenizer("ab"))
    params = adapted("llama_bias", lora)
    write_peft(tmp_path / "one", case.family, case.spec, params, lora, origin, base="a/b", dtype="bfloat16")
    assert config_of(tmp_path / "one") == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "r": 2, "lora_alpha": 2.5,
        "use_rslora": True, "lora_dropout": 0.0, "target_modules": ["q_proj", "up_proj"], "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    assert {kind for kind, _, _ in tensors_of(tmp_path / "one").values()} == {"bfloat16"}
    assert (tmp_path / "one/chat_template.jinja").is_file()
    with pytest.raises(ConfigError, match="one: is there and not empty"):
        write_peft(tmp_path / "one", case.family, case.spec, params, lora, origin, base="a/b")
    lora, case = LoRAConfig(rank=1, alpha=2, targets=("q_a", "kv_a")), opened("deepseek_v3")
    write_peft(tmp_path / "two", case.family, case.spec, adapted("deepseek_v3", lora), lora, Origin(), base="a/b")
    found = config_of(tmp_path / "two")
    assert found["target_modules"] == ["kv_a_proj_with_mqa", "q_a_proj"] and str(found["lora_alpha"]) == "2"


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    llama, case = FAMILIES["llama"], opened("llama_bias")
    fused = {n: (Rule("model.layers.{layer}.qkv_proj.weight", part=(i, 3, False)),) for i, n in enumerate("qkv")}
    family = Family("fused", llama.spec_from, llama.config_from, {**llama.rules, **fused})
    text = r"export: PEFT has no place for adapters of q in a fused model, where model.layers.\{layer\}.qkv_proj.weight"
    with pytest.raises(DataError, match=text):
        write_peft(tmp_path / "out", family, case.spec, adapted("llama_bias", LORA), LORA, Origin(), base="x")
    case = opened("deepseek_v3")
    text = (
        "export: PEFT takes adapters of down, gate, shared_down, shared_gate, shared_up, up in a deepseek_v3 model for"
    )
    with pytest.raises(DataError, match=text):
        write_peft(tmp_path / "out", case.family, case.spec, adapted("deepseek_v3", LORA), LORA, Origin(), base="x")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"adapter=true: model\.lora is null, expected a run with adapters"):
        ModelConfig(path="x").adapters()
    with pytest.raises(ConfigError, match=r"adapter=true: the base is model\.fresh, which is in no file"):
        ModelConfig(lora=LORA).adapters()
