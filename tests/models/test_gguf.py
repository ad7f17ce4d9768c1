"""GGUF files written by the `gguf` package are read back; each fault names what is wrong."""

import struct

import gguf
import numpy as np
import pytest

from ppojax.errors import DataError
from ppojax.models.gguf import read_gguf, read_header
from ppojax.models.smollm2 import find_smollm2
from ppojax.models.spec import DecoderSpec, RopeSpec

SPEC = DecoderSpec(
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_width=16,
    ffn=96,
    vocab=40,
    rope=RopeSpec(theta=5e4),
    norm_eps=1e-5,
    tied=True,
)
Q4_1, Q8_0, F16, BF16, F32 = (gguf.GGMLQuantizationType[n] for n in ("Q4_1", "Q8_0", "F16", "BF16", "F32"))


def interleave(weight, heads):
    """Order query or key rows as GGUF does (`permute` of llama.cpp's conversion script)."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def random_tensors(spec=SPEC):
    """Tensors in GGUF's names, and the parameters that they stand for."""
    rng = np.random.default_rng(0)
    D, q, kv = spec.width, spec.heads * spec.head_width, spec.kv_heads * spec.head_width
    matrices = {
        "q": ("attn_q", q, D),
        "k": ("attn_k", kv, D),
        "v": ("attn_v", kv, D),
        "o": ("attn_output", D, q),
        "gate": ("ffn_gate", spec.ffn, D),
        "up": ("ffn_up", spec.ffn, D),
        "down": ("ffn_down", D, spec.ffn),
    }
    embed, norm = rng.normal(size=(spec.vocab, D)).astype(np.float32), rng.normal(size=D).astype(np.float32)
    tensors = {"token_embd.weight": embed, "output_norm.weight": norm}
    layers = {}
    for key, (name, rows, columns) in matrices.items():
        weights = rng.normal(size=(spec.layers, rows, columns)).astype(np.float32)
        layers[key] = weights.swapaxes(1, 2)
        for n, weight in enumerate(weights):
            heads = {"q": spec.heads, "k": spec.kv_heads}.get(key)
            tensors[f"blk.{n}.{name}.weight"] = interleave(weight, heads) if heads else weight
    for key, name in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
        layers[key] = rng.normal(size=(spec.layers, D)).astype(np.float32)
        tensors |= {f"blk.{n}.{name}.weight": layers[key][n] for n in range(spec.layers)}
    return tensors, {"embed": embed, "norm": norm, "layers": layers}


def write(path, tensors, *, kind=F32, arch="llama", scaling=None, spec=SPEC):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_token_list([f"t{n}" for n in range(spec.vocab)])
    if scaling:
        writer.add_rope_scaling_type(scaling)
    for name, weight in tensors.items():
        if weight.ndim == 1 or kind == F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Bounds on the rounding of standard normal values (at most about 4.5 here): none; half of a half-precision unit in
