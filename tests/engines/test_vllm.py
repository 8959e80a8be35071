"""`VllmSampler` on real vLLM engines, on CPU cores: what they compute, how their weights change, how they die.

Run by `make test-engines`, in a virtual environment of its own (docs/vllm.md); an engine takes 10 to 60 s to start, so
the tests of a module share three. Left out: NCCL and CUDA IPC, which need GPUs.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from rich.console import Console

from cispo import cli
from cispo import config as configs
from cispo import model as models
from cispo.config import ModelConfig, VllmConfig
from cispo.learner import LocalLearner
from cispo.sampling.probe import learner_logprobs
from cispo.sampling.vllm import VllmSampler, _InProcess
from cispo.sampling.vllm_server import EngineLost, check_version
from cispo.tasks.think import VOCABULARY, BaseRecipe, make_base, make_tokenizer
from cispo.types import ConfigError, DataError, RunError, SampleRequest, SamplingParams

pytest.importorskip("vllm")

PARITY = 1e-4
CONTEXT = 4096
LONG = tuple(i * 7 % 16 for i in range(100))  # several blocks of the prefix cache
SETTINGS = VllmConfig(probe_tolerance=PARITY, timeout_s=45, max_restarts=1, kv_cache_gib=0.5)


def save_tiny(folder: Path, *, tied: bool, hidden: int = 64) -> Path:
    """Two layers of Qwen3 with random weights, loud enough that log-probs differ by nats."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            initializer_range=0.15,
            tie_word_embeddings=tied,
            dtype="float32",
            eos_token_id=15,
        )
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Side:
    """A learner and the sampler that follows it."""

    def __init__(self, folder: Path, **options):
        self.loaded = models.load(ModelConfig(), folder)
        self.learner = LocalLearner(self.loaded)
        self.logprobs = learner_logprobs(self.learner)
        eos = models.eos_token_ids(self.loaded.model, self.loaded.tokenizer)
        options = {"config": SETTINGS, "tokenizer": self.loaded.tokenizer, "eos_token_ids": eos} | options
        self.sampler = VllmSampler(folder, reference=self.logprobs, **options)

    def train(self, scale: float = 0.1) -> None:
        """Move every weight, the tied head's too."""
        with torch.no_grad():
            for parameter in self.loaded.model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)

    def publish(self) -> int:
        self.sampler.update_weights(self.learner.weights(), self.sampler.version + 1)
        return self.sampler.version

    def sample(self, prompt, n=1, **params):
        return self.sampler.sample([SampleRequest(0, tuple(prompt), n, SamplingParams(**params))])[0].completions

    def error(self, prompt, completion, temperature=1.0) -> torch.Tensor:
        """|sampler − learner| at each token, under the learner's present weights."""
        (row,) = self.logprobs([(*prompt, *completion.tokens)], temperature)
        return (torch.tensor(completion.logprobs) - torch.tensor(row[len(prompt) - 1 :])).abs()


def alive(side: Side) -> list[int]:
    return [process.pid for process in side.sampler._engine.processes()]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    side = Side(save_tiny(tmp_path_factory.mktemp("untied"), tied=False))
    yield side
    side.sampler.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    side = Side(save_tiny(tmp_path_factory.mktemp("tied"), tied=True))
    yield side
    side.sampler.close()


@pytest.fixture(params=["untied", "tied"])
def side(request):
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_learners_at_any_temperature(side, temperature):
    for prompt in ((3,), (12, 1, 2, 3), LONG):
        for completion in side.sample(prompt, 4, max_tokens=20, temperature=temperature, stop_token_ids=()):
            assert len(completion.tokens) == 20 and completion.stop_reason == "length"
            assert set(completion.versions) == {side.sampler.version}
            assert side.error(prompt, completion, temperature).max() <= PARITY


def test_greedy_samples_are_the_most_likely_tokens_and_all_alike(untied):
    one, two = untied.sample((3, 4), 2, max_tokens=8, temperature=0.0, stop_token_ids=())
    assert one == two
    assert untied.error((3, 4), one).max() <= PARITY
    tokens = torch.tensor([[3, 4, *one.tokens]])
    assert untied.loaded.model(tokens).logits[0, 1:-1].argmax(-1).tolist() == list(one.tokens)


