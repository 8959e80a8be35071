"""Tasks from data: what is read, how it becomes tokens, and what is said about data that is wrong."""

import asyncio
import json
import logging
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cispo import config as configs
from cispo import tasks
from cispo.tasks.dataset import (
    DatasetTask,
    PromptStyle,
    hold_out,
    hub_rows,
    jsonl_rows,
    make_prompts,
    make_row,
    read_rows,
)
from cispo.tasks.rewards import Exact, RewardFunction, Scorer
from cispo.types import ConfigError, DataError

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    """Bytes as tokens, with a BOS that ordinary tokenization puts first, and chat roles as single tokens."""
    letters = {chr(i): i for i in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters | {"<s>": 128}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "<system>", "<user>", "<assistant>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 128)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = template
    return fast


TOKENIZER = make_tokenizer()


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def prompts_of(*prompts, style=None, tokenizer=TOKENIZER, split="train"):
    rows = [make_row(f"data:{i + 1}", i, {"prompt": prompt}, "prompt") for i, prompt in enumerate(prompts)]
    return make_prompts(rows, split, tokenizer, style or PromptStyle())


def user(text):
    return [{"role": "user", "content": text}]


# -------------------------------------------------------------------------------------------------------------- reading


def test_rows_keep_their_columns_and_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1=", "answer": 2, "tags": ["x"]}, "", {"prompt": user("é")})
    first, second = read_rows(path)
    assert (first.prompt, first.columns, first.place, first.index) == (
        "1+1=",
        {"answer": 2, "tags": ["x"]},
        f"{path}:1",
        0,
    )
    assert (second.prompt, second.columns, second.place, second.index) == (user("é"), {}, f"{path}:3", 1)


def test_columns_can_have_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "1+1=", "solution": "2"})
    (row,) = read_rows(path, prompt_column="question", answer_column="solution")
    assert row.prompt == "1+1=" and row.columns == {"solution": "2", "answer": "2"}


def test_a_byte_order_mark_is_not_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}')
    assert read_rows(path)[0].prompt == "a"


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl: is empty"),
        ("\n \n", "a.jsonl: is empty"),
        (GOOD + "{'prompt': 1}", "a.jsonl:2: not JSON: Expecting property name .* at column 2"),
        (GOOD + '{"prompt": "a"', "a.jsonl:2: not JSON"),
        ('[{"prompt": "a"}]', "a.jsonl:1: a JSON list, not an object"),
        ('[\n{"prompt": "a"}\n]', "a.jsonl:1: not JSON: .*one whole object on each line"),
        (GOOD + '"a"', "a.jsonl:2: a JSON str"),
        (GOOD + '\n{"promt": "a"}', "a.jsonl:3: no column 'prompt'; did you mean 'promt'"),
        ('{"x": 1, "y": 2}', "a.jsonl:1: no column 'prompt'; the row has 'x', 'y'"),
        ("{}", "a.jsonl:1: no column 'prompt'; the row has none"),
        ('{"prompt": 3}', "a.jsonl:1: column 'prompt' is int"),
        ('{"prompt": null}', "a.jsonl:1: column 'prompt' is NoneType"),
        ('{"prompt": ""}', "a.jsonl:1: column 'prompt' is an empty string"),
        ('{"prompt": []}', "a.jsonl:1: .*empty list"),
        ('{"prompt": ["a"]}', "message 0: is str"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}', "message 1: 'content' is None"),
        ('{"prompt": [{"role": 1, "content": "a"}]}', "message 0: 'role' is 1"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "ends with the assistant's"),
        ('{"prompt": "a", "completions": 1}', "a.jsonl:1: column 'completions'"),
    ],
)
def test_data_that_is_wrong_is_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + '{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a.jsonl:2: not UTF-8 \(byte 13"):
        read_rows(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


# ------------------------------------------------------------------------------------------------------------- held out


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_fraction_is_held_out(count, fraction, seed):
    rows = [make_row(f"data:{i}", i, {"prompt": "a"}, "prompt") for i in range(count)]
    wanted = max(1, round(fraction * count))
    if wanted == count:
        with pytest.raises(DataError, match="leaves none"):
            hold_out(rows, fraction, seed=seed)
        return
    train, held_out = hold_out(rows, fraction, seed=seed)
    assert len(held_out) == wanted
    assert sorted([*train, *held_out], key=lambda row: row.index) == rows
    assert [r.index for r in train] == sorted(r.index for r in train)
    assert (train, held_out) == hold_out(rows, fraction, seed=seed)


def test_an_evaluation_file_or_a_fraction_and_not_both(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(10)))
    other = write(tmp_path / "b.jsonl", {"prompt": "x"})
    assert [len(rows) for rows in jsonl_rows(path)] == [10, 0]
    assert [len(rows) for rows in jsonl_rows(path, eval_path=other)] == [10, 1]
    assert [len(rows) for rows in jsonl_rows(path, eval_fraction=0.3)] == [7, 3]
    with pytest.raises(ConfigError, match="eval_fraction is 0.3"):
        jsonl_rows(path, eval_path=other, eval_fraction=0.3)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_fraction_of_nothing_or_all_is_refused(fraction):
    with pytest.raises(ConfigError, match="eval_fraction"):
        hold_out([], fraction)


