"""An adapter as other tools load it: a peft folder, in one tar file.

Left out on purpose: merging into the base's weights (`peft` does it), and encrypted exports.
"""

from __future__ import annotations

import io
import json
import tarfile

from safetensors.torch import save as save_tensors
from torch import Tensor

from cispo.server.compute import ServedModel
from cispo.server.lora import ALPHA, LoraShape

FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_adapter(served: ServedModel, shape: LoraShape, flat: Tensor) -> bytes:
    """A tar of `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them."""
    tensors, targets = {}, set()
    for i, (A, B) in served.host.views(shape, flat).items():
        name = served.host.sites[i].name
        targets.add(name.rpartition(".")[2])
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": served.path,
        "r": shape.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in zip(FILES, (json.dumps(config, indent=2).encode(), save_tensors(tensors)), strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_file(archive: bytes, name: str) -> bytes | None:
    """One file of such a tar, or None where it has none of that name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        try:
            member = tar.extractfile(name)
        except KeyError:
            return None
        return None if member is None else member.read()
