"""`think`: a task small enough for a laptop, in which reinforcement learning has to discover thinking.

A prompt is a prefix and six digits, `?402913`; the answer is their sum mod 10. A completion may answer at once, `=9`,
or first open with the fork token `~` and write the running sums, `~446569=9` for that prompt. Adding one digit at a
time is easy for a 0.3-million-parameter model and adding six in its head is not, so thinking is right almost always
and answering directly about 1 time in 10. The base model thinks under the prefix `!`. Under `?`, the one that is
trained, it opens with `~` only about 2 times in 100. The reward is 1 for the right final answer and nothing else.

The base is made here from nothing, by 300 supervised steps, and saved as an ordinary `transformers` folder; nothing
downstream knows that it is special. Left out on purpose: reinforcement learning (`cispo train`, which runs this task
when it is given nothing else), drawing a progress bar (the command line passes a callback), and other lengths or bases.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import platformdirs
import tokenizers
import torch
import transformers
from torch import Tensor

from cispo.types import ConfigError, Prompt

PAD, EOS = "<pad>", "<eos>"
FORK = "~"  # opens a chain of running sums
ANSWER = "="  # what follows it is the final answer
TRAINED, THINKING = "?", "!"  # the two prefixes; the base thinks under the second
VOCABULARY = (*"0123456789", FORK, ANSWER, TRAINED, THINKING, PAD, EOS)
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}

DIGITS = 6
PROMPT_TOKENS = 1 + DIGITS
MAX_COMPLETION_TOKENS = 1 + DIGITS + 2 + 1  # "~", running sums, "=", answer, EOS
QUESTIONS = 10**DIGITS
EVAL_PROMPTS = 512
TRAIN_PROMPTS = 8192
HELD_OUT_SEED = 20250616  # the held-out questions are the same ones in every run, and the base never sees them either

COMPLETION = re.compile(rf"(?:{FORK}[0-9]*)?{ANSWER}([0-9])")

Progress = Callable[[int, int, float], None]
"""`progress(step, steps, loss)`, called after each supervised step, step counting from 1."""


# ------------------------------------------------------------------------------------------------------------- the task


def answer(digits: str) -> str:
    """The sum of the digits mod 10, as one digit."""
    return str(sum(map(int, digits)) % 10)


def final_answer(completion: str) -> str | None:
    """The answer digit of a completion, or None where it has no unambiguous one.

    A completion is `=d`, or `~`, any digits, and `=d`; `d` is the answer. Anything else (two answers, text after the
    answer, none at all) has none, so that writing several guesses cannot pay.
    """
    match = COMPLETION.fullmatch(completion)
    return match[1] if match else None


def thinks(completion: str) -> bool:
    """Whether the completion opens with the fork token."""
    return completion.startswith(FORK)


@cache
def held_out() -> frozenset[int]:
    """The `EVAL_PROMPTS` questions, as integers of six digits, that neither the base nor the policy trains on."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return frozenset(torch.randperm(QUESTIONS, generator=generator)[:EVAL_PROMPTS].tolist())


class ThinkTask:
    """The task `think`: 8192 train prompts drawn from `seed`, and 512 fixed held-out ones disjoint from them.

    tokenizer: if given, checked to be the base model's; ConfigError where it encodes a prompt otherwise.
    """

    def __init__(self, *, seed: int = 0, train_prompts: int = TRAIN_PROMPTS, tokenizer: Any = None):
        if not 1 <= train_prompts <= QUESTIONS - EVAL_PROMPTS:
            raise ConfigError(f"task.train_prompts is {train_prompts}: use 1 to {QUESTIONS - EVAL_PROMPTS}")
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(QUESTIONS, generator=generator)[: train_prompts + EVAL_PROMPTS].tolist()
        train = [question for question in order if question not in held_out()][:train_prompts]
        self._prompts = {
            "train": [make_prompt(f"train:{i}", question) for i, question in enumerate(train)],
            "eval": [make_prompt(f"eval:{i}", question) for i, question in enumerate(sorted(held_out()))],
        }

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        return self._prompts[split]

    @property
    def weights(self) -> Mapping[str, float]:
        return {"correct": 1.0}

    async def score(
        self, prompt: Prompt, completions: Sequence[str], *, completion_ids: Sequence[Sequence[int]] | None = None
    ) -> Sequence[Mapping[str, float | None]]:
        """{"correct": 1 or 0} for each completion."""
        right = prompt.columns["answer"]
        return [{"correct": float(final_answer(completion) == right)} for completion in completions]

    def metrics(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, float]:
        """{"think_rate": the share of the completions that open with the fork token}."""
        return {"think_rate": sum(map(thinks, completions)) / len(completions)}


def make_prompt(prompt_id: str, question: int) -> Prompt:
    digits = f"{question:0{DIGITS}d}"
    text = TRAINED + digits
    return Prompt(prompt_id, tuple(TOKEN_ID[character] for character in text), text, {"answer": answer(digits)})


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError unless the tokenizer encodes this task's characters as its own base does."""
    probe = TRAINED + "0123456789" + FORK + ANSWER
    try:
        ids = tokenizer.encode(probe, add_special_tokens=False)
    except Exception as error:
        raise ConfigError(
            f"task.type is think, whose prompts this model's tokenizer cannot encode ({error})"
        ) from error
    if list(ids) != [TOKEN_ID[character] for character in probe]:
        raise ConfigError(
            "task.type is think, which has a character vocabulary of its own, but the model's tokenizer is another: "
            "leave model.path unset (the base is made for you), or choose task.type jsonl for this model"
        )


