"""Recipes of `tinker-cookbook`, unmodified, against a server that serves a tiny model under the names they expect."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip(
    "tinker_cookbook", reason="needs tinker-cookbook 0.6.1, which `make test` installs where the package index has it"
)

from tests.serving import serving

NAME = "Qwen/Qwen3-8B-Base"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which the recipes' hard-coded names are local folders: tokenizer, model, and two data sets."""
    import tokenizers
    import torch
    import transformers

    root = tmp_path_factory.mktemp("cookbook")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(root / NAME)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(root / NAME)
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(16)]
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(16)
    ]
    for name, subset, rows in (("openai/gsm8k", "main", sums), ("HuggingFaceH4/no_robots", "default", chats)):
        folder = root / name
        folder.mkdir(parents=True)
        lines = "\n".join(map(json.dumps, rows))
        files = ""
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(lines)
            files += f"  - split: {split}\n    path: {split}.jsonl\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
    return root


@pytest.fixture(scope="module")
def server(work, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("state"), model=[f"{NAME}={work / NAME}"]) as started:
        yield started


ARITHMETIC = (
    "env=arithmetic group_size=4 groups_per_batch=4 max_tokens=6 max_steps=2 save_every=2 eval_every=0 loss_fn=cispo"
)
RECIPES = {
    "rl_loop": "rl_loop loss_fn=cispo batch_size=2 group_size=4 max_tokens=8 max_steps=2 save_every=1",
    "sl_loop": "sl_loop batch_size=4",
    "math_rl": f"math_rl.train {ARITHMETIC} compute_post_kl=True",
    "math_rl, asynchronous": f"math_rl.train {ARITHMETIC} max_steps_off_policy=2",
}


@pytest.fixture(scope="module")
def started(work, server, tmp_path_factory):
    """All recipes at once, each a process of its own with its output in a file: what takes time is their imports."""
    environment = {**os.environ, "TINKER_API_KEY": server.key, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    runs = {}
    for name, words in RECIPES.items():
        module, *arguments = words.split()
        folder = tmp_path_factory.mktemp(module)
        command = [sys.executable, "-m", f"tinker_cookbook.recipes.{module}", *arguments]
        command += [f"model_name={NAME}", f"base_url={server.url}", f"log_path={folder / 'log'}"]
        with open(folder / "output", "w") as output:
            process = subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)
        runs[name] = (process, folder)
    yield runs
    for process, _ in runs.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_unmodified(started, name):
    process, folder = started[name]
    assert process.wait(300) == 0, (folder / "output").read_text()[-3000:]
    assert (folder / "log" / "metrics.jsonl").read_text().count("\n") >= 2
    assert "tinker://" in (folder / "log" / "checkpoints.jsonl").read_text()
