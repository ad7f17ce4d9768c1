"""Run the published implementations of other libraries on random inputs, and write down what comes out: peers.npz.

    python -m venv peers && . peers/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 "pydantic<2.12" jaxtyping hydra-core omegaconf
    pip install --no-deps verl==0.9.1 trl==1.16.0 openrlhf==0.11.2 skyrl==0.3.0 areal==1.0.4
    python make_peers.py        # and `pip install --no-deps` of what it then says is missing: ray, tensordict, datasets

What a peer imports and does not need here is a stand-in. NeMo-RL and slime, which have no release of their trainers on
the package index, are in make_checkouts.py; what a peer has only inside a training loop is left out: TRL's advantages.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import types
import typing
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace as Settings
from unittest.mock import MagicMock

import numpy as np
import torch
import typing_extensions

warnings.filterwarnings("ignore")
typing.TypedDict = typing_extensions.TypedDict  # pydantic asks for it below Python 3.12

B, T = 6, 12
GROUPS = [0, 0, 0, 1, 1, 1]
STAND_INS = ("deepspeed", "flash_attn", "flask", "areal.infra", "areal.experimental", "openrlhf.trainer.ray")
OUT: dict[str, np.ndarray] = {}


class StandIn(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class StandIns:
    """Finds modules that are only imported, never called."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if any(name == stand_in or name.startswith(f"{stand_in}.") for stand_in in STAND_INS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def without_init(*names: str) -> None:
    """Make packages importable without running what their own __init__ imports."""
    for name in names:
        parent, _, last = name.rpartition(".")
        path = (
            f"{sys.modules[parent].__path__[0]}/{last}"
            if parent
            else next(iter(importlib.util.find_spec(name).submodule_search_locations))
        )
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]


sys.meta_path.insert(0, StandIns())
without_init("openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.trainer.ppo_utils")
without_init("areal", "areal.trainer", "areal.trainer.ppo", "areal.utils")
verl = importlib.import_module("verl.trainer.ppo.core_algos")
verl_correction = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
verl_config = importlib.import_module("verl.workers.config").ActorConfig
openrlhf_loss = importlib.import_module("openrlhf.models.loss")
openrlhf_kl = importlib.import_module("openrlhf.models.utils").compute_approx_kl
skyrl = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
trl = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
areal = importlib.import_module("areal.utils.functional.functional")
areal_band = importlib.import_module("areal.api.cli_args").RejectionSamplingConfig
areal_kl = importlib.import_module("areal.utils.data").KLEstimator


def inputs() -> dict[str, torch.Tensor]:
    """Rows of 3 to 12 tokens with observations inside, which begin and end with an action; one fills all columns."""
    rng = np.random.default_rng(0)
    length = np.array([12, 7, 3, 10, 9, 5])
    inside = np.arange(T)[None] < length[:, None]
    mask = inside & (rng.random((B, T)) < 0.7)
    mask[:, 0] = True
    mask[np.arange(B), length - 1] = True
    behavior = rng.uniform(-4, -0.2, (B, T))
    old = np.minimum(behavior + rng.normal(0, 0.2, (B, T)), -0.01)
    now = np.minimum(old + rng.normal(0, 1.0, (B, T)), -0.01)
    arrays = {
        "length": length,
        "mask": mask,
        "behavior": behavior,
        "old": old,
        "now": now,
        "ref": np.minimum(now + rng.normal(0, 0.4, (B, T)), -0.01),
        "advantage": rng.normal(size=(B, T)),
        "row_advantage": rng.normal(size=B),
        "reward": mask * rng.normal(size=(B, T)),
        "score": rng.normal(size=B),
        "value": inside * rng.normal(size=(B, T)),
        "value_now": rng.normal(size=(B, T)),
        "value_after": rng.normal(size=B),
        "target": rng.normal(size=(B, T)),
    }
    return {name: torch.tensor(x, dtype=None if x.dtype != float else torch.float32) for name, x in arrays.items()}


X = inputs()
MASK = X["mask"].float()
LAST = torch.nn.functional.one_hot(X["length"] - 1, T).float()
SCORES = X["score"][:, None] * LAST  # the whole reward on a row's last token
A_ROW = X["row_advantage"][:, None].expand(B, T).contiguous()