def test_a_seed_repeats_a_request_and_neighbouring_seeds_share_nothing(untied):
    def draw(seed):
        found = untied.sample((5, 6), 4, max_tokens=24, seed=seed, stop_token_ids=())
        return [completion.tokens for completion in found]

    first = draw(7)
    assert draw(7) == first and len(set(first)) == 4
    assert not set(first) & set(draw(8))


def test_a_completion_ends_with_the_token_or_string_that_stops_it(untied):
    for completion in untied.sample((1, 2), 16, max_tokens=200, stop_token_ids=(4, 9)):
        assert completion.stop_reason == "stop" and completion.tokens[-1] in (4, 9)
        assert not {4, 9} & set(completion.tokens[:-1])
    for completion in untied.sample((1, 2), 16, max_tokens=200):  # the model's own EOS
        assert (completion.tokens[-1] == 15) == (completion.stop_reason == "stop")
    stops = 0
    for completion in untied.sample((1, 2), 16, max_tokens=400, stop=("12", "3"), stop_token_ids=()):
        text = untied.loaded.tokenizer.decode(completion.tokens)
        if completion.stop_reason == "stop":
            stops += 1
            assert text.endswith(("12", "3"))
            text = text[:-1]
        assert "12" not in text and "3" not in text
    assert stops


