"""Every family computes what transformers computes (tests/data/families), and its configs and tensors go both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from families import CASES, DATA, PREFIX, WITH_GRADIENTS, checkpoint, opened, oracle
from ppojax.errors import DataError
from ppojax.kernels import cap_logits
from ppojax.mesh import MeshConfig
from ppojax.models.attention import Packing
from ppojax.models.families import FAMILIES, family_for, read_config, write_config
from ppojax.models.families.layout import get, places
from ppojax.models.forward import ModelDef, Params, abstract_params, head_VD, hidden_states, param_shardings, positions
from ppojax.models.hf import open_hf
from ppojax.models.spec import DecoderSpec, MLASpec, RopeSpec

# Two float32 programs of a few blocks: some units in the last place (1e-7) of numbers up to 6, grown over the blocks.
# The bound that is asked for is 1e-4; NoPE and MoE blocks came to 2e-5, the others to 8e-6.
TOLERANCE = 5e-5


def logits_of(spec: DecoderSpec, params: Params, token: np.ndarray, **how: Any) -> jax.Array:
    token_BT = jnp.asarray(token)
    position_BT = how.pop("position_BT", positions(token_BT))
    hidden_BTD = hidden_states(ModelDef(spec, remat="none"), params, token_BT, position_BT, **how).hidden_BTD
    return cap_logits(hidden_BTD @ head_VD(params).T, spec.logit_softcap)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    spec, params = checkpoint(case)
    logits = jax.jit(lambda p: logits_of(spec, p, oracle(case)["token"]))(params)
    np.testing.assert_allclose(logits, oracle(case)["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_packed_positions(case: str) -> None:
    """[prompt | response | response] gives each response the logits of its own row."""
    spec, params = checkpoint(case)
    token, wanted = oracle(case)["token"], oracle(case)["logits"]
    row = np.concatenate([token[0], token[1, PREFIX:]])[None]
    place = np.concatenate([np.arange(token.shape[1]), np.arange(PREFIX, token.shape[1])])[None]
    how = {"position_BT": jnp.asarray(place, jnp.int32), "packing": Packing(PREFIX, 2)}
    logits = jax.jit(lambda p: logits_of(spec, p, row, **how))(params)
    packed = np.concatenate([wanted[0], wanted[1, PREFIX:]])
    np.testing.assert_allclose(logits[0], packed, rtol=0, atol=TOLERANCE)


# Three families by default; the backward passes of experts take 10 s each to compile.
LONG = {"deepseek_v3", "qwen3_moe_dense", "gpt_oss", "llama_rope3"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in LONG else []) for case in WITH_GRADIENTS]
)
def test_gradients_of_the_cross_entropy(case: str) -> None:
    spec, params = checkpoint(case)
    token_BT = jnp.asarray(oracle(case)["token"])

    def loss(params: Params) -> jax.Array:
        logp = jax.nn.log_softmax(logits_of(spec, params, oracle(case)["token"])[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, token_BT[:, 1:, None], axis=-1))

    found = to_file(case, spec, jax.jit(jax.grad(loss))(params))
    wanted = {name[5:]: value for name, value in oracle(case).items() if name.startswith("grad:")}
    assert any("norm" in name for name in wanted) and len(wanted) > 8
    for name, gradient in wanted.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)


def to_file(case: str, spec: DecoderSpec, tree: Params) -> dict[str, np.ndarray]:
    """A tree of parameters (or their gradients) under the names and in the layout of the files."""
    tensors: dict[str, np.ndarray] = {}
    for place in places(spec, opened(case).family.rules):
        rule, value = place.rules[0], np.asarray(get(tree, place.path))
        order = slice(None) if rule.order is None else rule.order(spec)
        for n, names in enumerate(place.names(rule)):
            for e, name in enumerate(names):
                part = value if place.start is None else value[n, e] if rule.by_expert else value[n]
                tensors.setdefault(name, np.zeros(rule.file_shape(place.inner), np.float32))
                rule.view(tensors[name])[..., order] = part
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_a_family_names_every_parameter(case: str) -> None:
    spec, params = checkpoint(case)
    shapes = jax.tree.map(lambda p: p.shape, params)
    assert shapes == jax.tree.map(lambda p: p.shape, abstract_params(ModelDef(spec)))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


@pytest.mark.parametrize("case", CASES)
def test_a_spec_becomes_its_config_again(case: str) -> None:
    config = opened(case).config
    written = write_config(opened(case).family, opened(case).spec)
    assert read_config("written", json.loads(json.dumps(written)))[1] == opened(case).spec
    assert family_for(opened(case).spec).model_type == config["model_type"]
    # transformers leaves the ramp of yarn to its defaults; where nothing has a window, `max_window_layers` is free.
    free = {"rope_parameters", "max_window_layers"} if not opened(case).spec.windowed else {"rope_parameters"}
    assert {k: v for k, v in written.items() if k in config and k not in free} == {
        k: v for k, v in config.items() if k in written and k not in free
    }


@pytest.mark.parametrize("case", CASES)
def test_the_spelling_of_transformers_4(case: str) -> None:
    config = dict(opened(case).config)
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope["rope_theta"]
    kind = rope["rope_type"]
    config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if kind != "default" else None
    if config["rope_scaling"]:  # transformers 4 before 4.43
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    if case == "gpt_oss_tied":  # without a table its positions would be stretched
        config["rope_scaling"] = {"rope_type": "default"}
    if config["model_type"] in ("qwen2", "smollm3", "qwen3"):
        config.pop("layer_types")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    assert read_config("v4", config)[1] == opened(case).spec


def test_the_layers_that_old_configs_leave_to_their_defaults() -> None:
    config = dict(opened("gemma3").config) | {"num_hidden_layers": 7}
    del config["layer_types"]
    assert read_config("c", config)[1].windowed == (True,) * 5 + (False, True)
    assert read_config("c", config | {"sliding_window_pattern": 2})[1].windowed == (True, False) * 3 + (True,)
    config = dict(opened("gpt_oss").config) | {"num_hidden_layers": 3}
    del config["layer_types"]
    assert read_config("c", config)[1].windowed == (True, False, True)
    config = dict(opened("smollm3").config) | {"no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None}
    assert read_config("c", config)[1].unrotated == (False, False, False, True)
    config["num_hidden_layers"] = 3
    assert read_config("c", config)[1].unrotated == ()


@pytest.mark.parametrize(
    ("case", "changes", "text"),
    [
        ("llama_tied", {"model_type": "mamba"}, r"model_type 'mamba', expected one of llama, smollm3, qwen2, .*"),
        ("llama_tied", {"model_type": None}, r"model_type None, expected one of llama"),
        ("llama_tied", {"model_type": ["llama"]}, r"model_type \['llama'\], expected one of llama"),
        ("llama_tied", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks for the model's own code, .* never"),
        ("llama_tied", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}, expected none"),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu', expected 'silu'; use another model"),
        ("llama_tied", {"hidden_size": "24"}, "hidden_size = '24', expected a whole number"),
        ("llama_tied", {"num_attention_heads": 0}, "num_attention_heads = 0, expected a whole number from 1 on"),
        ("llama_tied", {"num_hidden_layers": None}, "num_hidden_layers is missing, expected as in any llama model"),
        ("llama_tied", {"num_key_value_heads": 2}, r"heads \(3\) must be a multiple of kv_heads \(2\)"),
        ("llama_tied", {"rms_norm_eps": -1}, "norm_eps: Input should be greater than 0 .found -1.; fix the config"),
        (
            "llama_tied",
            {"rope_parameters": {"rope_type": "longrope"}},
            "RoPE type 'longrope', expected default, linear",
        ),
        ("llama_tied", {"rope_parameters": [1]}, r"rope_parameters = \[1\], expected a table"),
        ("llama_tied", {"rope_parameters": {"rope_type": "linear"}}, "RoPE type 'linear' without factor"),
        ("llama_tied", {"partial_rotary_factor": 0.5}, "RoPE turns only part of a head .partial_rotary_factor = 0.5"),
        ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention', expected"),
        ("qwen2_window", {"layer_types": ["sliding_attention"]}, "windowed has 1 entries, expected layers = 3"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2, expected 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\], expected the first blocks"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, r"moe.chosen \(7\) is over moe.experts \(6\)"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True, expected False"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, expected None"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation = 'silu', expected 'gelu_pytorch_tanh'"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0, expected 7.0"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False, expected True"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05, expected 1e-06"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax', expected 'sigmoid'"),
        ("deepseek_v3", {"n_group": 3}, r"moe.groups \(3\) must divide moe.experts \(8\)"),
    ],
)
def test_configs_that_change_the_computation_are_refused(case: str, changes: dict, text: str) -> None:
    with pytest.raises(DataError, match=rf"^x/config\.json: .*{text}"):
        read_config("x/config.json", opened(case).config | changes)


def test_a_spec_that_no_family_expresses() -> None:
    spec = DecoderSpec(layers=1, width=8, heads=2, kv_heads=1, head_width=4, ffn=8, vocab=9)
    assert family_for(spec).model_type == "llama"
    with pytest.raises(DataError, match="no family can express this decoder, expected one of llama, smollm3"):
        family_for(spec.model_copy(update={"sinks": True}))
    with pytest.raises(DataError, match="a qwen3 model cannot express this decoder"):
        write_config(FAMILIES["qwen3"], spec)
    with pytest.raises(DataError, match="a llama model cannot express this decoder"):
        rope = RopeSpec(scaling="yarn", factor=2.0)
        mla = MLASpec(kv_rank=2, nope_width=2, rope_width=2, value_width=4)
        write_config(FAMILIES["llama"], spec.model_copy(update={"rope": rope, "mla": mla}))


def test_experts_may_lie_stacked_and_fused(tmp_path: Path) -> None:
    """As transformers 5 holds them in memory: [E, gate and up, D] and [E, D, F]."""
    shutil.copytree(DATA / "qwen3_moe_dense", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for n in (1, 2):
        prefix = f"model.layers.{n}.mlp.experts."
        each = {
            m: np.stack([tensors.pop(f"{prefix}{e}.{m}_proj.weight") for e in range(5)]) for m in ("gate", "up", "down")
        }
        tensors[f"{prefix}gate_up_proj"] = np.concatenate([each["gate"], each["up"]], axis=1)
        tensors[f"{prefix}down_proj"] = each["down"]
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, open_hf(tmp_path).read(), checkpoint("qwen3_moe_dense")[1])


def test_blocks_that_predict_later_tokens_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(DATA / "deepseek_v3", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"layers\.3\.eh_proj\.weight is not part of a deepseek_v3 decoder"):
        open_hf(tmp_path).read()
    (tmp_path / "config.json").write_text(json.dumps(opened("deepseek_v3").config | {"num_nextn_predict_layers": 1}))
    jax.tree.map(np.testing.assert_array_equal, open_hf(tmp_path).read(), checkpoint("deepseek_v3")[1])


MESHES = [MeshConfig(fsdp=2), MeshConfig(tensor=2, data=2), MeshConfig(fsdp=2, tensor=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=["fsdp", "tensor", "both"])
@pytest.mark.parametrize("case", ["llama_bias", "qwen3_yarn", "gpt_oss", "deepseek_v3"])
def test_each_device_gets_its_part(case: str, mesh: MeshConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    built, spec = mesh.build(), opened(case).spec
    if mesh.check_divides(spec.axis_sizes()):
        pytest.skip("the mesh does not divide this model")
    shardings = param_shardings(ModelDef(spec), built)
    for large in (1 << 40, 0):  # whole stacks, then block by block
        monkeypatch.setattr("ppojax.models.weights.LARGE", large)
        params = opened(case).read(shardings=shardings)
        assert jax.tree.map(lambda p: p.sharding, params) == shardings
        jax.tree.map(np.testing.assert_array_equal, params, checkpoint(case)[1])
