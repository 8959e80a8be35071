"""`LocalSampler`: continuous batching in this process, over any `transformers` decoder, on the learner's own weights.

One step of the loop: waiting requests take free slots (each prompt runs once, whatever its number of samples), every
row in flight draws a token, and rows that ended leave. Randomness is stateless (`draw.py`), so a completion depends on
the weights, the prompt, the seed and the sample's index, and not on its neighbours, on when it was admitted, or on
whether it lost its slot for a while to a row that needed the memory.
Left out on purpose: other processes (vllm.py, cluster.py), beam search, speculative decoding, penalties.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cispo.sampling.draw import Filters, draw, uniforms
from cispo.sampling.slots import COUNT, CUR, MIN_P, POS, SEED, TEMPERATURE, TOP_K, TOP_P, Job, Row, Slots
from cispo.types import Completion, ConfigError, DataError, NonFiniteError, SampleRequest, SampleResult

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_DEFAULT_KV_BYTES = 4 << 30
import os
_GROWTH = int(os.environ.get('GR',32))
_STOPPED, _BROKEN = 1, 2  # a row's status after a draw


@dataclass(slots=True)
class _Entry:
    """Rows that wait for slots: some samples of one job that share the sequence to run first."""

    job: Job
    tokens: tuple[int, ...]
    rows: list[Row]


class LocalSampler:
    """A `Sampler` in this process.

    model: a loaded causal language model of `transformers`, plain or wrapped by peft (its active adapter is sampled).
    tokenizer: needed for stop strings only.
    max_batch_rows: rows in flight. max_kv_tokens: slots × columns of the key/value memory; by default what 4 GiB hold.
    A request larger than either is worked off in parts. max_prefill_tokens: tokens, padding included, in one pass over
    prompts. steps_per_poll: `poll` returns after this many decode steps, or as soon as a request has finished.
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
            ("steps_per_poll", steps_per_poll),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        self.version = version
        self.tokenizer = tokenizer
        self.share_weights = share_weights
        self.max_batch_rows, self.max_prefill_tokens = max_batch_rows, max_prefill_tokens
        self.steps_per_poll = steps_per_poll
        self.recompute_kv_on_update = recompute_kv_on_update
        self.model = model if share_weights else _own_copy(model)
        self.config = _decoder_config(self.model)
        self.context_length: int | None = getattr(self.config, "max_position_embeddings", None)
        self.vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.eos_token_ids = _eos_ids(self.model, tokenizer) if eos_token_ids is None else tuple(eos_token_ids)
        self._device = self.model.get_input_embeddings().weight.device
        self._dtype = self.model.dtype
        self._kinds = _attention_kinds(self.config)
        self._window = getattr(self.config, "sliding_window", None)
        self._chunk = getattr(self.config, "attention_chunk_size", None)
        self._filler = 1 if getattr(self.config, "pad_token_id", None) == 0 and self.vocab_size > 1 else 0
        self._head_by_row = "logits_to_keep" in inspect.signature(_base(self.model).forward).parameters
        self._seeds = random.Random(seed)
        self._slots = Slots(self.config.num_hidden_layers, self._device)
        self._waiting: deque[_Entry] = deque()
        self._jobs: dict[int, Job] = {}
        self._done: list[SampleResult] = []
        self._admitted = 0
        self._stale = False
        self._how: dict | None = None  # how the rows in flight are drawn; None: ask again
        self._token_text: dict[int, str] = {}
        self.max_kv_tokens = max_kv_tokens or 1 << 62
        if check_model:
            self._check_model()
        if max_kv_tokens is None:
            self.max_kv_tokens = max(1, _DEFAULT_KV_BYTES // max(1, self._token_bytes()))

    # --------------------------------------------------------------------------------------------------- the protocol

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._jobs) + len(self._done)

    @property
    def rows_in_flight(self) -> int:
        return self._slots.n - self._slots.dead

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises DataError or ConfigError for one that cannot be sampled as asked, before any work."""
        self._check_request(request)
        params = request.params
        stops = self.eos_token_ids if params.stop_token_ids is None else tuple(params.stop_token_ids)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        G = request.num_samples
        job = Job(request, seed, stops, [None] * G, G)
        self._jobs[request.request_id] = job
        rows = [Row(job, sample, [], [], 0) for sample in range(G)]
        self._waiting.append(_Entry(job, tuple(request.prompt), rows))

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """Advance by up to `steps_per_poll` decode steps, and return the requests that finished.

        wait: without it nothing is decoded, because here decoding is what takes the caller's time. Raises NonFiniteError when a row's logits hold NaN or infinity; its request is gone then, the others go on.
        """
        with self._inference():
            for _ in range(self.steps_per_poll if wait else 0):
                if self._done or not self._jobs:
                    break
                self._step()
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

    def cancel(self, request_id: int) -> None:
        """Drop a request and all its samples. One that is unknown, or was returned already, is no error."""
        self._done = [result for result in self._done if result.request_id != request_id]
        job = self._jobs.pop(request_id, None)
        if job is None:
            return
        self._waiting = deque(entry for entry in self._waiting if entry.job is not job)
        slots = [slot for slot in range(self._slots.n) if self._slots.live[slot] and self._slots.rows[slot].job is job]
        if slots:
            self._slots.drop(np.array(slots))

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """New policy from here on, rows in flight included.

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
            _load(self.model, weights)
        self.version = version
        self._stale = True
        slots = self._slots
        for slot in np.flatnonzero(slots.live[: slots.n]):
            row = slots.rows[slot]
            row.spans.append((int(slots.length[slot]) - len(row.job.request.prompt), version))

    def release(self) -> None:
        """Give the key/value memory back while nothing is in flight (a learner on the same device may need it)."""
        self._slots.compact()
        if self._slots.n == 0:
            self._slots = Slots(self.config.num_hidden_layers, self._device)

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
        B, L = slots.n, int(slots.length[: slots.n].max())
        pos_B = slots.ints[:B, POS].clone()
        slots.cache.plan_decode(pos_B, L)
        logits_BV = self._forward(slots.ints[:B, CUR, None], pos_B[:, None], self._mask(pos_B, L))[:, -1]
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
        ints[:, POS : COUNT + 1] += 1
        ints[:, CUR] = tokens_B
        at_B1 = ints[:, POS, None]
        slots.ids[new].scatter_(1, at_B1, tokens_B[:, None])
        slots.logprobs[new].scatter_(1, at_B1, logprobs_B[:, None])
        stopped_B = (slots.stops[new] == tokens_B[:, None]).any(1)
        status_B = torch.where(logprobs_B.isfinite(), stopped_B.to(torch.int8) * _STOPPED, _BROKEN)
        status = status_B.cpu().numpy()  # the step's one question to the device
        slots.length[new] += 1
        live = slots.live[new]
        if slots.watched[new].any():
            for i in np.flatnonzero(slots.watched[new] & (status == 0)):
                if self._string_ends(new.start + int(i)):
                    status[i] = _STOPPED
        ended = np.flatnonzero(live & ((status > 0) | (slots.length[new] >= slots.limit[new])))
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
            columns = (
                params[rows, TOP_K].astype(int).tolist(),
                params[rows, TOP_P].tolist(),
                params[rows, MIN_P].tolist(),
            )
            how["filters"] = Filters.of(rows.tolist(), *columns, self._device)
        return how

    def _finish(self, ended: np.ndarray, status: np.ndarray) -> None:
        slots = self._slots
        broken: dict[int, Job] = {}
        at = torch.from_numpy(ended).to(self._device)
        L = int(slots.length[ended].max())
        ids = slots.ids[at, :L].cpu().numpy()
        logprobs = slots.logprobs[at, :L].cpu().numpy()
        for i, slot in enumerate(ended):
            row, length = slots.rows[slot], int(slots.length[slot])
            job = row.job
            if status[i] == _BROKEN:
                broken[job.request.request_id] = job
                continue
            prompt = len(job.request.prompt)
            job.completions[row.sample] = Completion(
                tokens=tuple(ids[i, prompt:length].tolist()),
                logprobs=tuple(row.logprobs + logprobs[i, slots.start[slot] : length].tolist()),
                versions=_versions(row.spans, length - prompt),
                stop_reason="stop" if status[i] == _STOPPED else "length",
            )
            job.left -= 1
            if job.left == 0:
                request_id = job.request.request_id
                self._done.append(SampleResult(request_id, tuple(job.completions)))
                del self._jobs[request_id]
        if broken:
            slots.cache.wipe(at)
        slots.drop(ended)
        for request_id in broken:
            self.cancel(request_id)
        if broken:
            raise NonFiniteError(
                f"request {', '.join(map(str, broken))}: the model's logits hold NaN or infinity (weights of version "
                f"{self.version}), and nothing was sampled from them. Look for a diverged update, or an overflow in "
                "half precision"
            )

    def _string_ends(self, slot: int) -> bool:
        """Whether the newest token completes one of the row's stop strings."""
        slots = self._slots
        row, length = slots.rows[slot], int(slots.length[slot])
        stops, first = row.job.request.params.stop, len(row.job.request.prompt)
        newest = int(slots.ids[slot, length - 1])
        text = self._token_text.get(newest)
        if text is None:
            text = self._token_text[newest] = self._decode([newest])
        # A string can only end here when its last character is in the newest token's text. Bytes of an unfinished
        # character, and blanks that a tokenizer strips from a lone token, are no evidence: decode then.
        if text and "�" not in text and not any(stop[-1] in text or stop[-1].isspace() for stop in stops):
            return False
        longest = max(map(len, stops))
        size = longest + 8
        while True:
            tail = self._decode(slots.ids[slot, max(first, length - size) : length].tolist())
            if length - size <= first or len(tail) >= longest + len(text) + 4:
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
        n = slots.n
        longest, most = self._extent()
        waiting = sum(len(entry.rows) for entry in self._waiting)
        chosen: list[_Entry] = []
        while self._waiting and n < self.max_batch_rows:
            entry = self._waiting[0]
            length, limit = max(longest, len(entry.tokens)), max(most, _limit(entry.job.request))
            free = min(self.max_batch_rows, self.max_kv_tokens // _columns_for(length, limit)) - n
            # Slots free up one by one. Wait until an eighth of the batch is free, or each pass over prompts serves few
            # rows; and until a quarter is before a group is torn apart, whose prompt must run again for the rest.
            if n and free < min(len(entry.rows), max(1, self.max_batch_rows // 4)):
                break
            if slots.n and not chosen and free < min(waiting, (slots.n + free) // 8):
                break
            taken, entry.rows = entry.rows[:free], entry.rows[free:]
            chosen.append(_Entry(entry.job, entry.tokens, taken))
            n, longest, most = n + len(taken), length, limit
            if entry.rows:
                break
            self._waiting.popleft()
        if chosen:
            self._reshape(n, _columns_for(longest, most))
            self._prefill(chosen)

    def _extent(self) -> tuple[int, int]:
        """The longest row in flight, and the length that a row in flight may reach."""
        live = self._slots.live[: self._slots.n]
        if not live.any():
            return 0, 0
        return int(self._slots.length[: len(live)][live].max()), int(self._slots.limit[: len(live)][live].max())

    def _prefill(self, entries: list[_Entry]) -> None:
        """Run each sequence once, copy its keys and values to its rows' slots, and draw each row's next token."""
        slots = self._slots
        rows_of: dict[tuple[int, ...], list[Row]] = {}
        for entry in entries:  # requests with the same prompt share it too
            rows_of.setdefault(entry.tokens, []).extend(entry.rows)
        for batch in self._by_length(list(rows_of)):
            rows = [row for tokens in batch for row in rows_of[tokens]]
            for row in rows:
                self._admitted += 1
                row.order = self._admitted
                row.spans.append((len(row.logprobs), self.version))
            counts = np.array([len(rows_of[tokens]) for tokens in batch])
            lengths = np.array([len(tokens) for tokens in batch])
            ids_NS = torch.from_numpy(_padded(batch, self._filler)).to(self._device)
            source = torch.from_numpy(np.repeat(np.arange(len(batch)), counts)).to(self._device)
            new = slots.fill(rows, ids_NS[source], np.repeat(lengths, counts))
            self._how = None
            slots.cache.plan_prefill(new, int(counts[0]) if (counts == counts[0]).all() else source)
            logits_NV = self._forward_whole(ids_NS, torch.from_numpy(lengths).to(self._device))
            self._draw(new, logits_NV[source])

    def _recompute(self) -> None:
        """Compute the keys and values of the rows in flight again, under the present weights."""
        self._compact()
        slots = self._slots
        lengths = slots.length[: slots.n] - 1  # the newest token has no keys and values yet
        order = np.argsort(lengths, kind="stable")
        for batch in self._by_length(order.tolist(), key=lambda slot: int(lengths[slot])):
            at = torch.tensor(batch).to(self._device)
            slots.cache.plan_prefill(at, torch.arange(len(batch), device=self._device))
            lengths_N = torch.from_numpy(lengths[batch]).to(self._device)
            self._forward_whole(slots.ids[at, : int(lengths[batch].max())], lengths_N)

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
        """Widen the rectangle for one more token per row; where memory ends, the newest rows go back to the queue."""
        slots = self._slots
        longest, most = self._extent()
        if longest <= slots.cache.columns:
            return
        self._compact()
        if slots.n * longest > self.max_kv_tokens:
            keep = max(1, self.max_kv_tokens // _columns_for(longest, most))
            by_age = np.argsort([row.order for row in slots.rows[: slots.n]])
            self._preempt(by_age[keep:])
            longest, most = self._extent()
        self._reshape(slots.n, max(longest, min(_columns_for(longest, most), self.max_kv_tokens // slots.n)))

    def _preempt(self, at: np.ndarray) -> None:
        """Take the slots of these rows (oldest first). They wait at the head of the queue with what they have written;
        since a draw depends on its position only, they will go on as if nothing had been."""
        slots = self._slots
        entries = []
        for slot in at:
            row, length = slots.rows[slot], int(slots.length[slot])
            row.logprobs.extend(slots.logprobs[slot, slots.start[slot] : length].tolist())
            entries.append(_Entry(row.job, tuple(slots.ids[slot, :length].tolist()), [row]))
        self._waiting.extendleft(reversed(entries))
        slots.drop(at)
        self._compact()

    def _compact(self) -> None:
        if self._slots.compact():
            self._how = None

    def _reshape(self, rows: int, columns: int) -> None:
        """Sides of at least rows × columns, grown by doubling and kept while the budget allows."""
        R, C = self._slots.cache.rows, self._slots.cache.columns
        if rows <= R and columns <= C:
            return
        wider = max(C, columns)
        taller = R if rows <= R else max(rows, min(2 * R, self.max_batch_rows))
        for sides in ((taller, wider), (rows, wider), (taller, columns), (rows, columns)):
            if sides[0] * sides[1] <= self.max_kv_tokens:
                self._slots.reshape(*sides)
                return
        raise AssertionError(f"{rows} rows × {columns} columns were admitted over a budget of {self.max_kv_tokens}")

    # ------------------------------------------------------------------------------------------------- forward passes

    def _forward(self, ids_BS: Tensor, positions_BS: Tensor, mask: Tensor | dict | None, **kwargs) -> Tensor:
        return self.model(
            input_ids=ids_BS,
            position_ids=positions_BS,
            attention_mask=mask,
            past_key_values=self._slots.cache,
            use_cache=True,
            **kwargs,
        ).logits

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

    def _mask(self, pos_B: Tensor, L: int) -> Tensor | dict[str, Tensor]:
        """What one token at each of `pos_B` may attend to among L columns: additive [B, 1, 1, L], by kind of layer
        where the model has several."""
        columns_L = torch.arange(L, device=self._device)
        behind_BL = pos_B[:, None] - columns_L
        masks = {}
        for kind in self._kinds:
            hidden_BL = behind_BL < 0
            if kind == "sliding_attention":
                hidden_BL |= behind_BL >= self._window
            elif kind == "chunked_attention":
                hidden_BL |= columns_L // self._chunk != (pos_B // self._chunk)[:, None]
            mask_BL = torch.zeros(hidden_BL.shape, dtype=self._dtype, device=self._device)
            masks[kind] = mask_BL.masked_fill_(hidden_BL, -math.inf)[:, None, None, :]
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

    def _check_request(self, request: SampleRequest) -> None:
        what, params = f"request {request.request_id}", request.params
        prompt, vocab = request.prompt, self.vocab_size
        if request.request_id in self._jobs or any(done.request_id == request.request_id for done in self._done):
            raise DataError(f"{what}: this request_id is still pending; take another, or cancel the first")
        if request.num_samples < 1:
            raise ConfigError(f"{what}: num_samples is {request.num_samples}, but must be at least 1")
        if not prompt:
            raise DataError(f"{what}: the prompt is empty, so there is nothing to continue; begin it with a BOS token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(i for i, token in enumerate(prompt) if not 0 <= token < vocab)
            raise DataError(
                f"{what}: token {prompt[bad]} at prompt position {bad} is outside the vocabulary of {vocab}"
            )
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
        if total - 1 > self.max_kv_tokens:
            raise DataError(
                f"{what}: one sample of {total} tokens does not fit a key/value memory of {self.max_kv_tokens} "
                "tokens; raise max_kv_tokens or lower max_tokens"
            )

    def _check_model(self) -> None:
        """Compare a short ragged prefill and two cached steps with full passes, so that an architecture that this cache
        does not suit is refused instead of sampled wrongly. Leaves `_token_bytes` measured."""
        name = type(_base(self.model)).__name__
        full_NS = (torch.arange(14, device=self._device).view(2, 7) * 7 + 3) % self.vocab_size
        if self.context_length is not None and self.context_length < full_NS.shape[1]:
            return
        lengths = torch.tensor([5, 3], device=self._device)
        slots = self._slots
        try:
            with self._inference():
                expected_NSV = torch.cat([self.model(input_ids=row[None], use_cache=False).logits for row in full_NS])
                slots.reshape(2, 8)
                slots.cache.plan_prefill(slice(0, 2), 1)
                steps = [(lengths, self._forward_whole(full_NS[:, :5], lengths))]
                for _ in range(2):
                    pos_B = steps[-1][0]
                    L = int(pos_B.max()) + 1
                    slots.cache.plan_decode(pos_B, L)
                    token_B1 = full_NS.gather(1, pos_B[:, None])
                    steps.append((pos_B + 1, self._forward(token_B1, pos_B[:, None], self._mask(pos_B, L))[:, -1]))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            raise ConfigError(
                f"model {name} cannot be decoded with an explicit key/value cache ({type(error).__name__}: {error}); "
                "sample from it with another engine"
            ) from error
        finally:
            self._measured_token_bytes = slots.cache.token_bytes()
            self._slots = Slots(self.config.num_hidden_layers, self._device)
        tolerance = 0.01 if self._dtype in (torch.float32, torch.float64) else 0.2
        for length_N, logits_NV in steps:
            expected_NV = expected_NSV[torch.arange(2, device=self._device), length_N - 1].double()
            scale = (expected_NV - expected_NV.mean(-1, keepdim=True)).norm() + 1e-3 * self.vocab_size**0.5
            error = float((logits_NV.double() - expected_NV).norm() / scale)
            if not error <= tolerance:
                raise ConfigError(
                    f"model {name}: cached decoding is {error:.2g} away from its full pass, relative to the spread of "
                    f"its logits (tolerance {tolerance}); its attention or cache is not one that LocalSampler handles, "
                    "or its weights are not finite. Sample from it with another engine"
                )

    def _token_bytes(self) -> int:
        return self._measured_token_bytes


def _columns_for(longest: int, most: int) -> int:
    """Columns to take when rows of `longest` tokens may grow to `most`: room to grow, but not all the way. Attention
    reads a tight rectangle as one stream, which measured 1.5 × faster than the first half of a wide one; and widening
    it by an eighth, one copy, is soon forgotten among the steps that each read all of it."""
    return max(1, min(most - 1, longest + max(_GROWTH, longest // 8)))


def _limit(request: SampleRequest) -> int:
    """The length of prompt and completion at which a sample is truncated."""
    return len(request.prompt) + request.params.max_tokens


def _versions(spans: list[tuple[int, int]], length: int) -> tuple[int, ...]:
    """Spread (tokens written before, version) over the tokens."""
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


def _base(model: nn.Module) -> nn.Module:
    """The `transformers` model inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder_config(model: nn.Module):
    """The config of the decoder. Raises ConfigError where its state is more than keys and values."""
    base = _base(model)
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise ConfigError(f"model {name} is an encoder-decoder; LocalSampler continues prompts with decoders only")
    config = base.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS
    if kinds or getattr(base, "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent state"
        raise ConfigError(
            f"model {name} has layers whose cache is not plain attention ({found}); LocalSampler handles "
            f"{', '.join(sorted(_ATTENTION_KINDS))}. Sample from it with another engine"
        )
    return config


def _attention_kinds(config) -> list[str]:
    """The kinds of mask that the model's layers ask for, as `transformers.masking_utils.create_masks_for_generate`."""
    if getattr(config, "layer_types", None):
        return sorted(set(config.layer_types))
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    return ["full_attention"]


def _eos_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The EOS ids of the generation config and of the config together; the tokenizer's where there are none."""
    ids: list[int] = []
    for source in (getattr(model, "generation_config", None), _base(model).config, _decoder_config(model)):
        eos = getattr(source, "eos_token_id", None)
        ids.extend([] if eos is None else [eos] if isinstance(eos, int) else eos)
    if not ids and getattr(tokenizer, "eos_token_id", None) is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(eos) for eos in ids))


def _own_copy(model: nn.Module) -> nn.Module:
    """A frozen copy to sample from, adapters merged, so that its weights bear their `transformers` names."""
    own = copy.deepcopy(model)
    if hasattr(own, "merge_and_unload"):
        own = own.merge_and_unload()
    return own.requires_grad_(False).eval()


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in given]
    unknown = [name for name in weights if name not in own]
    shapes = [name for name, tensor in weights.items() if name in own and tensor.shape != own[name].shape]
    for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape")):
        if names:
            raise ConfigError(
                f"update_weights: {len(names)} weights are {what} for the sampler's model "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); pass its state_dict's names and shapes. "
                "Nothing was loaded"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
