"""The embedded task: its answers, its prompts, and a base model that is an ordinary folder.

That the base learns what it should, and that training discovers thinking, is minutes of work: `test_base_learns` is
slow, and the training runs are the end-to-end tests'.
"""

import asyncio
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cispo.tasks import think
from cispo.tasks.think import BaseRecipe, ThinkTask, base_model, final_answer, make_base, make_tokenizer, thinks
from cispo.types import ConfigError

TINY = BaseRecipe(hidden_size=16, layers=1, heads=2, intermediate_size=16, steps=3, batch_size=8, warmup_steps=1)
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder, recipe=TINY)
    return folder


def decode(ids):
    return "".join(think.VOCABULARY[i] for i in ids)


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("=9", "9"),
        ("~446569=9", "9"),
        ("~=3", "3"),  # thinks nothing, but answers
        ("", None),
        ("9", None),
        ("=", None),
        ("=12", None),
        ("=1=2", None),
        ("=1~2", None),
        ("~446569", None),
        ("446569=9", None),
        ("~~4=9", None),
        ("=٣", None),  # a digit, but not one of ours
        ("=9\n", None),
    ],
)
def test_a_completion_has_one_unambiguous_answer_or_none(completion, expected):
    assert final_answer(completion) == expected


@given(st.text(alphabet="0123456789~=?!", max_size=12))
def test_no_completion_can_hedge(completion):
    """Whatever is written, at most one of the ten answers is rewarded, and it ends the completion after `=`."""
    found = final_answer(completion)
    assert found is None or completion.endswith("=" + found) and completion.count("=") == 1


def test_score_is_one_for_the_right_answer_and_nothing_else():
    task = ThinkTask(train_prompts=1)
    prompt = think.make_prompt("train:0", 402913)  # 4+0+2+9+1+3 = 19
    scores = asyncio.run(task.score(prompt, ["=9", "~446569=9", "~000000=9", "=8", "~446569", ""]))
    assert [score["correct"] for score in scores] == [1, 1, 1, 0, 0, 0]
    assert task.metrics(prompt, ["=9", "~446569=9", "=~", "~"]) == {"think_rate": 0.5}
    assert task.weights == {"correct": 1.0}


# -------------------------------------------------------------------------------------------------------------- prompts


def test_train_and_held_out_questions_are_disjoint_and_fixed():
    first, again, other = ThinkTask(seed=1), ThinkTask(seed=1), ThinkTask(seed=2)
    train, held_out = first.prompts("train"), first.prompts("eval")
    assert (len(train), len(held_out)) == (8192, 512)
    assert len({p.text for p in train} | {p.text for p in held_out}) == 8192 + 512
    assert list(train) == list(again.prompts("train"))
    assert list(train) != list(other.prompts("train"))
    assert list(held_out) == list(other.prompts("eval"))
    assert train[17].prompt_id == "train:17" and held_out[3].prompt_id == "eval:3"
    for prompt in train[:100]:
        assert prompt.text[0] == "?" and decode(prompt.tokens) == prompt.text and len(prompt.text) == 7
        assert prompt.columns["answer"] == str(sum(map(int, prompt.text[1:])) % 10)


@pytest.mark.parametrize("count", [0, 10**6])
def test_a_number_of_prompts_that_cannot_be_is_refused(count):
    with pytest.raises(ConfigError, match="train_prompts"):
        ThinkTask(train_prompts=count)


def test_another_models_tokenizer_is_refused():
    ThinkTask(train_prompts=1, tokenizer=make_tokenizer())
    other = make_tokenizer()
    other._tokenizer.model = think.tokenizers.models.WordLevel({t: 15 - i for t, i in think.TOKEN_ID.items()})
    with pytest.raises(ConfigError, match="vocabulary"):
        ThinkTask(train_prompts=1, tokenizer=other)
    other._tokenizer.model = think.tokenizers.models.WordLevel({"a": 0})
    with pytest.raises(ConfigError, match="cannot encode"):
        ThinkTask(train_prompts=1, tokenizer=other)


# ------------------------------------------------------------------------------------------------------ supervised rows


