"""Loading a causal language model, and the two halves that training needs: hidden states, and the head.

The only door to transformers' model classes and to peft. Any `AutoModelForCausalLM` folder or hub id works: the
backbone gives hidden states, the output embeddings are the head (tied or not, with or without bias), and whatever a
family does between head and logits (Gemma's soft cap, Granite's scale) is known here or refused here, never silently
left out. Left out on purpose: sampling (`sampling/`) and optimizers (`learner.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cispo.config import LoraConfig, ModelConfig
from cispo.types import ConfigError, DataError

# Between head and logits these families do something that changes log-probs; `logit_scale_of` knows the scales.
_SCALED = {"logits_scaling": lambda x: 1 / x, "logit_scale": lambda x: x}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train, its tokenizer, and where it came from."""

    model: nn.Module
    tokenizer: Any
    path: str

    @property
    def context_length(self) -> int | None:
        return context_length(self.model.config)


def load(config: ModelConfig, path: str | Path, *, trainable: bool = True) -> LoadedModel:
    """Load `path`, with LoRA adapters where `config.lora` asks for them.

    Raises DataError for a folder that is no model or has no tokenizer, ConfigError for settings that do not fit it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    check_folder(path)
    device = device_of(config)
    tokenizer = load_tokenizer(path)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.attn_implementation, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise DataError(f"model.path: {path} cannot be loaded: {_first_line(error)}") from error
    if config.dtype == "auto" and next(model.parameters()).dtype == torch.float16:
        raise ConfigError("model.dtype: this model is stored in float16, which overflows in training; use bfloat16")
    logit_scale_of(model)  # refuses a family whose logits it does not know
    if config.lora is not None:
        model = _with_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and (config.lora is None or "lora_" in name))
    model.to(device)
    # Dropout off: the ratio compares two passes of one policy, and noise would stand in it.
    model.eval()
    if config.gradient_checkpointing:
        # transformers checkpoints only in training mode; every dropout probability is zeroed instead.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):  # what attention passes to its function
                    setattr(module, name, 0.0)
        model.train()
    return LoadedModel(model=model, tokenizer=tokenizer, path=str(path))


def check_folder(path: str | Path) -> None:
    """What can be known of a local model folder without loading a weight. A hub id passes. Raises DataError."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or str(path).startswith("."):
            raise DataError(f"model.path: {path} does not exist")
        return
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if not configs:
        raise DataError(f"model.path: {path} has no config.json, so it is not a transformers model folder")
    try:
        json.loads(configs[0].read_text())
    except ValueError as error:
        raise DataError(f"model.path: {configs[0]} is not JSON: {error}") from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise DataError(
            f"model.path: {path} has no tokenizer (tokenizer.json); save one there with tokenizer.save_pretrained"
        )
    if not list(folder.glob("*.safetensors")):
        raise DataError(f"model.path: {path} holds no .safetensors weights; convert them with save_pretrained")


def load_tokenizer(path: str | Path) -> Any:
    """Raises DataError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.path: no tokenizer can be loaded from {path}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"model.path: the tokenizer of {path} has no EOS token, so completions could not end")
    return tokenizer


def load_config(path: str | Path) -> Any:
    """The model's own configuration, without weights. Raises DataError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.path: {path} cannot be read: {_first_line(error)}") from error


def context_length(model_config: Any) -> int | None:
    """Positions the model was made for, or None where its config does not say."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's, the model config's and the tokenizer's."""
    found: list[int] = []
    for ids in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found += ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(found))


def device_of(config: ModelConfig) -> torch.device:
    """Raises ConfigError for a device that is not here."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.device: {config.device!r} is not here ({_first_line(error)}); use auto, cpu or cuda:N"
        ) from None


# ------------------------------------------------------------------------------------------------- the model's halves


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, D] after the final norm: what the head multiplies."""
    backbone = causal_lm(model).base_model
    return backbone(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, position_ids=position_ids_BS, use_cache=False
    ).last_hidden_state


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, D] and bias [V] or None. Logits are `logit_scale_of(model)` times the product.

    Where peft adapts the head, the weight is the merged one and gradients flow to the adapter.
    """
    head = causal_lm(model).get_output_embeddings()
    weight = head.weight
    if hasattr(head, "lora_A"):
        base = head.get_base_layer()
        weight = base.weight
        for name in head.active_adapters:
            weight = weight + head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
        return weight, base.bias
    return weight, getattr(head, "bias", None)


def logit_scale_of(model: nn.Module) -> float:
    """What the family multiplies the head's product by. Raises ConfigError for a soft cap."""
    config = causal_lm(model).config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError(
            f"model.path: {config.model_type} caps its logits softly (final_logit_softcapping "
            f"{config.final_logit_softcapping:g}), which the fused head does not compute; use a model without it"
        )
    scale = 1.0
    for name, multiplier in _SCALED.items():
        if getattr(config, name, None) not in (None, 1.0):
            scale *= multiplier(getattr(config, name))
    return scale


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before LoRA: the reference of a KL term."""
    with model.disable_adapter():
        yield


def is_lora(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


# ----------------------------------------------------------------------------------------------------- out of the door


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights under their transformers names, adapters merged into copies; the model itself is not touched."""
    inner = causal_lm(model)
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in inner.state_dict().items():
            if "lora_" in name:
                continue
            weights[name.replace(".base_layer.", ".")] = tensor.detach()
        for name, module in inner.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            weights[f"{name}.weight"] = module.get_base_layer().weight.detach() + delta
    return weights


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    merge: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an ordinary transformers folder; with LoRA and `merge=False`, an ordinary peft adapter folder.

    weights: whole ones, where the model's own are sharded; by `merged_weights`' names, or the adapter's for its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_lora(model) and merge:
        weights = merged_weights(model) if weights is None else weights
        inner = causal_lm(model)
        tied = getattr(inner, "_tied_weights_keys", None) or {}
        inner.config.save_pretrained(folder)
        _save_weights(
            {name: tensor for name, tensor in weights.items() if name not in tied or not is_tied(inner)}, folder
        )
        if inner.can_generate():
            inner.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    tokenizer.save_pretrained(folder)


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding's."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def _with_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora: peft is not installed ({error}); run pip install 'cispo[lora]'") from None
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
            ),
        )
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules: {config.target_modules!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
