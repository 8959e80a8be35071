"""Sampling: the draw against references and statistics, and the sampler against full passes of real architectures."""

import gc
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from cispo.sampling import LocalSampler
from cispo.sampling.draw import Filters, draw, inverse_cdf, row_seed, truncate, uniforms
from cispo.types import (
    ConfigError,
    DataError,
    NonFiniteError,
    RunError,
    Sampler,
    SampleRequest,
    SamplingParams,
)

V = 61
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
MODELS = {
    "qwen3": ("Qwen3", SMALL),
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", SMALL | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2",
        SMALL | {"sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3",
        SMALL | {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
        | {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
    ),
    "gpt-oss": (  # attention sinks: the shared prefix cannot be used, and every row's prefix is copied
        "GptOss",
        SMALL | {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def make_model(name="qwen3", *, seed=0, **changes):
    kind, settings_ = MODELS[name]
    torch.manual_seed(seed)
    classes = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}
    config_class, model_class = classes.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    config = getattr(transformers, config_class)(**(settings_ | changes))
    model = getattr(transformers, model_class)(config).eval()
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def request(request_id, prompt, num_samples=1, **params):
    params = {"max_tokens": 8, "seed": request_id} | params
    return SampleRequest(request_id, tuple(prompt), num_samples, SamplingParams(**params))


def ragged_requests(count, *, seed=0, longest=20, **params):
    rng = np.random.default_rng(seed)
    return [
        request(
            i,
            rng.integers(3, V, rng.integers(1, longest)).tolist(),
            int(rng.integers(1, 5)),
            **({"max_tokens": int(rng.integers(1, 14))} | params),
        )
        for i in range(count)
    ]


@torch.no_grad()
def full_logprobs(model, prompt, tokens, temperature=1.0):
    """Log-probs of `tokens` after `prompt`, by one pass without a cache."""
    ids = torch.tensor([[*prompt, *tokens]])
    logprobs = (model(input_ids=ids, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


def worst_gap(model, requests, results):
    """Largest |recorded − full pass| over all tokens."""
    gap = 0.0
    for asked, result in zip(requests, results, strict=True):
        assert result.request_id == asked.request_id
        assert len(result.completions) == asked.num_samples
        for completion in result.completions:
            expected = full_logprobs(model, asked.prompt, completion.tokens, asked.params.temperature or 1.0)
            gap = max(gap, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return gap


def chi_square_p(observed, expected=None):
    """The probability of counts at least this far from the expected ones (equal ones by default)."""
    observed = np.asarray(observed, dtype=float)
    expected = np.full_like(observed, observed.mean()) if expected is None else np.asarray(expected)
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def tokens_of(results):
    return [[completion.tokens for completion in result.completions] for result in results]


# ------------------------------------------------------------------------------------------------------------- uniforms


def test_uniforms_are_splitmix64():
    # The first outputs for seed 1234567, as published with the reference implementation (prng.di.unimi.it).
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert got.tolist() == [(x >> 11) * 2.0**-53 for x in outputs]


def test_uniforms_are_uniform_and_independent_along_and_across_rows():
    rows, steps = 400, 250
    seeds = torch.tensor([row_seed(7, sample) for sample in range(rows)])
    u = torch.stack([uniforms(seeds, torch.full((rows,), step)) for step in range(steps)], 1).numpy()
    assert u.min() >= 0 and u.max() < 1
    bins = np.bincount((u.ravel() * 64).astype(int), minlength=64)
    assert chi_square_p(bins) > 0.01
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # the next token; the next sample
        pairs = np.bincount((first.ravel() * 16).astype(int) * 16 + (second.ravel() * 16).astype(int), minlength=256)
        assert chi_square_p(pairs) > 0.01


def test_any_integer_is_a_seed_modulo_two_to_the_64():
    assert row_seed(-1, 0) == row_seed(2**64 - 1, 0) == row_seed(2**70 - 1, 0)
    assert len({row_seed(seed, sample) for seed in range(100) for sample in range(100)}) == 10_000
    assert all(-(2**63) <= row_seed(seed, 3) < 2**63 for seed in (0, 2**63, 2**64 - 1, 10**30))


# ------------------------------------------------------------------------------------------------------------- the draw


def test_inverse_cdf_by_hand():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, 6)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probs, u).tolist() == [1, 1, 3, 3, 4, 4]


@settings(max_examples=30, deadline=None)
@given(st.integers(1025, 4000), st.integers(0, 2**32), st.floats(0, 0.99))
def test_inverse_cdf_by_blocks_is_the_plain_one_and_never_draws_a_zero(vocabulary, seed, sparsity):
    rng = np.random.default_rng(seed)
    probs = rng.exponential(size=(4, vocabulary)).astype(np.float32) ** 4
    probs[rng.random(probs.shape) < sparsity] = 0
    probs[:, rng.integers(vocabulary)] = 1
    u = np.array([0.0, 1 - 2**-53, rng.random(), rng.random()])
    got = inverse_cdf(torch.from_numpy(probs), torch.from_numpy(u)).numpy()
    cdf = probs.astype(np.float64).cumsum(1)
    for row in range(4):
        assert probs[row, got[row]] > 0
        target, slack = u[row] * cdf[row, -1], 1e-9 * cdf[row, -1]
        below = cdf[row, got[row] - 1] if got[row] else 0.0
        assert below - slack <= target <= cdf[row, got[row]] + slack


def test_draws_have_the_tempered_frequencies_and_log_probs():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    n = 40_000
    u = uniforms(torch.tensor([row_seed(1, i) for i in range(n)]), torch.zeros(n, dtype=torch.int64))
    tokens, logprobs = draw(logits.expand(n, 5), u, temperature=0.7)
    expected = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[tokens])
    assert chi_square_p(np.bincount(tokens, minlength=5), n * expected.double().softmax(-1).numpy()) > 0.01


def kept(probs, top_k=0, top_p=1.0, min_p=0.0):
    filters = Filters.of(np.array([0]), np.array([top_k]), np.array([top_p]), np.array([min_p]), torch.device("cpu"))
    return truncate(torch.tensor([probs]), filters)[0].nonzero()[:, 0].tolist()


def test_truncation_by_hand():
    probs = [0.1, 0.4, 0.05, 0.25, 0.2]
    assert kept(probs, top_k=2) == [1, 3]
    assert kept(probs, top_p=0.4) == [1]  # the nucleus is the smallest set of *at least* this mass
    assert kept(probs, top_p=0.41) == [1, 3]
    assert kept(probs, top_p=0.9) == [0, 1, 3, 4]
    assert kept(probs, min_p=0.5) == [1, 3, 4]
    assert kept(probs, top_k=2, top_p=0.61) == [1]  # of the mass 0.65 that top-k leaves, 0.4 is 0.615
    assert kept(probs, top_k=4, min_p=0.6) == [1, 3]
    assert kept(probs, top_p=1e-9) == [1]
    assert kept([0.25, 0.25, 0.25, 0.25], top_k=1) == [0, 1, 2, 3]  # ties at the edge stay


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 3, 40]), st.sampled_from([0.05, 0.5, 0.9, 1.0]), st.floats(0, 0.3))
def test_truncation_is_that_of_transformers(seed, top_k, top_p, min_p):
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 200)) * 3).float()
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in [*warpers, MinPLogitsWarper(min_p)]:
        expected = warper(None, expected)
    assert kept(logits.softmax(-1)[0].tolist(), top_k, top_p, min_p) == expected.isfinite()[0].nonzero()[:, 0].tolist()


