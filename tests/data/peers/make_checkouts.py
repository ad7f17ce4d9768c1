"""Run NeMo-RL's and slime's own code on the inputs of peers.npz, and write down what comes out: checkouts.npz.

Neither has a release of its trainer on the package index, so they are read from checkouts. Only the files of `FILES`
are needed, each at the commit that stands there; what else they import and do not need here is a stand-in.

    git init nemo && cd nemo
    git fetch https://github.com/NVIDIA-NeMo/RL <commit> && git checkout <commit> -- <path>     # for each of its files
    pip install torch==2.13.0 transformers==5.23.0 pydantic numpy
    python make_checkouts.py nemo slime

The numbers beside this file came from copies of the functions called here, without their metrics and without what
runs on several processes only.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types
import typing
from pathlib import Path
from types import SimpleNamespace as Settings
from unittest.mock import MagicMock

import numpy as np
import torch

HERE = Path(__file__).parent
NEMO, SLIME = "NVIDIA-NeMo/RL", "THUDM/slime"
FILES: dict[str, tuple[str, str]] = {  # module: repository and commit
    "nemo_rl.algorithms.advantage_estimator": (NEMO, "00925dd1e44b816b5cb6afa27d23d7bd7af2b957"),
    "nemo_rl.algorithms.loss.loss_functions": (NEMO, "006907a9570734f3e5d484c08ada84b0b89224c9"),
    "nemo_rl.algorithms.utils": ("svcnemo-autobot/RL", "59af9d9ffaee044d6807e45056aff22ca5a0c09d"),  # a fork of it
    "slime.backends.megatron_utils.cp_utils": (SLIME, "04949ce16edc3281acbd710e3e62045825df121e"),
    "slime.backends.megatron_utils.loss": (SLIME, "2fc48831501c09bde6f6ba1b24576504746e7108"),
    "slime.ray.rollout": (SLIME, "a51f0714179da87b1abdff81f99ae1e22034be92"),
    "slime.utils.distributed_utils": (SLIME, "358c71849efaed2a88f75d88e3452f817014a84f"),
    "slime.utils.ppo_utils": (SLIME, "501dae9c59e7203c88a0cd912892b152af5436a8"),
}
ROOTS = {"nemo_rl": Path(sys.argv[1]), "slime": Path(sys.argv[2])}
ONE_PROCESS = Settings(
    get_context_parallel_world_size=lambda: 1,
    get_context_parallel_rank=lambda: 0,
    get_context_parallel_group=lambda: None,
    get_data_parallel_group=lambda: None,
)
GIVEN = {
    "nemo_rl.algorithms.loss.interfaces": {"LossFunction": object},
    "megatron.core": {"mpu": ONE_PROCESS},
    "ray": {"remote": lambda cls: cls},
    "slime.utils.misc": {"load_function": lambda name: vars(loss)[name]},
}
OUT: dict[str, np.ndarray] = {}


class StandIn(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Checkouts:
    """Finds the files in the checkouts, and stand-ins for all that they import beside them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        top = name.partition(".")[0]
        if name in FILES:
            return importlib.util.spec_from_file_location(name, ROOTS[top] / f"{name.replace('.', '/')}.py")
        if top in {*ROOTS, "megatron", "ray", "sglang"}:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(GIVEN.get(module.__name__, {}))


sys.meta_path.insert(0, Checkouts())
torch.compile = lambda **options: lambda function: function
torch.distributed.all_reduce = lambda x, group=None: None
estimators = importlib.import_module("nemo_rl.algorithms.advantage_estimator")
nemo = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
nemo_kl = importlib.import_module("nemo_rl.algorithms.utils").calculate_kl
loss = importlib.import_module("slime.backends.megatron_utils.loss")
ppo = importlib.import_module("slime.utils.ppo_utils")
manager = importlib.import_module("slime.ray.rollout").RolloutManager

