"""Benchmarks against the alternatives: each a module with an options dataclass and `run(options) -> int`.

They are imported only when asked for, because the peers that they compare with are heavy (extra `bench`).

    cispo bench head
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

BENCHES = {
    "head": "HeadBenchOptions",
    "rollout": "RolloutBenchOptions",
    "train": "TrainBenchOptions",
    "server": "ServerBenchOptions",
}
"""Module of this package, and the name of its options."""


def load(name: str) -> tuple[type[Any], Callable[[Any], int]]:
    """The options dataclass (for tyro) and the `run` of one benchmark."""
    module = importlib.import_module(f"cispo.bench.{name}")
    return getattr(module, BENCHES[name]), module.run
