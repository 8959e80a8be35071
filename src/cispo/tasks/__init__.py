"""Prompts, environments and rewards: one class a kind of task, chosen by the config's type.

Left out on purpose: sampling and statistics over groups (`rollout.py`, `advantages.py`).
"""

from __future__ import annotations

from typing import Any

from cispo import config as configs
from cispo.types import Task


def check(config: configs.TaskConfig) -> None:
    """What can be found wrong before a tokenizer or a model is loaded. Raises DataError, ConfigError."""


def build(config: configs.TaskConfig, tokenizer: Any, *, seed: int) -> Task:
    """The task of a config. Raises DataError, ConfigError."""
    match config:
        case configs.ThinkTask():
            from cispo.tasks.think import ThinkTask

            return ThinkTask(seed=seed, train_prompts=config.train_prompts, tokenizer=tokenizer)
        case _:
            raise NotImplementedError(config.type)
