"""What a vLLM engine is to the sampler, and the one that is a server: the same verbs over HTTP.

Talking to a server needs no vLLM here. Left out on purpose: the engine of this process and the sampler (`vllm.py`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cispo.config import VllmConfig
from cispo.types import Completion, ConfigError, RunError

SUPPORTED = "0.32"
"""The vLLM whose interfaces this file speaks: of the engine installed here, and of a server."""


class EngineLost(RunError):
    """The engine died, stopped answering, or came back as another. Its requests are to be sampled again."""


@dataclass(frozen=True)
class Job:
    """One request as an engine gets it. `salt` keeps apart the prefix caches of different weights."""

    name: str
    prompt: tuple[int, ...]
    num_samples: int
    sampling: Mapping[str, Any]
    salt: str


class Engine(Protocol):
    """What the sampler asks of vLLM. Everything but `kill` runs on the loop."""

    lost: asyncio.Future[EngineLost]

    async def generate(self, job: Job) -> list[Completion]: ...

    async def weight_version(self) -> str:
        """The label of the engine's weights; asked regularly, as a sign of life."""

    async def pause(self, mode: str, clear_cache: bool) -> None: ...

    async def resume(self) -> None: ...

    async def call(self, name: str, payload: dict[str, Any] | str | None = None) -> None:
        """One of the four steps of a weight update by vLLM's name for it, or `update_weight_version`."""

    async def close(self) -> None: ...

    def kill(self) -> None:
        """End it at once, where it is ours."""


def completion_of(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    spans: Sequence[tuple[str, int, int]],
    finish_reason: str | None,
) -> Completion:
    """Ours from vLLM's. Raises EngineLost for one that was aborted or written by weights of unknown version."""
    if finish_reason not in ("stop", "length"):
        raise EngineLost(f"vllm: a completion ended by {finish_reason!r}")
    versions: list[int] = []
    for version, start, end in spans:
        if not version.isdigit():
            raise EngineLost(f"vllm: a completion was written by weights {version!r}, which this run never published")
        versions.extend([int(version)] * (end - start))
    if len(versions) != len(tokens):
        raise EngineLost(f"vllm: {len(tokens)} tokens came with versions of {len(versions)}")
    return Completion(tuple(tokens), tuple(logprobs), tuple(versions), finish_reason)


def check_version(found: str, where: str) -> None:
    """Raises ConfigError for a vLLM whose interfaces may be others."""
    if ".".join(found.split(".")[:2]) != SUPPORTED:
        raise ConfigError(
            f"vllm: {where} is of version {found}, and this cispo speaks to {SUPPORTED}.x only; install vllm=="
            f"{SUPPORTED}.*"
        )


# ------------------------------------------------------------------------------------------------------------ a server


class Server:
    """A vLLM server at an address, which needs `VLLM_SERVER_DEV_MODE=1` (the routes that change weights)."""

    def __init__(self, url: str, config: VllmConfig):
        try:
            import aiohttp
        except ImportError as error:
            raise ConfigError(
                f"vllm.url: talking to a server needs aiohttp ({error}); run pip install aiohttp"
            ) from None
        self.lost = asyncio.get_running_loop().create_future()
        self._url = url.rstrip("/")
        self._config = config
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
        )
        self._max_sequences = 1 << 62

    async def start(self, *, wait: bool) -> dict[str, Any]:
        """The server's configuration. Raises ConfigError where it is none of ours, EngineLost where it is not there.

        wait: a server that was there before is given `start_timeout_s` to come back.
        """
        until = time.monotonic() + (self._config.start_timeout_s if wait else 0)
        while True:
            try:
                version = (await self._request("GET", "/version"))["version"]
                break
            except EngineLost:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(1.0)
        check_version(version, f"the server at {self._url}")
        try:
            info = await self._request("GET", "/server_info?config_format=json")
        except RunError as error:
            raise ConfigError(
                f"vllm.url: {self._url} does not let its weights be changed; start it with VLLM_SERVER_DEV_MODE=1 and "
                f"the flags in docs/vllm.md ({error})"
            ) from None
        config = info["vllm_config"]
        self._max_sequences = int(at(config, "scheduler_config", "max_num_seqs") or 1 << 62)
        return config

    async def tokenize(self, text: str) -> list[int]:
        return (await self._request("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}))["tokens"]

    async def generate(self, job: Job) -> list[Completion]:
        """In parts, where a server decodes fewer at once than there are samples."""
        parts, start = [], 0
        while start < job.num_samples:
            n = min(job.num_samples - start, self._max_sequences)
            sampling = {**job.sampling, "n": n, "seed": job.sampling["seed"] + start}
            parts.append(self._generate(replace(job, name=f"{job.name}-{start}", sampling=sampling)))
            start += n
        return [completion for part in await asyncio.gather(*parts) for completion in part]

    async def _generate(self, job: Job) -> list[Completion]:
        body = {
            "request_id": job.name,
            "token_ids": list(job.prompt),
            "sampling_params": dict(job.sampling),
            "cache_salt": job.salt,
        }
        answer = await self._request("POST", "/inference/v1/generate", body)
        return [
            completion_of(
                choice["token_ids"],
                [position["logprob"] for position in choice["logprobs"]["content"]],
                [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"] or ()],
                choice["finish_reason"],
            )
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]

    async def weight_version(self) -> str:
        return (await self._request("GET", "/weight_info"))["weight_version"]

    async def pause(self, mode: str, clear_cache: bool) -> None:
        await self._request("POST", f"/pause?mode={mode}&clear_cache={str(clear_cache).lower()}")

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def call(self, name: str, payload: dict[str, Any] | str | None = None) -> None:
        key = {
            "init_weight_transfer_engine": "init_info",
            "update_weights": "update_info",
            "finish_weight_update": "weight_version",
            "update_weight_version": "new_version",
        }.get(name)
        await self._request("POST", f"/{name}", None if key is None else {key: payload})

    async def _request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answer. Raises EngineLost for a server that is gone or broken, RunError for one that refuses."""
        import aiohttp

        try:
            async with self._client.request(method, self._url + path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(f"vllm: no answer from {self._url}: {first_line(error)}") from error
        except ValueError as error:
            raise ConfigError(f"vllm.url: {self._url} is no address: {error}; write http://host:port") from error
        if response.status >= 500 and path.startswith(("/inference", "/weight_info", "/version")):
            raise EngineLost(f"vllm: {self._url}{path} failed ({response.status}): {text[:300]}")
        if response.status >= 400:
            raise RunError(f"vllm: {self._url}{path} was refused ({response.status}): {text[:300]}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise RunError(f"vllm: {self._url}{path} did not answer JSON; is it a vLLM server?") from None

    async def close(self) -> None:
        await self._client.close()

    def kill(self) -> None:
        """A server is not ours to end."""


def at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