STORED = np.load(HERE / "peers.npz")
X = {name.removeprefix("input/"): torch.tensor(x) for name, x in STORED.items() if name.startswith("input/")}
MASK = X["mask"].float()
B, T = MASK.shape
LENGTHS = X["length"].tolist()
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
A, A_ROW = X["advantage"], X["row_advantage"][:, None].expand(B, T).contiguous()


def keep(name: str, **results: torch.Tensor) -> None:
    for part, x in results.items():
        OUT[f"{name}/{part}"] = x.detach().numpy().astype(np.float32)


def keep_loss(name: str, function: typing.Callable[[torch.Tensor], torch.Tensor], at: str = "now") -> None:
    """A loss and its gradient in the log-probabilities (or values)."""
    x = X[at].clone().requires_grad_()
    value = function(x)
    value.sum().backward()
    keep(name, loss=value, gradient=x.grad)


# --- NeMo-RL -------------------------------------------------------------------------------------------------------


def advantages_of_nemo() -> None:
    in_loss = Settings(use_kl_in_reward=False, reference_policy_kl_penalty=0.0, reference_policy_kl_type="k3")
    in_reward = Settings(use_kl_in_reward=True, reference_policy_kl_penalty=0.05, reference_policy_kl_type="k1")
    logps = {"logprobs_policy": X["old"], "logprobs_reference": X["ref"]}

    def group(name: str, cls: type, ids: torch.Tensor = GROUPS, kl: Settings = in_loss, **config: object) -> None:
        run = cls(estimators.AdvEstimatorConfig(**config), kl).compute_advantage
        out = run(prompt_ids=ids[:, None], rewards=X["score"].clone(), mask=MASK, **logps)
        keep(f"nemo_rl/{name}", advantage=out * MASK)

    def gae(name: str, **config: object) -> None:
        config = {"gae_gamma": 0.97, "gae_lambda": 0.9, "normalize_advantages": False} | config
        run = estimators.GeneralizedAdvantageEstimator(estimators.GAEConfig(**config), in_loss).compute_advantage
        a, r = run(GROUPS[:, None], X["score"].clone(), MASK, X["value"])
        keep(f"nemo_rl/{name}", advantage=a * MASK, returns=r * MASK)

    grpo, plus = estimators.GRPOAdvantageEstimator, estimators.ReinforcePlusPlusAdvantageEstimator
    group("grpo", grpo, use_leave_one_out_baseline=False)
    group("rloo", grpo, normalize_rewards=False)
    group("grpo_leave_one_out", grpo)
    group("grpo_alone", grpo, torch.tensor([0, 0, 0, 1, 1, 2]), use_leave_one_out_baseline=False)
    group("reinforce_plus_plus", plus, minus_baseline=False)
    group("reinforce_plus_plus_baseline", plus)
    group("reinforce_plus_plus_kl", plus, kl=in_reward, minus_baseline=False)
    gae("gae")
    gae("gae_whitened", normalize_advantages=True)
    gae("gae_by_length", length_adaptive_alpha=0.4, gae_lambda_value=1.0)
    gae("gae_monte_carlo", gae_gamma=1.0, gae_lambda=1.0)


