"""Reward functions: the named ones, your own by `package.module:function`, and the `Scorer` that runs several of them.

All have the signature that people know from TRL, `f(prompts, completions, **columns) -> list[float | None]`, over the G
completions of one prompt: every argument is a list of G and is passed by name. A function gets what it asks for: the
data row's columns, `prompt_ids` and `completion_ids` besides, everything where it takes `**kwargs`. As in TRL, a
completion of a chat prompt is `[{"role": "assistant", "content": text}]` and one of a string prompt is a string.

Left out on purpose: the advantage (floor 1), what a truncated completion is worth (`rollout.py`), and stopping a
function in mid-air: one that runs past its timeout is given up on and its thread left to end. (Python's `re` holds the
interpreter while it backtracks, so a runaway pattern cannot even be timed out. The `math` reward is a process for that
reason.)
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from cispo.types import ConfigError, Prompt, RunError

logger = logging.getLogger(__name__)

Reward = float | None
Message = dict[str, Any]

OURS = ("prompts", "completions", "prompt_ids", "completion_ids")
"""What a reward function may ask for besides the data row's columns."""


# -------------------------------------------------------------------------------------------------- the named functions


def text_of(completion: str | Sequence[Message]) -> str:
    """A completion's text, of a string or of a chat."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@dataclass(frozen=True)
class Exact:
    """1 where the completion, stripped, equals the column, stripped and as a string; else 0."""

    column: str = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[Reward]:
        golds = columns[self.column]
        return [float(text_of(c).strip() == str(gold).strip()) for c, gold in zip(completions, golds, strict=True)]


@dataclass(frozen=True)
class Format:
    """1 where the pattern (Python's `re`; begin with `(?s)` for a dot that crosses lines) matches; else 0.

    mode: "fullmatch" is the whole completion, "search" anywhere in it. Raises ConfigError for a pattern that is none.
    """

    pattern: str
    mode: Literal["fullmatch", "search"] = "fullmatch"

    def __post_init__(self) -> None:
        if self.mode not in ("fullmatch", "search"):
            raise ConfigError(f"reward format: mode is {self.mode!r}; use 'fullmatch' or 'search'")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"reward format: pattern {self.pattern!r} is not a regular expression: {error}"
            ) from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[Reward]:
        matches = getattr(re.compile(self.pattern), self.mode)
        return [float(matches(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class Length:
    """DAPO's soft overlong punishment (arXiv:2503.14476 eq. 13), of a completion y of |y| tokens, EOS included:

    0                                          where |y| ≤ max_tokens − cache_tokens
    (max_tokens − cache_tokens − |y|) / cache_tokens   in between
    −1                                         where |y| > max_tokens
    """

    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ConfigError(
                f"reward length: cache_tokens is {self.cache_tokens} with max_tokens {self.max_tokens}; the penalty "
                f"grows over the last cache_tokens of max_tokens, so use 1 to {self.max_tokens}"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[Reward]:
        return [self.penalty(len(ids)) for ids in completion_ids]

    def penalty(self, length: int) -> float:
        over = length - (self.max_tokens - self.cache_tokens)
        return -min(max(over / self.cache_tokens, 0.0), 1.0)


class Math:
    """1 where math-verify finds the column's expression in the completion, 0 where it does not.

    column: the gold answer: a number, an expression, LaTeX, or GSM8K's `reasoning #### 72`.
    timeout_s: for the G completions of one prompt, from when a worker is free; what is not judged by then gets None.
    completion_timeout_s: for one completion; beyond it its worker process is ended, and it gets None.
    workers: processes at most; they start when first needed.

    Raises ConfigError where math-verify (extra `math`) is not installed, and when called ValueError for a gold answer
    that is no expression and TimeoutError where not one completion could be judged.
    """

    bounds_itself = True  # the wait for a free worker must not count against the timeout

    def __init__(
        self,
        column: str = "answer",
        *,
        timeout_s: float = 30.0,
        completion_timeout_s: float = 5.0,
        workers: int | None = None,
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("reward math needs math-verify, which is not installed: pip install 'cispo[math]'")
        self.column = column
        self.columns = (column,)
        self.timeout_s = timeout_s
        self.completion_timeout_s = completion_timeout_s
        self._idle: queue.LifoQueue[_MathWorker | None] = queue.LifoQueue()
        for _ in range(workers or min(4, os.cpu_count() or 1)):
            self._idle.put(None)
        weakref.finalize(self, _close_workers, self._idle)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[Reward]:
        worker = self._idle.get()
        deadline = time.monotonic() + self.timeout_s
        rewards: list[Reward] = []
        try:
            for gold, completion in zip(columns[self.column], completions, strict=True):
                if time.monotonic() > deadline:
                    break
                worker = worker or _MathWorker(self.completion_timeout_s)
                reply = worker.ask(str(gold), text_of(completion))
                if reply is None:
                    worker.close()
                    worker = None
                    rewards.append(None)
                elif "error" in reply:
                    raise ValueError(reply["error"])
                else:
                    rewards.append(reply["reward"])
        finally:
            self._idle.put(worker)
        rewards += [None] * (len(completions) - len(rewards))
        if all(reward is None for reward in rewards):
            raise TimeoutError(
                f"no completion was judged in {self.completion_timeout_s:g} s each, {self.timeout_s:g} s together"
            )
        if None in rewards:
            logger.warning("reward math: %d of %d completions not judged in time", rewards.count(None), len(rewards))
        return rewards


class _MathWorker:
    """One `math_worker.py`. It ends itself when a completion takes longer than `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
        if not self._process.stdout.readline():
            self.close()
            raise RuntimeError(f"the math worker did not start: exit status {self._process.returncode}, see stderr")

    def ask(self, gold: str, completion: str) -> dict[str, Any] | None:
        """The worker's answer; None where it ended without one."""
        try:
            print(json.dumps({"gold": gold, "completion": completion}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a request that was still in our buffer
            self._process.stdin.close()


def _close_workers(idle: queue.LifoQueue[_MathWorker | None]) -> None:
    while True:
        try:
            worker = idle.get_nowait()
        except queue.Empty:
            return
        if worker is not None:
            worker.close()


NAMED: Mapping[str, Callable[..., Any]] = {"exact": Exact, "math": Math, "format": Format, "length": Length}
"""The named reward functions: `NAMED[name](**options)` is one."""


def load_function(path: str) -> Callable[..., Any]:
    """The function `package.module:function`; modules of the current directory can be named too.

    Raises ConfigError where the path has no colon, the module or the attribute does not exist, the import fails, or
    what is there is not a function.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        head, _, tail = path.rpartition(".")
        hint = f"{head}:{tail}" if head else "package.module:function"
        raise ConfigError(
            f"reward function {path!r} is not of the form package.module:function; did you mean {hint!r}?"
        )
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"reward function {path!r}: importing {module_name} failed: {error}") from error
        raise ConfigError(
            f"reward function {path!r}: there is no module {error.name!r}, neither installed nor in {here}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"reward function {path!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, [name for name in vars(module) if not name.startswith("_")])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"reward function {path!r}: module {module_name} has no {attribute!r}{hint}")
    function = getattr(module, attribute)
    if inspect.isclass(function) or not callable(function):
        raise ConfigError(
            f"reward function {path!r}: {attribute} is a {type(function).__name__}, not a function "
            "f(prompts, completions, **columns) -> list[float | None]"
        )
    return function


# ---------------------------------------------------------------------------------------------------------- running one


@dataclass(frozen=True)
class RewardFunction:
    """A reward function as it takes part in a run.

    name: its key in the rewards and metrics. weight: in the total. timeout_s: for one call, that is for the G
    completions of one prompt.

    A sync function runs in a thread of its own for each call, so several calls can overlap; an async one runs in the
    caller's event loop.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"reward {self.name}: weight is {self.weight}; use a finite number")
        if not self.timeout_s > 0:
            raise ConfigError(f"reward {self.name}: timeout_s is {self.timeout_s}; use a positive number of seconds")
        try:
            inspect.signature(self.function)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {self.name}: {error}; wrap it in a Python function") from error
        by_position = [p.name for p in self._parameters if p.kind is p.POSITIONAL_ONLY]
        if by_position:
            raise ConfigError(
                f"reward {self.name}: parameter {by_position[0]!r} is positional-only; it is passed by name"
            )

    @functools.cached_property
    def _parameters(self) -> Sequence[inspect.Parameter]:
        return tuple(inspect.signature(self.function).parameters.values())

    @functools.cached_property
    def required_columns(self) -> frozenset[str]:
        """The columns without which the function cannot be called."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        asked = {p.name for p in self._parameters if p.kind not in variadic and p.default is p.empty}
        return frozenset(asked - set(OURS)) | frozenset(getattr(self.function, "columns", ()))

    def accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            return dict(arguments)
        names = {p.name for p in self._parameters}
        return {name: value for name, value in arguments.items() if name in names}

    async def __call__(self, arguments: Mapping[str, Any], count: int) -> list[Reward]:
        """The rewards of `count` completions, checked. Raises whatever the function does, TimeoutError, ValueError."""
        timeout_s = None if getattr(self.function, "bounds_itself", False) else self.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                rewards = await self._call(self.accepted(arguments))
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"took longer than timeout_s = {self.timeout_s:g} s") from error
        if isinstance(rewards, str) or not isinstance(rewards, Iterable):
            raise ValueError(f"returned {type(rewards).__name__}, not a list of {count} numbers")
        rewards = list(rewards)
        if len(rewards) != count:
            raise ValueError(f"returned {len(rewards)} rewards for {count} completions")
        return [_number(reward, index) for index, reward in enumerate(rewards)]

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        function = self.function
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(**arguments)
        result = await _in_thread(functools.partial(function, **arguments), f"reward-{self.name}")
        return await result if inspect.isawaitable(result) else result


def _number(reward: Any, index: int) -> Reward:
    """A float, or None. Numpy's and torch's scalars are numbers too."""
    if reward is None:
        return None
    if not isinstance(reward, Real) and hasattr(reward, "item"):
        reward = reward.item()
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(f"returned {reward!r} for completion {index}, which is not a finite number or None")
    return float(reward)


def _in_thread(function: Callable[[], Any], name: str) -> Awaitable[Any]:
    """What the function returns or raises, awaited without blocking the loop.

    A daemon thread for each call and not an executor: a call that never ends would keep its place in a pool, and an
    executor's threads are joined at exit.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():  # given up on
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except StopIteration as error:  # which a future cannot carry
            failure = RuntimeError("raised StopIteration")
            failure.__cause__ = error
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


# ------------------------------------------------------------------------------------------------------ running several


class Scorer:
    """Runs all reward functions over one prompt's completions, at the same time, and stops a run that they break.

    A call that raises, times out, or returns something other than G finite numbers or Nones gives None for those
    completions; it is counted in `failures` and logged with its traceback. RunError, with the last failure as its
    cause, when more than `max_failure_share` of a function's last `window` calls failed (and it had `least` at least).

    Of functions with the same name, the second is called `name_2` and so on.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        max_failure_share: float = 0.5,
        window: int = 200,
        least: int = 20,
    ) -> None:
        if not functions:
            raise ConfigError("task.rewards is empty; name at least one reward function")
        self.functions: dict[str, RewardFunction] = {}
        seen: Counter[str] = Counter()
        for function in functions:
            seen[function.name] += 1
            number = seen[function.name]
            self.functions[function.name if number == 1 else f"{function.name}_{number}"] = function
        self.max_failure_share = max_failure_share
        self.least = least
        self.failures: Counter[str] = Counter()
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=window) for name in self.functions}

    @property
    def weights(self) -> dict[str, float]:
        return {name: function.weight for name, function in self.functions.items()}

    def missing_columns(self, columns: Iterable[str]) -> dict[str, str]:
        """By column that some function needs and that is not among `columns`: the function's name."""
        have = set(columns)
        return {c: name for name, function in self.functions.items() for c in sorted(function.required_columns - have)}

    async def score(
        self,
        prompt: Prompt,
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[dict[str, Reward]]:
        """For each of G completions, the reward by function. Raises RunError when too many calls of one fail."""
        G = len(completions)
        chat = not isinstance(prompt.text, str)
        arguments = {name: [value] * G for name, value in prompt.columns.items()} | {
            "prompts": [prompt.text] * G,
            "completions": [[{"role": "assistant", "content": c}] for c in completions] if chat else list(completions),
            "prompt_ids": [list(prompt.tokens)] * G,
        }
        if completion_ids is not None:
            arguments["completion_ids"] = [list(ids) for ids in completion_ids]
        columns = await asyncio.gather(*(self._rewards(name, prompt, arguments, G) for name in self.functions))
        return [dict(zip(self.functions, row, strict=True)) for row in zip(*columns, strict=True)]

    def total(self, rewards: Mapping[str, Reward]) -> Reward:
        """Σ weight · reward over the functions that gave one; None where none did."""
        given = [self.functions[name].weight * reward for name, reward in rewards.items() if reward is not None]
        return sum(given) if given else None

    async def _rewards(self, name: str, prompt: Prompt, arguments: Mapping[str, Any], count: int) -> list[Reward]:
        try:
            rewards = await self.functions[name](arguments, count)
        except Exception as error:
            self.failures[name] += 1
            self._recent[name].append(True)
            logger.warning("reward %s failed on prompt %s: %s", name, prompt.prompt_id, error, exc_info=error)
            self._stop_if_broken(name, error)
            return [None] * count
        self._recent[name].append(False)
        return rewards

    def _stop_if_broken(self, name: str, error: Exception) -> None:
        calls, failed = len(self._recent[name]), sum(self._recent[name])
        if calls >= self.least and failed > self.max_failure_share * calls:
            raise RunError(
                f"reward {name}: {failed} of the last {calls} calls failed, more than task.max_failure_share = "
                f"{self.max_failure_share:g}; the last with {type(error).__name__}: {error}"
            ) from error