# ----------------------------------------------------------------------------------------------------------- tokenising


def decode(prompt):
    return TOKENIZER.decode(prompt.tokens)


def test_a_string_is_raw_with_the_tokenizers_own_bos():
    (prompt,) = prompts_of("ab")
    assert prompt.tokens == (128, ord("a"), ord("b")) and prompt.text == "ab"


def test_messages_go_through_the_chat_template_and_get_no_second_bos():
    (prompt,) = prompts_of(user("ab"))
    assert decode(prompt) == "<user>ab<assistant>" and prompt.text == user("ab")


def test_a_string_can_be_wrapped_as_a_user_message_with_a_system_text():
    style = PromptStyle(chat_template=True, system="be brief")
    own = [{"role": "system", "content": "sing"}, *user("b")]
    wrapped, kept = prompts_of("a", own, style=style)
    assert decode(wrapped) == "<system>be brief<user>a<assistant>"
    assert wrapped.text == [{"role": "system", "content": "be brief"}, *user("a")]
    assert decode(kept) == "<system>sing<user>b<assistant>"


def test_strings_and_messages_mix():
    assert [decode(p) for p in prompts_of("a", user("b"), "c")] == ["<s>a", "<user>b<assistant>", "<s>c"]


def test_ids_are_rows_and_never_text():
    assert [p.prompt_id for p in prompts_of("same", "same", split="eval")] == ["eval:0", "eval:1"]


def test_a_system_text_without_a_chat_is_refused():
    with pytest.raises(ConfigError, match="task.system.*chat_template: true"):
        prompts_of("a", style=PromptStyle(system="be brief"))


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(DataError, match="data:2: .*no chat template"):
        prompts_of("a", user("b"), tokenizer=make_tokenizer(template=None))


def test_messages_that_the_template_refuses():
    with pytest.raises(DataError, match="data:1: .*no tools here"):
        prompts_of([*user("a"), {"role": "tool", "content": "b"}])


def test_an_overlong_prompt_is_an_error_or_dropped_and_counted(caplog):
    texts = ("aa", "aaaa", "a", "aaaaaa")
    with pytest.raises(DataError, match=r"data:2: the prompt has 5 tokens, more than the 3 .*and 1 rows after it"):
        prompts_of(*texts, style=PromptStyle(max_tokens=3))
    with caplog.at_level(logging.WARNING):
        kept = prompts_of(*texts, style=PromptStyle(max_tokens=3, overlong="drop"))
    assert [p.prompt_id for p in kept] == ["train:0", "train:2"]
    assert "dropped 2 of 4" in caplog.text and "data:2" in caplog.text
    with pytest.raises(DataError, match="nothing is left"):
        prompts_of(*texts, style=PromptStyle(max_tokens=1, overlong="drop"))


# ------------------------------------------------------------------------------------------------------------- the task