def losses_of_nemo() -> None:
    front = lambda x: torch.nn.functional.pad(x, (1, 0))  # noqa: E731  what it says at t it keeps at t + 1
    data = {
        "token_mask": front(MASK),
        "sample_mask": torch.ones(B),
        "prev_logprobs": front(X["old"]),
        "generation_logprobs": front(X["behavior"]),
        "reference_policy_logprobs": front(X["ref"]),
        "rewards": X["score"],
    }

    def run(name: str, advantage: torch.Tensor = A, kl: float = 0.0, **config: object) -> None:
        function = nemo.ClippedPGLossFn(nemo.ClippedPGLossConfig(reference_policy_kl_penalty=kl, **config))
        given = data | {"advantages": front(advantage)}
        keep_loss(f"nemo_rl/{name}", lambda now: function(now, given, torch.tensor(float(B)), MASK.sum())[0])

    rows = {"token_level_loss": False, "sequence_level_importance_ratios": True}
    corrected = {"use_importance_sampling_correction": True}
    band = {"truncated_importance_sampling_ratio_min": 0.8, "truncated_importance_sampling_ratio": 1.2, **corrected}
    run("ppo", ratio_clip_min=0.2, ratio_clip_max=0.28)
    run("ppo_sequence", ratio_clip_min=0.2, ratio_clip_max=0.28, token_level_loss=False)
    run("dual_clip", ratio_clip_c=1.5)
    run("reinforce", disable_ppo_ratio=True)
    run("gspo", A_ROW, ratio_clip_min=0.1, ratio_clip_max=0.1, **rows)
    run("gspo_corrected", A_ROW, ratio_clip_min=0.1, ratio_clip_max=0.1, **rows, **corrected)
    run("cispo", use_cispo=True, ratio_clip_min=0.3, ratio_clip_max=0.4)
    run("correction", **corrected)
    run("correction_tis", truncated_importance_sampling_type="tis", **band)
    run("correction_icepop", truncated_importance_sampling_type="icepop", **band)
    narrow = {"truncated_importance_sampling_ratio_min": 0.98, "truncated_importance_sampling_ratio": 1.02}
    run("correction_rows", truncated_importance_sampling_type="seq-mask-tis", **(band | narrow))
    run("kl", kl=0.05)
    run("kl_weighted", kl=0.05, use_on_policy_kl_approximation=True)
    run("positive_nll", positive_example_nll_weight=0.1)
    critic = nemo.MseValueLossFn(nemo.MseValueLossConfig(cliprange=0.2))
    given = {"token_mask": MASK, "sample_mask": torch.ones(B), "returns": X["target"], "values": X["value"]}
    keep_loss("nemo_rl/value", lambda v: critic(v, given, torch.tensor(float(B)), MASK.sum())[0], at="value_now")
    for kind in ("k1", "k2", "k3"):
        keep_loss(f"nemo_rl/{kind}", lambda now, kind=kind: nemo_kl(now, X["ref"], kind))


# --- slime ---------------------------------------------------------------------------------------------------------


def rows_of(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[b, :n] for b, n in enumerate(LENGTHS)]


def filled(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, T - len(row))) for row in rows]) * MASK


LAYOUT = {"total_lengths": [n + 1 for n in LENGTHS], "response_lengths": LENGTHS, "loss_masks": rows_of(MASK)}


def advantages_of_slime() -> None:
    def run(name: str, estimator: str, *, kl: float = 0.0, **config: object) -> None:
        config = {"normalize_advantages": False, "rewards_normalization": True, "grpo_std_normalization": True} | config
        sizes = {"n_samples_per_prompt": 3, "rollout_batch_size": 2, "use_rollout_logprobs": False}
        rates = {"gamma": 0.97 if estimator == "ppo" else 1.0, "lambd": 0.9, "kl_coef": kl, "kl_loss_type": "k1"}
        args = Settings(advantage_estimator=estimator, **sizes, **rates, **config)
        samples = [Settings(get_reward_value=lambda args, b=b: X["score"][b].item()) for b in range(B)]
        self = Settings(custom_reward_post_process_func=None, args=args)
        given = LAYOUT | {
            "rewards": manager._post_process_rewards(self, samples)[1],
            "values": rows_of(X["value"]),
            "log_probs": rows_of(torch.zeros(B, T)),
            "ref_log_probs": rows_of(torch.full((B, T), -0.1)),  # a KL of 0.1 a token
        }
        loss.compute_advantages_and_returns(args, given)
        keep(f"slime/{name}", advantage=filled(given["advantages"]), returns=filled(given["returns"]))

    run("gae", "ppo")
    run("gae_whitened", "ppo", normalize_advantages=True)
    run("grpo", "grpo")
    run("dr_grpo", "grpo", grpo_std_normalization=False)
    run("reinforce_plus_plus", "reinforce_plus_plus", kl=0.1, normalize_advantages=True)
    run("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", normalize_advantages=True)


