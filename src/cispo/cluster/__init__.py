"""Several processes and machines behind the verbs: the only door to Ray, and the launches of the sharded learner.

`compose` gives a learner and a sampler for a config's `cluster` section; the trainer does not know where they run, and
nothing here is imported when they run in its own process. Ray is used for placement and supervision, torch's process
groups between the learner's ranks. Left out on purpose: the loop (`trainer.py`), FSDP2 itself (`sharded.py`), engines
(`sampling/`), and memory arithmetic (`plan.py`).

    cispo train RECIPE.yaml --cluster ray --cluster.learner_ranks 8 --cluster.samplers 4
    torchrun --nproc-per-node 8 -m cispo train RECIPE.yaml --cluster torchrun
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cispo.config import Config
from cispo.types import ConfigError, Learner, Sampler, Task


@dataclass(frozen=True)
class Parts:
    """What a run works with, and what ends it. sampler: None where the caller builds its own."""

    learner: Learner
    sampler: Sampler | None
    task: Task
    close: Callable[[], None]


def compose(config: Config, path: str | Path, task: Task) -> Parts:
    """The learner and the sampler of `config.cluster`, started and answering.

    path: the model folder or hub id, which every machine must be able to read. Raises ConfigError for resources that
    are not there, before anything is loaded.
    """
    match config.cluster.kind:
        case "torchrun":
            from cispo.cluster.torchrun import conduct

            learner = conduct(config, path)
            return Parts(learner, None, task, learner.close)
        case "ray":
            try:
                import ray  # noqa: F401
            except ImportError as error:
                raise ConfigError(f"cluster.kind: ray is not installed ({error}); pip install 'cispo[ray]'") from None
            from cispo.cluster.start import compose_ray

            return compose_ray(config, path, task)
    raise ConfigError(f"cluster.kind: {config.cluster.kind} has no cluster; build the parts in this process")


def follows(config: Config) -> bool:
    """Whether this process is one of torchrun's ranks that only follow the first: it must call `follow`."""
    from cispo.cluster.torchrun import rank_of_torchrun

    return config.cluster.kind == "torchrun" and rank_of_torchrun(config) != 0


def follow(config: Config, path: str | Path) -> None:
    """Take part in the first rank's verbs until it is done."""
    from cispo.cluster.torchrun import follow

    follow(config, path)