def keep(name: str, **results: torch.Tensor) -> None:
    for part, x in results.items():
        OUT[f"{name}/{part}"] = x.detach().numpy().astype(np.float32)


def keep_loss(name: str, loss: typing.Callable[[torch.Tensor], torch.Tensor], at: str = "now") -> None:
    """A loss and its gradient in the log-probabilities (or values)."""
    x = X[at].clone().requires_grad_()
    value = loss(x)
    value.sum().backward()
    keep(name, loss=value, gradient=x.grad)


def advantages_of_verl() -> None:
    index = np.array(GROUPS)
    a, r = verl.compute_gae_advantage_return(X["reward"], X["value"], MASK, 0.97, 0.9)
    keep("verl/gae", advantage=a * MASK, returns=r * MASK)
    for norm in (True, False):
        a, _ = verl.compute_grpo_outcome_advantage(SCORES.clone(), MASK, index, norm_adv_by_std_in_grpo=norm)
        keep("verl/grpo" if norm else "verl/dr_grpo", advantage=a)
    keep("verl/rloo", advantage=verl.compute_rloo_outcome_advantage(SCORES.clone(), MASK, index)[0])
    plus = verl.compute_reinforce_plus_plus_outcome_advantage(X["reward"], MASK, config=Settings(gamma=1.0))
    keep("verl/reinforce_plus_plus", advantage=plus[0], returns=plus[1])
    base = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(SCORES.clone(), MASK, index)
    keep("verl/reinforce_plus_plus_baseline", advantage=base[0])
    alone = np.array([0, 0, 0, 1, 1, 2])
    keep("verl/grpo_alone", advantage=verl.compute_grpo_outcome_advantage(SCORES.clone(), MASK, alone)[0])
    keep("verl/rloo_alone", advantage=verl.compute_rloo_outcome_advantage(SCORES.clone(), MASK, alone)[0])


def advantages_of_skyrl() -> None:
    index = np.array(GROUPS)
    a, r = skyrl.compute_gae_advantage_return(X["reward"], X["value"], MASK, 0.97, 0.9)
    keep("skyrl/gae", advantage=a * MASK, returns=r * MASK)
    keep("skyrl/grpo", advantage=skyrl.compute_grpo_outcome_advantage(SCORES.clone(), MASK, index)[0])
    keep("skyrl/rloo", advantage=skyrl.compute_rloo_outcome_advantage(SCORES.clone(), MASK, index)[0])
    alone = np.array([0, 0, 0, 1, 1, 2])
    keep("skyrl/rloo_alone", advantage=skyrl.compute_rloo_outcome_advantage(SCORES.clone(), MASK, alone)[0])
    plus = skyrl.compute_reinforce_plus_plus_outcome_advantage(X["reward"], MASK, 1.0)
    keep("skyrl/reinforce_plus_plus", advantage=plus[0] * MASK, returns=plus[1] * MASK)


def advantages_of_openrlhf() -> None:
    maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    maker.apply_length_penalties = lambda experiences, args: None
    cls = next(x for x in vars(maker).values() if isinstance(x, type) and hasattr(x, "get_cumulative_returns"))
    for estimator in ("gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"):
        advantage = Settings(
            estimator=estimator, gamma=0.97 if estimator == "gae" else 1.0, lambd=0.9, no_std_norm=False
        )
        args = Settings(
            algo=Settings(advantage=advantage),
            rollout=Settings(n_samples_per_prompt=3),
            reward=Settings(clip_range=None),
        )
        self = object.__new__(cls)
        self.strategy, self.advantage_estimator, self.kl_ctl = Settings(args=args), estimator, Settings(value=0.1)
        # A KL of 0.1 a token, of which its coefficient takes 0.01 off each reward; none where there is a baseline,
        # which OpenRLHF makes of the scores alone.
        kl = 0.1 * MASK if estimator in ("gae", "reinforce") else 0.0 * MASK
        experience = Settings(
            rewards=X["score"].clone(), index=list(range(B)), info={}, values=X["value"], kl=kl, action_mask=MASK
        )
        self.compute_advantages_and_returns([experience])
        keep(f"openrlhf/{estimator}", advantage=experience.advantages * MASK, returns=experience.returns * MASK)


