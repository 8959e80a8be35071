"""Reward functions: what the named ones are worth, what they are called with, and what becomes of those that fail."""

import asyncio
import importlib.util
import logging
import math
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cispo.tasks.rewards import Exact, Format, Length, Math, RewardFunction, Scorer, load_function
from cispo.types import ConfigError, Prompt, RunError

PROMPT = Prompt("train:0", (5, 6), "2+2=", {"answer": "4", "source": "school"})
CHAT = Prompt("train:1", (5, 6), [{"role": "user", "content": "2+2="}], {"answer": 4})


def score(functions, completions, prompt=PROMPT, completion_ids=None, **options):
    scorer = functions if isinstance(functions, Scorer) else Scorer(functions, **options)
    return asyncio.run(scorer.score(prompt, completions, completion_ids=completion_ids))


def values(function, completions, **arguments):
    """Rewards of one function, as a scorer of its own gives them."""
    return [next(iter(row.values())) for row in score([RewardFunction("f", function)], completions, **arguments)]


# -------------------------------------------------------------------------------------------------- the named functions


def test_exact():
    assert values(Exact(), ["4", " 4\n", "5", "", "4."]) == [1, 1, 0, 0, 0]
    assert values(Exact(), ["4", "four"], prompt=CHAT) == [1, 0]  # the column is a number, the completion a message
    assert values(Exact("source"), ["school"]) == [1]


def test_format():
    assert values(Format(r"<a>\d</a>"), ["<a>1</a>", "so <a>1</a>", "<a>1</a>\n"]) == [1, 0, 0]
    assert values(Format(r"<a>\d</a>", mode="search"), ["<a>1</a>", "so <a>1</a>", "<a></a>"]) == [1, 1, 0]
    assert values(Format(r"a.b"), ["a\nb"]) == [0]
    assert values(Format(r"(?s)a.b"), ["a\nb"], prompt=CHAT) == [1]


@pytest.mark.parametrize(
    ("options", "message"), [({"pattern": "("}, "regular"), ({"pattern": "a", "mode": "match"}, "mode")]
)
def test_format_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Format(**options)


def test_length_is_dapos_equation_13():
    """DAPO's own setting: 16384 expected, 4096 of cache."""
    penalty = Length(max_tokens=20480, cache_tokens=4096)
    lengths = [0, 16384, 16385, 18432, 20480, 20481, 99999]
    assert [penalty.penalty(n) for n in lengths] == [0, 0, -1 / 4096, -0.5, -1, -1, -1]
    assert values(Length(4, 2), ["a", "b", "c"], completion_ids=[[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]) == [0, -0.5, -1]


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 200))
def test_length_never_rises_with_length(cache, more, length):
    penalty = Length(cache + more, cache).penalty
    assert -1 <= penalty(length + 1) <= penalty(length) <= 0


@pytest.mark.parametrize("cache", [0, 5])
def test_length_refuses(cache):
    with pytest.raises(ConfigError, match="cache_tokens"):
        Length(4, cache)


needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="the extra `math`")


@pytest.fixture(scope="module")
def math_reward():
    return Math(workers=1, completion_timeout_s=2.0)


@needs_math
@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("72", r"so it is \boxed{72}", "The answer is 71."),
        ("She sells 48/2 = <<48/2=24>>24.\n#### 1,072", "1072", "72"),
        (r"\frac{1}{2}", "$0.5$", "$0.2$"),
        ("(x+1)^2", "$x^2+2x+1$", "$x^2+1$"),
        (-3, "$-3$", "3"),
        ("6", r"first $5$, and then \boxed{6}", r"\boxed{5} or so, not $6$"),
    ],
)
def test_math_judges_expressions(math_reward, gold, right, wrong):
    prompt = Prompt("p", (1,), "?", {"answer": gold})
    assert values(math_reward, [right, wrong, "I do not know"], prompt=prompt) == [1, 0, 0]


@needs_math
def test_math_gives_up_on_one_completion_and_judges_the_others(math_reward):
    assert values(math_reward, ["4", r"$9^{9^{9^{9^9}}}$", "5"]) == [1, None, 0]


@needs_math
def test_math_works_from_many_threads_at_once(math_reward):
    async def many():
        scorer = Scorer([RewardFunction("math", math_reward)])
        return await asyncio.gather(*(scorer.score(PROMPT, [str(n), "4"]) for n in range(8)))

    assert asyncio.run(many()) == [[{"math": float(n == 4)}, {"math": 1.0}] for n in range(8)]


