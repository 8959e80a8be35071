"""`LocalSampler`: continuous batching in this process, over any `transformers` decoder, on the learner's own weights.

One step of the loop: waiting requests take free slots (each prompt runs once, whatever its number of samples), every
row in flight draws a token, and rows that ended leave. Randomness is stateless (`draw.py`), so a completion depends on
the weights, the prompt, the seed and the sample's index, and not on its neighbours, on when it was admitted, or on
whether it lost its slot for a while to a row that needed the memory.
Left out on purpose: other processes (vllm.py, cluster.py), beam search, speculative decoding, penalties.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from cispo.sampling.cache import SHARED_ATTENTION, Decode, Extend, Prefill, Sharing
from cispo.sampling.decoder import attention_kinds, base, decoder_config, eos_ids, load_weights, own_copy, token_bytes
from cispo.sampling.draw import Filters, draw, uniforms
from cispo.sampling.slots import (
    COLUMN,
    COUNT,
    CUR,
    MIN_P,
    POSITION,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Job,
    Prefix,
    Row,
    Slots,
)
from cispo.types import Completion, ConfigError, DataError, NonFiniteError, RunError, SampleRequest, SampleResult

logger = logging.getLogger(__name__)

_DEFAULT_KV_BYTES = 4 << 30
_LOGITS_AT_ONCE = 1 << 26  # of a prompt's positions × vocabulary
_SCORES_AT_ONCE = 1 << 26  # of attention, where rows' tokens are computed again over a shared prefix
_GROWTH = 32  # columns that a store grows by, at least
_SHARE = 32  # rows on one copy of a prefix: bounds the padding where groups are of unequal size
_STOPPED, _BROKEN = 1, 2  # a row's status after a draw


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of S given tokens, at temperature 1. logprobs: of each token after those before it; None for the first. top: the
    most likely (token, log-prob) pairs at each place, likeliest first; None for the first, and empty where top_k is 0.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...] | None, ...]


@dataclass(slots=True)
class _Entry:
    """Rows that wait for slots, and the sequence that they continue. shared: it goes to the prefix store, and not to
    each row's slot. Where siblings took slots already: the copies of that prefix, and the logits [V] after it."""

    tokens: tuple[int, ...]
    rows: list[Row]
    shared: bool = False
    prefixes: list[Prefix] = field(default_factory=list)
    logits_V: Tensor | None = None

    def forget(self) -> None:
        """Run the prefix again instead: its keys are stale, or their memory is needed."""
        for prefix in self.prefixes:
            prefix.held = False
        self.prefixes, self.logits_V = [], None


