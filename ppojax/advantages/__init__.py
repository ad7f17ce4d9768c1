"""Advantage estimators: settings that are called with an experience."""

from typing import Annotated

from pydantic import Field

from ppojax.advantages.gae import GAE
from ppojax.advantages.group import Group

AdvantageEstimator = Annotated[GAE | Group, Field(discriminator="type")]

__all__ = ["GAE", "AdvantageEstimator", "Group"]
