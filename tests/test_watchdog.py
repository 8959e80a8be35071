"""Nothing is waited for without end: rewards that never come, a sampler that stops, groups that take too long."""

import asyncio
import logging
import os
import signal
import time

import pytest

from cispo import cli, model
from cispo import config as configs
from cispo.buffer import Buffer
from cispo.config import AsyncConfig, ModelConfig, RolloutConfig
from cispo.rollout import PromptCursor, Rollouts
from cispo.sampling.local import LocalSampler
from cispo.sampling.process import ProcessOptions, ProcessSampler
from cispo.tasks.think import ThinkTask
from cispo.types import RunError, SampleRequest, SamplingParams

SMALL = [
    "--rollout.groups_per_step", "4", "--rollout.group_size", "4", "--algorithm.updates_per_rollout", "2",
    "--threads", "1", "--eval.max_prompts", "4", "--async.watchdog_s", "1",
]  # fmt: skip


class Unanswered(ThinkTask):
    """A task of one's own. Nobody ever scores the prompts that `silent` chooses."""

    def __init__(self, silent):
        super().__init__()
        self._silent = silent

    async def score(self, prompt, completions, *, completion_ids=None):
        if self._silent(prompt):
            await asyncio.Event().wait()
        return await super().score(prompt, completions, completion_ids=completion_ids)


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_rewards_that_never_come_end_the_run_by_name(base_folder, tmp_path, staleness):
    words = ["--run_dir", str(tmp_path / "run"), "--eval.every", "0", "--async.max_staleness", staleness,
             "--async.sampler", "inline"]  # fmt: skip
    config = configs.load(None, [*SMALL, *words])
    numbers = PromptCursor(ThinkTask().prompts("train"), config.seed)
    silent = [numbers.next().prompt_id for _ in range(4)][2]  # the third of the first step
    with pytest.raises(RunError, match=rf"nothing has moved for 1 s .*{silent} \(group 2, being scored for"):
        cli.train(config, task=Unanswered(lambda prompt: prompt.prompt_id == silent))


def test_an_evaluation_that_nobody_scores_ends_the_run(base_folder, tmp_path):
    config = configs.load(None, [*SMALL, "--run_dir", str(tmp_path / "run")])
    held_out = {prompt.prompt_id for prompt in ThinkTask().prompts("eval")}
    with pytest.raises(RunError, match="evaluation: no completion has been scored for 1 s .* 4 of 4 prompts"):
        cli.train(config, task=Unanswered(lambda prompt: prompt.prompt_id in held_out))


def test_a_reward_that_cannot_be_cancelled_does_not_hold_up_the_end(base_folder, tmp_path):
    class Busy(ThinkTask):
        async def score(self, prompt, completions, *, completion_ids=None):
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    logging.getLogger(__name__).info("no, thank you")

    config = configs.load(None, [*SMALL, "--run_dir", str(tmp_path / "run"), "--eval.every", "0"])
    with pytest.raises(RunError, match="being scored"):
        cli.train(config, task=Busy())


# ------------------------------------------------------------------------------------------------ the sampler's process


@pytest.fixture
def process(tiny_folder):
    sampler = ProcessSampler(ProcessOptions(path=tiny_folder, model=ModelConfig(), timeout_s=1.0))
    sampler.submit(request(100))
    results(sampler, 1)  # the child is up
    yield sampler
    sampler.close()


def request(number, prompt=(14, 1, 2)):
    return SampleRequest(number, prompt, 2, SamplingParams(max_tokens=20, stop_token_ids=(), seed=number))


def results(sampler, count):
    found = {}
    while len(found) < count:
        found |= {r.request_id: r for r in sampler.poll()}
    return found


def stop(sampler):
    os.kill(sampler._process.pid, signal.SIGSTOP)


def test_a_stopped_process_is_replaced_and_its_requests_are_sampled_again(process, caplog):
    stop(process)
    for number in range(3):
        process.submit(request(number))
    assert set(results(process, 3)) == {0, 1, 2}
    assert "gave no sign of life for 1 s and is started again; 3 requests are sampled again" in caplog.text


def test_publishing_to_a_stopped_process_ends_and_the_new_one_has_the_weights(process, tiny_folder):
    weights = model.merged_weights(model.load(ModelConfig(), tiny_folder).model)
    stop(process)
    for version in (1, 2, 3):
        process.update_weights(weights, version)
    process.submit(request(0))
    (found,) = results(process, 1).values()
    assert {v for c in found.completions for v in c.versions} == {3}


def test_more_requests_than_a_pipe_holds_do_not_block_on_a_stopped_process(process):
    stop(process)
    long = tuple(range(14)) * 6
    for number in range(4000):
        process.submit(request(number, long[: 20 + number % 60]))
    for number in range(10, 4000):
        process.cancel(number)
    assert set(results(process, 10)) == set(range(10))


def test_a_process_with_nothing_to_do_owes_no_sign_of_life(process):
    asleep = time.monotonic() + 1.5
    while time.monotonic() < asleep:
        assert process.poll() == []
    process.submit(request(0))
    results(process, 1)
    assert process._restarts_left == 3


# ----------------------------------------------------------------------------------------------------------- stragglers


class Withholding(LocalSampler):
    """A sampler that never finishes what `withheld` chooses, until it is cancelled."""

    def __init__(self, *arguments, withheld):
        super().__init__(*arguments)
        self._withheld, self.held = withheld, []

    def submit(self, request):
        if self._withheld(request.request_id):
            self.held.append(request.request_id)
        else:
            super().submit(request)

    def cancel(self, request_id):
        if request_id in self.held:
            self.held.remove(request_id)
        else:
            super().cancel(request_id)

    @property
    def pending(self):
        return super().pending + len(self.held)


def rollouts(tiny, withheld, **settings):
    sampler = Withholding(tiny.model, tiny.tokenizer, withheld=withheld)
    return sampler, Rollouts(
        config=RolloutConfig(groups_per_step=3, group_size=2, max_tokens=5),
        asynchrony=AsyncConfig(max_staleness=1, sampler="inline", **settings),
        task=ThinkTask(),
        sampler=sampler,
        tokenizer=tiny.tokenizer,
        buffer=Buffer(3, 1),
        cursor=PromptCursor(ThinkTask().prompts("train"), 0),
        seed=0,
    )


def test_a_straggler_is_dropped_counted_and_its_slot_given_to_another(tiny, caplog):
    sampler, loop = rollouts(tiny, lambda number: number == 1, straggler_timeout_s=0.3)
    while not loop.buffer.ready:
        loop.advance(0)
    groups, counts = loop.take()
    loop.close()
    assert [group.admission for group in groups] == [0, 2, 3]
    assert (counts.stragglers, counts.dropped_groups, sampler.held) == (1, 1, [])
    assert loop.buffer.admissible(0) == 1  # the slot, for another prompt
    assert "was still being sampled after 0.3 s" in caplog.text


def test_without_a_deadline_a_slow_prompt_is_waited_for(tiny):
    sampler, loop = rollouts(tiny, lambda number: number == 1)
    while len(loop.buffer.finished) < 5:
        loop.advance(0)
    assert not loop.buffer.ready and sampler.held == [1] and loop.buffer.outstanding == [1]
    loop.close()


def test_dropping_stragglers_for_ever_is_no_progress(tiny):
    """Each is replaced by another that is dropped too; the watchdog must see through it."""
    _, loop = rollouts(tiny, lambda number: True, straggler_timeout_s=0.02)
    while loop.counts.stragglers < 20:
        assert loop.advance(0) is False
    loop.close()
