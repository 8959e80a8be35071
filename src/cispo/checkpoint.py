"""Checkpoints that a kill at any moment cannot spoil: written beside, synced, then renamed into place.

`checkpoints/step-000012/` holds `model/` (an ordinary transformers or peft folder), the learner's own safetensors, and
`state.json` (schedule, cursor, buffer, metrics position, random-number states, the config). A folder with that name is
complete; what a kill leaves has another name and is swept away. Nothing here unpickles. Left out on purpose: what the
state means (`trainer.py`), and sharded checkpoints (`sharded.py`).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cispo.types import DataError, Group, Learner, Prompt, Trajectory

_NAME = re.compile(r"step-(\d{6,})$")


def save(run_dir: Path, step: int, learner: Learner, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `checkpoints/step-<step>` atomically and prune all but the newest `keep`. Returns its folder."""
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for torn in parent.glob(".writing-*"):
        shutil.rmtree(torn)
    final = parent / f"step-{step:06d}"
    if final.exists():  # nothing has been trained since
        return final
    building = parent / f".writing-{final.name}"
    building.mkdir()
    learner.save(building)
    (building / "state.json").write_text(json.dumps({**state, "rng": _rng_state()}))
    for path in [*building.rglob("*"), building]:
        _sync(path)
    building.rename(final)
    _sync(parent)
    for old in complete(run_dir)[:-keep]:
        shutil.rmtree(old.rename(parent / f".writing-{old.name}"))  # half removed, it must not look complete
    return final


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.search(path.name)]
    return sorted(found, key=lambda path: int(_NAME.search(path.name).group(1)))


def latest(run_dir: Path) -> Path:
    """The newest complete checkpoint. Raises DataError where there is none."""
    found = complete(run_dir)
    if not found:
        raise DataError(f"{run_dir}: has no complete checkpoint to resume from; start again in another folder")
    return found[-1]


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json`, with the random-number states put back. Raises DataError where it is not readable."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'state.json'}: cannot be read: {error}") from None
    _restore_rng(state.pop("rng"))
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rng_state() -> dict[str, Any]:
    """Reward functions may draw from any of these; our own draws are functions of the run's seed."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
    }


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


# ------------------------------------------------------------------------------------------------------ groups as JSON


def group_to_json(group: Group) -> dict[str, Any]:
    """A group without its prompt's text, which the task still has. float32 values survive JSON exactly."""
    return {
        "prompt_id": group.prompt.prompt_id,
        "admission": group.admission,
        "version": group.version,
        "trajectories": [
            {
                "tokens": t.tokens.tolist(),
                "action_mask": t.action_mask.int().tolist(),
                "sampler_logprobs": t.sampler_logprobs.tolist(),
                "versions": t.versions.tolist(),
                "text": t.text,
                "reward": t.reward,
                "rewards": dict(t.rewards),
                "truncated": t.truncated,
            }
            for t in group.trajectories
        ],
    }


def group_from_json(record: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Group:
    """Raises DataError where the task no longer has the group's prompt."""
    if record["prompt_id"] not in prompts:
        raise DataError(f"checkpoint: prompt {record['prompt_id']} is no longer in the task's data")
    return Group(
        prompt=prompts[record["prompt_id"]],
        admission=record["admission"],
        version=record["version"],
        trajectories=tuple(
            Trajectory(
                tokens=torch.tensor(t["tokens"]),
                action_mask=torch.tensor(t["action_mask"], dtype=torch.bool),
                sampler_logprobs=torch.tensor(t["sampler_logprobs"], dtype=torch.float32),
                versions=torch.tensor(t["versions"]),
                text=t["text"],
                reward=t["reward"],
                rewards=t["rewards"],
                truncated=t["truncated"],
            )
            for t in record["trajectories"]
        ),
    )
