"""Rewards of answers: parts with weights, each a file, and their sum."""

from ppojax.envs.rewards.composite import Rewards
from ppojax.envs.rewards.part import Answered, Part

__all__ = ["Answered", "Part", "Rewards"]
