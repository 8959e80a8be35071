"""Prompts, environments and rewards: where prompts come from and what completions are worth.

`build` turns a task's config into the task; `check` finds what is wrong with its data and reward functions before a
tokenizer or a model is loaded. Left out on purpose: sampling and statistics over groups (`rollout.py`,
`advantages.py`), and whether prompts fit the model's context (`cli.py`).
"""

from __future__ import annotations

from typing import Any

from cispo import config as configs
from cispo.tasks.dataset import DatasetTask, PromptStyle, Row, check_columns, hub_rows, jsonl_rows
from cispo.tasks.rewards import NAMED, RewardFunction, Scorer, load_function
from cispo.types import Task


def check(config: configs.TaskConfig) -> None:
    """Raise ConfigError or DataError for whatever can be known to be wrong without a tokenizer."""
    if isinstance(config, configs.ThinkTask):
        return
    scorer = make_scorer(config)
    for rows in read(config):
        for row in rows:
            check_columns(row, scorer)


def build(config: configs.TaskConfig, tokenizer: Any, *, seed: int) -> Task:
    """The task of a config. `seed` draws the train prompts of `think`. Raises ConfigError, DataError."""
    if isinstance(config, configs.ThinkTask):
        from cispo.tasks.think import ThinkTask  # brings transformers' model classes

        return ThinkTask(seed=seed, train_prompts=config.train_prompts, tokenizer=tokenizer)
    train, held_out = read(config)
    style = PromptStyle(
        chat_template=config.chat_template,
        system=config.system,
        max_tokens=config.max_prompt_tokens,
        overlong=config.overlong_prompts,
    )
    return DatasetTask(train, held_out, tokenizer=tokenizer, scorer=make_scorer(config), style=style)


def read(config: configs.JsonlTask | configs.HubTask) -> tuple[list[Row], list[Row]]:
    """(train, held out) rows. Which are held out by `eval_fraction` does not depend on the run's seed."""
    options = {"eval_fraction": config.eval_fraction, "prompt_column": config.prompt_column}
    if isinstance(config, configs.JsonlTask):
        return jsonl_rows(config.path, eval_path=config.eval_path, **options)
    return hub_rows(config.name, config.config_name, split=config.split, eval_split=config.eval_split, **options)


def make_scorer(config: configs.JsonlTask | configs.HubTask) -> Scorer:
    return Scorer([make_reward(reward) for reward in config.rewards], max_failure_share=config.max_failure_share)


def make_reward(config: configs.RewardConfig) -> RewardFunction:
    if isinstance(config, configs.FunctionReward):
        return RewardFunction(
            config.path.rpartition(":")[2], load_function(config.path), config.weight, config.timeout_s
        )
    bounds_itself = isinstance(config, configs.MathReward)
    options = config.model_dump(exclude={"type", "weight"} if bounds_itself else {"type", "weight", "timeout_s"})
    return RewardFunction(config.type, NAMED[config.type](**options), config.weight, config.timeout_s)