def test_rows_are_truncated_each_in_its_own_way_whatever_the_others_ask():
    torch.manual_seed(0)
    probs = (torch.randn(4, 5000) * 2).softmax(-1)
    probs[3] = 1 / 5000  # flat: its nucleus is wider than the head that is looked at first
    top_k, top_p, min_p = np.array([7, 0, 0, 0]), np.array([0.5, 0.6, 1.0, 0.7]), np.array([0.0, 0.0, 0.2, 0.0])
    together = truncate(probs, Filters.of(np.arange(4), top_k, top_p, min_p, torch.device("cpu")))
    for row in range(4):
        one = slice(row, row + 1)
        alone = Filters.of(np.array([0]), top_k[one], top_p[one], min_p[one], torch.device("cpu"))
        assert torch.equal(together[one], truncate(probs[one], alone))
    assert (together > 0).sum(1).tolist()[0] <= 7
    assert (together[1].sum() >= 0.6) and (together[1].sum() - together[1][together[1] > 0].min() < 0.6)


# --------------------------------------------------------------------------------- log-probs equal those of full passes


@pytest.mark.parametrize("share_from", [1, 10, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_logprobs_are_those_of_a_full_pass_on_ragged_joining_and_leaving_rows(name, share_from):
    model = make_model(name)
    sampler = LocalSampler(model, max_batch_rows=9, max_prefill_tokens=60, share_prompts_from=share_from)
    requests = ragged_requests(16)
    results = sampler.sample(requests)
    assert worst_gap(model, requests, results) < 1e-4
    assert sampler.pending == 0 and sampler.rows_in_flight == 0
    assert isinstance(sampler, Sampler)


def test_whether_prompts_are_shared_or_copied_changes_no_token():
    model = make_model("gemma3")
    requests = ragged_requests(10)
    results = [LocalSampler(model, max_batch_rows=9, share_prompts_from=n).sample(requests) for n in (1, 8, 1000)]
    assert tokens_of(results[0]) == tokens_of(results[1]) == tokens_of(results[2])


def test_bfloat16_stays_near_its_full_pass():
    model = make_model("qwen3", initializer_range=0.1).to(torch.bfloat16)
    requests = ragged_requests(8)
    assert worst_gap(model, requests, LocalSampler(model).sample(requests)) < 0.1


def test_peft_adapter_is_sampled_and_merged_into_an_own_copy():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    requests = ragged_requests(6)
    results = LocalSampler(model).sample(requests)
    assert worst_gap(model, requests, results) < 1e-4
    with model.disable_adapter():
        assert worst_gap(model, requests, results) > 0.1
    assert tokens_of(LocalSampler(model, share_weights=False).sample(requests)) == tokens_of(results)


def test_a_model_in_training_with_dropout_and_checkpointing_is_sampled_in_eval_and_left_as_it_was():
    model = make_model("llama", attention_dropout=0.5, use_cache=False)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    requests = ragged_requests(6)
    results = LocalSampler(model).sample(requests)
    assert [module.training for module in model.modules()] == flags
    assert model.config._attn_implementation == "sdpa"
    loss = model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert worst_gap(model.eval(), requests, results) < 1e-4


# ----------------------------------------------------------------------- a completion does not depend on its neighbours


def test_samples_do_not_depend_on_batch_size_neighbours_or_memory():
    model = make_model()
    requests = ragged_requests(12, longest=12) + [request(99, [5, 6, 7], 40, max_tokens=12)]
    at_once = LocalSampler(model).sample(requests)
    for limits in (
        {"max_batch_rows": 5},
        {"max_batch_rows": 1},
        {"max_prefill_tokens": 1},
        {"max_kv_tokens": 64, "max_batch_rows": 16},
        {"max_kv_tokens": 64, "share_prompts_from": 1},
        {"max_kv_tokens": 33},
    ):
        assert tokens_of(LocalSampler(model, **limits).sample(requests)) == tokens_of(at_once), limits
    alone = LocalSampler(model)
    assert [tokens_of(alone.sample([one]))[0] for one in requests] == tokens_of(at_once)


@pytest.mark.parametrize("share_from", [1, 1000])
def test_memory_budget_is_kept_by_sending_the_newest_rows_back(share_from):
    model = make_model(max_position_embeddings=512)
    sampler = LocalSampler(model, max_kv_tokens=300, steps_per_poll=1, share_prompts_from=share_from)
    requests = [request(i, [3 + i] * 4, 4, max_tokens=90, stop_token_ids=()) for i in range(4)]
    for one in requests:
        sampler.submit(one)
    done, most, shrunk = {}, 0, False
    while sampler.pending:
        before = sampler.rows_in_flight
        finished = sampler.poll()
        done |= {result.request_id: result for result in finished}
        shrunk |= sampler.rows_in_flight < before and not finished and before == most
        most = max(most, sampler.rows_in_flight)
        cache = sampler._slots.cache
        assert math.prod(cache.prefix_sides) + math.prod(cache.row_sides) <= 300
    assert most > 3 and shrunk
    results = [done[one.request_id] for one in requests]
    assert all(len(completion.tokens) == 90 for result in results for completion in result.completions)
    assert worst_gap(model, requests, results) < 1e-4


def test_requests_without_a_seed_differ_but_a_sampler_repeats_itself():
    model = make_model()
    requests = [request(i, [3, 4, 5], 4, seed=None, max_tokens=12) for i in range(3)]
    first, again, other = (tokens_of(LocalSampler(model, seed=seed).sample(requests)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tokens for group in first for tokens in group}) == 12


def test_first_tokens_have_the_models_frequencies_in_a_mixed_batch():
    model = make_model(initializer_range=0.2)
    n = 4000
    requests = [
        request(0, [7, 8], n, max_tokens=1, temperature=1.3, seed=2**80 + 5),
        request(1, [9], 200, max_tokens=3, temperature=0.2, top_k=3),
    ]
    counts = np.zeros(V)
    for completion in LocalSampler(model, max_batch_rows=700).sample(requests)[0].completions:
        counts[completion.tokens[0]] += 1
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[7, 8]])).logits[0, -1].double() / 1.3).softmax(-1).numpy() * n
    common = expected > 5
    assert common.sum() > 20
    assert chi_square_p(counts[common], expected[common] * counts[common].sum() / expected[common].sum()) > 0.01


