"""Hugging Face folders: both generations of config.json, one and several files, and each fault by name."""

import json
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ppojax.errors import DataError
from ppojax.models.families import FAMILIES
from ppojax.models.families.layout import places
from ppojax.models.hf import read_hf
from ppojax.models.smollm2 import find_smollm2
from ppojax.models.spec import DecoderSpec, RopeSpec

SPEC = DecoderSpec(
    layers=2,
    width=8,
    heads=4,
    kv_heads=2,
    head_width=2,
    ffn=12,
    vocab=20,
    rope=RopeSpec(theta=5e4),
    norm_eps=1e-6,
    tied=True,
)
NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 20,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
V4 = {"rope_theta": 5e4, "rope_scaling": None, "torch_dtype": "float32", "head_dim": 2, "attention_bias": False}
V5 = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "dtype": "float32", "layer_types": None}


def random_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {
        name: place.rules[0].file_shape(place.inner)
        for place in places(SPEC, FAMILIES["llama"].rules)
        for [name] in place.names(place.rules[0])
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, tensors=None, files=1, **changes):
    tensors = random_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(CONFIG | V5 | changes))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
    place = {name: names[n % files] for n, name in enumerate(tensors)}
    for file in names:
        save_file({t: tensors[t] for t, f in place.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_stacked_and_transposed(tmp_path, files, dtype):
    tensors = random_tensors(dtype)
    spec, params = read_hf(write(tmp_path, tensors, files))
    assert spec == SPEC
    assert set(params) == {"embed", "norm", "layers"}
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"].astype(np.float32))
    for key, name in NAMES.items():
        assert params["layers"][key].dtype == np.float32
        for n in range(2):
            weight = tensors[f"model.layers.{n}.{name}.weight"].astype(np.float32)
            np.testing.assert_array_equal(params["layers"][key][n], weight.T)


@pytest.mark.parametrize("spelling", [V4, V5])
def test_both_spellings_of_the_config(tmp_path, spelling):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | spelling))
    assert read_hf(tmp_path)[0] == SPEC


def test_a_head_of_its_own_and_surplus_buffers(tmp_path):
    tensors = random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    tensors["lm_head.weight"] = np.full((20, 8), 2, np.float32)
    spec, params = read_hf(write(tmp_path, tensors, tie_word_embeddings=False))
    assert not spec.tied
    np.testing.assert_array_equal(params["head"], 2)
    spec, params = read_hf(write(tmp_path, tensors))
    assert spec.tied
    assert "head" not in params


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"intermediate_size": 13}, r"gate_proj\.weight has shape \(12, 8\), expected \(13, 8\) from the config"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\..*\.weight is not part of a llama decoder"),
        ({"tie_word_embeddings": False}, r"tensor lm_head\.weight is missing"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changes, text):
    with pytest.raises(DataError, match=text):
        read_hf(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (np.nan, np.float32, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"),
        (np.inf, np.float16, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"),
        (1, np.int8, r"model\.layers\.1\.mlp\.up_proj\.weight is I8, expected F32, F16, BF16"),
    ],
)
def test_faulty_values_are_named(tmp_path, value, dtype, text):
    tensors = random_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = np.full((12, 8), value, dtype)
    with pytest.raises(DataError, match=text):
        read_hf(write(tmp_path, tensors))


def test_a_cut_file_names_the_tensor(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors: tensor model\..* is cut; download it again"):
        read_hf(tmp_path)
    path.write_bytes(whole[:50])
    with pytest.raises(DataError, match="not a safetensors file"):
        read_hf(tmp_path)


def test_files_that_are_missing_outside_or_pickled(tmp_path):
    with pytest.raises(DataError, match=r"config\.json: no such file; expected a Hugging Face model folder"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="num_hidden_layers is missing"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        read_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle, which can run code; .* save_pretrained"):
        read_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../../etc/weights.safetensors", "/etc/weights.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(DataError, match="of the same folder"):
            read_hf(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    with pytest.raises(DataError, match=r"names the file a\.safetensors, which is missing"):
        read_hf(tmp_path)


def test_smollm2_is_found_or_its_extra_is_named(monkeypatch):
    assert find_smollm2().suffix == ".gguf"

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(DataError, match=r"pip install 'ppojax\[smollm2\]'"):
        find_smollm2()