def losses_of_slime() -> None:
    defaults = {
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "use_rollout_logprobs": False,
        "use_opsm": False,
        "get_mismatch_metrics": False,
        "use_tis": False,
        "tis_clip_low": 0.8,
        "tis_clip": 1.2,
        "custom_tis_function_path": None,
        "calculate_per_token_loss": False,
        "qkv_format": "thd",
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "use_unbiased_kl": False,
        "kl_loss_type": "k3",
        "kl_loss_coef": 0.05,
        "value_clip": 0.2,
    }

    def run(name: str, advantage: torch.Tensor = A, **config: object) -> None:
        args = Settings(**(defaults | config))
        batch = LAYOUT | {
            "unconcat_tokens": None,
            "advantages": rows_of(advantage),
            "log_probs": rows_of(X["old"]),
            "rollout_log_probs": rows_of(X["behavior"]),
            "ref_log_probs": rows_of(X["ref"]),
        }
        # Its losses are sums over rows (or tokens), which it divides afterwards.
        reducer = loss.get_sum_of_sample_mean(*LAYOUT.values(), args.calculate_per_token_loss)
        weight = MASK.sum() if args.calculate_per_token_loss else B

        def function(now: torch.Tensor) -> torch.Tensor:
            given = {"log_probs": rows_of(now), "entropy": rows_of(torch.zeros(B, T))}
            loss.get_log_probs_and_entropy = lambda *args, **kwargs: given
            return loss.policy_loss_function(args, batch, now, reducer)[0] / weight

        keep_loss(f"slime/{name}", function)

    def alone(name: str, function: typing.Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """A mean over rows of what the log ratio and the log-probability give for each token."""
        mean = loss.get_sum_of_sample_mean(*LAYOUT.values())
        old = torch.cat(rows_of(X["old"]))
        flat = lambda now: torch.cat(rows_of(now))  # noqa: E731
        keep_loss(f"slime/{name}", lambda now: mean(function(old - flat(now), flat(now))) / B)

    run("ppo")
    run("ppo_token", calculate_per_token_loss=True)
    run("ppo_behavior", use_rollout_logprobs=True)
    run("gspo", A_ROW, advantage_estimator="gspo", eps_clip=0.1, eps_clip_high=0.1)
    run("correction_tis", use_tis=True)
    run("correction_icepop", use_tis=True, custom_tis_function_path="icepop_function")
    run("kl", use_kl_loss=True)
    run("kl_weighted", use_kl_loss=True, use_unbiased_kl=True)
    a = torch.cat(rows_of(A))
    alone("dual_clip", lambda kl, now: ppo.compute_policy_loss(kl, a, 0.2, 0.2, 1.5)[0])
    alone("cispo", lambda kl, now: ppo.compute_cispo_loss(kl, now, a, 0.3, 0.4)[0])

    critic = LAYOUT | {"unconcat_tokens": None, "values": rows_of(X["value"]), "returns": rows_of(X["target"])}
    args = Settings(**defaults)

    def value(v: torch.Tensor) -> torch.Tensor:
        loss.get_values = lambda *args, **kwargs: {"values": rows_of(v)}
        return loss.value_loss_function(args, critic, v, loss.get_sum_of_sample_mean(*LAYOUT.values()))[0] / B

    keep_loss("slime/value", value, at="value_now")
    for kind in ("k1", "k2", "k3"):
        keep_loss(f"slime/{kind}", lambda now, kind=kind: ppo.compute_approx_kl(now, X["ref"], kind))


def main() -> None:
    for run in (advantages_of_nemo, losses_of_nemo, advantages_of_slime, losses_of_slime):
        run()
    path = HERE / "versions.json"
    versions = json.loads(path.read_text())
    for module, (repository, commit) in FILES.items():
        versions.setdefault(repository, {})[f"{module.replace('.', '/')}.py"] = commit
    path.write_text(json.dumps(versions, indent=2) + "\n")
    np.savez_compressed(HERE / "checkouts.npz", **OUT)


if __name__ == "__main__":
    main()
