"""Environments: what a policy talks to in several turns, and functions that it can call."""

from lightning_rlhf.rl.environments.calculator import Calculator
from lightning_rlhf.rl.environments.guess import GuessNumber
from lightning_rlhf.rl.environments.tools import ToolEnvironment
from lightning_rlhf.rollout.environment import Environment, Turn, TurnError

__all__ = ["Calculator", "Environment", "GuessNumber", "ToolEnvironment", "Turn", "TurnError"]
