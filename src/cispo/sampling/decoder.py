"""What a sampler asks about a `transformers` model: its decoder's config, layers and EOS ids, and its weights by name.

Left out on purpose: running it (local.py), and loading it from a folder (`cispo.model`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cispo.types import ConfigError

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def base(model: nn.Module) -> nn.Module:
    """The `transformers` model inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_config(model: nn.Module):
    """The config of the decoder. Raises ConfigError where its state is more than keys and values."""
    inner = base(model)
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ConfigError(f"model {name} is an encoder-decoder; LocalSampler continues prompts with decoders only")
    config = inner.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if kinds or getattr(inner, "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent state"
        raise ConfigError(
            f"model {name} has layers whose cache is not plain attention ({found}); LocalSampler handles "
            f"{', '.join(sorted(ATTENTION_KINDS))}. Sample from it with another engine"
        )
    return config


def attention_kinds(config) -> list[str]:
    """The kinds of mask that the model's layers ask for, as `transformers.masking_utils.create_masks_for_generate`."""
    if getattr(config, "layer_types", None):
        return sorted(set(config.layer_types))
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    return ["full_attention"]


def eos_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The EOS ids of the generation config and of the config together; the tokenizer's where there are none."""
    ids: list[int] = []
    for source in (getattr(model, "generation_config", None), base(model).config, decoder_config(model)):
        eos = getattr(source, "eos_token_id", None)
        ids.extend([] if eos is None else [eos] if isinstance(eos, int) else eos)
    if not ids and getattr(tokenizer, "eos_token_id", None) is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(eos) for eos in ids))


def own_copy(model: nn.Module) -> nn.Module:
    """A frozen copy to sample from, adapters merged, so that its weights bear their `transformers` names."""
    own = copy.deepcopy(model)
    if hasattr(own, "merge_and_unload"):
        own = own.merge_and_unload()
    return own.requires_grad_(False).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
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


def token_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, as the config has it."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize
