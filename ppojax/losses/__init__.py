"""Losses: settings that are called with statistics and a batch, and give a sum and its weight."""

from typing import Annotated

from pydantic import Field

from ppojax.losses.aggregate import Aggregation
from ppojax.losses.dppo import DPPO
from ppojax.losses.kl import KLPenalty, kl_estimate
from ppojax.losses.nll import NLL
from ppojax.losses.ppo import PPOClip
from ppojax.losses.value import ValueLoss

Loss = Annotated[DPPO | PPOClip | NLL, Field(discriminator="type")]

__all__ = ["DPPO", "NLL", "Aggregation", "KLPenalty", "Loss", "PPOClip", "ValueLoss", "kl_estimate"]
