"""What `cispo serve` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

GIB = 1 << 30


class ServeOptions(BaseModel):
    """Serve the Tinker API: `export TINKER_BASE_URL=http://HOST:PORT`, and the `tinker` SDK trains and samples here."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: tuple[str, ...] = ()
    """PATH_OR_ID, or ALIAS=PATH to serve a folder under another name; several are served together. None: the embedded
    base of the `think` task."""
    state_dir: Path = Field(default_factory=lambda: platformdirs.user_data_path("cispo") / "server")
    """Runs, checkpoints and the write-ahead log. One server at a time."""
    host: str = "127.0.0.1"
    """Who can reach it: loopback only, unless told otherwise."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    keys: Path | None = None
    """A file with a line `NAME sha256:HEX` (or `NAME tml-…`) for each tenant. None: one key, made at first start."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base models; adapters are float32."""
    threads: PositiveInt | None = None
    """Of torch. The same number after a restart, or replayed weights differ in the last bits. None: one for each two
    cores, since clients on the same machine want some too."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens in one forward and backward; sampling gets its turn in between."""
    max_batch_rows: PositiveInt = 256
    """Sequences that decode together."""
    adapter_memory_gib: Annotated[float, Field(gt=0)] = 4.0
    """Adapters beyond this go to disk until they are needed."""
    cut_every: PositiveInt = 200
    """Requests between two snapshots: how many may run again after a crash."""
    journal: bool = True
    """Keep a run folder of each training run in STATE_DIR/runs, for `cispo report` and `cispo watch`: it holds prompts
    and completions as text."""
    max_body_mib: PositiveInt = 64
    max_samples: PositiveInt = 1024
    """Sequences per sample request."""
    max_requests: PositiveInt = 8192
    """Requests under way per key; beyond, 429."""
    max_runs: PositiveInt = 1024
    """Training runs per key."""
    max_stored_gib: Annotated[float, Field(gt=0)] = 100.0
    """Checkpoints and samplers per key."""
    hold_seconds: Annotated[float, Field(gt=0, le=30)] = 25.0
    """How long a poll for a result is held open."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """On SIGTERM, time to finish what is under way."""
    status: bool = False
    """Ask the server that runs on this host and port how it does, and print it."""