def advantages_of_areal() -> None:
    cls = importlib.import_module("areal.trainer.ppo.actor").PPOActor
    self = object.__new__(cls)
    self.config = Settings(overlong_reward_penalty=False, use_decoupled_loss=True, recompute_logprob=True)
    self.reward_bias, self.reward_scaling, self.reward_clip, self.reward_norm, self.adv_norm = (
        0.0,
        1.0,
        20.0,
        None,
        None,
    )
    self.kl_ctl, self.kl_estimator, self.mask_no_eos_with_zero = 0.0, areal_kl("k1"), False
    self.discount, self.gae_lambda = 0.97, 0.9
    # AReaL speaks at t of token t + 1: a token before all is put in front. Rows that fill all columns were truncated.
    ahead = torch.nn.functional.pad
    inside = torch.arange(T)[None] < X["length"][:, None]
    values = ahead(X["value"], (0, 1))
    values[0, T] = X["value_after"][0]
    data = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "attention_mask": ahead(inside, (1, 0), value=True),
        "loss_mask": ahead(X["mask"], (1, 0)),
        "logprobs": torch.zeros(B, T + 1),
        "rewards": X["score"].clone(),
        "values": values,
    }
    out = cls._compute_advantages(self, data)
    keep("areal/gae", advantage=out["advantages"][:, :T] * MASK, returns=out["returns"][:, :T] * MASK)


def losses_of_verl() -> None:
    def run(name: str, mode: str, advantage: torch.Tensor, agg: str = "token-mean", **config: float) -> None:
        settings = verl_config(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **config)
        loss = verl.get_policy_loss_fn(mode)
        keep_loss(f"verl/{name}", lambda now: loss(X["old"], now, advantage, MASK, agg, settings)[0])

    A = X["advantage"]
    run("ppo", "vanilla", A, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1e6)
    run("dual_clip", "vanilla", A, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=1.5)
    run("dppo_tv", "dppo_tv", A, clip_ratio_low=0.1, clip_ratio_high=0.15, clip_ratio_c=1.7)
    run("dppo_kl", "dppo_kl", A, clip_ratio_low=0.02, clip_ratio_high=0.03, clip_ratio_c=1.7)
    run("gspo", "gspo", A, "seq-mean-token-mean", clip_ratio_low=0.1, clip_ratio_high=0.1)
    run("cispo", "cispo", A, clip_ratio_low=0.3, clip_ratio_high=0.4)
    gap = X["old"] - X["behavior"]

    def corrected(name: str, mask: torch.Tensor = MASK, weight: torch.Tensor | None = None) -> None:
        settings = verl_config(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=0.2, clip_ratio_c=1e6)
        loss = verl.get_policy_loss_fn("vanilla")
        keep_loss(f"verl/{name}", lambda now: loss(X["old"], now, A, mask, "token-mean", settings, weight)[0])

    for level in ("token", "sequence"):
        for name, band in (("tis", 1.2), ("icepop", "0.8_1.2")):
            weight, _ = verl_correction.compute_rollout_correction_weights(gap, MASK, level, band)
            corrected(f"{name}_{level}", weight=weight)
    # Its bounds are of the sampler's probability over the policy's.
    kept, _ = verl_correction.compute_rollout_rejection_mask(gap, MASK, "seq_mean_k1", f"{1 / 1.02}_{1 / 0.98}")
    corrected("rejection", mask=kept)
    for agg in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        keep_loss(f"verl/{agg}", lambda x, agg=agg: verl.agg_loss(x, MASK, agg, loss_scale_factor=20))
    clip = lambda v: verl.compute_value_loss(v, X["target"], X["value"], MASK, 0.2)[0]  # noqa: E731
    keep_loss("verl/value", clip, at="value_now")
    for kind in ("k1", "k2", "k3", "k3+"):
        keep_loss(f"verl/{kind}", lambda now, kind=kind: verl.kl_penalty(now, X["ref"], kind))