def test_a_task_scores_with_the_rows_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "1+1=", "answer": 2}, {"prompt": "1+2=", "answer": 3})
    train, held_out = jsonl_rows(path, eval_fraction=0.5)

    def lengths(completion_ids):
        return [len(ids) for ids in completion_ids]

    scorer = Scorer([RewardFunction("exact", Exact(), 2.0), RewardFunction("lengths", lengths, 0.1)])
    task = DatasetTask(train, held_out, tokenizer=TOKENIZER, scorer=scorer)
    (prompt,), (other,) = task.prompts("train"), task.prompts("eval")
    assert {prompt.prompt_id.split(":")[0], other.prompt_id.split(":")[0]} == {"train", "eval"}
    right = str(prompt.columns["answer"])
    scores = asyncio.run(task.score(prompt, [right, "none"]))
    assert scores == [{"exact": 1.0, "lengths": 1.0}, {"exact": 0.0, "lengths": 4.0}]
    with_eos = asyncio.run(task.score(prompt, [right], completion_ids=[[1, 2]]))
    assert with_eos == [{"exact": 1.0, "lengths": 2.0}]
    assert task.weights == {"exact": 2.0, "lengths": 0.1} and task.metrics(prompt, ["a"]) == {}


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "a.jsonl", *({"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)))


def jsonl(data, **options):
    options = {"prompt_column": "question", "rewards": [{"type": "exact"}]} | options
    return configs.JsonlTask(path=str(data), **options)


def test_a_config_becomes_a_task(data):
    rewards = [
        {"type": "exact", "weight": 2.0},
        {"type": "format", "pattern": r"\d"},
        {"type": "length", "max_tokens": 4, "cache_tokens": 2},
        {"type": "function", "path": "cispo.tasks.think:final_answer", "weight": 0.5},
    ]
    config = jsonl(data, rewards=rewards[:3], chat_template=True, eval_fraction=0.25)
    tasks.check(config)
    task = tasks.build(config, TOKENIZER, seed=0)
    assert len(task.prompts("train")) == 3 and len(task.prompts("eval")) == 1
    prompt = next(p for p in (*task.prompts("train"), *task.prompts("eval")) if p.columns["answer"] == "3")
    assert decode(prompt) == "<user>2+1=<assistant>"
    scores = asyncio.run(task.score(prompt, ["3", "33x"], completion_ids=[[0], [0] * 3]))
    assert scores == [{"exact": 1, "format": 1, "length": 0}, {"exact": 0, "format": 0, "length": -0.5}]
    assert tasks.make_reward(jsonl(data, rewards=rewards).rewards[3]).name == "final_answer"


def test_the_math_reward_of_a_config_bounds_itself(data):
    pytest.importorskip("math_verify")
    (reward,) = jsonl(data, rewards=[{"type": "math", "timeout_s": 7.0}]).rewards
    assert tasks.make_reward(reward).function.timeout_s == 7.0


def test_the_default_config_is_the_embedded_task():
    from cispo.tasks import think

    tasks.check(configs.ThinkTask())
    task = tasks.build(configs.ThinkTask(train_prompts=3), think.make_tokenizer(), seed=5)
    assert [p.text for p in task.prompts("train")] == [p.text for p in think.ThinkTask(seed=5).prompts("train")[:3]]
    with pytest.raises(ConfigError, match="think"):
        tasks.build(configs.ThinkTask(), TOKENIZER, seed=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_column": "questoin"}, DataError, "a.jsonl:1: no column 'questoin'; did you mean 'question'"),
        (
            {"rewards": [{"type": "exact", "column": "anwser"}]},
            DataError,
            "reward exact needs column 'anwser'; did you mean",
        ),
        ({"rewards": [{"type": "function", "path": "json:dump_s"}]}, ConfigError, "did you mean dumps"),
        ({"rewards": [{"type": "format", "pattern": "("}]}, ConfigError, "not a regular expression"),
        ({"eval_path": "nowhere.jsonl"}, DataError, "nowhere.jsonl: does not exist"),
    ],
)
def test_mistakes_are_found_without_a_tokenizer(data, options, error, message):
    with pytest.raises(error, match=message):
        tasks.check(jsonl(data, **options))


# ------------------------------------------------------------------------------------------------------------------ hub


def test_hub_rows_come_from_datasets(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", *({"question": f"{i}", "answer": i} for i in range(5)))
    write(tmp_path / "test.jsonl", {"question": "x", "answer": 9})
    train, held_out = hub_rows(str(tmp_path), eval_split="test", prompt_column="question")
    assert [row.prompt for row in train] == list("01234") and held_out[0].columns == {"answer": 9}
    assert train[3].place == f"{tmp_path}[train] row 3"
    train, held_out = hub_rows(str(tmp_path), split="train", eval_fraction=0.2, prompt_column="question")
    assert (len(train), len(held_out)) == (4, 1)
    with pytest.raises(DataError, match="no column 'prompt'"):
        hub_rows(str(tmp_path))
    with pytest.raises(DataError, match="cannot be loaded"):
        hub_rows(str(tmp_path), split="validation", prompt_column="question")
    with pytest.raises(DataError, match="cannot be loaded"):
        hub_rows(str(tmp_path / "nowhere"))


def test_hub_rows_without_datasets_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'cispo\[datasets\]'"):
        hub_rows("openai/gsm8k")
