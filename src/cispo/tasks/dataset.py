"""Tasks from data: the rows of a JSONL file or of a hub dataset become prompts, and reward functions judge completions.

Two steps, so that mistakes in the data are found before a tokenizer or a weight is loaded: `jsonl_rows` and `hub_rows`
read and check syntax, columns and messages; `DatasetTask` then turns rows into tokens. Every row knows its place (file
and line), and every error names it.

Left out on purpose: streaming and sharded data (a task's prompts are a sequence in memory), images, and shuffling (the
trainer's cursor does it).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cispo.tasks.rewards import OURS, Reward, Scorer
from cispo.types import ConfigError, DataError, Prompt

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Row:
    """One question as it stands in the data.

    place: where, for messages: "data.jsonl:17" (lines count from 1) or "openai/gsm8k[train] row 16" (rows from 0).
    index: its number among the rows of its source, from 0. prompt: a string or chat messages. columns: the rest.
    """

    place: str
    index: int
    prompt: str | list[dict[str, Any]]
    columns: Mapping[str, Any]


# -------------------------------------------------------------------------------------------------------------- reading


def read_rows(path: str | Path, *, prompt_column: str = "prompt", answer_column: str | None = None) -> list[Row]:
    """The rows of a JSONL file: UTF-8, one JSON object a line; blank lines are skipped.

    answer_column: its value is also the column `answer`. Raises DataError, with file and line, for a file that is
    missing or empty, a line that is not a JSON object, and a prompt that is missing or neither string nor messages.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a JSONL file" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what} (looked from {Path.cwd()})")
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                place = f"{path}:{number}"
                rows.append(make_row(place, len(rows), parse_line(place, line), prompt_column, answer_column))
    if not rows:
        raise DataError(f"{path}: is empty; expected one JSON object a line with a column {prompt_column!r}")
    return rows


def parse_line(place: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start + 1}: {error.reason}); convert the file") from error
    except json.JSONDecodeError as error:
        hint = "; a JSONL file has one whole object on each line" if line.strip()[:1] in (b"[", b"{") else ""
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: a JSON {type(value).__name__}, not an object; a JSONL file has one object on each line"
        )
    return value


def read_hub_rows(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    prompt_column: str = "prompt",
    answer_column: str | None = None,
) -> list[Row]:
    """The rows of one split of a hub dataset, or of a folder that `datasets.load_dataset` understands.

    Raises ConfigError where `datasets` is not installed, and DataError where there is no such dataset or split, or as
    `read_rows` does.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"task.name is {name!r}, a hub dataset, which needs `datasets`: pip install 'cispo[datasets]', or use "
            "task.type jsonl"
        ) from error
    source = f"{name}[{split}]" if config_name is None else f"{name}/{config_name}[{split}]"
    try:
        dataset = datasets.load_dataset(name, config_name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {type(error).__name__}: {error}") from error
    rows = [
        make_row(f"{source} row {index}", index, dict(values), prompt_column, answer_column)
        for index, values in enumerate(dataset)
    ]
    if not rows:
        raise DataError(f"{source}: is empty")
    return rows


def make_row(
    place: str, index: int, values: dict[str, Any], prompt_column: str, answer_column: str | None = None
) -> Row:
    """Check one row. Raises DataError."""
    prompt = need_column(place, values, prompt_column)
    columns = {name: value for name, value in values.items() if name != prompt_column}
    if answer_column is not None:
        columns["answer"] = need_column(place, values, answer_column)
    if reserved := sorted(columns.keys() & set(OURS)):
        raise DataError(f"{place}: column {reserved[0]!r} is what reward functions get from the run; rename it")
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{place}: column {prompt_column!r} is an empty string")
    elif isinstance(prompt, list):
        check_messages(place, prompt_column, prompt)
    else:
        kind = type(prompt).__name__
        raise DataError(f"{place}: column {prompt_column!r} is {kind}; expected a string or a list of chat messages")
    return Row(place, index, prompt, columns)


def need_column(place: str, values: Mapping[str, Any], name: str) -> Any:
    if name in values:
        return values[name]
    raise DataError(f"{place}: no column {name!r}; {nearest(name, values)}")


def nearest(name: str, values: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(values), n=1)
    return f"did you mean {near[0]!r}?" if near else f"the row has {', '.join(map(repr, values)) or 'none'}"


def check_messages(place: str, column: str, messages: list[Any]) -> None:
    if not messages:
        raise DataError(f"{place}: column {column!r} is an empty list of messages")
    for number, message in enumerate(messages):
        where = f"{place}: column {column!r}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: is {type(message).__name__}; expected {{'role': ..., 'content': ...}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where}: {key!r} is {message.get(key)!r}; expected a string")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{place}: column {column!r} ends with the assistant's message; nothing is left to answer")


def jsonl_rows(
    path: str | Path, *, eval_path: str | Path | None = None, eval_fraction: float = 0.0, **options: Any
) -> tuple[list[Row], list[Row]]:
    """(train, held out) of a JSONL file: held out are the rows of `eval_path`, a share of the file, or none.

    options: as `read_rows`. Raises ConfigError where both are given, and as `read_rows` and `hold_out`.
    """
    held_out = read_rows(eval_path, **options) if eval_path is not None else None
    return split_rows(read_rows(path, **options), held_out, eval_fraction)


def hub_rows(
    name: str,
    config_name: str | None = None,
    *,
    split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.0,
    **options: Any,
) -> tuple[list[Row], list[Row]]:
    """(train, held out) of a hub dataset: held out are the rows of `eval_split`, a share of `split`, or none."""
    held_out = read_hub_rows(name, config_name, eval_split, **options) if eval_split is not None else None
    return split_rows(read_hub_rows(name, config_name, split, **options), held_out, eval_fraction)


def split_rows(train: list[Row], held_out: list[Row] | None, eval_fraction: float) -> tuple[list[Row], list[Row]]:
    if held_out is not None:
        if eval_fraction:
            raise ConfigError(
                f"task.eval_fraction is {eval_fraction:g}, but the task has its own evaluation set; keep one of the two"
            )
        return train, held_out
    return hold_out(train, eval_fraction) if eval_fraction else (train, [])


def hold_out(rows: Sequence[Row], fraction: float, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, eval): a share of the rows drawn by `seed`, at least one, held out; both in their original order.

    Raises ConfigError for a fraction outside (0, 1), DataError where it leaves no row to train on.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"task.eval_fraction is {fraction:g}; use a share between 0 and 1, for example 0.05")
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise DataError(f"{rows[0].place}: eval_fraction {fraction:g} of {len(rows)} rows leaves none to train on")
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    train = [row for number, row in enumerate(rows) if number not in chosen]
    return train, [row for number, row in enumerate(rows) if number in chosen]


# ----------------------------------------------------------------------------------------------------------- tokenising


@dataclass(frozen=True)
class PromptStyle:
    """How a row's prompt becomes tokens.

    chat_template: wrap string prompts as one user message; without it a string is used raw, with the special tokens
    (BOS) that the tokenizer puts before any text. Messages always go through the tokenizer's chat template.
    system: put before messages that have no system message of their own.
    max_tokens: longest prompt, in tokens. overlong: "error", or "drop" the row and count it in a warning.
    """

    chat_template: bool = False
    system: str | None = None
    max_tokens: int | None = None
    overlong: Literal["error", "drop"] = "error"

    def messages(self, prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """The prompt as it will be shown to the model: a raw string, or messages."""
        if isinstance(prompt, str):
            if not self.chat_template:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if self.system is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system}, *prompt]
        return prompt


def make_prompts(rows: Sequence[Row], split: Split, tokenizer: Any, style: PromptStyle) -> list[Prompt]:
    """Tokenise rows. Prompt ids are `split:index`, whatever the text. Raises ConfigError, DataError."""
    if style.system is not None and not style.chat_template and all(isinstance(row.prompt, str) for row in rows):
        raise ConfigError("task.system is set, but the prompts are raw strings; set task.chat_template: true")
    rows = [replace(row, prompt=style.messages(row.prompt)) for row in rows]
    raw = [isinstance(row.prompt, str) for row in rows]
    texts = [row.prompt if is_raw else render(tokenizer, row) for row, is_raw in zip(rows, raw, strict=True)]
    tokens: list[Sequence[int]] = [()] * len(rows)
    for is_raw in (True, False):  # a chat template writes the special tokens itself
        numbers = [number for number, kind in enumerate(raw) if kind is is_raw]
        if numbers:
            ids = tokenizer([texts[n] for n in numbers], add_special_tokens=is_raw)["input_ids"]
            for number, row_ids in zip(numbers, ids, strict=True):
                tokens[number] = row_ids
    prompts, overlong = [], []
    for row, ids in zip(rows, tokens, strict=True):
        if not ids:
            raise DataError(f"{row.place}: the prompt has no tokens")
        if style.max_tokens is not None and len(ids) > style.max_tokens:
            overlong.append((row, len(ids)))
        else:
            prompts.append(Prompt(f"{split}:{row.index}", tuple(ids), row.prompt, row.columns))
    if overlong:
        row, length = overlong[0]
        first = f"{row.place}: the prompt has {length} tokens, more than the {style.max_tokens} that it may have"
        if style.overlong == "error":
            also = f" (and {len(overlong) - 1} rows after it)" if len(overlong) > 1 else ""
            raise DataError(f"{first}{also}; raise task.max_prompt_tokens or set task.overlong_prompts: drop")
        if not prompts:
            raise DataError(f"{first}, and so has every other row; nothing is left")
        logger.warning("dropped %d of %d %s prompts; the first is %s", len(overlong), len(rows), split, first)
    return prompts


def render(tokenizer: Any, row: Row) -> str:
    """The row's messages through the chat template, up to where the assistant begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{row.place}: the prompt is chat messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template; use string prompts (task.chat_template: false), or an instruction-tuned model"
        )
    try:
        return tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{row.place}: the chat template refuses the messages: {error}") from error


# ------------------------------------------------------------------------------------------------------------- the task


class DatasetTask:
    """Prompts from rows, rewards from a `Scorer`. Raises ConfigError, DataError.

    Every row must have the columns that the reward functions need. An empty `eval_rows` means no held-out set.
    """

    def __init__(
        self,
        train_rows: Sequence[Row],
        eval_rows: Sequence[Row] = (),
        *,
        tokenizer: Any,
        scorer: Scorer,
        style: PromptStyle | None = None,
    ) -> None:
        style = style or PromptStyle()
        for row in (*train_rows, *eval_rows):
            check_columns(row, scorer)
        self.scorer = scorer
        self._tokenizer = tokenizer
        self._prompts: dict[Split, list[Prompt]] = {
            "train": make_prompts(train_rows, "train", tokenizer, style),
            "eval": make_prompts(eval_rows, "eval", tokenizer, style) if eval_rows else [],
        }

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return self._prompts[split]

    @property
    def weights(self) -> Mapping[str, float]:
        return self.scorer.weights

    async def score(
        self,
        prompt: Prompt,
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[Mapping[str, Reward]]:
        """The rewards by function. Without `completion_ids` the texts are tokenised again, which loses the EOS."""
        if completion_ids is None:
            completion_ids = self._tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        return await self.scorer.score(prompt, completions, completion_ids=completion_ids)

    def metrics(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, float]:
        return {}


def check_columns(row: Row, scorer: Scorer) -> None:
    """Raise DataError where a reward function needs a column that the row does not have."""
    for column, function in scorer.missing_columns(row.columns).items():
        raise DataError(f"{row.place}: reward {function} needs column {column!r}; {nearest(column, row.columns)}")