# the last place at 4, or of bfloat16; half a step of 2 * 4.5 / 254, and of 9 / 15, with float16 scales.
@pytest.mark.parametrize(("kind", "bound"), [(F32, 0.0), (F16, 0.002), (BF16, 0.016), (Q8_0, 0.02), (Q4_1, 0.32)])
def test_weights_are_read_back(tmp_path, kind, bound):
    tensors, expected = random_tensors()
    spec, params = read_gguf(write(tmp_path / "m.gguf", tensors, kind=kind))
    assert spec == SPEC
    assert params.keys() == expected.keys()
    assert params["layers"].keys() == expected["layers"].keys()
    flat = {**expected["layers"], "embed": expected["embed"], "norm": expected["norm"]}
    for key, weight in flat.items():
        read = params["layers"][key] if key in params["layers"] else params[key]
        assert read.dtype == np.float32
        assert read.shape == weight.shape
        assert np.abs(read - weight).max() <= bound, key


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_files_keep_the_order_of_rows_and_have_more_tensors(tmp_path, arch):
    tensors, expected = random_tensors()
    rng = np.random.default_rng(1)
    for n in range(SPEC.layers):
        for key in ("q", "k"):
            tensors[f"blk.{n}.attn_{key}.weight"] = expected["layers"][key][n].T.copy()
    names = {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
    sizes = {"q_bias": 64, "k_bias": 32, "v_bias": 32, "q_norm": 16, "k_norm": 16}
    if arch == "qwen3":
        names = {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}
    for key, name in names.items():
        expected["layers"][key] = rng.normal(size=(SPEC.layers, sizes[key])).astype(np.float32)
        tensors |= {f"blk.{n}.{name}": expected["layers"][key][n] for n in range(SPEC.layers)}
    spec, params = read_gguf(write(tmp_path / "m.gguf", tensors, arch=arch))
    assert (spec.qkv_bias, spec.qk_norm) == (arch == "qwen2", arch == "qwen3")
    assert params["layers"].keys() == expected["layers"].keys()
    for key, weight in expected["layers"].items():
        np.testing.assert_array_equal(params["layers"][key], weight)


def test_a_head_of_its_own(tmp_path):
    tensors, _ = random_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"] + np.float32(1)
    spec, params = read_gguf(write(tmp_path / "m.gguf", tensors))
    assert not spec.tied
    np.testing.assert_array_equal(params["head"], tensors["output.weight"])


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("missing", r"tensor blk\.1\.ffn_up\.weight is missing, expected shape \(96, 64\)"),
        ("surplus", r"tensor rope_freqs\.weight is not part of a llama decoder"),
        ("shape", r"tensor blk\.0\.attn_v\.weight has shape \(64, 64\), expected \(32, 64\)"),
        ("nan", r"tensor blk\.1\.attn_q\.weight holds NaN or infinite values"),
        ("inf", r"tensor token_embd\.weight holds NaN or infinite values"),
    ],
)
def test_faulty_tensors_are_named(tmp_path, fault, text):
    tensors, _ = random_tensors()
    if fault == "missing":
        del tensors["blk.1.ffn_up.weight"]
    elif fault == "surplus":
        tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    elif fault == "shape":
        tensors["blk.0.attn_v.weight"] = np.ones((64, 64), np.float32)
    elif fault == "nan":
        tensors["blk.1.attn_q.weight"][3, 3] = np.nan
    else:
        tensors["token_embd.weight"][0, 0] = -np.inf
    with pytest.raises(DataError, match=text):
        read_gguf(write(tmp_path / "m.gguf", tensors))


def test_faulty_files_are_named(tmp_path):
    tensors, _ = random_tensors()
    whole = write(tmp_path / "m.gguf", tensors).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-2000])
    with pytest.raises(DataError, match=r"cut\.gguf: tensor .* is cut, \d+ of \d+ bytes; download it again"):
        read_gguf(cut)
    for size in (5, 20, 100, 400):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="the GGUF header is cut or corrupt at byte"):
            read_header(cut)
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(DataError, match="expected b'GGUF'"):
        read_header(cut)
    cut.write_bytes(b"GGUF" + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(DataError, match="GGUF version 1, expected 2 or 3"):
        read_header(cut)
    with pytest.raises(DataError, match="no such GGUF file"):
        read_header(tmp_path / "none.gguf")


def test_other_architectures_are_refused(tmp_path):
    tensors, _ = random_tensors()
    with pytest.raises(DataError, match="architecture 'mamba', expected one of llama, qwen2, qwen3"):
        read_gguf(write(tmp_path / "m.gguf", tensors, arch="mamba"))
    with pytest.raises(DataError, match="RoPE scaling 'yarn', expected none"):
        read_gguf(write(tmp_path / "n.gguf", tensors, scaling=gguf.RopeScalingType.YARN))


def test_smollm2_is_what_it_should_be():
    header = read_header(find_smollm2())
    assert header.fields["general.license"] == "apache-2.0"
    assert len(header.tensors) == 272
    assert sum(int(np.prod(t.shape)) for t in header.tensors.values()) == 134_515_008
