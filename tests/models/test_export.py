"""`load` and `export`: padded batches, and what is written is what was read, bit by bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from families import CASES, DATA, opened, oracle
from ppojax.errors import CannotWriteError, ConfigError
from ppojax.mesh import MeshConfig
from ppojax.models import export, load
from ppojax.models.api import Model
from ppojax.models.hf import open_hf
from ppojax.models.hf_write import Origin, write_hf
from ppojax.models.tokenizer import char_tokenizer
from ppojax.models.tokenizer_files import tokenizer_from_hf


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                value = file.get_tensor(name)
                found[name] = (str(value.dtype), value.shape, value.tobytes())
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_original_bit_by_bit(case: str, tmp_path: Path) -> None:
    model = load(DATA / case)
    dtype = opened(case).config["dtype"]
    export(model, tmp_path / "out", dtype=dtype, shard_bytes=30_000)
    written, original = tensors_of(tmp_path / "out"), tensors_of(DATA / case)
    for name in [n for n in written if n.endswith("e_score_correction_bias")]:  # kept in float32
        kind, shape, value = written.pop(name)
        was = np.frombuffer(original[name][2], dtype).astype(np.float32)
        assert (kind, shape, value) == ("float32", original.pop(name)[1], was.tobytes())
    assert written == original
    again = open_hf(tmp_path / "out")
    assert (again.spec, again.family) == (opened(case).spec, opened(case).family)
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "dtype")
    assert {k: again.config[k] for k in kept} == {k: opened(case).config[k] for k in kept}


@pytest.mark.parametrize("case", ["llama_tied", "gemma3_capped", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(case: str, side: str) -> None:
    model, length = load(DATA / case), oracle(case)["length"]
    token, T = oracle(case)["token"], oracle(case)["token"].shape[1]
    padded, mask = np.full((2, T), 5, np.int32), np.zeros((2, T), np.int32)
    for row, n in enumerate(length):
        place = slice(T - n, T) if side == "left" else slice(0, n)
        padded[row, place], mask[row, place] = token[row, :n], 1
    logits = np.asarray(model.logits(model.params, jnp.asarray(padded), jnp.asarray(mask)))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[mask > 0], oracle(case)[f"{side}_logits"], rtol=0, atol=5e-5)


def test_positions_may_be_given() -> None:
    model, token = load(DATA / "llama_rope3"), jnp.asarray(oracle("llama_rope3")["token"])
    plain = model.logits(model.params, token)
    place = jnp.broadcast_to(jnp.arange(token.shape[1], dtype=jnp.int32), token.shape)
    np.testing.assert_array_equal(model.logits(model.params, token, position_BT=place), plain)
    moved = model.logits(model.params, token, position_BT=place + 9)  # rotary positions are relative
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-4)


def test_what_a_model_has() -> None:
    model = load(DATA / "qwen3_tied", dtype="bfloat16", mesh=MeshConfig(fsdp=2).build())
    assert model.spec == opened("qwen3_tied").spec
    assert model.graphdef is not None
    assert model.tokenizer is None  # the folder has none
    assert model.params["layers"]["q"].dtype == jnp.bfloat16
    assert len(model.params["layers"]["q"].sharding.device_set) == 2
    logits = model.logits(model.params, jnp.asarray(oracle("qwen3_tied")["token"]))
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - oracle("qwen3_tied")["logits"]).max() < 0.15  # 3 decimal digits


def test_shards_and_their_index(tmp_path: Path) -> None:
    export(load(DATA / "llama_tied"), tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "model.safetensors"]
    export(load(DATA / "llama_tied"), tmp_path / "many", shard_bytes=10_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    whole = tensors_of(tmp_path / "one")
    assert index["metadata"]["total_size"] == sum(len(value) for _, _, value in whole.values())
    assert tensors_of(tmp_path / "many") == whole
    # Some tensors are over half the bound; no file is over it.
    assert all((tmp_path / "many" / file).stat().st_size < 12_000 for file in files)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model, tokenizer = load(DATA / "llama_tied"), char_tokenizer("abc")
    write_hf(tmp_path / "new", model.family, model.spec, model.params, Origin(tokenizer))
    assert tokenizer_from_hf(tmp_path / "new").fingerprint() == tokenizer.fingerprint()
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (list(tokenizer.eos_ids), tokenizer.pad_id)
    loaded = load(tmp_path / "new")
    assert loaded.tokenizer is not None
    (tmp_path / "new/special_tokens_map.json").write_text("{}")
    export(loaded, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize("place", ["jinja", "config", "named", "none"])
def test_the_template_is_that_of_training(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder, out = load(DATA / "llama_tied"), tmp_path / "own", tmp_path / "out"
    char_tokenizer("Hi").save(folder)
    own = (folder / "chat_template.jinja").read_text()
    (tmp_path / "training.jinja").write_text("{{ '' }}" + own)
    if place != "jinja":
        (folder / "chat_template.jinja").unlink()
        stated = {"config": own, "named": [{"name": "default", "template": own}, {"name": "tool_use", "template": "x"}]}
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if place != "none":
            config["chat_template"] = stated[place]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_hf(folder, str(tmp_path / "training.jinja"))
    write_hf(out, model.family, model.spec, model.params, Origin(tokenizer, folder))
    again = tokenizer_from_hf(out)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (out / "chat_template.jinja").read_text() == tokenizer.template.source
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config.get("chat_template", tokenizer.template.source) == tokenizer.template.source
    kept = out / "additional_chat_templates/original.jinja"
    assert kept.read_text() == own if place != "none" else not kept.exists()
    assert ("the chat template is that of training" in caplog.text) == (place != "none")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Model = load(DATA / "llama_tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="full: is there and not empty; give a new folder"):
        export(model, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CannotWriteError, match="new: cannot be written: No space left on device"):
        export(model, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before