def losses_of_skyrl() -> None:
    names = (
        "tis_ratio_type",
        "sequence_mask_metric",
        "outlier_token_is_threshold_low",
        "outlier_token_is_threshold_high",
    )
    off = dict.fromkeys((*names, "token_mask_is_threshold_low", "token_mask_is_threshold_high"))

    def run(
        name: str,
        loss: typing.Callable,
        advantage: torch.Tensor,
        reduction: str,
        correction: dict[str, object] | None = None,
        **config: object,
    ) -> None:
        correct = Settings(**(off | (correction or {})))
        settings = Settings(off_policy_correction=correct, loss_reduction=reduction, **config)
        scaled = skyrl.apply_loss_reduction_to_advantages_minibatch(advantage, MASK, reduction, B, 20)
        rollout = X["behavior"] if "dppo" in config or correction else None
        keep_loss(f"skyrl/{name}", lambda now: loss(now, X["old"], scaled, settings, MASK, rollout)[0])

    A, clip = X["advantage"], {"eps_clip_low": 0.2, "eps_clip_high": 0.28}
    for reduction in ("token_mean", "sequence_mean", "seq_mean_token_sum_norm"):
        run(f"ppo_{reduction}", skyrl.ppo_policy_loss, A, reduction, policy_loss_type="regular", **clip)
    run("dual_clip", skyrl.ppo_policy_loss, A, "token_mean", policy_loss_type="dual_clip", clip_ratio_c=1.5, **clip)
    tokens = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2}
    every_token = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1e6}
    rows = {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.2}
    geometric = {"sequence_mask_metric": "geometric", "geo_mask_low": 0.98, "geo_mask_high": 1.02}
    product = {"sequence_mask_metric": "product", "product_mask_low": 0.8, "product_mask_high": 1.25}
    for name, correction in {
        "tis_token": tokens,
        "tis_sequence": rows,
        "geometric": geometric,
        "geometric_tis": geometric | every_token,
        "product": product,
    }.items():
        kind = {"policy_loss_type": "regular", "eps_clip_low": 0.2, "eps_clip_high": 0.2}
        run(f"correction_{name}", skyrl.ppo_policy_loss, A, "token_mean", correction, **kind)
    run("gspo", skyrl.gspo_policy_loss, A, "sequence_mean", eps_clip_low=0.1, eps_clip_high=0.1)
    cispo = Settings(cispo_eps_clip_low=0.3, cispo_eps_clip_high=0.4)
    run("cispo", skyrl.compute_policy_loss_cispo, A, "token_mean", cispo=cispo)
    for kind, low, high in (("tv", 0.1, 0.15), ("kl", 0.02, 0.03)):
        dppo = Settings(dppo_type=f"binary_{kind}", delta_low=low, delta_high=high)
        run(f"dppo_{kind}", skyrl.dppo_policy_loss, A, "token_mean", dppo=dppo)
    value = Settings(value_clip=0.2)
    critic = lambda v: skyrl.ppo_critic_loss(v, X["value"], X["target"], value, MASK)[0]  # noqa: E731
    keep_loss("skyrl/value", critic, at="value_now")
    for kind in ("k1", "k2", "k3"):
        keep_loss(f"skyrl/{kind}", lambda now, kind=kind: skyrl.compute_approx_kl(now, X["ref"], None, kind))


def losses_of_openrlhf() -> None:
    def run(name: str, advantage: torch.Tensor, **config: object) -> None:
        loss = openrlhf_loss.PolicyLoss(**config)
        keep_loss(f"openrlhf/{name}", lambda now: loss(now, X["old"], advantage, MASK, X["behavior"])[0])

    A = X["advantage"]
    run("ppo", A, clip_eps_low=0.2, clip_eps_high=0.28)
    run("ppo_sequence", A, clip_eps_low=0.2, clip_eps_high=0.28, token_level_loss=False)
    run("dual_clip", A, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=1.5)
    run("gspo", A_ROW, clip_eps_low=0.1, clip_eps_high=0.1, policy_loss_type="gspo")
    for mode in ("clip", "mask"):
        run(
            f"correction_{mode}",
            A,
            is_correction_level="token",
            is_correction_mode=mode,
            is_correction_threshold=[0.8, 1.2],
        )
    narrow = {"is_correction_mode": "mask", "is_correction_threshold": [0.98, 1.02]}
    run("correction_rows", A, is_correction_level="seq", **narrow)
    clip = openrlhf_loss.ValueLoss(clip_eps=0.2)
    keep_loss("openrlhf/value", lambda v: clip(v, X["value"], X["target"], MASK), at="value_now")
    for kind in ("k1", "k2", "k3"):
        keep_loss(f"openrlhf/{kind}", lambda now, kind=kind: openrlhf_kl(now, X["ref"], None, kind))


