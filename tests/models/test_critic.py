"""Where critics come from: cuts of every kind of decoder, heads that start at the centre, ensembles."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from helpers import ACTOR, SPEC, params, random_experience
from ppojax.errors import DataError
from ppojax.models.critic import cut_spec, cut_trunk
from ppojax.models.critic_source import CriticForm, load_critic
from ppojax.models.forward import ModelDef, init, join, values
from ppojax.models.pretrained import Loaded
from ppojax.models.settings import CutCritic, FreshCritic, FreshSpec
from ppojax.models.spec import DecoderSpec, MoESpec
from ppojax.models.tokenizer import char_tokenizer
from ppojax.models.value_head import ArctanHead, HLGaussHead, LinearHead, ValueHead

TOKENIZER = char_tokenizer("ab")
VALUES = jax.jit(values, static_argnums=(0, 3))
SHAPE = FreshSpec(layers=1, width=16, heads=2, kv_heads=2, ffn=16)


def actor() -> Loaded:
    return Loaded(ACTOR, params(), TOKENIZER)


@pytest.mark.parametrize("head", [LinearHead(), ArctanHead(low=-1, high=3), HLGaussHead(bins=5)], ids=lambda h: h.type)
@pytest.mark.parametrize("count", [1, 2])
def test_every_state_has_the_same_value_at_the_start(head: ValueHead, count: int) -> None:
    experience, layout = random_experience(share=True)
    model, drawn = load_critic(CutCritic(layers=1), actor(), jax.random.key(0), CriticForm(head, count))
    got = np.asarray(VALUES(model, drawn, experience, layout))
    assert got.shape == (count, *experience.token_BT.shape) and got.dtype == np.float32
    inside = np.asarray(experience.action_BT)
    centre = {"linear": 0.0, "arctan": 1.0, "hl_gauss": 0.5}[head.type]
    np.testing.assert_array_equal(got[:, inside], np.full_like(got[:, inside], centre))


def test_members_differ_by_the_noise_and_one_has_none() -> None:
    experience, _ = random_experience()
    single, plain = load_critic(CutCritic(layers=1), actor(), jax.random.key(0), CriticForm(noise=0.1))
    assert not np.asarray(VALUES(single, plain, experience)).any()
    model, drawn = load_critic(CutCritic(layers=1), actor(), jax.random.key(0), CriticForm(count=4, noise=0.1))
    got = np.asarray(VALUES(model, drawn, experience))[:, np.asarray(experience.action_BT)]
    # Final hidden states have unit scale: each value is a sum of 32 terms of deviation .1 / sqrt(32).
    assert 0.03 < got.std(0).mean() < 0.2
    assert len({tuple(row) for row in got[:, :3].tolist()}) == 4


def test_fresh_members_have_their_own_trunks() -> None:
    model, drawn = load_critic(FreshCritic(shape=SHAPE), actor(), jax.random.key(0), CriticForm(count=2))
    assert model.count == 2 and drawn["trunk"]["embed"].shape == (2, SPEC.vocab, 16)
    assert not np.array_equal(drawn["trunk"]["embed"][0], drawn["trunk"]["embed"][1])
    one, alone = load_critic(FreshCritic(shape=SHAPE), actor(), jax.random.key(0))
    assert one.count == 1 and alone["trunk"]["embed"].shape == (SPEC.vocab, 16)


def test_the_values_of_an_ensemble_are_those_of_its_members() -> None:
    experience, layout = random_experience(share=True)
    model = ModelDef(SPEC.model_copy(update={"layers": 1}), head=HLGaussHead(bins=5), count=3)
    members = [params(model.member, seed) for seed in range(3)]
    together = values(model, join(members), experience, layout)
    for m, alone in enumerate(members):
        # The same float32 sums, batched over members.
        want = values(model.member, alone, experience, layout)[0]
        np.testing.assert_allclose(together[m], want, rtol=1e-5, atol=1e-6)
    order = np.array([2, 0, 1])
    permuted = values(model, jax.tree.map(lambda x: x[order], join(members)), experience, layout)
    np.testing.assert_array_equal(permuted, together[order])


def test_a_cut_takes_what_says_of_each_block_what_it_is() -> None:
    spec = DecoderSpec(
        layers=4, width=8, heads=2, kv_heads=2, head_width=4, ffn=8, vocab=16, tied=False, window=4,
        windowed=(True, False, True, False), unrotated=(False, False, False, True),
    )  # fmt: skip
    cut = cut_spec(spec, 3)
    assert cut.layers == 3 and cut.windowed == (True, False, True) and cut.unrotated == (False, False, False)
    assert cut.tied and cut.window == 4
    assert DecoderSpec.model_validate(cut.model_dump()) == cut


@pytest.mark.parametrize(
    ("layers", "stacks"), [(1, {"layers": 1}), (2, {"layers": 2}), (3, {"dense_layers": 2, "layers": 1})]
)
def test_dense_blocks_at_the_bottom_are_cut_first(layers: int, stacks: dict[str, int]) -> None:
    spec = DecoderSpec(
        layers=4, width=8, heads=2, kv_heads=2, head_width=4, ffn=8, vocab=16,
        moe=MoESpec(experts=4, chosen=2, ffn=4, dense_first=2),
    )  # fmt: skip
    blocks = np.arange(2)
    whole = {"embed": 0, "norm": 1, "dense_layers": {"gate": blocks}, "layers": {"router": blocks}}
    trunk, cut = cut_trunk(spec, whole, layers), cut_spec(spec, layers)
    assert {name: len(next(iter(trunk[name].values()))) for name in trunk if "layers" in name} == stacks
    assert (cut.moe is None) == (layers <= 2) and cut.moe_layers == max(layers - 2, 0)
    assert DecoderSpec.model_validate(cut.model_dump()) == cut
    assert set(trunk["layers"]) == ({"gate"} if layers <= 2 else {"router"})


def test_a_cut_critic_sees_what_the_actor_sees() -> None:
    """All of the actor's blocks, its norm and its embeddings: the trunk's state is the actor's."""
    _, cut = load_critic(CutCritic(layers=2), actor(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, cut["trunk"], params())
    untied = ModelDef(SPEC.model_copy(update={"tied": False}))
    model, cut = load_critic(
        CutCritic(layers=1), Loaded(untied, init(untied, jax.random.key(0)), TOKENIZER), jax.random.key(0)
    )
    assert model.spec.tied and "head" not in cut["trunk"]


def test_more_blocks_than_there_are_cannot_be_cut() -> None:
    with pytest.raises(DataError, match=r"critic\.model\.layers = 3, the actor has 2 layers"):
        load_critic(CutCritic(layers=3), actor(), jax.random.key(0))
    with pytest.raises(ValueError, match="has 2 layers"):
        cut_spec(SPEC, 3)