# -------------------------------------------------------------------------------------------------- continuous batching


class Passes:
    """What went through the model: (rows, tokens in a row) of every pass."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_a_prompt_runs_once_for_all_its_samples_even_where_they_do_not_fit_at_once():
    model = make_model()
    sampler = LocalSampler(model, max_batch_rows=6)
    passes = Passes(model)
    requests = [request(i, range(3 + i, 20 + i), 16, max_tokens=5, stop_token_ids=()) for i in range(2)]
    results = sampler.sample(requests)
    assert sum(rows for rows, tokens in passes.shapes if tokens > 1) == 2
    assert worst_gap(model, requests, results) < 1e-4


def test_equal_prompts_of_different_requests_run_once():
    model = make_model()
    sampler = LocalSampler(model)
    passes = Passes(model)
    results = sampler.sample([request(i, [5, 6, 7, 8], 2) for i in range(5)])
    assert [shape for shape in passes.shapes if shape[1] > 1] == [(1, 4)]
    assert len({tokens for group in tokens_of(results) for tokens in group}) > 5


def test_the_longest_row_does_not_keep_the_batch_empty():
    model = make_model()
    rows = 16
    sampler = LocalSampler(model, max_batch_rows=rows, steps_per_poll=1)
    lengths = [100] + [4] * 300
    for i, length in enumerate(lengths):
        sampler.submit(request(i, [3 + i % 50, 4], max_tokens=length, stop_token_ids=()))
    passes = Passes(model)
    finished = []
    while sampler.pending:
        finished += [result.request_id for result in sampler.poll()]
        if sampler._waiting:
            assert passes.shapes[-1][0] >= rows * 7 // 8
    steps = sum(1 for shape in passes.shapes if shape[1] == 1)
    assert steps < 1.3 * sum(lengths) / rows + 10
    assert finished.index(0) > 250  # the long one came first and ended among the last, beside the others


def test_poll_hands_over_what_is_done_and_does_not_decode_unless_it_may():
    sampler = LocalSampler(make_model(), steps_per_poll=1)
    sampler.submit(request(0, [3, 4], max_tokens=6, stop_token_ids=()))
    sampler.submit(request(1, [3, 5], max_tokens=2, stop_token_ids=()))
    assert sampler.poll(wait=False) == [] and sampler.rows_in_flight == 0
    assert [result.request_id for result in sampler.poll()] == [1]
    assert sampler.pending == 1
    late = [request(2, [4, 4], max_tokens=9, stop_token_ids=())]
    assert [result.request_id for result in sampler.sample(late)] == [2]
    assert [result.request_id for result in sampler.poll(wait=False)] == [0]  # finished meanwhile, and kept
    assert sampler.poll() == [] and sampler.pending == 0


def test_cancel_drops_waiting_flying_and_finished_requests():
    model = make_model()
    sampler = LocalSampler(model, max_batch_rows=4, steps_per_poll=1)
    for i in range(4):
        sampler.submit(request(i, [3 + i, 9], 3, max_tokens=10, stop_token_ids=()))
    sampler.poll()
    sampler.cancel(0)
    sampler.cancel(1)
    sampler.cancel(3)
    sampler.cancel(77)
    results = []
    while sampler.pending:
        results += sampler.poll()
    assert [result.request_id for result in results] == [2]
    assert worst_gap(model, [request(2, [5, 9], 3)], results) < 1e-4


# ---------------------------------------------------------------------------------------------------------------- stops


def test_completions_end_at_the_models_eos_the_given_stop_tokens_or_none():
    model = make_model()
    model.generation_config.eos_token_id = [1, 17]
    model.config.eos_token_id = 23
    free = LocalSampler(model).sample([request(0, [3, 4], 64, max_tokens=30, stop_token_ids=())])[0].completions
    assert all(len(completion.tokens) == 30 and completion.stop_reason == "length" for completion in free)
    for ids, params in (({1, 17, 23}, {}), ({5, 6}, {"stop_token_ids": (5, 6)})):
        sampler = LocalSampler(model)
        ended = sampler.sample([request(0, [3, 4], 64, max_tokens=30, **params)])[0].completions
        for whole, cut in zip(free, ended, strict=True):
            stop = next((i for i, token in enumerate(whole.tokens) if token in ids), None)
            assert cut.tokens == (whole.tokens if stop is None else whole.tokens[: stop + 1])
            assert cut.stop_reason == ("length" if stop is None else "stop")
        assert {completion.stop_reason for completion in ended} == {"stop", "length"}
    own = LocalSampler(model, eos_token_ids=[9]).sample([request(0, [3, 4], 64, max_tokens=30)])[0].completions
    assert {completion.tokens[-1] for completion in own if completion.stop_reason == "stop"} == {9}


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Tokens are bytes and a few pairs, so that strings, and even characters, span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *alphabet, "ab", "Ġa", "ba"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def test_stop_strings_end_at_the_token_that_completes_them(byte_tokenizer):
    size = len(byte_tokenizer)
    model = make_model(vocab_size=size, initializer_range=0.02)
    # Only a few tokens are likely, among them the two bytes of é, so that the strings below do come up.
    likely = byte_tokenizer.convert_tokens_to_ids(["a", "b", "ab", "Ġa", "ba", "Ã", "©", "!"])
    model.lm_head.bias = torch.nn.Parameter(torch.full((size,), -30.0).index_fill_(0, torch.tensor(likely), 0.0))
    sampler = LocalSampler(model, byte_tokenizer)
    free = sampler.sample([request(0, [3, 4], 48, max_tokens=40, stop_token_ids=())])[0].completions
    seen = set()
    for stops in (("bab",), ("é",), ("é!", "bb"), ("a ab", " a a"), (" ",), ("zz",)):
        cut = sampler.sample([request(0, [3, 4], 48, max_tokens=40, stop_token_ids=(), stop=stops)])[0].completions
        for whole, ended in zip(free, cut, strict=True):
            texts = (byte_tokenizer.decode(whole.tokens[:n]) for n in range(1, 41))
            at = next((n for n, text in enumerate(texts, 1) if any(stop in text for stop in stops)), None)
            assert ended.tokens == whole.tokens[:at]
            assert ended.stop_reason == ("length" if at is None else "stop")
            seen.add((stops, ended.stop_reason))
    assert {stops for stops, reason in seen if reason == "stop"} > {("bab",), ("é",), ("é!", "bb"), ("a ab", " a a")}
    assert (("zz",), "length") in seen


# ---------------------------------------------------------------------------------------------- temperature and filters


def test_temperature_zero_is_greedy_with_logprobs_at_temperature_one():
    model = make_model()
    prompt = [3, 14, 15, 9]
    requests = [request(0, prompt, 2, temperature=0.0, max_tokens=12, stop_token_ids=(), top_k=2)]
    requests.append(request(1, prompt, 2, max_tokens=12, stop_token_ids=()))
    greedy, sampled = LocalSampler(model).sample(requests)
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=12, max_new_tokens=12, eos_token_id=None
    )
    assert [list(completion.tokens) for completion in greedy.completions] == [expected[0, 4:].tolist()] * 2
    assert worst_gap(model, requests, [greedy, sampled]) < 1e-4
    assert sampled.completions[0].tokens != greedy.completions[0].tokens


def test_logprobs_are_tempered_and_before_truncation():
    model = make_model()
    requests = [
        request(0, [3, 4], 8, temperature=0.5),
        request(1, [3, 4], 8, temperature=2.0, top_k=2),
        request(2, [3, 4], 8, top_p=0.3),
        request(3, [3, 4], 8, temperature=1.5, min_p=0.5),
        request(4, [3, 4], 8),
    ]
    results = LocalSampler(model).sample(requests)
    assert worst_gap(model, requests, results) < 1e-4
    for asked, result in zip(requests, results, strict=True):
        for completion in result.completions:
            logits = model(input_ids=torch.tensor([[*asked.prompt, *completion.tokens]])).logits[0, 1:-1]
            probs = (logits / asked.params.temperature).softmax(-1)
            chosen = probs.gather(1, torch.tensor(completion.tokens)[:, None])
            assert ((probs > chosen + 1e-6).sum(1) < (asked.params.top_k or V)).all()
            assert (chosen[:, 0] >= asked.params.min_p * probs.amax(1) - 1e-6).all()
            better = torch.where(probs > chosen + 1e-6, probs, 0).sum(1)
            assert (better < asked.params.top_p + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------- new weights


def nudged(model, scale=0.2):
    """Change the weights in place, as an optimizer would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def stale_logprobs(before, after, prompt, tokens, switch):
    """By transformers' own cache: keys of the first tokens under one model, and the rest under another."""
    ids, cache = torch.tensor([[*prompt, *tokens]]), DynamicCache(config=before.config)
    fed = len(prompt) + switch - 1  # the newest token is fed after the update
    first = before(input_ids=ids[:, :fed], past_key_values=cache, use_cache=True).logits[0]
    second = after(input_ids=ids[:, fed:], past_key_values=cache, use_cache=True).logits[0]
    logprobs = torch.cat([first, second]).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "share_from"), [("qwen3", 1), ("gemma3", 10), ("gpt-oss", 1), ("gpt2", 1000)])
