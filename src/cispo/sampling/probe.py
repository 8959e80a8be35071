"""Does the sampler compute the policy that the learner trains? Asked of every engine that has a copy of the weights.

An update of an engine's weights can report success and leave part of the model as it was (vLLM on CPUs did so with tied
heads). Nothing crashes then: ratios drift, and training degrades in silence. So after an update a few completions are
sampled, and the log-probs that came with them are compared with the learner's own. What is compared is what is trained
on, along the whole path: prefill, decoding, the head, the temperature. Left out on purpose: how completions come about
(`vllm.py` for its own engine, `cluster/samplers.py` for every sampler of a pool).
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cispo.config import VllmConfig
from cispo.types import Batch, Completion, Learner, RunError, SampleRequest, SamplingParams

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Accepted |Δ log-prob| in nats. Measured between vLLM 0.32 and transformers: 1e-5 in float32, 0.07 in bfloat16."""

_ROWS, _PROMPT, _TOKENS = 4, 256, 16

LearnerLogprobs = Callable[[Sequence[Sequence[int]], float], Sequence[Sequence[float]]]
"""`(rows, temperature) -> log-probs`: of each row of S tokens, the S − 1 log-probs of its tokens from the second on,
under the learner's present weights with logits divided by the temperature."""


def learner_logprobs(learner: Learner) -> LearnerLogprobs:
    """The callable of a learner. Not to be called while the learner works: its `forward` is run."""

    def logprobs(rows: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        lengths = [len(row) - 1 for row in rows]
        batch = Batch(
            rows=tuple(torch.tensor(row[:-1]) for row in rows),
            targets_T=torch.cat([torch.tensor(row[1:]) for row in rows]),
            weights_T=torch.ones(sum(lengths)),
            columns={},
        )
        logprobs_T = learner.forward(batch, temperature=temperature).logprobs_T
        return [part.tolist() for part in logprobs_T.split(lengths)]

    return logprobs


class Recent:
    """What probes sample: the beginnings of the prompts seen last, at the temperature of the newest."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._prompts: deque[tuple[int, ...]] = deque(maxlen=_ROWS)
        self.temperature = 1.0

    def note(self, request: SampleRequest) -> None:
        if request.prompt not in self._prompts:
            self._prompts.append(request.prompt)
        self.temperature = request.params.temperature

    def requests(self, first_id: int, *, seed: int, context_length: int | None) -> list[SampleRequest]:
        """One completion of each prompt, never ended before its length; a random prompt where none was seen."""
        room = (context_length or 1 << 30) - 1
        tokens = min(_TOKENS, room)
        longest = room - tokens + 1
        draw = random.Random(0)
        prompts = list(self._prompts) or [tuple(draw.randrange(self._vocab_size) for _ in range(min(16, longest)))]
        params = SamplingParams(max_tokens=tokens, temperature=self.temperature, stop_token_ids=(), seed=seed)
        return [
            SampleRequest(first_id + i, prompt[: min(_PROMPT, longest)], 1, params) for i, prompt in enumerate(prompts)
        ]


def due(updates: int, config: VllmConfig) -> bool:
    """Whether a probe follows this update, the first of which is number 1."""
    return updates <= config.probe_updates or bool(config.probe_every and updates % config.probe_every == 0)


def accepted(config: VllmConfig, dtype: torch.dtype) -> float:
    """The largest difference in nats that a probe lets pass, of samplers that compute in this dtype."""
    return config.probe_tolerance or TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


@dataclass(frozen=True)
class Parity:
    """What one probe found: |sampler − learner| in nats, over `tokens` sampled tokens."""

    version: int
    tokens: int
    mean: float
    max: float


def compare(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    reference: LearnerLogprobs,
    *,
    temperature: float,
    tolerance: float,
    version: int,
    names: Sequence[str] | None = None,
) -> Parity:
    """Compare the log-probs of one completion of each prompt with the learner's.

    temperature: that of the samples; greedy ones (0) are compared at 1, as samplers report them. tolerance: the largest
    accepted |difference| in nats. names: which sampler wrote each completion, for messages. Raises RunError where the
    tolerance is exceeded, or where a token is of another version.
    """
    names = names or ["sampler"] * len(prompts)
    rows = [(*prompt, *completion.tokens) for prompt, completion in zip(prompts, completions, strict=True)]
    others = {v: name for name, c in zip(names, completions, strict=True) for v in c.versions if v != version}
    if others:
        raise RunError(
            f"{others[min(others)]}: after the update to version {version}, tokens were written by version "
            f"{min(others)}; the engine's weights are not the ones that were published"
        )
    worst, total, tokens, at = 0.0, 0.0, 0, (0, 0)
    expected = reference(rows, temperature or 1.0)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own = expected[i][len(prompt) - 1 :]
        for position, (sampled, trained) in enumerate(zip(completion.logprobs, own, strict=True)):
            difference = abs(sampled - trained)
            difference = math.inf if math.isnan(difference) else difference
            total, tokens = total + difference, tokens + 1
            if difference > worst:
                worst, at = difference, (i, position)
    parity = Parity(version, tokens, total / max(1, tokens), worst)
    if worst > tolerance:
        i, position = at
        raise RunError(
            f"{names[i]}: at version {version} its log-probs differ from the learner's by up to {worst:.3g} nats (mean "
            f"{parity.mean:.2g} over {tokens} tokens), more than the accepted {tolerance:g} "
            f"(vllm.probe_tolerance). Token {position} of a completion has {completions[i].logprobs[position]:.4f} in "
            f"the sampler and {expected[i][len(prompts[i]) - 1 + position]:.4f} in the learner. Either the weights did "
            "not arrive whole, or the two compute another model (dtype, rope scaling, an unsupported architecture)"
        )
    return parity
