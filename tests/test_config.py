"""The root config: what it composes, and every pair of settings that cannot hold together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ppojax.advantages import GAE
from ppojax.config import Config
from ppojax.envs import Calculator
from ppojax.errors import ConfigError
from ppojax.losses import DPPO
from ppojax.settings import help_text
from ppojax.settings.foreign import FOREIGN_KEYS
from ppojax.settings.schema import keys, sections

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
BASE = ("env.type=calculator", "model.path=smollm2")
FRESH = ("env.type=calculator", "model.fresh={}", "model.tokenizer=char", "critic.model.layers=4")
ALONE = "update.shared_prefix=false"


def faults(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.load(*arguments)
    return str(caught.value).splitlines()


def test_the_defaults_hold_together() -> None:
    for base in (BASE, FRESH):
        config = Config.load(*base)
        assert isinstance(config.advantage, GAE) and isinstance(config.loss, DPPO)
        assert config.critic.optimizer.learning_rate == 1e-5
        assert hash(config) == hash(Config.load(*base))


def test_a_config_made_in_python_is_checked_too() -> None:
    config = Config.load(*BASE)
    same = Config(env=config.env, model=config.model)
    assert same == config
    with pytest.raises(ConfigError, match=r"model\.path=null, model\.fresh=null: there is no model; give model\.path="):
        Config(env=config.env)


def test_the_resolved_config_is_a_config(tmp_path: Path) -> None:
    config = Config.load(*FRESH, "advantage.type=group", "loss.type=ppo", "warm_start.steps=3", "resume=strict")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert Config.load(f"config={file}") == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configs_hold_together(file: Path, tmp_path: Path) -> None:
    config = Config.load(f"config={file}")
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert Config.load(f"config={resolved}") == config


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_go_behind_a_config_of_another_loss_and_advantage(file: Path) -> None:
    alone = yaml.safe_load(file.read_text()).get("rollout", {}).get("group_size") == 1
    for base in ("quickstart", "quickstart_grpo", "tiny"):
        Config.load(f"config={FOLDER / base}.yaml,{file}", *(("rollout.prompts=128",) if alone else ()))


def test_configs_are_shipped() -> None:
    assert {"quickstart.yaml", "tiny.yaml"} <= {file.name for file in CONFIGS}


def test_a_mistyped_key_names_the_nearest() -> None:
    [line] = faults(*BASE, "actor.optimizer.learning_rte=1")
    assert line == (
        "unknown key actor.optimizer.learning_rte (command line); did you mean actor.optimizer.learning_rate?"
    )


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_keys_of_other_libraries_are_understood(key: str) -> None:
    known = dict(keys(Config))
    assert FOREIGN_KEYS[key] in known and key not in known
    assert not sections(known[FOREIGN_KEYS[key]])
    assert faults(*BASE, f"{key}=1") == [f"unknown key {key} (command line); did you mean {FOREIGN_KEYS[key]}?"]


def test_every_key_says_what_it_is() -> None:
    silent = [key for key, field in keys(Config) if not (field.description or key.endswith(".type"))]
    assert silent == []


def test_help_describes_every_section() -> None:
    texts = {name: help_text(Config, name) for name in Config.model_fields}
    for key, _ in keys(Config):
        alone = key.endswith(".type")  # in a section's text its values are headings
        assert f"  {key}: " in (help_text(Config, key) if alone else texts[key.partition(".")[0]])


def test_an_environment_must_be_chosen() -> None:
    [line] = faults("model.path=smollm2")
    assert line.startswith("env is missing: expected ")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-x", ""])
def test_a_run_is_one_folder(name: str) -> None:
    [line] = faults(*BASE, f"run.name='{name}'")
    assert "expected the name of a folder: letters, digits and . _ = + -, no leading dot or dash" in line


CONTRADICTIONS = [
    (
        ("env.type=calculator",),
        "model.path=null (default), model.fresh=null (default): there is no model; give model.path=smollm2 "
        "(or a folder, a .gguf file, a hub id), or model.fresh.layers=... for a new one",
    ),
    (
        (*FRESH, "model.path=smollm2"),
        "model.path=smollm2 (command line), model.fresh={...} (command line): "
        "a model is either loaded or made from scratch; set model.path=null or model.fresh=null",
    ),
    (
        (*FRESH, "model.tokenizer=null"),
        "model.fresh={...} (command line), model.tokenizer=null (command line): "
        "a model from scratch brings no tokenizer; set model.tokenizer=char",
    ),
    (
        (*BASE, "model.tokenizer=char"),
        "model.path=smollm2 (command line), model.tokenizer=char (command line): "
        "a loaded model brings its own tokenizer; set model.tokenizer=null",
    ),
    (
        (*FRESH, "model.fresh.width=100"),
        "model.fresh.width=100 (command line), model.fresh.heads=4 (default): "
        "heads have equal, even widths; make width a multiple of 8",
    ),
    (
        (*FRESH, "model.fresh.kv_heads=3"),
        "model.fresh.heads=4 (default), model.fresh.kv_heads=3 (command line): "
        "each key/value head serves the same number of heads; kv_heads may be 1, 2, 4",
    ),
    (
        (*FRESH, ALONE, "model.fresh.width=136", "mesh.fsdp=16", "update.microbatch_rows=16", "rollout.prompts=16"),
        "mesh.fsdp=16 (command line), model.fresh.width=136 (command line): "
        "width is split over mesh.fsdp and does not divide; mesh.fsdp may be 1, 2, 4, 8, 17, 34, 68, 136",
    ),
    (
        (*FRESH, "model.fresh.kv_heads=2", "mesh.tensor=4"),
        "mesh.tensor=4 (command line), model.fresh.kv_heads=2 (command line): "
        "kv_heads is split over mesh.tensor and does not divide; mesh.tensor may be 1, 2",
    ),
    (
        (*BASE, "advantage.type=group", "rollout.group_size=1"),
        "advantage.type=group (command line), advantage.baseline=mean (default), rollout.group_size=1 (command line): "
        "an episode is compared with the others of its task, and there are none; set rollout.group_size to 2 or more, "
        "advantage.type=gae, or advantage.baseline=none and advantage.scale=none",
    ),
    (
        (*BASE, "update.minibatches=3"),
        "rollout.prompts=8 (default), rollout.group_size=4 (default), update.minibatches=3 (command line): "
        "32 episodes a step are not dealt out evenly; update.minibatches may be 1, 2, 4, 8, 16, 32",
    ),
    (
        (*BASE, "update.minibatches=2", "update.microbatch_rows=3"),
        "rollout.prompts=8 (default), rollout.group_size=4 (default), update.minibatches=2 (command line), "
        "update.microbatch_rows=3 (command line): the 16 rows of a minibatch are not cut evenly; "
        "update.microbatch_rows may be 1, 2, 4, 8, 16",
    ),
    (
        (*BASE, "update.microbatch_rows=2", "mesh.data=2", "mesh.fsdp=2"),
        "update.microbatch_rows=2 (command line), mesh.data=2 (command line), mesh.fsdp=2 (command line), "
        "mesh.expert=1 (default): "
        "the rows of a microbatch are not split evenly over 4 devices; update.microbatch_rows may be 4, 8, 16, 32",
    ),
    (
        (*BASE, "update.microbatch_rows=2"),
        "update.microbatch_rows=2 (command line), rollout.group_size=4 (default): a microbatch would tear groups of 4 "
        "episodes that share their prompt; update.microbatch_rows may be 4, 8, 16, 32, "
        "or set update.shared_prefix=false",
    ),
    (
        (*BASE, "mesh.data=3"),
        "update.microbatch_rows=8 (default), mesh.data=3 (command line), mesh.fsdp=1 (default), "
        "mesh.expert=1 (default): the rows of a microbatch are not split evenly over 3 devices; "
        "update.microbatch_rows may be nothing: make 32 a multiple of 3",
    ),
    (
        (*BASE, "rollout.max_turn_tokens=512"),
        "rollout.max_turn_tokens=512 (command line), rollout.max_tokens=512 (default): a turn leaves no room for the "
        "prompt in its row; raise rollout.max_tokens or lower rollout.max_turn_tokens",
    ),
    (
        (*FRESH, ALONE, "model.fresh.kv_heads=2", "mesh.data=4", "rollout.mesh.tensor=4"),
        "rollout.mesh.tensor=4 (command line), model.fresh.kv_heads=2 (command line): "
        "kv_heads is split over rollout.mesh.tensor and does not divide; rollout.mesh.tensor may be 1, 2",
    ),
    (
        (*BASE, ALONE, "mesh.data=4", "rollout.mesh.tensor=2"),
        "rollout.mesh.data=1 (default), rollout.mesh.fsdp=1 (default), rollout.mesh.expert=1 (default), "
        "rollout.mesh.tensor=2 (command line), mesh.data=4 (command line), mesh.fsdp=1 (default), "
        "mesh.expert=1 (default), mesh.tensor=1 (default): the sampler's mesh has 2 devices and the trainer's 4, and "
        "they are to be the same; make the product of rollout.mesh 4, or set rollout.mesh=null or rollout.devices=own",
    ),
    (
        (*BASE, "rollout.devices=own"),
        "rollout.devices=own (command line), rollout.mesh=null (default): the sampler has devices of its own, and "
        "nothing says how many; set rollout.mesh.data (or another axis), or rollout.devices=shared",
    ),
    (
        (*BASE, "rollout.max_staleness=2"),
        "rollout.max_staleness=2 (command line), rollout.mode=sync (default): episodes are played with the weights "
        "that learn from them; set rollout.mode=one_step_off, or rollout.max_staleness=1",
    ),
    (
        (*BASE, "rollout.mode=one_step_off", "rollout.mismatch.stale_steps=2"),
        "rollout.mode=one_step_off (command line), rollout.mismatch.stale_steps=2 (command line): weights are old "
        "already; set rollout.max_staleness to the steps that they are to be old, and rollout.mismatch.stale_steps=0",
    ),
    (
        (*FRESH, "mesh.tensor=4", "critic.mesh.data=2"),
        "critic.mesh.data=2 (command line), critic.mesh.fsdp=1 (default), critic.mesh.expert=1 (default), "
        "critic.mesh.tensor=1 (default), mesh.data=1 (default), mesh.fsdp=1 (default), mesh.expert=1 (default), "
        "mesh.tensor=4 (command line): the critics' mesh has 2 devices and the trainer's 4, and they are to be the "
        "same; make the product of critic.mesh 4, or set critic.mesh=null",
    ),
    (
        (*FRESH, ALONE, "model.fresh.kv_heads=2", "mesh.data=4", "critic.mesh.tensor=4"),
        "critic.mesh.tensor=4 (command line), model.fresh.kv_heads=2 (command line): "
        "kv_heads is split over critic.mesh.tensor and does not divide; critic.mesh.tensor may be 1, 2",
    ),
    (
        (*BASE, ALONE, "critic.model.type=fresh", "critic.model.shape.ffn=6", "mesh.data=4", "critic.mesh.tensor=4"),
        "critic.mesh.tensor=4 (command line), critic.model.shape.ffn=6 (command line): "
        "ffn is split over critic.mesh.tensor and does not divide; critic.mesh.tensor may be 1, 2, 3, 6",
    ),
    (
        (*BASE, "mesh.tensor=16", "critic.mesh.data=16"),
        "update.microbatch_rows=8 (default), critic.mesh.data=16 (command line), critic.mesh.fsdp=1 (default), "
        "critic.mesh.expert=1 (default): the rows of a microbatch are not split evenly over 16 devices; "
        "update.microbatch_rows may be 16, 32",
    ),
    (
        (*BASE, "mesh.data=4"),
        "update.microbatch_rows=8 (default), rollout.group_size=4 (default), mesh.data=4 (command line), "
        "mesh.fsdp=1 (default), mesh.expert=1 (default): rows that share a prompt stay on one device, and the 2 "
        "groups of a microbatch are not split evenly over 4 devices; update.microbatch_rows may be 16, 32, or set "
        "update.shared_prefix=false",
    ),
    (
        (*BASE, "rollout.top_k=5", "rollout.record_hidden=true"),
        "rollout.top_k=5 (command line), rollout.top_p=1.0 (default), rollout.min_p=0.0 (default), "
        "rollout.record_hidden=true (command line): hidden states do not tell what was cut off the distribution, and "
        "the exact gap would be of another one; set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or "
        "rollout.record_hidden=false",
    ),
    (
        (*BASE, "rollout.mismatch.logit_noise=0.1", "rollout.record_hidden=true"),
        "rollout.mismatch.logit_noise=0.1 (command line), rollout.record_hidden=true (command line): hidden states do "
        "not tell the noise on the logits, and the policy would be compared with another one; set "
        "rollout.mismatch.logit_noise=0 (they have rollout.mismatch.hidden_noise), or leave them out "
        "(rollout.record_hidden=false, and with dppo loss.support=binary or topk and loss.compare_supports=false)",
    ),
    (
        (*BASE, "rollout.mismatch.logit_noise=0.1", "loss.support=full"),
        "rollout.mismatch.logit_noise=0.1 (command line), loss.support=full (command line), "
        "loss.compare_supports=false (default): hidden states do not tell the noise on the logits, and the policy "
        "would be compared with another one; set rollout.mismatch.logit_noise=0 (they have "
        "rollout.mismatch.hidden_noise), or leave them out "
        "(rollout.record_hidden=false, and with dppo loss.support=binary or topk and loss.compare_supports=false)",
    ),
    (
        (*BASE, "rollout.slots=6", "mesh.tensor=4", "rollout.mesh.data=4"),
        "rollout.slots=6 (command line), rollout.mesh.data=4 (command line), rollout.mesh.fsdp=1 (default), "
        "rollout.mesh.expert=1 (default): slots are not split evenly over 4 devices; "
        "make rollout.slots a multiple of 4",
    ),
    (
        (
            *BASE,
            "rollout.prompts=6",
            "rollout.group_size=1",
            "update.minibatches=1",
            "update.microbatch_rows=6",
            "mesh.tensor=4",
            "rollout.mesh.data=4",
        ),
        "rollout.prompts=6 (command line), rollout.group_size=1 (command line), rollout.mesh.data=4 (command line), "
        "rollout.mesh.fsdp=1 (default), rollout.mesh.expert=1 (default): 6 slots, one for each episode, are not split "
        "evenly over 4 devices; set rollout.slots to a multiple of 4",
    ),
    (
        (*BASE, "rollout.slots=3", "mesh.data=2"),
        "rollout.slots=3 (command line), mesh.data=2 (command line), mesh.fsdp=1 (default), mesh.expert=1 (default): "
        "slots are not split evenly over 2 devices; make rollout.slots a multiple of 2",
    ),
    (
        (*BASE, "loss.support=full", "rollout.top_p=0.9"),
        "rollout.top_k=0 (default), rollout.top_p=0.9 (command line), rollout.min_p=0.0 (default), loss.support=full "
        "(command line), loss.compare_supports=false (default): the loss compares whole distributions, and the sampler "
        "would draw from a cut one that is not recorded; set rollout.top_k=0, rollout.top_p=1 and rollout.min_p=0, or "
        "loss.support=binary and loss.compare_supports=false",
    ),
    (
        (*BASE, "loss.support=full", "loss.anchor=old"),
        "loss.anchor=old (command line), loss.support=full (command line), loss.compare_supports=false (default): only "
        "the sampler keeps more of its distribution than the drawn token: the old policy has no other support; set "
        "loss.anchor=behavior, or loss.support=binary and loss.compare_supports=false",
    ),
    (
        (*BASE, "actor.optimizer.schedule=cosine"),
        "actor.optimizer.schedule=cosine (command line), actor.optimizer.decay_steps=0 (default): the learning rate "
        "would fall to zero at once; set actor.optimizer.decay_steps, or actor.optimizer.schedule=constant",
    ),
    (
        (*BASE, "critic.optimizer.schedule=linear"),
        "critic.optimizer.schedule=linear (command line), critic.optimizer.decay_steps=0 (default): the learning rate "
        "would fall to zero at once; set critic.optimizer.decay_steps, or critic.optimizer.schedule=constant",
    ),
    (
        (*FRESH, "critic.model.layers=5"),
        "critic.model.layers=5 (command line), model.fresh.layers=4 (default): "
        "the critic takes more blocks than the actor has; set critic.model.layers to 4 or less",
    ),
    (
        (*BASE, "critic.model.type=fresh", "critic.model.shape.width=100"),
        "critic.model.shape.width=100 (command line), critic.model.shape.heads=4 (default): "
        "heads have equal, even widths; make width a multiple of 8",
    ),
    (
        (*BASE, "critic.warmup_steps=5", "steps=5"),
        "critic.warmup_steps=5 (command line), steps=5 (command line): "
        "the policy would never be trained; raise steps or lower critic.warmup_steps",
    ),
    (
        (*BASE, "advantage.ensemble.agreed=0.2"),
        "advantage.ensemble.agreed=0.2 (command line), advantage.ensemble.disputed=0.0 (default), "
        "critic.count=1 (default): one critic does not disagree with itself; set critic.count to 2 or more, or "
        "advantage.ensemble.agreed=0 and advantage.ensemble.disputed=0",
    ),
    (
        (*BASE, "advantage.ensemble.agreed=0.2", "critic.count=2", "critic.split=none", "critic.noise=0"),
        "advantage.ensemble.agreed=0.2 (command line), advantage.ensemble.disputed=0.0 (default), critic.split=none "
        "(command line), critic.noise=0.0 (command line): critics that start alike and learn from the same rows never "
        "disagree; set critic.split=responses or prompts, or critic.noise",
    ),
    (
        (*BASE, "advantage.ensemble.disputed=0.2", "critic.count=2"),
        "advantage.ensemble.disputed=0.2 (command line), loss.entropy_coefficient=0.0 (default): tokens are left out "
        "of an entropy bonus that there is not; set loss.entropy_coefficient, for instance to 0.001, or "
        "advantage.ensemble.disputed=0",
    ),
    (
        (*BASE, "critic.count=6", "critic.split=responses"),
        "critic.count=6 (command line), critic.split=responses (command line), rollout.group_size=4 (default): "
        "4 responses do not go round among 6 critics; set critic.count to 4 or less, or critic.split=none",
    ),
    (
        (*BASE, "critic.count=9", "critic.split=prompts"),
        "critic.count=9 (command line), critic.split=prompts (command line), rollout.prompts=8 (default): "
        "8 prompts do not go round among 9 critics; set critic.count to 8 or less, or critic.split=none",
    ),
    (
        (*BASE, "critic.head.type=hl_gauss", "critic.loss.clip=0.2"),
        "critic.head.type=hl_gauss (command line), critic.loss.clip=0.2 (command line): "
        "the head is fitted by cross-entropy, which has no clip; set critic.loss.clip=null",
    ),
    (
        (*BASE, "critic.count=2", "critic.split=responses", "advantage.ensemble.disputed=0.2", "loss.type=nll"),
        "advantage.ensemble.disputed=0.2 (command line), loss.type=nll (command line): "
        "tokens are left out of an entropy bonus that there is not; "
        "set loss.entropy_coefficient, for instance to 0.001, or advantage.ensemble.disputed=0",
    ),
    (
        (*BASE, "actor.perturb.initial=0.01", "loss.type=minirl"),
        "actor.perturb={...} (command line), loss.type=minirl (command line), loss.anchor=old (default): the policy "
        "with noise is compared with the sampler, and this loss takes a ratio to the policy at the start of the "
        "update; set loss.anchor=behavior where the loss has it (ppo, gspo, cispo, dppo, minirl), or "
        "actor.perturb=null",
    ),
    (
        (*BASE, "critic.loss.cross_entropy=true"),
        "critic.head.type=linear (default), critic.loss.cross_entropy=true (command line): a value without bounds is "
        "no probability, of which there could be a cross-entropy; set critic.head.type=arctan with its bounds, or "
        "critic.loss.cross_entropy=false",
    ),
    (
        (*BASE, "critic.head.type=arctan", "critic.loss.cross_entropy=true", "critic.loss.clip=0.2"),
        "critic.loss.cross_entropy=true (command line), critic.loss.clip=0.2 (command line): "
        "the head is fitted by cross-entropy, which has no clip; set critic.loss.clip=null",
    ),
    (
        (*BASE, "critic.head.type=arctan", "reward_scaling.source_max=2"),
        "critic.head.type=arctan (command line), critic.head.low=0.0 (default), critic.head.high=1.0 (default), "
        "reward_scaling={...} (command line), env.type=calculator (command line): episodes earn -1 to 1, which the "
        "head cannot say; set critic.head.low to -1 or less and critic.head.high to 1 or more",
    ),
    (
        (*BASE, "critic.head.type=arctan", "env.reward_answer=1"),
        "critic.head.type=arctan (command line), critic.head.low=0.0 (default), critic.head.high=1.0 (default), "
        "env.type=calculator (command line): episodes earn 0 to 1.5, which the head cannot say; set critic.head.low to "
        "0 or less and critic.head.high to 1.5 or more",
    ),
    (
        (
            "model.path=smollm2",
            *("env.type=tools", "env.functions=[a:b]", "env.path=a", "env.reward.exact.weight=1"),
            "critic.head.type=hl_gauss",
        ),
        "critic.head.type=hl_gauss (command line), critic.head.low=-0.1 (default), critic.head.high=1.1 (default), "
        "env.type=tools (command line): the head is bounded, and what an episode can earn is not known; set "
        "critic.head.low and critic.head.high to the lowest and highest sum of rewards, or critic.head.type=linear",
    ),
    (
        (*BASE, "critic.head.type=arctan", "kl_reward.coefficient=0.1"),
        "critic.head.type=arctan (command line), critic.head.low=0.0 (default), critic.head.high=1.0 (default), "
        "kl_reward={...} (command line), env.type=calculator (command line): the head is bounded, and what "
        "an episode can earn is not known; set critic.head.low and critic.head.high to the lowest and highest sum of "
        "rewards, or critic.head.type=linear",
    ),
    (
        (*FRESH, "rollout.record_experts=true"),
        "rollout.record_experts=true (command line), model.fresh.moe=null (default): a "
        "dense model has no experts whose choice could be replayed; set rollout.record_experts=null, or "
        "model.fresh.moe.experts",
    ),
    (
        (*BASE, "model.base_dtype=bfloat16"),
        "model.base_dtype=bfloat16 (command line), model.lora=null (default): weights that are trained are kept in "
        "float32; set model.lora.rank for adapters, or model.base_dtype=float32",
    ),
    (
        (*BASE, ALONE, "warm_start.rows=6", "mesh.data=4"),
        "warm_start.rows=6 (command line), mesh.data=4 (command line), mesh.fsdp=1 (default), mesh.expert=1 (default): "
        "demonstrations are not split evenly over 4 devices; make warm_start.rows a multiple of 4",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), CONTRADICTIONS, ids=lambda value: str(value)[-40:])
def test_contradictions(arguments: tuple[str, ...], line: str) -> None:
    assert faults(*arguments) == [line]


def test_a_warm_start_needs_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calculator, "has_expert", False)
    assert faults(*BASE, "warm_start.steps=3") == [
        "warm_start.steps=3 (command line), env.type=calculator (command line): "
        "this environment has no expert to learn from; set warm_start=null"
    ]


def test_contradictions_are_told_together_with_all_else() -> None:
    lines = faults(
        "env.type=calculator", "seed=-1", "update.minibatches=3", "rollout.max_turn_tokens=600", "stesp=3", "model={}"
    )
    assert [line.split("=")[0].split(" (")[0] for line in lines] == [
        "unknown key stesp",
        "seed",
        "model.path",
        "rollout.prompts",
        "rollout.max_turn_tokens",
    ]


def test_what_is_not_used_is_not_judged() -> None:
    Config.load(*FRESH, "critic.model.layers=99", "critic.warmup_steps=999", "advantage.type=group")
    alone = ("rollout.group_size=1", "advantage.type=group", "advantage.baseline=none", "advantage.scale=none")
    Config.load(*BASE, *alone)


EXACT = {
    "model.dtype=bfloat16": "rounding to fewer bits is not the same everywhere; set model.dtype=float32",
    "rollout.dtype=float16": "sampler and trainer compute in two types; set rollout.dtype=null",
    "rollout.mode=one_step_off": "what is recorded is of older weights; set rollout.mode=sync",
    "rollout.mesh={}": "another mesh adds in another order; set rollout.mesh=null",
    "rollout.top_k=5": "the trainer's policy is not cut; set rollout.top_k=0, rollout.top_p=1, rollout.min_p=0",
    "rollout.mismatch.stale_steps=1": "gaps are put in on purpose; set rollout.mismatch={}",
    "model.remat=dots": "what blocks keep for the backward pass changes the program; set model.remat=full",
    "model.lora.dropout=0.1": "an update drops inputs of its own; set model.lora.dropout=0",
    "actor.perturb={}": "an update adds noise of its own; set actor.perturb=null",
    "update.shared_prefix=true": "shared prompts have other shapes; set update.shared_prefix=false",
}


@pytest.mark.parametrize("argument", EXACT)
def test_what_keeps_sampling_from_being_exact(argument: str) -> None:
    [line] = faults(*BASE, "rollout.exact=true", "update.shared_prefix=false", argument)
    assert line.startswith("rollout.exact=true (command line), ")
    assert line.endswith(f": {EXACT[argument]}, or rollout.exact=false")


ON_POLICY = (
    ("loss.type=ppo",),
    ("loss.type=gspo",),
    ("loss.type=cispo", "loss.anchor=old"),
    ("loss.type=reinforce", "loss.importance_weight=false"),
    ("loss.type=nll",),
)
OFF_POLICY = (
    ("loss.type=ppo", "loss.anchor=behavior"),
    ("loss.type=gspo", "loss.correction.method=mask"),
    ("loss.type=dppo", "loss.anchor=old"),  # its weights are over the sampler all the same
    *((f"loss.type={name}",) for name in ("cispo", "cppo", "dis", "dppo", "drpo", "ipo", "minirl", "reinforce")),
)


def test_a_loss_of_older_weights_has_their_ratio() -> None:
    """Which losses do is tested by their gradients, in tests/losses."""
    for loss in ON_POLICY:
        Config.load(*BASE, *loss)
        [line] = faults(*BASE, *loss, "rollout.mode=one_step_off")
        assert ": older weights play, and this loss takes what they drew for the policy's own; give it the rat" in line
    for loss in OFF_POLICY:
        Config.load(*BASE, *loss, "rollout.mode=one_step_off", "rollout.devices=own", "rollout.mesh.data=2")


def test_noise_is_over_the_sampler() -> None:
    [line] = faults(*BASE, "actor.perturb={}", "loss.type=ppo")
    assert "this loss takes a ratio to the policy at the start of the update; set loss.anchor=behavior" in line
    Config.load(*BASE, "actor.perturb={}", "loss.type=ppo", "loss.anchor=behavior")
    [line] = faults(*BASE, "loss.type=ppo", "loss.anchor=behavior", "loss.correction.method=mask")
    assert "correction.method=mask would count the difference twice: set correction.method=none" in line