@needs_math
def test_a_gold_answer_that_is_no_expression_is_a_failure(math_reward):
    scorer = Scorer([RewardFunction("math", math_reward)])
    assert score(scorer, ["4"], prompt=Prompt("p", (1,), "?", {"answer": " "})) == [{"math": None}]
    assert scorer.failures == {"math": 1}


def test_math_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cispo\[math\]'"):
        Math()


# ---------------------------------------------------------------------------------------------------- your own, by name


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current directory and give its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    names = []

    def write(source):
        name = f"my_rewards_{tmp_path.name.replace('-', '_')}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_of_the_current_directory_is_found(module):
    name = module("def shortest(completions, **kwargs):\n    return [-len(c) for c in completions]\n")
    assert values(load_function(f"{name}:shortest"), ["ab", ""]) == [-2, 0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.rewards:f", "no module 'no_such_package'"),
        ("json.no_such:f", "no module 'json.no_such'"),
        ("json.dumps", "did you mean 'json:dumps'"),
        ("f", "package.module:function"),
        (":f", "package.module:function"),
        ("json:dump_s", "did you mean dumps"),
        ("json:JSONDecoder", "is a type, not a function"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path, message):
    with pytest.raises(ConfigError, match=message):
        load_function(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
    ],
)
def test_a_module_that_does_not_import_says_why(module, source, message):
    with pytest.raises(ConfigError, match=f"importing .* failed: .*{message}"):
        load_function(f"{module(source)}:f")


# ---------------------------------------------------------------------------------------------------- what it is given


def test_a_function_with_kwargs_gets_everything_in_lists():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0, 1.0]

    assert values(reward, ["a", "b"], completion_ids=[[1], [2, 3]]) == [0, 1]
    assert seen == {
        "prompts": ["2+2=", "2+2="],
        "completions": ["a", "b"],
        "answer": ["4", "4"],
        "source": ["school", "school"],
        "prompt_ids": [[5, 6], [5, 6]],
        "completion_ids": [[1], [2, 3]],
    }


def test_a_function_without_kwargs_gets_what_it_names():
    def reward(completion_ids, answer, unknown=7):
        return [len(ids) + int(a) + unknown for ids, a in zip(completion_ids, answer, strict=True)]

    assert values(reward, ["a", "b"], completion_ids=[[1], [2, 3]]) == [12, 13]
    assert RewardFunction("f", reward).required_columns == {"answer"}


def test_completions_of_a_chat_are_messages():
    def reward(prompts, completions):
        return [prompts[0][0]["role"] == "user" and c[0]["content"] == "4" for c in completions]

    assert values(reward, ["4", "5"], prompt=CHAT) == [1, 0]


def test_missing_columns_are_known_before_anything_runs():
    functions = [RewardFunction("exact", Exact("gold")), RewardFunction("f", lambda completions, level: [0])]
    assert Scorer(functions).missing_columns(["answer", "level"]) == {"gold": "exact"}
    assert Scorer(functions).missing_columns(["gold"]) == {"level": "f"}


def test_async_functions_share_the_loop():
    """Each waits until both are called, so they finish only if they run at the same time."""
    arrived = []

    async def first(completions, **_):
        arrived.append(asyncio.Event())
        while len(arrived) < 2:
            await asyncio.sleep(0)
        return [1.0]

    class Second:
        async def __call__(self, completions, **_):
            return await first(completions)

    functions = [RewardFunction("first", first, timeout_s=5), RewardFunction("second", Second(), timeout_s=5)]
    assert score(functions, ["a"]) == [{"first": 1.0, "second": 1.0}]


def test_sync_functions_run_at_the_same_time():
    barrier = threading.Barrier(2)

    def meet(completions):
        barrier.wait(timeout=5)
        return [1.0]

    assert score([RewardFunction("f", meet), RewardFunction("f", meet)], ["a"]) == [{"f": 1.0, "f_2": 1.0}]


# ------------------------------------------------------------------------------------------------ what it may give back


def test_numbers_of_numpy_and_torch_are_numbers():
    numbers = [np.float32(0.5), torch.tensor(2.0), True, 3, None, np.int64(4)]
    assert values(lambda completions: numbers, ["a"] * 6) == [0.5, 2.0, 1.0, 3.0, None, 4.0]
    assert values(lambda completions: np.array([1.5, 2.5]), ["a"] * 2) == [1.5, 2.5]
    assert values(lambda completions: torch.tensor([1.5, 2.5]), ["a"] * 2) == [1.5, 2.5]