@pytest.mark.parametrize(
    ("error", "words", "prompt", "params"),
    [
        (ConfigError, "top_p is 0.9", (1,), {"top_p": 0.9}),
        (ConfigError, "top_k is 5", (1,), {"top_k": 5}),
        (ConfigError, "min_p is 0.1", (1,), {"min_p": 0.1}),
        (ConfigError, "temperature is -1", (1,), {"temperature": -1}),
        (DataError, "prompt is empty", (), {}),
        (DataError, "token 16 at prompt position 1", (0, 16), {}),
        (DataError, "set max_tokens to at most 4095", (1,), {"max_tokens": 5000}),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_any_work(untied, error, words, prompt, params):
    with pytest.raises(error, match=words):
        untied.sample(prompt, 1, **{"max_tokens": 4, **params})
    assert untied.sampler.pending == 0


# ---------------------------------------------------------------------------------------------- how its weights change


def test_after_an_update_the_engine_computes_the_new_policy_and_no_cached_part_of_the_old(side):
    prompts = (LONG, (3,))
    before = [side.sample(prompt, 2, max_tokens=8, seed=1, stop_token_ids=()) for prompt in prompts]
    for _ in range(3):
        side.train()
        version = side.publish()
        for prompt, old in zip(prompts, before, strict=True):
            assert side.error(prompt, old[0]).max() > 0.1, "the update moved nothing, so this proves nothing"
            for completion in side.sample(prompt, 2, max_tokens=8, seed=1, stop_token_ids=()):
                assert set(completion.versions) == {version}
                assert side.error(prompt, completion).max() <= PARITY
    assert side.sampler.parity.version == version and side.sampler.parity.max <= PARITY


@pytest.mark.parametrize(("tied", "tensor_parallel"), [(True, 1), (False, 2)])
def test_weights_reach_an_engine_by_broadcast_from_memory_to_memory(tmp_path, tied, tensor_parallel):
    """Over gloo, with each of the engine's workers a member; between GPUs the same code takes NCCL."""
    changes = {"weight_transfer": "broadcast", "tensor_parallel": tensor_parallel}
    side = Side(save_tiny(tmp_path, tied=tied), config=SETTINGS.model_copy(update=changes))
    try:
        for version in (1, 2, 3):
            side.train()
            assert side.publish() == version and side.sampler.parity.max <= PARITY
            for completion in side.sample(LONG, 2, max_tokens=8, stop_token_ids=()):
                assert set(completion.versions) == {version}
                assert side.error(LONG, completion).max() <= PARITY
        assert side.sampler._folder is None, "weights were written to a file"
    finally:
        side.sampler.close()


def test_a_learner_that_the_engine_does_not_follow_is_found_by_the_probe(side):
    kept = {name: tensor.clone() for name, tensor in side.learner.weights().items()}
    side.train()
    with pytest.raises(RunError, match="differ from the learner's by up to"):
        side.sampler.probe()
    side.loaded.model.load_state_dict(kept)
    assert side.sampler.probe().max <= PARITY


@pytest.mark.parametrize("recompute", [True, False])
def test_completions_in_flight_go_on_under_new_weights_and_know_which_wrote_them(untied, recompute):
    sampler = untied.sampler
    sampler.in_flight, sampler.recompute_kv = True, recompute
    first, params = sampler.version, SamplingParams(max_tokens=3000, stop_token_ids=(), seed=3)
    sampler.submit(SampleRequest(1, LONG, 4, params))
    while tokens_written(sampler) < 4 * 50:
        assert not sampler.poll(), "finished before the weights changed; give it more tokens"
    old = {name: tensor.clone() for name, tensor in untied.learner.weights().items()}
    untied.train(0.02)
    new = {name: tensor.clone() for name, tensor in untied.learner.weights().items()}
    untied.publish()
    (result,) = wait_for(sampler, 1)
    for completion in result.completions:
        versions = torch.tensor(completion.versions)
        assert versions.tolist() == sorted(completion.versions)
        assert set(completion.versions) == {first, first + 1}
        untied.loaded.model.load_state_dict(old)
        assert untied.error(LONG, completion)[versions == first].max() <= PARITY
        untied.loaded.model.load_state_dict(new)
        after = untied.error(LONG, completion)[versions == first + 1]
        if recompute:
            assert after.max() <= PARITY
        else:
            assert after.max() > PARITY, "keys and values of the old weights cannot give the new policy's log-probs"


def test_without_in_flight_updates_completions_are_finished_first(untied):
    sampler = untied.sampler
    sampler.in_flight = False
    first, params = sampler.version, SamplingParams(max_tokens=300, stop_token_ids=(), seed=3)
    for number in (1, 2):
        sampler.submit(SampleRequest(number, (number,), 4, params))
    untied.train(0.02)
    untied.publish()
    results = wait_for(sampler, 2)
    sampler.in_flight = True
    assert {v for result in results for c in result.completions for v in c.versions} <= {first, first + 1}
    assert all(len(set(c.versions)) == 1 for result in results for c in result.completions)


def tokens_written(sampler) -> int:
    """By the requests in flight, as far as vLLM has told this process."""
    states = sampler._engine._llm.output_processor.request_states.values()
    return sum(state.detokenizer.num_output_tokens() for state in list(states))


def wait_for(sampler, number, limit=240):
    results, deadline = [], time.monotonic() + limit
    while len(results) < number:
        results += sampler.poll()
        assert time.monotonic() < deadline, f"{len(results)} of {number} results after {limit} s"
    return results


def test_a_cancelled_request_is_forgotten(untied):
    sampler = untied.sampler
    sampler.submit(SampleRequest(5, (1,), 2, SamplingParams(max_tokens=2000, stop_token_ids=())))
    with pytest.raises(DataError, match="still pending"):
        sampler.submit(SampleRequest(5, (1,), 1, SamplingParams(max_tokens=1)))
    sampler.cancel(5)
    sampler.cancel(77)
    assert sampler.pending == 0 and sampler.poll(wait=False) == []
    assert len(untied.sample((1,), 1, max_tokens=3, stop_token_ids=())) == 1


# ----------------------------------------------------------------------------------------------------- how it sleeps


def test_a_sampler_that_slept_samples_as_before_and_takes_new_weights(side):
    sampler = side.sampler

    def sample():
        return side.sample(LONG, 4, max_tokens=12, seed=1, stop_token_ids=())

    for _ in range(2):
        side.train()
        version = side.publish()
        before = sample()
        sampler.sleep()
        sampler.sleep()
        assert sampler._wait(sampler._ask(sampler._engine), "a heartbeat") == str(version)
        for act, what in (
            (lambda: sampler.submit(SampleRequest(1, (1,), 1, SamplingParams(max_tokens=1))), "request 1"),
            (lambda: side.publish(), "update_weights"),
            (lambda: sampler.probe(), "probe"),
        ):
            with pytest.raises(RunError, match=f"{what}: the sampler sleeps; call wake first"):
                act()
        assert sampler.pending == 0 and sampler.poll() == [] and sampler.version == version
        sampler.wake()
        sampler.wake()
        after = sample()
        assert [completion.tokens for completion in after] == [completion.tokens for completion in before]
        for completion in after:
            assert set(completion.versions) == {version}
            assert side.error(LONG, completion).max() <= PARITY
    assert sampler.probe().max <= PARITY
    assert sampler.restarts == 0


def test_a_sampler_with_requests_does_not_sleep_and_cancelled_ones_do_not_delay_it(untied):
    sampler = untied.sampler
    endless = SamplingParams(max_tokens=4000, stop_token_ids=())
    for number in range(2):
        sampler.submit(SampleRequest(number, (number,), 2, endless))
    with pytest.raises(RunError, match="sleep: 2 requests are pending; poll until they are returned, or cancel them"):
        sampler.sleep()
    while tokens_written(sampler) < 10:
        assert not sampler.poll(wait=False), "finished before they could be cancelled; give them more tokens"
    sampler.cancel(0)
    sampler.cancel(1)
    sampler.sleep()
    sampler.wake()
    assert tokens_written(sampler) == 0
    assert len(untied.sample((1,), 1, max_tokens=3, stop_token_ids=())) == 1


def test_an_engine_that_dies_asleep_is_replaced_when_the_sampler_wakes(tmp_path):
    settings = SETTINGS.model_copy(update={"max_restarts": 2})
    side = Side(save_tiny(tmp_path / "model", tied=True), sleeps=True, config=settings)
    sampler = side.sampler
    try:
        side.train()
        version = side.publish()
        for deaths, found_by_the_heartbeat in ((1, True), (2, False)):
            sampler.sleep()
            (pid,) = alive(side)
            os.kill(pid, signal.SIGKILL)
            if found_by_the_heartbeat:
                deadline = time.monotonic() + 60
                while not sampler._engine.lost.done():
                    assert sampler.poll(wait=False) == [] and time.monotonic() < deadline
                    time.sleep(0.1)
            assert sampler.restarts == deaths - 1, "it took the memory of whoever let it sleep"
            sampler.wake()
            assert sampler.restarts == deaths and alive(side) != [pid]
            for completion in side.sample(LONG, 2, max_tokens=12, stop_token_ids=()):
                assert set(completion.versions) == {version}
                assert side.error(LONG, completion).max() <= PARITY
        side.train()
        side.publish()
        assert sampler.probe().max <= PARITY
        sampler.sleep()
        os.kill(alive(side)[0], signal.SIGKILL)
        with pytest.raises(RunError, match=r"lost 3 times within an hour \(vllm.max_restarts: 2\)"):
            sampler.wake()
    finally:
        sampler.close()


def test_only_an_engine_that_can_give_its_memory_back_is_put_to_sleep(untied, monkeypatch):
    """By what vLLM says of a platform with sleep mode, which there is no engine of here."""
    from vllm.platforms import current_platform

    def arguments(sleeps):
        async def construct():
            options = {"threads": 1, "context_length": None, "sleeps": sleeps}
            return _InProcess(untied.sampler.model, torch.float32, SETTINGS, **options)._arguments

        return asyncio.run(construct())

    assert not arguments(sleeps=True).enable_sleep_mode  # vLLM refuses it on CPU cores
    monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True)
    assert arguments(sleeps=True).enable_sleep_mode and not arguments(sleeps=False).enable_sleep_mode
    with pytest.raises(RunError, match="started to keep its memory; construct the sampler with sleeps=True"):
        untied.sampler.sleep()


def test_a_server_is_not_put_to_sleep(untied):
    with pytest.raises(ConfigError, match=r"the engine at http://127.0.0.1:9 is not this run's to put to sleep"):
        VllmSampler(untied.sampler.model, VllmConfig(url="http://127.0.0.1:9"), sleeps=True)


# ------------------------------------------------------------------------------------------------------ how it dies


def test_an_interrupt_of_the_trainer_leaves_the_engine_alone(side):
    """Of either engine: the first of a process inherits its signal mask in other circumstances than the second."""
    for pid in alive(side):
        os.kill(pid, signal.SIGINT)
    assert side.sampler.probe().max <= PARITY
    assert side.sampler.restarts == 0


def test_a_killed_engine_is_replaced_with_the_newest_weights_and_asked_again(tied):
    sampler = tied.sampler
    tied.train()
    version = tied.publish()
    for number in range(3):
        sampler.submit(SampleRequest(number, (number, 3), 2, SamplingParams(max_tokens=800, stop_token_ids=())))
    (pid,) = alive(tied)
    os.kill(pid, signal.SIGKILL)
    results = wait_for(sampler, 3)
    assert sorted(result.request_id for result in results) == [0, 1, 2]
    assert sampler.restarts == 1 and alive(tied) != [pid] and sampler.pending == 0
    for result in results:
        for completion in result.completions:
            assert len(completion.tokens) == 800 and set(completion.versions) == {version}
            assert tied.error((result.request_id, 3), completion).max() <= PARITY
    tied.train()
    assert tied.publish() == version + 1
    assert sampler.probe().max <= PARITY


def test_a_worker_killed_during_an_update_takes_its_engine_along_and_that_is_replaced(tmp_path):
    """What is under way then ends with another error than a dead engine's next call."""
    side = Side(save_tiny(tmp_path, tied=False), config=SETTINGS.model_copy(update={"tensor_parallel": 2}))
    sampler = side.sampler
    try:
        (core,) = sampler._engine.processes()
        worker = psutil.Process(core.pid).children(recursive=True)[-1]
        worker.suspend()

        def kill() -> None:
            while not sampler._turn.locked():
                time.sleep(0.005)
            worker.kill()

        threading.Thread(target=kill, daemon=True).start()
        side.train()
        version = side.publish()
        assert sampler.restarts == 1
        for completion in side.sample(LONG, 2, max_tokens=8, stop_token_ids=()):
            assert set(completion.versions) == {version} and side.error(LONG, completion).max() <= PARITY
    finally:
        sampler.close()


def test_an_engine_that_stops_answering_ends_the_run_once_its_restarts_are_used_up(tied):
    (pid,) = alive(tied)
    os.kill(pid, signal.SIGSTOP)
    tied.sampler.submit(SampleRequest(9, (1,), 1, SamplingParams(max_tokens=5)))
    with pytest.raises(RunError, match=r"has not answered for 45 s.*lost 2 times within an hour"):
        wait_for(tied.sampler, 1)
    with pytest.raises(RunError, match="lost 2 times"):
        tied.sampler.poll()


# -------------------------------------------------------------------------------------------------- bad surroundings


def test_another_version_of_vllm_is_refused_with_the_one_that_is_supported():
    check_version("0.32.4", "the one installed here")
    with pytest.raises(ConfigError, match=r"0\.33\.1, and this cispo speaks to 0\.32\.x only"):
        check_version("0.33.1", "the one installed here")


def test_an_attention_head_that_vllm_cannot_run_is_refused_before_an_engine_starts(tmp_path):
    make_base(tmp_path / "model", recipe=BaseRecipe(steps=1))
    with pytest.raises(ConfigError, match=r"attention heads of 32, 64, .* has 24; use async.sampler: process"):
        VllmSampler(tmp_path / "model", SETTINGS)


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_trains_on_what_vllm_samples(tmp_path):
    make_base(tmp_path / "base", recipe=BaseRecipe(heads=3))  # attention heads of 32
    flags = f"--model.path {tmp_path / 'base'} --run_dir {tmp_path / 'run'} --steps 4 --eval.every 4 "
    flags += "--eval.max_prompts 64 --async.sampler vllm --vllm.kv_cache_gib 0.5 --vllm.probe_every 1 "
    run = cli.train(configs.load(None, (flags + "--vllm.probe_tolerance 1e-4").split()), console=Console(quiet=True))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    # A step whose first window trains nothing has no such number.
    found = [step["kl/sampler_max_abs"] for step in steps if "kl/sampler_max_abs" in step]
    assert len(found) >= 2 and max(found) <= PARITY
    assert all(step["staleness/histogram"] == [step["tokens/sampled"]] for step in steps[1:])
    assert steps[-1]["eval/accuracy"] > steps[0]["eval/accuracy"] + 0.2


# ---------------------------------------------------------------------------------------------------------- a server


class Server:
    """`vllm serve` on this machine, as docs/vllm.md starts it."""

    def __init__(self, folder: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        flags = f"--port {self.port} --host 127.0.0.1 --dtype float32 --enforce-eager --max-num-seqs 3".split()
        flags.append("--enable-scale-out")
        flags += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "cispo"}']
        flags += ["--kv-cache-memory-bytes", str(2**29), "--model", str(self.folder)]
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait(self, limit: float = 300) -> None:
        deadline = time.monotonic() + limit
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).read()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.5)

    def tokens_written(self) -> int:
        metrics = urllib.request.urlopen(self.url + "/metrics", timeout=5).read().decode()
        (count,) = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)", metrics, re.MULTILINE)
        return int(float(count))

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    server = Server(save_tiny(folder / "model", tied=True), folder / "log")
    server.start()
    server.wait()
    yield server
    server.kill()


