"""Coefficients that follow what is measured: the KL inside the reward, the entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from ppojax.config import Config
from ppojax.experience.kl_reward import penalize
from ppojax.experience.reward_scaling import scale
from ppojax.types import Experience


@dataclass
class Controls:
    """The coefficients of the step to come."""

    config: Config
    kl: float
    entropy: float = 1.0  # times the bonus

    @classmethod
    def start(cls, config: Config) -> Controls:
        """As the config says."""
        return cls(config, 0.0 if config.kl_reward is None else config.kl_reward.coefficient)

    @property
    def entropy_scale(self) -> float | None:
        """What the entropy bonus is multiplied with; None where it is not controlled."""
        return None if self.config.entropy_control is None else self.entropy

    def penalize(self, experience: Experience) -> tuple[Experience, dict[str, float]]:
        """Scale rewards and take the KL off them, where that is asked for, and move its coefficient."""
        settings = self.config.kl_reward
        experience = scale(experience, self.config.reward_scaling, bootstraps=self.config.advantage.bootstraps)
        if settings is None:
            return experience, {}
        used = self.kl
        experience, kl = penalize(experience, used, settings.estimator)
        self.kl = settings.next(used, float(kl), self.config.rollout.rows)
        return experience, {"actor/reward_kl_penalty": float(kl), "actor/reward_kl_penalty_coeff": used}

    def follow_entropy(self, metrics: dict[str, float]) -> dict[str, float]:
        """Move the scale of the entropy bonus after a step with these metrics."""
        control, used = self.config.entropy_control, self.entropy
        if control is None:
            return {}
        if "actor/entropy" in metrics:
            self.entropy = control.next(used, metrics["actor/entropy"])
        return {"actor/entropy_scale": used}

    def position(self) -> dict[str, float]:
        """What a checkpoint keeps, as JSON."""
        return {"kl": self.kl, "entropy": self.entropy}

    def restore(self, position: dict[str, float]) -> None:
        """Go back to where `position()` was taken."""
        self.kl, self.entropy = position["kl"], position["entropy"]
