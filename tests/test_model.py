"""Model families: biased, tied, scaled and capped heads, against the model's own logits."""

import pytest
import torch
import transformers

from cispo import model as models
from cispo import objectives
from cispo.config import AlgorithmConfig, ModelConfig
from cispo.learner import LocalLearner
from cispo.tasks import think
from cispo.types import ConfigError, DataError
from tests.test_learner import gradients, reference_gradients, relative, rollout

SIZES = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 15, "pad_token_id": 14,
         "bos_token_id": None}  # fmt: skip
FAMILIES = {
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "phi, head bias": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)),
    "gpt2, absolute positions": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=15,
                                bos_token_id=15)
    ),
    "cohere, logit scale": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, logit scaling": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, logits_scaling=4.0)
    ),
    "mistral, sliding window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=4)
    ),
}  # fmt: skip


def saved(build, folder):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    think.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_own_logits_gradients(family, tmp_path):
    folder = saved(FAMILIES[family], tmp_path)
    batch = rollout([1, 6, 12], vocabulary=14)
    learner = LocalLearner(models.load(ModelConfig(), folder))
    objective = objectives.bind(AlgorithmConfig())
    learner.forward_backward(batch, objective)
    expected = reference_gradients(models.load(ModelConfig(), folder).model, batch, objective)
    found = {name: gradient.double() for name, gradient in gradients(learner).items()}
    assert relative(found, {name: expected[name] for name in found}) < 1e-4
    assert set(found) == set(expected)


def test_a_soft_cap_is_refused_by_name(tmp_path):
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)
    folder = saved(lambda: transformers.Gemma2ForCausalLM(config), tmp_path)
    with pytest.raises(ConfigError, match="final_logit_softcapping 30"):
        models.load(ModelConfig(), folder)


def test_exports_are_ordinary_folders(tiny, tmp_path):
    models.export(tiny.model, tiny.tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(tiny.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 15


def test_pickled_weights_are_refused(tiny, tmp_path):
    models.export(tiny.model, tiny.tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="no .safetensors weights"):
        models.load(ModelConfig(), tmp_path)


def test_every_eos_id_is_known(tiny):
    tiny.model.generation_config.eos_token_id = [15, 3]
    assert models.eos_token_ids(tiny.model, tiny.tokenizer) == (15, 3)
