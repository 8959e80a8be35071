"""Where prompts and rewards of another system's recipe come from, in our words: shared by the dialects.

Left out on purpose: reward functions that live inside another system and have no equal here; the message says how to
pass them as `package.module:function`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cispo.dialects.draft import OURS, Draft, Given

ANSWER_FORMAT = r"^<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])"
THINK_FORMAT = r"^<think>(?!.*<think>)(.*?)</think>.*$"


def place_dataset(draft: Draft, name: str, origin: str) -> None:
    """A .jsonl file or a hub dataset."""
    if name.endswith((".jsonl", ".json")):
        draft.set("task.type", "jsonl", origin)
        draft.set("task.path", name, origin)
    else:
        draft.set("task.type", "hub", origin)
        draft.set("task.name", name, origin)


def place_rewards(
    draft: Draft,
    names: Sequence[str],
    weights: Sequence[float] | None,
    origin: str,
    known: Mapping[str, dict[str, Any] | str],
) -> None:
    """Reward functions by that system's names (`known`: name → our section, or why there is none) or import path."""
    rewards = []
    for name in names:
        entry = known.get(name)
        if isinstance(entry, str):
            draft.problem(f"{origin}: {name}: {entry}; pass your own as package.module.function")
        elif entry is not None:
            rewards.append(dict(entry))
        elif ":" in name or "." in name:
            module, _, function = name.rpartition(":") if ":" in name else name.rpartition(".")
            rewards.append({"type": "function", "path": f"{module}:{function}"})
        else:
            draft.problem(
                f"{origin}: {name!r} is not a reward function known here; choose from "
                f"{', '.join(k for k, v in known.items() if isinstance(v, dict))}, or an import path"
            )
    if weights is not None and len(weights) != len(names):
        draft.problem(f"{origin}: {len(names)} reward functions and {len(weights)} reward weights; give one each")
        weights = None
    for reward, weight in zip(rewards, weights or (), strict=False):
        reward["weight"] = weight
    if rewards:
        draft.set("task.rewards", rewards, origin)


def without_dataset(draft: Draft) -> None:
    """Nothing says what to train on: the embedded task stands in."""
    draft.set("task.type", "think", OURS)
    if draft.raw.get("model", {}).get("path"):
        draft.warn(
            "no dataset is given: the embedded task `think` stands in; name one, or use --tiny to try the recipe"
        )


def without_evaluation(draft: Draft) -> None:
    draft.set("eval.every", 0, "derived: no held-out data is named")


def place_updates(draft: Draft, given: Given, *, groups: float, updates: float, names: Sequence[str]) -> None:
    """groups_per_step and updates_per_rollout, which must be whole numbers that divide."""
    origin = given.origin(*names)
    shown = ", ".join(f"{n} = {given[n]}" for n in names if given[n] is not None)
    if groups < 1 or groups != int(groups):
        draft.problem(f"{shown}: makes {groups:g} prompt groups in a rollout; the batch must hold whole groups")
        return
    if updates < 1 or updates != int(updates):
        draft.problem(f"{shown}: makes {updates:g} updates in a rollout; it must be a whole number")
        return
    if groups % updates:
        draft.problem(
            f"{shown}: {groups:g} prompt groups do not divide into {updates:g} updates; a group is not split here, "
            "since its completions share a baseline and (by prompt) a normaliser"
        )
        return
    draft.set("rollout.groups_per_step", int(groups), origin)
    draft.set("algorithm.updates_per_rollout", int(updates), origin)


def whole_steps(updates: float, per_step: int) -> int:
    return max(1, math.ceil(updates / per_step))