def losses_of_trl() -> None:
    def run(
        name: str, kind: str, level: str = "token", delta: float | None = None, high: float = 0.28, low: float = 0.2
    ):
        self = object.__new__(trl)
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.use_vllm = self.use_adaptive_entropy = False
        self.top_entropy_quantile, self.off_policy_mask_threshold, self.importance_sampling_level = 1.0, None, level
        self.beta, self.loss_type, self.epsilon_low, self.epsilon_high = 0.05, kind, low, high
        self.args = Settings(delta=delta, use_bias_correction_kl=False, steps_per_generation=1)
        self.current_gradient_accumulation_steps, self.max_completion_length = 1, 20
        self.model, self._metrics = Settings(training=True), {"train": defaultdict(list)}
        same = lambda x, reduction=None: x  # noqa: E731
        self.accelerator = Settings(num_processes=1, gather=same, reduce=same, sync_gradients=True)
        batch = {
            "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
            "prompt_mask": torch.ones(B, 1),
            "completion_ids": torch.zeros(B, T, dtype=torch.long),
            "completion_mask": MASK,
            "advantages": X["row_advantage"],
            "old_per_token_logps": X["old"],
            "ref_per_token_logps": X["ref"],
            "num_items_in_batch": MASK.sum(),
        }

        def loss(now: torch.Tensor) -> torch.Tensor:
            self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (now, torch.zeros_like(now), None)
            return trl._compute_loss(self, None, batch)

        keep_loss(f"trl/{name}", loss)

    for kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        run(kind, kind)
    run("delta", "dapo", delta=1.5, high=0.2)
    run("gspo", "grpo", level="sequence", high=0.1, low=0.1)
    run("cispo", "cispo", high=1.4)


def losses_of_areal() -> None:
    def run(name: str, advantage: torch.Tensor, **config: object) -> None:
        keep_loss(
            f"areal/{name}",
            lambda now: areal.ppo_actor_loss_fn(now, X["old"], X["behavior"], advantage, loss_mask=X["mask"], **config)[
                0
            ],
        )

    run("ppo", X["advantage"], eps_clip=0.2, eps_clip_higher=0.28)
    run("dual_clip", X["advantage"], eps_clip=0.2, c_clip=1.5)
    run("gspo", A_ROW, eps_clip=0.1, importance_sampling_level="sequence")
    wide, rows = (
        {"metric": "ratio", "lower": 0.8, "upper": 1.2},
        {"level": "sequence", "agg": "mean", "metric": "ratio"},
    )
    for name, band in {
        "decoupled": {"action": "clamp", "metric": "ratio", "upper": 1e6},
        "correction_tis": {"action": "clamp", **wide},
        "correction_icepop": {"action": "mask", **wide},
        "correction_tis_rows": {"action": "clamp", "lower": 0.98, "upper": 1.02, **rows},
        "correction_mask_rows": {"action": "mask", "lower": 0.98, "upper": 1.02, **rows},
    }.items():
        run(name, X["advantage"], eps_clip=0.2, rejection_sampling=areal_band(**band))
    critic = lambda v: areal.ppo_critic_loss_fn(v, X["value"], X["target"], 0.2, X["mask"])[0]  # noqa: E731
    keep_loss("areal/value", critic, at="value_now")


def main() -> None:
    for run in (
        advantages_of_verl,
        advantages_of_skyrl,
        advantages_of_openrlhf,
        advantages_of_areal,
        losses_of_verl,
        losses_of_skyrl,
        losses_of_openrlhf,
        losses_of_trl,
        losses_of_areal,
    ):
        run()
    here = Path(__file__).parent
    versions = json.loads((here / "versions.json").read_text()) | {
        name: importlib.metadata.version(name) for name in ("verl", "trl", "openrlhf", "skyrl", "areal", "torch")
    }
    print(json.dumps(versions))
    (here / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    np.savez_compressed(here / "peers.npz", **{f"input/{k}": v.numpy() for k, v in X.items()}, **OUT)


if __name__ == "__main__":
    main()
