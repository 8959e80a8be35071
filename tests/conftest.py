"""Shared fixtures: small real models. Two threads at most, so that runs on one machine are comparable."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CISPO_TEST_GPU", ""))

import pytest
import torch

from cispo.config import ModelConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """An untrained model of the `think` architecture as an ordinary transformers folder."""
    from cispo.tasks import think

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    think.make_model(think.BaseRecipe()).save_pretrained(folder)
    think.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder():
    """The embedded base model, made once and kept in the user's cache folder."""
    from cispo.tasks import think

    return think.base_model()


@pytest.fixture
def tiny(tiny_folder):
    """A freshly loaded untrained model."""
    from cispo import model

    return model.load(ModelConfig(), tiny_folder)
