"""Tinker: `loss_fn`, `loss_fn_config` JSON and AdamParams in, our config out.

The thresholds are absolute, the anchor is the sampler, and every loss is a plain sum. Read in the SDK 0.38 and Tinker's
docs. Left out on purpose: the wire protocol (`cispo serve`), and losses that need no RL (cross_entropy).

    cispo explain --like tinker --loss_fn cispo --loss_fn_config '{"clip_high_threshold": 4.0}'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cispo.dialects.datasets import without_dataset
from cispo.dialects.draft import Draft, Given, Setting, Table, Translation, coerce, read_flags, split_arguments
from cispo.types import ConfigError

_CONFIG_KEYS = {
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "importance_sampling": {},
    "dro": {"beta": 0.05},
}
TINKER = Table(
    "tinker",
    "Tinker",
    {
        s.name: s
        for s in [
            Setting("loss_fn", "str"),
            Setting("loss_fn_config", "json"),
            Setting("base_model", "str", None, ("model_name",)),
            Setting("lora_rank", "int", 32, ("rank",)),
            Setting("learning_rate", "float", 1e-4),
            Setting("beta1", "float", 0.9),
            Setting("beta2", "float", 0.95),
            Setting("eps", "float", 1e-12),
            Setting("weight_decay", "float", 0.0),
            Setting("grad_clip_norm", "float", 0.0),
            Setting("group_size", "int", 16),
            Setting("groups_per_batch", "int", 32),
            Setting("num_substeps", "int", 1),
            Setting("max_tokens", "int", 512),
            Setting("temperature", "float", 1.0),
            Setting("top_p", "float", 1.0),
            Setting("top_k", "int", -1),
            Setting("seed", "int"),
            Setting("kl_penalty_coef", "float", 0.0),
            Setting("max_steps_off_policy", "int", None),
        ]
    },
    {
        "the service's own": ("base_url", "api_key", "project_id", "user_metadata", "ttl_seconds", "sdk_version"),
        "every step is logged (metrics.jsonl, rollouts/)": ("log_path", "wandb_project", "wandb_name"),
        "cispo's own": ("eval_every", "save_every", "renderer_name", "dataset", "env"),
    },
    defaults_from="Tinker's",
)


def translate(arguments: Sequence[str]) -> Translation:
    """`--loss_fn cispo --loss_fn_config JSON …`, or one JSON object (text or file) with the same keys."""
    draft = Draft(TINKER)
    theirs, ours = split_arguments(arguments)
    flags = []
    while theirs and not theirs[0].startswith("--"):
        flags += _from_json(theirs.pop(0))
    given = TINKER.accept(flags + read_flags(theirs, draft), draft)
    _objective(draft, given)
    draft.set("algorithm.anchor", "sampler", "Tinker's `logprobs` input is the sampler's")
    draft.set("algorithm.reduction", "sum", "every loss of Tinker is a sum")
    draft.set("algorithm.advantage", "group_mean", "tinker-cookbook's advantages")
    for key in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        draft.take(f"optimizer.{key}", given, key)
    draft.take("rollout.group_size", given, "group_size")
    draft.take("rollout.groups_per_step", given, "groups_per_batch")
    draft.take("algorithm.updates_per_rollout", given, "num_substeps")
    for key in ("max_tokens", "temperature", "top_p"):
        draft.take(f"rollout.{key}", given, key)
    draft.take("rollout.top_k", given, "top_k", max(0, given["top_k"] or 0))
    if given["max_steps_off_policy"] is not None:
        draft.take("async.max_staleness", given, "max_steps_off_policy")
    if given["kl_penalty_coef"]:
        draft.take("algorithm.kl.coef", given, "kl_penalty_coef")
        draft.set("algorithm.kl.place", "reward", "tinker-cookbook's KL is in the reward")
        draft.set("algorithm.kl.form", "k1", "tinker-cookbook's KL")
    if given["base_model"] is not None:
        draft.take("model.path", given, "base_model")
    draft.take("model.lora.rank", given, "lora_rank")
    if given["seed"] is not None:
        draft.take("seed", given, "seed")
    without_dataset(draft)
    draft.override(ours)
    return draft.finish(given)


def _from_json(word: str) -> list:
    try:
        text = Path(word).read_text(encoding="utf-8") if not word.lstrip().startswith("{") else word
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no possible path
        raise ConfigError(f"--like tinker: {word!r}: neither a JSON object nor a readable file ({error})") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--like tinker: {word}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--like tinker: {word}: holds a {type(values).__name__}, not an object with loss_fn")
    return [(str(k), v if isinstance(v, list) else [v], str(k)) for k, v in values.items()]


def _objective(draft: Draft, given: Given) -> None:
    loss, origin = given["loss_fn"], given.origin("loss_fn")
    if loss is None:
        draft.problem("--loss_fn is missing; choose from cispo, ppo, importance_sampling, dro")
        return
    if loss not in _CONFIG_KEYS:
        why = {
            "cross_entropy": "is supervised; there is no RL to run",
            "gspo": "has no published formula in Tinker; use --algorithm.objective.type gspo with a recipe of ours",
            "stable_reinforce": "has no published formula; use cispo",
            "custom": "runs in the client; name your own with --algorithm.objective.type function",
        }.get(loss, "is unknown to Tinker; choose from cispo, ppo, importance_sampling, dro")
        draft.problem(f"--loss_fn {loss}: {why}")
        return
    config = given["loss_fn_config"]
    config = {} if config is None else config
    if not isinstance(config, dict):
        draft.problem(f"--loss_fn_config: holds a {type(config).__name__}, not an object of numbers")
        return
    kinds = {"ppo": "ppo_clip"}
    draft.set("algorithm.objective.type", kinds.get(loss, loss), origin)
    known = Table(
        "tinker", f"Tinker's {loss}", {k: Setting(k, "float", v) for k, v in _CONFIG_KEYS[loss].items()}, dash=""
    )
    inner = known.accept([(str(k), v, f"loss_fn_config.{k}") for k, v in config.items()], draft)
    for name, default in _CONFIG_KEYS[loss].items():
        value = coerce(inner[name], known.settings[name])
        origin = f"loss_fn_config.{name}" if name in inner else "Tinker's default"
        draft.set(f"algorithm.objective.{name}", default if value is None else value, origin)