REMOTE = VllmConfig(probe_tolerance=PARITY, timeout_s=45, max_restarts=1, start_timeout_s=300)


def remote(server, **options):
    return {"config": REMOTE.model_copy(update={"url": server.url}), **options}


def test_a_server_follows_the_learner_and_comes_back_from_the_dead(server):
    side = Side(server.folder, **remote(server))
    sampler = side.sampler
    try:
        with pytest.raises(RunError, match="has not got this run's weights"):
            side.sample((1,), 1, max_tokens=1)
        side.train()
        sampler.update_weights(side.learner.weights(), 1)
        assert sampler.parity.version == 1 and sampler.parity.max <= PARITY
        with pytest.raises(RunError, match=r"sleep: the engine at .* is not this run's to put to sleep"):
            sampler.sleep()
        found = side.sample(
            LONG, 8, max_tokens=20, temperature=0.7, seed=3, stop_token_ids=()
        )  # more than it decodes at once
        assert len({completion.tokens for completion in found}) == 8
        for completion in found:
            assert side.error(LONG, completion, 0.7).max() <= PARITY and set(completion.versions) == {1}

        sampler.submit(SampleRequest(4, LONG, 2, SamplingParams(max_tokens=3000, stop_token_ids=())))
        before = server.tokens_written()
        while server.tokens_written() < before + 100:
            assert not sampler.poll(), "finished before the weights changed; give it more tokens"
        side.train(0.02)
        sampler.update_weights(side.learner.weights(), 2)
        (result,) = wait_for(sampler, 1)
        assert {v for c in result.completions for v in c.versions} == {1, 2}

        sampler.submit(SampleRequest(5, (1, 2), 2, SamplingParams(max_tokens=1000, stop_token_ids=())))
        server.kill()
        server.start()
        (result,) = wait_for(sampler, 1, limit=300)
        assert sampler.restarts == 1
        for completion in result.completions:
            assert set(completion.versions) == {2}
            assert side.error((1, 2), completion).max() <= PARITY
    finally:
        sampler.close()


