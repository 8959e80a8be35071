"""Reinforcement learning of language models in which no token loses its gradient (CISPO).

The public names are imported when they are first used, so that `cispo --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cispo.cli import train
    from cispo.head import LinearPolicyLoss, linear_logprobs, linear_policy_loss
    from cispo.objectives import cispo, cross_entropy, importance_sampling, ppo_clip, reinforce, unified
    from cispo.types import Learner, Sampler, Task

__version__ = "0.1.0"

__all__ = [
    "Learner",
    "LinearPolicyLoss",
    "Sampler",
    "Task",
    "cispo",
    "cross_entropy",
    "importance_sampling",
    "linear_logprobs",
    "linear_policy_loss",
    "ppo_clip",
    "reinforce",
    "train",
    "unified",
]

_HOMES = {
    "cispo.cli": ("train",),
    "cispo.head": ("LinearPolicyLoss", "linear_logprobs", "linear_policy_loss"),
    "cispo.objectives": ("cispo", "cross_entropy", "importance_sampling", "ppo_clip", "reinforce", "unified"),
    "cispo.types": ("Learner", "Sampler", "Task"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'cispo' has no attribute {name!r}")