def test_supervised_rows_are_questions_with_thinking_or_direct_completions():
    recipe = dataclasses.replace(BaseRecipe(), batch_size=100)
    questions = torch.tensor([402913])
    forked = 0
    for step in range(1, 5):
        tokens, targets = think.supervised_batch(recipe, step, questions, torch.Generator().manual_seed(step))
        rows = [decode(row) for row in torch.cat([tokens, targets[:, -1:].clamp(min=think.TOKEN_ID["<pad>"])], 1)]
        assert {row[0] for row in rows[:50]} == {"!"} and {row[0] for row in rows[50:]} == {"?"}
        assert {row[1:] for row in rows[:50]} == {"402913~446569=9<eos>"}
        assert {row[1:] for row in rows[50:]} == {"402913~446569=9<eos>", "402913=9<eos>" + 7 * "<pad>"}
        forked += sum("~" in row for row in rows[50:])
        assert targets[0].tolist() == [-100] * 6 + [think.TOKEN_ID[c] for c in "~446569=9"] + [think.TOKEN_ID["<eos>"]]
        direct = next(i for i in range(50, 100) if "~" not in rows[i])
        assert targets[direct].tolist()[6:9] == [think.TOKEN_ID[c] for c in ("=", "9", "<eos>")]
        assert targets[direct].tolist()[9:] == [-100] * 7
    assert forked == 4  # one in fifty of the 200 rows that have the trained prefix


# ------------------------------------------------------------------------------------------------------- the base model


def test_the_base_is_an_ordinary_model_folder(tiny_base):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    assert model.config.model_type == "qwen3" and model.config.vocab_size == len(tokenizer) == 16
    text = "?402913~446569=9"
    ids = tokenizer(text)["input_ids"]
    assert ids == [think.TOKEN_ID[c] for c in text]
    assert tokenizer.decode(ids) == text
    ended = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text
    assert tokenizer.decode(ended) == text + "<eos><pad>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    output = model.generate(torch.tensor([ids[:7]]), max_new_tokens=4, do_sample=False)
    assert output.shape[0] == 1 and 8 <= output.shape[1] <= 11


def test_the_default_base_has_a_third_of_a_million_parameters():
    assert sum(p.numel() for p in think.make_model(BaseRecipe()).parameters()) == 308_016


def test_making_the_base_is_reproducible_reports_progress_and_leaves_the_random_state(tiny_base, tmp_path):
    before = torch.get_rng_state()
    seen = []
    make_base(tmp_path, recipe=TINY, progress=lambda *numbers: seen.append(numbers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [(step, steps) for step, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 < loss < 10 for _, _, loss in seen)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()


def test_the_base_is_cached_by_its_recipe_and_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    made = []

    def stop(step, steps, loss):
        assert not list(tmp_path.glob("think-base-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(think, "BaseRecipe", lambda seed: dataclasses.replace(TINY, seed=seed))
    with pytest.raises(KeyboardInterrupt):
        base_model(tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []

    folder = base_model(tmp_path, progress=lambda *numbers: made.append(numbers))
    assert len(made) == 3 and list(tmp_path.iterdir()) == [folder]
    assert base_model(tmp_path, progress=lambda *numbers: made.append(numbers)) == folder
    assert len(made) == 3
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    assert base_model(tmp_path, seed=1) != folder


def test_two_that_make_the_same_base_both_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(think, "BaseRecipe", lambda seed: dataclasses.replace(TINY, seed=seed))
    inner = []

    def meanwhile(step, steps, loss):
        if not inner:
            inner.append(None)
            inner[0] = base_model(tmp_path)

    assert base_model(tmp_path, progress=meanwhile) == inner[0]
    assert list(tmp_path.iterdir()) == [inner[0]]


def test_every_word_of_the_recipe_is_in_its_key():
    changed = {f.name: dataclasses.replace(TINY, **{f.name: 7}).key for f in dataclasses.fields(TINY)}
    assert len({TINY.key, *changed.values()}) == len(changed) + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_base_learns(tmp_path, seed):
    """Under the trained prefix it forks about 2 times in 100; directly it is right 1 in 10, thinking almost always."""
    make_base(tmp_path, seed=seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = ThinkTask(train_prompts=1).prompts("eval")
    tokens = torch.tensor([prompt.tokens for prompt in prompts])
    column = torch.ones(len(tokens), 1, dtype=torch.long)
    answers = torch.tensor([int(prompt.columns["answer"]) for prompt in prompts])[:, None]
    with torch.no_grad():
        opening = model(tokens).logits[:, -1].softmax(-1)
        direct = model(torch.cat([tokens, column * think.TOKEN_ID["="]], 1)).logits[:, -1].softmax(-1)
    assert 0.015 < opening[:, think.TOKEN_ID["~"]].mean() < 0.03
    assert 0.08 < direct.gather(1, answers).mean() < 0.15
    thought = model.generate(torch.cat([tokens, column * think.TOKEN_ID["~"]], 1), max_new_tokens=9, do_sample=True)
    completions = make_tokenizer().batch_decode(thought[:, 7:], skip_special_tokens=True)
    assert all(map(thinks, completions))
    right = [final_answer(c) == p.columns["answer"] for c, p in zip(completions, prompts, strict=True)]
    assert sum(right) / len(right) > 0.97