class LocalSampler:
    """A `Sampler` in this process.

    model: a loaded causal language model of `transformers`, plain or wrapped by peft (its active adapter is sampled).
    tokenizer: needed for stop strings only.
    max_batch_rows: rows in flight. max_kv_tokens: slots × columns of the key/value memory; by default what 4 GiB hold.
    A request larger than either is worked off in parts. max_prefill_tokens: tokens, padding included, in one pass over
    prompts. share_prompts_from: tokens of keys and values that sharing a prompt among its samples must save,
    (samples − 1) × length; below that the prompt is copied to each, which costs less than arranging to share it.
    steps_per_poll: `poll` returns after this many decode steps, or as soon as a request has finished.
    eos_token_ids: what ends a completion when its `stop_token_ids` is None; by default the EOS ids of the model's
    generation config and config (the tokenizer's where these name none).
    share_weights: sample from `model` itself, whose weights the learner changes in place, and `update_weights(None, v)`
    only tells the new version. False: from a copy (peft: merged), which `update_weights(weights, v)` fills.
    recompute_kv_on_update: rows in flight when the weights change have their keys and values computed again; otherwise
    they go on with stale ones, as vLLM does when it keeps its cache.
    seed: of the seeds of requests that bring none. check_model: compare a short cached decode with full passes first.

    Raises ConfigError for a model whose cache is not plain attention, or whose cached decode is not its full pass.
    Not thread-safe: one caller at a time, and with shared weights not during a training step.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer=None,
        *,
        max_batch_rows: int = 512,
        max_kv_tokens: int | None = None,
        max_prefill_tokens: int = 8192,
        share_prompts_from: int = 128,
        steps_per_poll: int = 8,
        eos_token_ids: Sequence[int] | None = None,
        share_weights: bool = True,
        recompute_kv_on_update: bool = False,
        seed: int = 0,
        version: int = 0,
        check_model: bool = True,
    ):
        for name, value in (
            ("max_batch_rows", max_batch_rows),
            ("max_kv_tokens", max_kv_tokens),
            ("max_prefill_tokens", max_prefill_tokens),
            ("share_prompts_from", share_prompts_from),
            ("steps_per_poll", steps_per_poll),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        self.version = version
        self.tokenizer = tokenizer
        self.share_weights = share_weights
        self.max_batch_rows, self.max_prefill_tokens = (max_batch_rows, max_prefill_tokens)
        self.share_prompts_from, self.steps_per_poll = (share_prompts_from, steps_per_poll)
        self.recompute_kv_on_update = recompute_kv_on_update
        self.model = model if share_weights else own_copy(model)
        self.config = decoder_config(self.model)
        self.context_length: int | None = getattr(self.config, "max_position_embeddings", None)
        self.vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.eos_token_ids = eos_ids(self.model, tokenizer) if eos_token_ids is None else tuple(eos_token_ids)
        self._device = self.model.get_input_embeddings().weight.device
        self._dtype = self.model.dtype
        self._kinds = attention_kinds(self.config)
        self._window = getattr(self.config, "sliding_window", None)
        self._chunk = getattr(self.config, "attention_chunk_size", None)
        self._filler = 1 if getattr(self.config, "pad_token_id", None) == 0 and self.vocab_size > 1 else 0
        self._head_by_row = "logits_to_keep" in inspect.signature(base(self.model).forward).parameters
        self._seeds = random.Random(seed)
        self._slots = Slots(self.config.num_hidden_layers, self._device)
        self._waiting: deque[_Entry] = deque()
        self._jobs: dict[int, Job] = {}
        self._done: list[SampleResult] = []
        self._broken: list[int] = []
        self._admitted = 0
        self._stale = False
        self._asleep = False
        self._how: dict | None = None  # how the rows in flight are drawn; None: ask again
        self._token_text: dict[int, str] = {}
        self._shared = self.config._attn_implementation in ("sdpa", "eager")
        self._token_bytes = token_bytes(self.config, self._dtype)
        if check_model:
            self._check_model()
        self.max_kv_tokens = max_kv_tokens or max(1, _DEFAULT_KV_BYTES // self._token_bytes)

    # --------------------------------------------------------------------------------------------------- the protocol

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._jobs) + len(self._done)

    @property
    def rows_in_flight(self) -> int:
        return self._slots.n - self._slots.dead

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises DataError or ConfigError for one that cannot be sampled as asked, before any work,
        RunError while the sampler sleeps."""
        self._check_awake(f"request {request.request_id}")
        self._check_request(request)
        params = request.params
        stops = self.eos_token_ids if params.stop_token_ids is None else tuple(params.stop_token_ids)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        G = request.num_samples
        job = Job(request, seed, stops, [None] * G, G)
        self._jobs[request.request_id] = job
        self._waiting.append(_Entry(tuple(request.prompt), [Row(job, sample) for sample in range(G)]))

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """Advance by up to `steps_per_poll` decode steps, and return the requests that finished.

        wait: without it nothing is decoded, because here decoding is what takes the caller's time. Raises
        NonFiniteError when a row's logits hold NaN or infinity; its request is gone then, the others go on.
        """
        with self._inference():
            for _ in range(self.steps_per_poll if wait else 0):
                if self._done or not self._jobs:
                    break
                self._step()
                self._raise_if_broken()
        done, self._done = self._done, []
        return done

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResult]:
        """Submit, poll to the end, and return the results in the order of the requests."""
        mine: dict[int, SampleResult | None] = {}
        others: list[SampleResult] = []
        try:
            for request in requests:
                self.submit(request)
                mine[request.request_id] = None
            while any(result is None for result in mine.values()):
                for result in self.poll():
                    if result.request_id in mine:
                        mine[result.request_id] = result
                    else:
                        others.append(result)
        except BaseException:
            for request_id in mine:
                self.cancel(request_id)
            raise
        finally:
            self._done = others + self._done
        return [mine[request.request_id] for request in requests]

    def prompt_logprobs(self, tokens: Sequence[int], top_k: int = 0) -> PromptLogprobs:
        """Log-probs of given tokens under the present weights, at once and beside what is in flight.

        The logits of a slice of positions exist at a time. Raises DataError for tokens that are no prompt of this
        model, NonFiniteError where its logits hold NaN or infinity, RunError while the sampler sleeps.
        """
        self._check_awake("prompt_logprobs")
        if not 0 <= top_k <= self.vocab_size:
            raise ConfigError(f"top_k is {top_k}, but must be between 0 and the {self.vocab_size} tokens there are")
        self._check_prompt("prompt_logprobs", tokens)
        if self.context_length is not None and len(tokens) > self.context_length:
            raise DataError(f"a prompt of {len(tokens)} tokens is beyond the model's context of {self.context_length}")
        ids_S = torch.tensor(list(tokens), dtype=torch.int64).to(self._device)
        cache, logprobs, top = DynamicCache(config=self.config), [], []
        step = max(1, min(2048, _LOGITS_AT_ONCE // self.vocab_size))
        with self._inference():
            for begin in range(0, len(tokens) - 1, step):
                here_S = ids_S[begin : min(begin + step, len(tokens) - 1)]
                position_S = torch.arange(begin, begin + len(here_S), device=self._device)
                logits_SV = self._forward(here_S[None], position_S[None], None, cache=cache)[0]
                logprobs_SV = logits_SV.float().log_softmax(-1)
                next_S1 = ids_S[begin + 1 : begin + 1 + len(here_S), None]
                logprobs.append(logprobs_SV.gather(1, next_S1)[:, 0])
                if top_k:
                    best = logprobs_SV.topk(top_k, -1)
                    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    top.extend(tuple(zip(ids, values, strict=True)) for ids, values in pairs)
        chosen_S = torch.cat(logprobs) if logprobs else torch.empty(0)
        if not bool(chosen_S.isfinite().all()):
            at = int((~chosen_S.isfinite()).nonzero()[0]) + 1
            raise NonFiniteError(f"prompt_logprobs: the model's logits before position {at} hold NaN or infinity")
        return PromptLogprobs(
            logprobs=(None, *chosen_S.tolist()), top=(None, *(top if top_k else [()] * (len(tokens) - 1)))
        )

    def cancel(self, request_id: int) -> None:
        """Drop a request and all its samples. One that is unknown, or was returned already, is no error."""
        self._done = [result for result in self._done if result.request_id != request_id]
        job = self._jobs.pop(request_id, None)
        if job is None:
            return
        for entry in self._waiting:
            if entry.rows[0].job is job:
                entry.forget()
        self._waiting = deque(entry for entry in self._waiting if entry.rows[0].job is not job)
        slots = [slot for slot in range(self._slots.n) if self._slots.live[slot] and self._slots.rows[slot].job is job]
        if slots:
            self._slots.drop(np.array(slots))

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """New policy from here on, rows in flight included; also while the sampler sleeps.

        weights: by their names in `model.state_dict()`, or None when they are shared and have changed in place. All
        are checked before the first is written. Raises ConfigError for a weight that is missing, unknown or of another
        shape, or when weights are given to a sampler that shares the learner's.
        """
        if weights is None:
            if not self.share_weights:
                raise ConfigError(
                    "update_weights(None) says that the weights changed in place, but this sampler has a copy of its "
                    "own: pass learner.weights(), or construct it with share_weights=True"
                )
        else:
            if self.share_weights:
                raise ConfigError(
                    "update_weights got weights, but this sampler shares the learner's, which they would overwrite: "
                    "pass None, or construct it with share_weights=False"
                )
            load_weights(self.model, weights)
        self.version = version
        self._stale = True
        slots = self._slots
        for slot in np.flatnonzero(slots.live[: slots.n]):
            row = slots.rows[slot]
            row.spans.append((len(row.tokens) + int(slots.used[slot] - slots.start[slot]), version))
        for entry in self._waiting:
            entry.forget()

    def sleep(self) -> None:
        """Give the device's memory back until `wake`: keys and values, and on a CUDA device weights of its own.

        Those wait in the host's memory; shared ones are the learner's, and stay where it has them. Nothing may be
        pending: raises RunError otherwise. One that sleeps already sleeps on.
        """
        if self._asleep:
            return
        if self.pending:
            raise RunError(f"sleep: {self.pending} requests are pending; poll until they are returned, or cancel them")
        self._slots = Slots(self.config.num_hidden_layers, self._device)
        self._how = None
        if not self.share_weights and self._device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()  # what torch keeps for later is kept from other processes
        self._asleep = True

    def wake(self) -> None:
        """Be able to sample again: with the weights it slept with, or those that `update_weights` brought meanwhile."""
        if self._asleep and not self.share_weights:
            self.model.to(self._device)
        self._asleep = False

    # --------------------------------------------------------------------------------------------------- one step

    def _step(self) -> None:
        if self._stale and self.recompute_kv_on_update:
            self._recompute()
        self._stale = False
        self._admit()
        slots = self._slots
        if 16 * slots.dead >= slots.n:  # a moved row costs about what a dead one costs in every step
            self._compact()
        if slots.n == 0:
            return
        self._make_room()
        B, L = slots.n, int(slots.used[: slots.n].max())
        column_B, position_B1 = (slots.ints[:B, COLUMN].clone(), slots.ints[:B, POSITION, None].clone())
        even = bool((slots.used[:B] == L).all())
        slots.cache.plan = Decode(slots.sharing, column_B, L, even=even)
        mask = self._mask(slots.sharing, position_B1, L)
        logits_BV = self._forward(slots.ints[:B, CUR, None], position_B1, mask)[:, -1]
        self._draw(slice(0, B), logits_BV)

    def _draw(self, new: slice, logits_BV: Tensor) -> None:
        """Draw one token for each row of `new`, write it down, and let the rows that ended go."""
        slots = self._slots
        ints = slots.ints[new]
        how = self._how if new == slice(0, slots.n) else None
        if how is None:
            how = self._drawing(new)
            if new == slice(0, slots.n):
                self._how = how
        tokens_B, logprobs_B = draw(logits_BV, uniforms(ints[:, SEED], ints[:, COUNT]), **how)
        ints[:, COLUMN : COUNT + 1] += 1
        ints[:, CUR] = tokens_B
        at_B1 = ints[:, COLUMN, None]
        slots.ids[new].scatter_(1, at_B1, tokens_B[:, None])
        slots.logprobs[new].scatter_(1, at_B1, logprobs_B[:, None])
        stopped_B = (slots.stops[new] == tokens_B[:, None]).any(1)
        status_B = torch.where(logprobs_B.isfinite(), stopped_B.to(torch.int8) * _STOPPED, _BROKEN)
        status = status_B.cpu().numpy()  # the step's one question to the device
        slots.used[new] += 1
        if slots.watched[new].any():
            newest = tokens_B.tolist()
            for i in np.flatnonzero(slots.watched[new] & (status == 0)):
                if self._string_ends(new.start + int(i), newest[i]):
                    status[i] = _STOPPED
        ended = np.flatnonzero(slots.live[new] & ((status > 0) | (slots.used[new] >= slots.limit[new])))
        if len(ended):
            self._finish(new.start + ended, status[ended])

    def _drawing(self, new: slice) -> dict:
        """The keyword arguments of `draw` for these rows. Dead rows' count too: they cost nothing to be wrong about."""
        params = self._slots.params[new]
        greedy = params[:, TEMPERATURE] == 0
        temperatures = np.where(greedy, 1.0, params[:, TEMPERATURE])
        how: dict = {"temperature": float(temperatures[0])}
        if (temperatures != temperatures[0]).any():
            how["temperature"] = torch.from_numpy(temperatures).to(torch.float32).to(self._device)
        if greedy.any():
            how["greedy_B"] = torch.from_numpy(greedy).to(self._device)
        truncated = (params[:, TOP_K] > 0) | (params[:, TOP_P] < 1) | (params[:, MIN_P] > 0)
        rows = np.flatnonzero(truncated & ~greedy)
        if len(rows):
            top_k, top_p, min_p = params[rows][:, [TOP_K, TOP_P, MIN_P]].T
            how["filters"] = Filters.of(rows, top_k.astype(np.int64), top_p, min_p, self._device)
        return how

    def _finish(self, ended: np.ndarray, status: np.ndarray) -> None:
        slots = self._slots
        at = torch.from_numpy(ended).to(self._device)
        columns = int(slots.used[ended].max())
        ids = slots.ids[at, :columns].cpu().numpy()
        logprobs = slots.logprobs[at, :columns].cpu().numpy()
        for i, slot in enumerate(ended):
            row, drawn = slots.rows[slot], slice(slots.start[slot], slots.used[slot])
            job, request_id = row.job, row.job.request.request_id
            if status[i] == _BROKEN:
                self._broken.append(request_id)
                continue
            tokens = row.tokens + ids[i, drawn].tolist()
            job.completions[row.sample] = Completion(
                tokens=tuple(tokens),
                logprobs=tuple(row.logprobs + logprobs[i, drawn].tolist()),
                versions=_versions(row.spans, len(tokens)),
                stop_reason="stop" if status[i] == _STOPPED else "length",
            )
            job.left -= 1
            if job.left == 0:
                self._done.append(SampleResult(request_id, tuple(job.completions)))
                del self._jobs[request_id]
        if (status == _BROKEN).any():
            prefixes = slots.group[ended]
            slots.cache.wipe(at, torch.from_numpy(prefixes[prefixes >= 0]).to(self._device))
        slots.drop(ended)

    def _raise_if_broken(self) -> None:
        if not self._broken:
            return
        broken, self._broken = sorted(set(self._broken)), []
        for request_id in broken:
            self.cancel(request_id)
        raise NonFiniteError(
            f"request {', '.join(map(str, broken))}: the model's logits hold NaN or infinity (weights of version "
            f"{self.version}), and nothing was sampled from them. Look for a diverged update or an overflow in half "
            "precision"
        )

    def _string_ends(self, slot: int, newest: int) -> bool:
        """Whether the newest token completes one of the row's stop strings."""
        stops = self._slots.rows[slot].job.request.params.stop
        text = self._token_text.get(newest)
        if text is None:
            text = self._token_text[newest] = self._decode([newest])
        # A string can only end here when its last character is in the newest token's text. Bytes of an unfinished
        # character, and blanks that a tokenizer strips from a lone token, are no evidence: decode then.
        if text and "\ufffd" not in text and not any(stop[-1] in text or stop[-1].isspace() for stop in stops):
            return False
        longest = max(map(len, stops))
        size = longest + 8
        while True:
            tokens = self._slots.tail(slot, size)
            tail = self._decode(tokens)
            if len(tokens) < size or len(tail) >= longest + len(text) + 4:
                return any(stop in tail for stop in stops)
            size *= 2

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # --------------------------------------------------------------------------------------------- admission and room

    def _admit(self) -> None:
        """Let waiting rows take free slots, first come first served, when that is worth a pass over prompts."""
        if not self._waiting:
            return
        self._compact()
        slots = self._slots
        need = self._need()
        waiting = sum(len(entry.rows) for entry in self._waiting)
        chosen: list[tuple[_Entry, list[Row]]] = []
        while self._waiting and need.rows < self.max_batch_rows:
            entry = self._waiting[0]
            more, free, shared = self._admission(need, entry)
            if free < 1 and need.rows == 0 and entry.prefixes:
                entry.forget()
                self._compact()
                need = self._need()
                continue
            # Slots free up one by one: with less than an eighth of them free, a pass over prompts would serve few rows.
            if free < 1 or (slots.n and not chosen and free < min(waiting, (slots.n + free) // 8)):
                break
            taken, entry.rows = entry.rows[:free], entry.rows[free:]
            entry.shared = shared
            chosen.append((entry, taken))
            need = replace(more, rows=need.rows + len(taken))
            if entry.rows:
                break
            self._waiting.popleft()
        if chosen:
            self._reshape(need)
            self._prefill([pair for pair in chosen if not pair[0].prefixes])
            for entry, rows in chosen:
                if entry.prefixes and rows[0].prefix is None:
                    self._join(entry, rows)
                if not entry.rows:
                    entry.forget()

    def _admission(self, need: _Need, entry: _Entry) -> tuple[_Need, int, bool]:
        """How to admit rows of `entry` beside `need`: what its sequence adds, how many slots are free then, and whether
        the sequence is shared. That is for those where it saves enough, and for those whose rows do not all fit: the
        rest can then join without running it again."""
        room = self.max_batch_rows - need.rows
        if entry.prefixes:
            ways = [(True, room)]
        elif not self._shared:
            ways = [(False, room)]
        elif (len(entry.rows) - 1) * len(entry.tokens) >= self.share_prompts_from:
            ways = [(True, room), (True, _SHARE)]  # where copies of the prefix do not fit, one may
        else:
            ways = [(False, room), (True, room), (True, _SHARE)]
        best: tuple[_Need, int, bool] | None = None
        for shared, most in ways:
            more = need.plus(entry, shared, most)
            fitting = (self.max_kv_tokens - more.prefix_tokens) // more.columns - need.rows
            free = min(fitting, most)
            if best is None or free > best[1] or (shared and not best[2] and free >= best[1]):
                best = more, free, shared
            if free >= len(entry.rows):
                break
        return best

    def _need(self) -> _Need:
        """What the rows in flight and the prefixes in store take."""
        slots = self._slots
        used, limit = slots.used[: slots.n], slots.limit[: slots.n]
        return _Need(
            rows=slots.n,
            used=int(used.max(initial=0)),
            limit=int(limit[slots.live[: slots.n]].max(initial=0)),
            prefixes=len(slots.prefixes),
            prefix_columns=max((len(prefix.tokens) for prefix in slots.prefixes), default=0),
        )

    def _prefill(self, chosen: list[tuple[_Entry, list[Row]]]) -> None:
        """Run each sequence once, store its keys and values, and draw the next token of each row on it."""
        slots = self._slots
        rows_of: dict[tuple[int, ...], list[tuple[_Entry, list[Row]]]] = {}
        for pair in chosen:  # requests with the same prompt run it once
            rows_of.setdefault(pair[0].tokens, []).append(pair)
        for batch in self._by_length(list(rows_of)):
            rows: list[Row] = []
            places: list[int] = []  # of each row's prefix
            source: list[int] = []  # of each row's sequence
            first, of_prefixes = len(slots.prefixes), []
            pairs = [(i, *pair) for i, tokens in enumerate(batch) for pair in rows_of[tokens]]
            for i, entry, its_rows in sorted(pairs, key=lambda pair: not pair[1].shared):
                if entry.shared:
                    copies = -(-len(its_rows) // _SHARE)
                    places.extend(len(slots.prefixes) + j % copies for j in range(len(its_rows)))
                    new = [Prefix(entry.tokens, held=bool(entry.rows)) for _ in range(copies)]
                    slots.prefixes.extend(new)
                    of_prefixes.extend([i] * copies)
                    entry.prefixes = new if entry.rows else []
                else:
                    places.extend([-1] * len(its_rows))
                rows.extend(its_rows)
                source.extend([i] * len(its_rows))
            lengths_N = self._tensor([len(tokens) for tokens in batch])
            ids_NS = torch.from_numpy(_padded(batch, self._filler)).to(self._device)
            own = places.index(-1) if -1 in places else len(places)  # from here on, rows have their sequence themselves
            slots.cache.plan = Prefill(
                slice(first, len(slots.prefixes)),
                self._tensor(of_prefixes),
                slice(slots.n + own, slots.n + len(rows)),
                self._tensor(source[own:]),
            )
            logits_NV = self._forward_whole(ids_NS, lengths_N)
            for i, entry, _ in pairs:
                if entry.prefixes:
                    entry.logits_V = logits_NV[i].clone()
            for row, i in zip(rows, source, strict=True):
                row.sequence = batch[i]
            self._draw_first(rows, places, logits_NV[self._tensor(source)])

    def _join(self, entry: _Entry, rows: list[Row]) -> None:
        """Let rows continue a prefix that their siblings brought in, spread over its copies."""
        load = [(prefix.rows, self._slots.prefixes.index(prefix)) for prefix in entry.prefixes]
        heapq.heapify(load)
        places = []
        for row in rows:
            row.sequence = entry.tokens
            count, place = load[0]
            places.append(place)
            heapq.heapreplace(load, (count + 1, place))
        self._draw_first(rows, places, entry.logits_V.expand(len(rows), -1))

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self._device)

    def _draw_first(self, rows: list[Row], places: list[int], logits_BV: Tensor) -> None:
        for row in rows:
            self._admitted += 1
            row.order = self._admitted
            row.spans.append((len(row.tokens), self.version))
        new = self._slots.fill(rows, places)
        self._how = None
        self._draw(new, logits_BV)

    def _recompute(self) -> None:
        """Compute the keys and values of everything in flight again, under the present weights."""
        self._compact()
        slots = self._slots
        nothing = self._tensor([])
        prefixes = [prefix.tokens for prefix in slots.prefixes]
        for batch in self._by_length(range(len(prefixes)), key=lambda place: len(prefixes[place])):
            self._refill([prefixes[place] for place in batch], self._tensor(batch), nothing)
        # The newest token of a row has no keys and values yet.
        own = [slot for slot in range(slots.n) if slots.group[slot] < 0]
        for batch in self._by_length(own, key=lambda slot: int(slots.used[slot])):
            sequences = [
                slots.rows[slot].sequence + tuple(slots.ids[slot, slots.start[slot] : slots.used[slot] - 1].tolist())
                for slot in batch
            ]
            self._refill(sequences, nothing, self._tensor(batch))
        lengths = np.array([len(tokens) for tokens in prefixes])
        drawn = slots.used[: slots.n] - 1
        written = [slot for slot in range(slots.n) if slots.group[slot] >= 0 and drawn[slot] > 0]
        for batch in self._by_length(written, key=lambda slot: int(drawn[slot])):
            S, at = int(drawn[batch].max()), self._tensor(batch)
            sharing = Sharing(slots.group[batch], lengths, self._device)
            scores = len(batch) * self.config.num_attention_heads * (sharing.columns + S)
            step = max(1, _SCORES_AT_ONCE // scores)
            for begin in range(0, S, step):
                end = min(begin + step, S)
                slots.cache.plan = Extend(sharing, at, begin, end)
                position_BS = sharing.length_B[:, None] + torch.arange(begin, end, device=self._device)
                position_BS = position_BS.clamp(max=(self.context_length or 1 << 62) - 1)  # of the padding
                self._forward(slots.ids[at, begin:end], position_BS, self._mask(sharing, position_BS, end))

    def _refill(self, sequences: list[tuple[int, ...]], prefixes: Tensor, rows: Tensor) -> None:
        """Write these sequences' keys and values to these prefixes, or to these slots."""
        every = torch.arange(len(sequences), device=self._device)
        self._slots.cache.plan = Prefill(prefixes, every[: len(prefixes)], rows, every[: len(rows)])
        ids_NS = torch.from_numpy(_padded(sequences, self._filler)).to(self._device)
        self._forward_whole(ids_NS, self._tensor([len(tokens) for tokens in sequences]))

    def _by_length(self, items: list, key: Callable = len) -> Iterator[list]:
        """Items in batches of like length, each of at most `max_prefill_tokens` with its padding."""
        batch: list = []
        for item in sorted(items, key=key):
            if batch and (len(batch) + 1) * key(item) > self.max_prefill_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _make_room(self) -> None:
        """Widen the slots for one more token per row; where memory ends, the newest rows return to the queue."""
        slots = self._slots
        if slots.used[: slots.n].max() <= slots.cache.row_sides[1]:
            return
        self._compact()
        need = self._need()
        if need.tokens > self.max_kv_tokens:
            for entry in self._waiting:
                entry.forget()
            self._preempt()
            need = self._need()
        self._reshape(need)

    def _preempt(self) -> None:
        """Take the slots of the newest rows, as many as must. They wait at the head of the queue with what they have
        written; since a draw depends on its position only, they will go on as if nothing had been."""
        slots = self._slots
        by_age = np.argsort([row.order for row in slots.rows[: slots.n]])
        need, seen, keep = self._need(), set(), 0
        need = replace(need, rows=0, prefixes=0, prefix_columns=0)
        for slot in by_age:
            prefix = slots.rows[slot].prefix
            if prefix is not None:
                seen.add(id(prefix))
                need = replace(need, prefix_columns=max(need.prefix_columns, len(prefix.tokens)))
            need = replace(need, rows=need.rows + 1, prefixes=len(seen))
            if keep and need.tokens > self.max_kv_tokens:
                break
            keep += 1
        entries = []
        for slot in by_age[keep:]:
            row = slots.rows[slot]
            drawn = slice(slots.start[slot], slots.used[slot])
            tokens = slots.ids[slot, drawn].tolist()
            entries.append(_Entry(row.sequence + tuple(tokens), [row]))
            row.tokens.extend(tokens)
            row.logprobs.extend(slots.logprobs[slot, drawn].tolist())
        slots.drop(by_age[keep:])
        for entry in reversed(entries):
            entry.rows[0].prefix = None
            self._waiting.appendleft(entry)
        self._compact()

    def _compact(self) -> None:
        if self._slots.compact():
            self._how = None

    def _reshape(self, need: _Need) -> None:
        """Stores that hold at least `need`, grown by doubling in slots, and kept while the budget allows."""
        slots = self._slots
        (N, P), (R, C) = slots.cache.prefix_sides, slots.cache.row_sides
        if need.prefixes <= N and need.prefix_columns <= P and need.rows <= R and need.used <= C:
            return
        R = R if need.rows <= R else max(need.rows, min(2 * R, self.max_batch_rows))
        N = N if need.prefixes <= N else max(need.prefixes, min(2 * N, R))
        grown = (N, max(P, need.prefix_columns)), (R, max(C, need.columns))
        if sum(a * b for a, b in grown) > self.max_kv_tokens:
            spare = self.max_kv_tokens - need.prefix_tokens
            columns = min(need.columns, spare // max(1, need.rows))
            grown = ((need.prefixes, need.prefix_columns), (need.rows, max(need.used, columns)))
        slots.reshape(*grown)

    # ------------------------------------------------------------------------------------------------- forward passes

    def _forward(
        self, ids_BS: Tensor, positions_BS: Tensor, mask: Tensor | dict | None, *, cache: Cache | None = None, **kwargs
    ) -> Tensor:
        attention = self.config._attn_implementation
        if mask is not None and self._slots.cache.plan.sharing is not None:
            self.config._attn_implementation = SHARED_ATTENTION
        try:
            return self.model(
                input_ids=ids_BS,
                position_ids=positions_BS,
                attention_mask=mask,
                past_key_values=self._slots.cache if cache is None else cache,
                use_cache=True,
                **kwargs,
            ).logits
        finally:
            if self.config._attn_implementation != attention:
                self.config._attn_implementation = attention

    def _forward_whole(self, ids_NS: Tensor, lengths_N: Tensor) -> Tensor:
        """Run whole sequences, padded on the right. Returns the logits [N, V] after each one's last token.

        No mask: a causal pass never looks at the padding to its right, and what the padding leaves in the cache stands
        at columns that the row overwrites before it looks at them.
        """
        N, S = ids_NS.shape
        positions_NS = torch.arange(S, device=self._device).expand(N, S)
        last_N1 = (lengths_N - 1)[:, None]
        if self._head_by_row:
            logits = self._forward(ids_NS, positions_NS, None, logits_to_keep=last_N1)
            if logits.shape[:2] == (N, 1):
                return logits[:, 0]
            self._head_by_row = False  # an older or foreign model, that keeps the same positions of every row
        logits_NSV = self._forward(ids_NS, positions_NS, None)
        return logits_NSV.gather(1, last_N1[:, :, None].expand(-1, -1, logits_NSV.shape[-1]))[:, 0]

    def _mask(self, sharing: Sharing | None, position_BS: Tensor, columns: int) -> Tensor | dict[str, Tensor]:
        """What the tokens at these positions may attend to, among the columns of their prefix, if any, and then
        `columns` of their slot: additive [B, 1, S, L], by kind of layer where the model has several."""
        key_BL = torch.arange(columns, device=self._device).expand(len(position_BS), -1)
        if sharing is not None:
            prefix_P = torch.arange(sharing.columns, device=self._device)
            length_B1 = sharing.length_B[:, None]
            # A column of padding in the prefix counts as one from the future.
            prefix_BP = torch.where(prefix_P < length_B1, prefix_P, 1 << 40)
            key_BL = torch.cat([prefix_BP, length_B1 + key_BL], 1)
        behind_BSL = position_BS[:, :, None] - key_BL[:, None, :]
        masks = {}
        for kind in self._kinds:
            hidden_BSL = behind_BSL < 0
            if kind == "sliding_attention":
                hidden_BSL |= behind_BSL >= self._window
            elif kind == "chunked_attention":
                hidden_BSL |= (key_BL // self._chunk)[:, None, :] != (position_BS // self._chunk)[:, :, None]
            mask_BSL = torch.zeros(hidden_BSL.shape, dtype=self._dtype, device=self._device)
            masks[kind] = mask_BSL.masked_fill_(hidden_BSL, -math.inf)[:, None]
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, no dropout, no gradient checkpointing, and an attention that takes explicit masks; afterwards
        the model is as it was. `no_grad` and not `inference_mode`, whose tensors may not enter a later training pass
        when a model keeps some (FSDP2's gathered weights, dynamic rotary tables)."""
        training = [module for module in self.model.modules() if module.training]
        attention = self.config._attn_implementation
        for module in training:
            module.training = False
        if attention not in ("sdpa", "eager"):
            self.config._attn_implementation = "sdpa"
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            if self.config._attn_implementation != attention:
                self.config._attn_implementation = attention

    # ----------------------------------------------------------------------------------------------------- validation

    def _check_awake(self, what: str) -> None:
        if self._asleep:
            raise RunError(f"{what}: the sampler sleeps; call wake first")

    def _check_request(self, request: SampleRequest) -> None:
        what, params = f"request {request.request_id}", request.params
        prompt = request.prompt
        if request.request_id in self._jobs or any(done.request_id == request.request_id for done in self._done):
            raise DataError(f"{what}: this request_id is still pending; take another, or cancel the first")
        if request.num_samples < 1:
            raise ConfigError(f"{what}: num_samples is {request.num_samples}, but must be at least 1")
        self._check_prompt(what, prompt)
        for name, value, good, must in (
            ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
            ("temperature", params.temperature, 0 <= params.temperature < math.inf, "finite and at least 0 (greedy)"),
            ("top_k", params.top_k, params.top_k >= 0, "at least 0 (all tokens)"),
            ("top_p", params.top_p, 0 < params.top_p <= 1, "in (0, 1]"),
            ("min_p", params.min_p, 0 <= params.min_p <= 1, "in [0, 1]"),
            ("stop_token_ids", params.stop_token_ids, min(params.stop_token_ids or (0,)) >= 0, "token ids"),
            ("stop", params.stop, all(params.stop), "strings of at least one character"),
        ):
            if not good:
                raise ConfigError(f"{what}: {name} is {value!r}, but must be {must}")
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"{what}: stop strings {params.stop!r} need a tokenizer; construct the sampler with one")
        total = _limit(request)
        if self.context_length is not None and total > self.context_length:
            raise DataError(
                f"{what}: a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} make {total}, beyond the "
                f"model's context of {self.context_length}; shorten the prompt or set max_tokens to at most "
                f"{max(0, self.context_length - len(prompt))}"
            )
        if len(prompt) + max(1, params.max_tokens - 1) > self.max_kv_tokens:  # the last token is never fed
            raise DataError(
                f"{what}: one sample of {total} tokens does not fit a key/value memory of {self.max_kv_tokens} "
                "tokens; raise max_kv_tokens or lower max_tokens"
            )

    def _check_prompt(self, what: str, prompt: Sequence[int]) -> None:
        if not len(prompt):
            raise DataError(f"{what}: the prompt is empty, so there is nothing to continue; begin it with a BOS token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            at, token = next((i, token) for i, token in enumerate(prompt) if not 0 <= token < self.vocab_size)
            raise DataError(
                f"{what}: token {token} at prompt position {at} is outside the vocabulary of {self.vocab_size}"
            )

    def _check_model(self) -> None:
        """Compare a short ragged prefill and two cached steps with full passes, so that an architecture that this cache
        does not suit is refused instead of sampled wrongly. One whose attention cannot be replaced by ours gets every
        row's prefix copied in every step: slower, and as right."""
        if self.context_length is not None and self.context_length < 7:
            return
        name = type(base(self.model)).__name__
        tolerance = 0.01 if self._dtype in (torch.float32, torch.float64) else 0.2
        problem = self._problem(tolerance, shared=False)
        if problem:
            raise ConfigError(
                f"model {name}: decoding with LocalSampler's key/value cache does not reproduce its full pass "
                f"({problem}). Its attention is of another kind, or its weights are not finite; sample from it "
                "with another engine"
            )
        problem = self._shared and self._problem(tolerance, shared=True)
        if problem:
            self._shared = False
            logger.info("model %s: prompts are copied for each of their samples (%s)", name, problem)

    def _problem(self, tolerance: float, *, shared: bool) -> str:
        try:
            off = self._cached_error(shared)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if off <= tolerance else f"it is {off:.2g} off, relative to the logits' spread; tolerance {tolerance}"

    def _cached_error(self, shared: bool) -> float:
        full_NS = (torch.arange(14, device=self._device).view(2, 7) * 7 + 3) % self.vocab_size
        length_N, both, none = (self._tensor([5, 3]), self._tensor([0, 1]), self._tensor([]))
        slots, errors = self._slots, []
        try:
            with self._inference():
                expected_NSV = torch.cat([self.model(input_ids=row[None], use_cache=False).logits for row in full_NS])
                slots.cache.reshape((2, 5), (2, 7), 0, 0)
                slots.cache.plan = Prefill(both, both, none, none) if shared else Prefill(none, none, both, both)
                logits_NV = self._forward_whole(full_NS[:, :5], length_N)
                sharing = Sharing(np.arange(2), np.array([5, 3]), self._device) if shared else None
                for step in range(3):
                    position_N1 = (length_N + step)[:, None]
                    expected_NV = expected_NSV[both, position_N1[:, 0] - 1].double()
                    scale = (expected_NV - expected_NV.mean(-1, keepdim=True)).norm() + 1e-3 * self.vocab_size**0.5
                    errors.append(float((logits_NV.double() - expected_NV).norm() / scale))
                    if step == 2:
                        break
                    column_N = torch.full_like(length_N, step) if shared else position_N1[:, 0]
                    columns = int(column_N.max()) + 1
                    slots.cache.plan = Decode(sharing, column_N, columns)
                    mask = self._mask(sharing, position_N1, columns)
                    logits_NV = self._forward(full_NS.gather(1, position_N1), position_N1, mask)[:, -1]
        finally:
            self._token_bytes = slots.cache.token_bytes()
            self._slots = Slots(self.config.num_hidden_layers, self._device)
        return max(errors) if all(map(math.isfinite, errors)) else math.inf


@dataclass(frozen=True, slots=True)
class _Need:
    """What some rows take of the stores. used: columns of their slots. limit: of `used`, plus one."""

    rows: int
    used: int
    limit: int
    prefixes: int
    prefix_columns: int

    @property
    def columns(self) -> int:
        """Columns to take for the slots: room to grow, but not all the way. Widening a store by an eighth costs a copy,
        soon forgotten among the steps that each read all of it."""
        return max(1, self.used, min(self.limit - 1, self.used + max(_GROWTH, self.used // 8)))

    @property
    def prefix_tokens(self) -> int:
        return self.prefixes * self.prefix_columns

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.rows * self.columns

    def plus(self, entry: _Entry, shared: bool, most: int) -> _Need:
        """With what the entry's sequence takes, copied for up to `most` rows if it is shared, and with its rows' use
        of their slots; but not with the rows."""
        length = 0 if shared else len(entry.tokens)
        left = max(row.job.request.params.max_tokens - len(row.tokens) for row in entry.rows)
        more = replace(self, used=max(self.used, length), limit=max(self.limit, length + left))
        if not shared or entry.prefixes:
            return more
        copies = -(-min(len(entry.rows), most) // _SHARE)
        columns = max(self.prefix_columns, len(entry.tokens))
        return replace(more, prefixes=self.prefixes + copies, prefix_columns=columns)


def _limit(request: SampleRequest) -> int:
    """The length of prompt and completion at which a sample is truncated."""
    return len(request.prompt) + request.params.max_tokens


def _versions(spans: list[tuple[int, int]], length: int) -> tuple[int, ...]:
    """Spread (tokens written before, version) over the tokens."""
    if len(spans) == 1:
        return (spans[0][1],) * length
    versions: list[int] = []
    for (begin, version), (end, _) in zip(spans, [*spans[1:], (length, 0)], strict=True):
        versions.extend([version] * (end - begin))
    return tuple(versions)


def _padded(sequences: Sequence[Sequence[int]], filler: int) -> np.ndarray:
    """int64 [N, S], filled up on the right."""
    out = np.full((len(sequences), max(map(len, sequences))), filler, dtype=np.int64)
    for row, tokens in zip(out, sequences, strict=True):
        row[: len(tokens)] = tokens
    return out