def test_rows_in_flight_go_on_under_new_weights(name, share_from, recompute, monkeypatch):
    monkeypatch.setattr("cispo.sampling.local._SCORES_AT_ONCE", 400)  # several slices of a row's tokens
    before, model = make_model(name), make_model(name)
    sampler = LocalSampler(
        model,
        steps_per_poll=1,
        recompute_kv_on_update=recompute,
        version=3,
        max_batch_rows=8,
        share_prompts_from=share_from,
    )
    requests = [request(i, range(3, 6 + 4 * i), 3, max_tokens=9 + i, stop_token_ids=()) for i in range(4)]
    for one in requests:
        sampler.submit(one)
    results = [result for _ in range(5) for result in sampler.poll()]
    nudged(model)
    sampler.update_weights(None, 4)
    while sampler.pending:
        results += sampler.poll()
    switched, staleness = 0, 0.0
    for result in sorted(results, key=lambda result: result.request_id):
        prompt = requests[result.request_id].prompt
        for completion in result.completions:
            switch = completion.versions.count(3)
            assert completion.versions == (3,) * switch + (4,) * (len(completion.tokens) - switch)
            switched += switch > 0
            got = torch.tensor(completion.logprobs)
            new = full_logprobs(model, prompt, completion.tokens)
            if switch == 0 or recompute:
                expected = torch.cat([full_logprobs(before, prompt, completion.tokens)[:switch], new[switch:]])
            else:
                expected = stale_logprobs(before, model, prompt, completion.tokens, switch)
                staleness = max(staleness, float((expected - new)[switch:].abs().max()))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert switched >= 6
    assert recompute or staleness > 0.01


