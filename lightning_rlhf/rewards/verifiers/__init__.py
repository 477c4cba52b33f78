"""Rewards that check a completion against a column of the data; ``docs/verifiers.md`` describes them.

A row without the column's value (None) is one to which the verifier does not apply: its score is None.
"""

from lightning_rlhf.rewards.verifiers.code import code
from lightning_rlhf.rewards.verifiers.constraints import constraints
from lightning_rlhf.rewards.verifiers.lengths import length
from lightning_rlhf.rewards.verifiers.math import math
from lightning_rlhf.rewards.verifiers.structured import json_schema
from lightning_rlhf.rewards.verifiers.texts import exact, number, read_number, regex, repetition

__all__ = [
    "code",
    "constraints",
    "exact",
    "json_schema",
    "length",
    "math",
    "number",
    "read_number",
    "regex",
    "repetition",
]