def test_a_server_of_another_model_or_vocabulary_is_refused(server, tmp_path):
    other = save_tiny(tmp_path / "wider", tied=True, hidden=128)
    with pytest.raises(ConfigError, match="serves another model .* its hidden_size is 64, not 128"):
        VllmSampler(other, **remote(server))
    untied = save_tiny(tmp_path / "untied", tied=False)
    with pytest.raises(ConfigError, match="its tie_word_embeddings is True, not False"):
        VllmSampler(untied, **remote(server))
    tokenizer = models.load_tokenizer(server.folder)
    swapped = make_tokenizer_with("0123456789=~?!", tmp_path / "tokenizer")
    assert len(swapped) == len(tokenizer)
    with pytest.raises(ConfigError, match="another vocabulary"):
        VllmSampler(server.folder, tokenizer=swapped, **remote(server))
    with pytest.raises(ConfigError, match=r"dtype 'torch.float32', but this run needs 'torch.bfloat16'"):
        VllmSampler(server.folder, dtype=torch.bfloat16, **remote(server))


def make_tokenizer_with(characters: str, folder: Path):
    """The think task's tokenizer with its characters in another order."""
    import tokenizers

    words = [*characters, "<pad>", "<eos>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def test_an_address_without_a_server_is_refused_at_once(tmp_path):
    folder = save_tiny(tmp_path, tied=True)
    started = time.monotonic()
    with pytest.raises(EngineLost, match="no answer from http://127.0.0.1:9"):
        VllmSampler(folder, VllmConfig(url="http://127.0.0.1:9"))
    assert time.monotonic() - started < 30