def test_versions_survive_a_lost_slot_and_several_updates():
    model = make_model(max_position_embeddings=512)
    sampler = LocalSampler(model, max_kv_tokens=120, steps_per_poll=1)
    sampler.submit(request(0, [3, 4], 6, max_tokens=50, stop_token_ids=()))
    results, version = [], 0
    while sampler.pending:
        results += sampler.poll()
        version += 1
        sampler.update_weights(None, version)
    for completion in results[0].completions:
        assert len(completion.versions) == 50
        assert list(completion.versions) == sorted(completion.versions)
        assert len(set(completion.versions)) > 10
    assert worst_gap(model, [request(0, [3, 4], 6)], results) < 1e-4  # the weights never did change


def test_given_weights_fill_an_own_copy_and_only_whole():
    learner = make_model(tie_word_embeddings=True)
    sampler = LocalSampler(learner, share_weights=False)
    requests = ragged_requests(6)
    old = sampler.sample(requests)
    nudged(learner)
    assert tokens_of(sampler.sample(requests)) == tokens_of(old)  # a copy: training does not reach it
    weights = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    del weights["lm_head.weight"]  # tied, so it need not be given
    for wrong, word in (
        ({name: w for name, w in weights.items() if "norm" not in name}, "missing"),
        (weights | {"model.extra": torch.zeros(1)}, "unknown"),
        (weights | {"model.norm.weight": torch.zeros(3)}, "shape"),
    ):
        with pytest.raises(ConfigError, match=word):
            sampler.update_weights(wrong, 1)
        assert sampler.version == 0 and tokens_of(sampler.sample(requests)) == tokens_of(old)
    sampler.update_weights(weights, 1)
    results = sampler.sample(requests)
    assert worst_gap(learner, requests, results) < 1e-4
    assert {version for result in results for completion in result.completions for version in completion.versions} == {
        1
    }
    with pytest.raises(ConfigError, match="copy"):
        sampler.update_weights(None, 2)
    with pytest.raises(ConfigError, match="shares"):
        LocalSampler(learner).update_weights(weights, 2)