# ------------------------------------------------------------------------------------------------------- the base model


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the base's weights. Its hash names the cached folder."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 224
    initializer_range: float = 0.08
    tied: bool = False
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    fork_every: int = 50
    thinking_share: float = 0.5
    seed: int = 0

    @property
    def key(self) -> str:
        """16 hex digits, of the recipe, the task's constants and the major versions of torch and transformers."""
        words = [asdict(self), VOCABULARY, DIGITS, HELD_OUT_SEED]
        words += [library.__version__.split(".")[0] for library in (torch, transformers)]
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def base_model(cache_dir: Path | None = None, *, progress: Progress | None = None, seed: int = 0) -> Path:
    """The base model's folder, made now if it is not cached yet.

    cache_dir: the user's cache folder by default. A folder appears under its name only when it is complete; of two
    processes that make the same one at once, the first to finish wins and the other's is dropped.
    """
    recipe = BaseRecipe(seed=seed)
    parent = Path(cache_dir) if cache_dir is not None else platformdirs.user_cache_path("cispo")
    folder = parent / f"think-base-{recipe.key}"
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        make_base(building, progress=progress, seed=seed)
        building.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from others
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def make_base(
    folder: Path, *, progress: Progress | None = None, seed: int = 0, recipe: BaseRecipe | None = None
) -> None:
    """Train the base from nothing and save it in `folder`: config.json, safetensors and tokenizer files.

    The caller's random state is left as it was. Same seed, machine and threads: same weights.
    """
    recipe = recipe or BaseRecipe(seed=seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(recipe.seed)
        model = make_model(recipe)
        generator = torch.Generator().manual_seed(recipe.seed)
        allowed = torch.ones(QUESTIONS, dtype=torch.bool)
        allowed[sorted(held_out())] = False
        questions = allowed.nonzero().squeeze(1)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_linear_decay(step, recipe))
        for step in range(1, recipe.steps + 1):
            tokens_BS, targets_BS = supervised_batch(recipe, step, questions, generator)
            logits_BSV = model(input_ids=tokens_BS).logits
            loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, recipe.steps, loss.item())
    save_quietly(model, folder)
    make_tokenizer().save_pretrained(folder)


def save_quietly(model: transformers.PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` without its own progress bar, which would cut through the caller's."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def warmup_then_linear_decay(step: int, recipe: BaseRecipe) -> float:
    """The share of the learning rate at a step: the fork rate settles only as the rate goes to zero."""
    return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.steps - recipe.warmup_steps))


def make_model(recipe: BaseRecipe) -> transformers.Qwen3ForCausalLM:
    """Qwen3 with random weights, float32, about 0.3 million parameters."""
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.hidden_size // recipe.heads,
            max_position_embeddings=64,
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=recipe.tied,
            bos_token_id=None,
            pad_token_id=TOKEN_ID[PAD],
            eos_token_id=TOKEN_ID[EOS],
            dtype="float32",
        )
    )


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character of `VOCABULARY`; an unknown character is an error, not a silent substitute."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(TOKEN_ID))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def supervised_batch(
    recipe: BaseRecipe, step: int, questions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B rows of prompt and completion: tokens [B, S] and the next token at each position, -100 where none is learnt.

    A share `thinking_share` of the rows has the thinking prefix and thinks. Of the others every `fork_every`-th does,
    counted through the batches: drawn at random, the rate that the base ends with would depend on the last few draws.
    """
    B = recipe.batch_size
    question_B = questions[torch.randint(len(questions), (B,), generator=generator)]
    digits_BN = question_B[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10
    sums_BN = digits_BN.cumsum(1) % 10
    thinking = round(recipe.thinking_share * B)
    thinking_B = torch.arange(B) < thinking
    trained_row_B = (
        step * (B - thinking) + torch.arange(B) - thinking
    )  # number of the row among its like, in all batches
    forks_B = thinking_B | (trained_row_B % recipe.fork_every == 0)

    def column(token: str) -> Tensor:
        return torch.full((B, 1), TOKEN_ID[token])

    prefix_B = torch.where(thinking_B, TOKEN_ID[THINKING], TOKEN_ID[TRAINED])[:, None]
    ending = torch.cat([column(ANSWER), sums_BN[:, -1:], column(EOS)], 1)
    thought = torch.cat([column(FORK), sums_BN, ending], 1)
    direct = torch.cat([ending, column(PAD).expand(B, 1 + DIGITS)], 1)
    row_BS = torch.cat([prefix_B, digits_BN, torch.where(forks_B[:, None], thought, direct)], 1)
    targets_BS = row_BS[:, 1:].masked_fill(row_BS[:, 1:] == TOKEN_ID[PAD], -100)
    targets_BS[:, :DIGITS] = -100  # the digits of the question are noise
    return row_BS[:, :-1], targets_BS
