"""Reinforcement learning of language models in which no token loses its gradient (CISPO)."""

from typing import Any

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


def train(*args: Any, **kwargs: Any) -> Any:
    """Run a whole training: see `cispo.cli.train`, which composes it. Imported late, because it needs transformers."""
    from cispo.cli import train as run

    return run(*args, **kwargs)