# --------------------------------------------------------------------------------------------------- sleeping in turn


def tensor_bytes():
    """Of all storages that a tensor of this process still refers to, by device type."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    return {
        kind: sum(storage.nbytes() for storage in storages.values() if storage.device.type == kind)
        for kind in ("cpu", "cuda")
    }


@pytest.mark.parametrize("share_weights", [True, False])
def test_a_sampler_that_sleeps_holds_no_keys_and_values(share_weights):
    sampler = LocalSampler(make_model(), share_weights=share_weights)
    requests = [request(i, range(3 + i, 23 + i), 64, max_tokens=40, temperature=0.5 + i / 2) for i in range(4)]
    fresh = tensor_bytes()["cpu"]
    for _ in range(2):
        results = sampler.sample(requests)
        tokens = sum(len(completion.tokens) for result in results for completion in result.completions)
        assert tensor_bytes()["cpu"] - fresh > tokens * sampler._token_bytes
        sampler.sleep()
        assert tensor_bytes()["cpu"] == fresh
        sampler.wake()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which the weights leave")
def test_weights_of_its_own_leave_the_device_while_it_sleeps():
    before = tensor_bytes()["cuda"]
    sampler = LocalSampler(make_model().cuda(), share_weights=False)
    expected = sampler.sample([request(0, [3, 4], 8)])
    sampler.sleep()
    assert tensor_bytes()["cuda"] == before
    sampler.wake()
    assert sampler.sample([request(0, [3, 4], 8)]) == expected
    learner = make_model()
    nudged(learner)
    sampler.sleep()
    sampler.update_weights(learner.state_dict(), 1)
    assert tensor_bytes()["cuda"] == before
    sampler.wake()
    asked = [request(1, [3, 4], 8)]
    assert tokens_of(sampler.sample(asked)) == tokens_of(LocalSampler(learner.cuda()).sample(asked))


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("share_weights", [True, False])
def test_a_sampler_that_slept_samples_what_one_that_never_slept_does(share_weights, update):
    requests = ragged_requests(8) + [request(50, [5, 6, 7], 24, max_tokens=12)]

    def sample(sleeps):
        learner = make_model(tie_word_embeddings=True)
        sampler = LocalSampler(learner, share_weights=share_weights)
        results = sampler.sample(requests)
        for version in (1, 2):
            if sleeps:
                sampler.sleep()
                sampler.sleep()
            if update:
                nudged(learner)
                sampler.update_weights(None if share_weights else learner.state_dict(), version)
            if sleeps:
                sampler.wake()
                sampler.wake()
            results += sampler.sample(requests)
        return results

    slept, never = sample(True), sample(False)
    assert slept == never
    changed = tokens_of(slept[-len(requests) :]) != tokens_of(slept[: len(requests)])
    assert changed == update, "the update moved nothing, so this proves nothing"


def test_only_an_idle_sampler_sleeps_and_none_that_sleeps_takes_work():
    sampler = LocalSampler(make_model(), steps_per_poll=1)
    for i in range(3):
        sampler.submit(request(i, [3 + i], 2, max_tokens=6, stop_token_ids=()))
    sampler.poll()
    with pytest.raises(RunError, match="sleep: 3 requests are pending; poll until they are returned, or cancel them"):
        sampler.sleep()
    sampler.cancel(0)
    results = []
    while sampler.pending:
        results += sampler.poll()
    assert sorted(result.request_id for result in results) == [1, 2]  # it stayed awake
    sampler.sleep()
    with pytest.raises(RunError, match="request 7: the sampler sleeps; call wake first"):
        sampler.submit(request(7, [3]))
    with pytest.raises(RunError, match="prompt_logprobs: the sampler sleeps"):
        sampler.prompt_logprobs([3, 4])
    assert sampler.poll() == [] and sampler.pending == 0
    sampler.cancel(7)
    sampler.wake()
    assert len(sampler.sample([request(7, [3])])) == 1


# --------------------------------------------------------------------------------------------------- prompt log-probs


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_prompt_logprobs_are_those_of_a_full_pass_in_slices_and_beside_rows_in_flight(name, monkeypatch):
    model = make_model(name)
    tokens = np.random.default_rng(0).integers(3, V, 50).tolist()
    sampler = LocalSampler(model, steps_per_poll=1)
    asked = request(0, [3, 4, 5], 3, max_tokens=10)
    sampler.submit(asked)
    sampler.poll()
    whole = sampler.prompt_logprobs(tokens, top_k=4)
    monkeypatch.setattr("cispo.sampling.local._LOGITS_AT_ONCE", 7 * V)
    sliced = sampler.prompt_logprobs(tokens, top_k=4)
    expected = full_logprobs(model, tokens[:1], tokens[1:])
    with torch.no_grad():
        best = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1).topk(4)
    for got in (whole, sliced):
        assert got.logprobs[0] is None and got.top[0] is None
        torch.testing.assert_close(torch.tensor(got.logprobs[1:]), expected, atol=1e-5, rtol=1e-5)
        assert [[token for token, _ in pairs] for pairs in got.top[1:]] == best.indices.tolist()
        values = torch.tensor([[logprob for _, logprob in pairs] for pairs in got.top[1:]])
        torch.testing.assert_close(values, best.values, atol=1e-5, rtol=1e-5)
    assert sampler.prompt_logprobs([7]).logprobs == (None,)
    assert sampler.prompt_logprobs([7, 8]).top == (None, ())
    results = []
    while sampler.pending:
        results += sampler.poll()
    assert worst_gap(model, [asked], results) < 1e-4
    for wrong, error in (([], DataError), ([V], DataError), ([3] * 129, DataError)):
        with pytest.raises(error):
            sampler.prompt_logprobs(wrong)
    with pytest.raises(ConfigError, match="top_k"):
        sampler.prompt_logprobs([3], top_k=V + 1)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("share_from", [1, 1000])
def test_logits_that_are_not_finite_end_their_request_and_no_other(share_from):
    model = make_model()
    sampler = LocalSampler(model, steps_per_poll=1, share_prompts_from=share_from)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
        model.lm_head.bias[60] = -1e4  # nobody draws it
    lengths = (2, 12, 2, 1, 1, 2)  # a short prompt beside a long one has masked columns, where the NaN may stand
    requests = [request(i, [3 + i] * n, 2, max_tokens=20, stop_token_ids=()) for i, n in enumerate(lengths)]
    for one in requests[:3]:
        sampler.submit(one)
    sampler.poll()
    sampler.submit(request(50, [4, 60, 5, 60], 2))
    with pytest.raises(NonFiniteError, match="request 50"):
        sampler.poll()
    for one in requests[3:]:  # these take the slots where the NaN was
        sampler.submit(one)
    results = []
    while sampler.pending:
        results += sampler.poll()
    results.sort(key=lambda result: result.request_id)
    assert worst_gap(model, requests, results) < 1e-4


@pytest.mark.parametrize("share_from", [1, 1000])
def test_weights_that_are_not_finite_end_what_is_in_flight_and_better_ones_go_on(share_from):
    model = make_model()
    sampler = LocalSampler(model, steps_per_poll=1, share_prompts_from=share_from)
    for i in range(3):
        sampler.submit(request(i, [3, 4 + i], 4, max_tokens=40, stop_token_ids=()))
    for _ in range(6):
        sampler.poll()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(math.inf)
    sampler.update_weights(None, 1)
    with pytest.raises(NonFiniteError, match="request 0, 1, 2"):
        sampler.poll()
    assert sampler.pending == 0
    fresh = make_model()
    model.load_state_dict(fresh.state_dict())
    sampler.update_weights(None, 2)
    requests = [request(i, [7] * (1 + i % 3), 3, max_tokens=3 + i, stop_token_ids=()) for i in range(10)]
    results = []
    for one in requests:  # staggered, so that some rows look past columns that others have not reached
        sampler.submit(one)
        results += sampler.poll()
    while sampler.pending:
        results += sampler.poll()
    results.sort(key=lambda result: result.request_id)
    assert worst_gap(fresh, requests, results) < 1e-4


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": ()}, DataError, "empty"),
        ({"prompt": (3, V)}, DataError, f"token {V} at prompt position 1"),
        ({"prompt": (3,) * 100}, DataError, "context of 128"),
        ({"num_samples": 0}, ConfigError, "num_samples"),
        ({"max_tokens": 0}, ConfigError, "max_tokens"),
        ({"temperature": -0.5}, ConfigError, "temperature"),
        ({"temperature": math.inf}, ConfigError, "temperature"),
        ({"top_k": -1}, ConfigError, "top_k"),
        ({"top_p": 0.0}, ConfigError, "top_p"),
        ({"min_p": 1.5}, ConfigError, "min_p"),
        ({"stop": ("",)}, ConfigError, "stop"),
        ({"stop": ("x",)}, ConfigError, "tokenizer"),
        ({"stop_token_ids": (-1,)}, ConfigError, "stop_token_ids"),
        ({"max_tokens": 90}, DataError, "max_kv_tokens"),
    ],
)
def test_bad_requests_are_refused_before_any_work(changes, error, words):
    model = make_model()
    sampler = LocalSampler(model, max_kv_tokens=80)
    passes = Passes(model)
    fields = {"prompt": (3, 4), "num_samples": 1, "max_tokens": 30} | changes
    with pytest.raises(error, match=words):
        sampler.submit(request(5, fields.pop("prompt"), fields.pop("num_samples"), **fields))
    assert sampler.pending == 0 and sampler.poll() == [] and not passes.shapes


def test_a_request_id_may_not_be_pending_twice():
    sampler = LocalSampler(make_model())
    sampler.submit(request(5, [3]))
    with pytest.raises(DataError, match="request 5"):
        sampler.submit(request(5, [3]))


def small_mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def small_t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )


def small_bloom():  # positions are biases, not rotations
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2))


def small_linear_attention():
    kinds = ["linear_attention", "full_attention"]
    config = transformers.Qwen3NextConfig(
        **(SMALL | {"num_hidden_layers": 2}), layer_types=kinds, num_experts=2, num_experts_per_tok=1
    )
    return transformers.Qwen3NextForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (small_mamba, "not plain attention"),
        (small_t5, "encoder-decoder"),
        (small_bloom, "another engine"),
        (small_linear_attention, "not plain attention"),
    ],
)
def test_models_that_a_key_value_cache_does_not_suit_are_refused(make, words):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=words):
        LocalSampler(make())
