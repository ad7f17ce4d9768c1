"""Losses: settings that are called with statistics and a batch, and give a sum and its weight."""

from typing import Annotated

from pydantic import Field

from ppojax.losses.aggregate import Aggregation
from ppojax.losses.cispo import CISPO
from ppojax.losses.correction import Correction
from ppojax.losses.cppo import CPPO
from ppojax.losses.dis import DIS
from ppojax.losses.dppo import DPPO
from ppojax.losses.drpo import DRPO
from ppojax.losses.gspo import GSPO
from ppojax.losses.ipo import IPO
from ppojax.losses.kl import KLPenalty, KLReward, kl_estimate
from ppojax.losses.minirl import MiniRL
from ppojax.losses.nll import NLL
from ppojax.losses.ppo import PPOClip
from ppojax.losses.reinforce import Reinforce
from ppojax.losses.value import ValueLoss

# Another loss is a file, and its name here.
Loss = Annotated[
    CISPO | CPPO | DIS | DPPO | DRPO | GSPO | IPO | MiniRL | NLL | PPOClip | Reinforce, Field(discriminator="type")
]

__all__ = [
    "CISPO",
    "CPPO",
    "DIS",
    "DPPO",
    "DRPO",
    "GSPO",
    "IPO",
    "NLL",
    "Aggregation",
    "Correction",
    "KLPenalty",
    "KLReward",
    "Loss",
    "MiniRL",
    "PPOClip",
    "Reinforce",
    "ValueLoss",
    "kl_estimate",
]