def raises(completions):
    raise KeyError("answr")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "answr"),
        (lambda completions: [1.0], "1 rewards for 2"),
        (lambda completions: [1.0] * 3, "3 rewards for 2"),
        (lambda completions: [1.0, math.nan], "nan for completion 1"),
        (lambda completions: [math.inf, 1.0], "inf for completion 0"),
        (lambda completions: ["1", 0.0], "'1' for completion 0"),
        (lambda completions: "ab", "str"),
        (lambda completions: 1.0, "float"),
        (lambda completions: None, "NoneType"),
    ],
)
def test_a_failure_is_none_counted_and_logged_with_its_traceback(function, message, caplog):
    scorer = Scorer([RewardFunction("bad", function), RewardFunction("good", Exact())])
    with caplog.at_level(logging.WARNING):
        assert score(scorer, ["4", "5"]) == [{"bad": None, "good": 1.0}, {"bad": None, "good": 0.0}]
    assert scorer.failures == {"bad": 1}
    (record,) = caplog.records
    assert message in record.getMessage() and "train:0" in record.getMessage() and record.exc_info[2] is not None


def test_a_function_that_hangs_is_given_up_on():
    release = threading.Event()

    def hangs(completions):
        release.wait()
        return [1.0]

    async def hangs_async(completions):
        await asyncio.Event().wait()

    functions = [
        RewardFunction("sync", hangs, timeout_s=0.02),
        RewardFunction("async", hangs_async, timeout_s=0.02),
        RewardFunction("good", Exact()),
    ]
    scorer = Scorer(functions)
    try:
        assert score(scorer, ["4"]) == [{"sync": None, "async": None, "good": 1.0}]
    finally:
        release.set()
    assert scorer.failures == {"sync": 1, "async": 1}


def test_too_many_failures_end_the_run_with_the_last_as_cause():
    calls = []

    def every_other(completions):
        calls.append(None)
        if len(calls) % 2 == 0 or len(calls) > 20:
            raise KeyError(f"call {len(calls)}")
        return [1.0]

    scorer = Scorer([RewardFunction("flaky", every_other)], max_failure_share=0.5)
    for _ in range(21):  # 10 of 20 is not more than a half, 11 of 21 is
        last = None
        try:
            score(scorer, ["a"])
        except RunError as error:
            last = error
            break
    assert len(calls) == 21
    assert "flaky" in str(last) and "11 of the last 21" in str(last)
    assert isinstance(last.__cause__, KeyError) and last.__cause__.__traceback__ is not None


def test_old_failures_are_forgotten():
    failing = [True] * 19 + [False] * 30 + [True] * 9
    plan = iter(failing)

    def planned(completions):
        if next(plan):
            raise ValueError("planned")
        return [1.0]

    scorer = Scorer([RewardFunction("f", planned)], max_failure_share=0.3, window=30, least=20)
    for _ in failing:  # the 19 at the start are below `least`, and have left the window before the 9 come
        score(scorer, ["a"])
    assert scorer.failures["f"] == 28
    plan = iter([True])
    with pytest.raises(RunError):
        score(scorer, ["a"])


def test_a_function_may_always_fail_where_the_config_says_so():
    scorer = Scorer([RewardFunction("f", raises)], max_failure_share=1.0)
    for _ in range(50):
        assert score(scorer, ["a"]) == [{"f": None}]


# ------------------------------------------------------------------------------------------------------------ the total


def test_the_total_is_the_weighted_sum_of_what_was_given():
    functions = [RewardFunction("a", Exact(), weight=2.0), RewardFunction("b", Exact(), weight=-0.5)]
    scorer = Scorer(functions)
    assert scorer.weights == {"a": 2.0, "b": -0.5}
    assert scorer.total({"a": 1.0, "b": 3.0}) == 0.5
    assert scorer.total({"a": None, "b": 3.0}) == -1.5
    assert scorer.total({"a": 0.0, "b": None}) == 0.0
    assert scorer.total({"a": None, "b": None}) is None


def test_functions_of_the_same_name_stay_apart():
    scorer = Scorer([RewardFunction("format", Format("a")), RewardFunction("format", Format("b"))])
    assert score(scorer, ["a", "b"]) == [{"format": 1, "format_2": 0}, {"format": 0, "format_2": 1}]


@pytest.mark.parametrize(
    "options", [{"weight": math.nan}, {"weight": math.inf}, {"timeout_s": 0}, {"timeout_s": math.nan}]
)
def test_a_reward_function_refuses(options):
    with pytest.raises(ConfigError, match=f"reward f: {next(iter(options))}"):
        RewardFunction("f", Exact(), **options)


def test_a_parameter_by_position_is_refused():
    with pytest.raises(ConfigError, match="'completions' is positional-only"):
        RewardFunction("f", lambda completions, /: [1.0])


def test_a_task_needs_a_reward():
    with pytest.raises(ConfigError, match="rewards"):
        Scorer([])
