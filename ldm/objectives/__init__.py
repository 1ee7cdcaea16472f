"""Losses over a batch. An objective owns what is trained and nothing of how it is trained."""

from ldm.objectives.base import Objective as Objective
