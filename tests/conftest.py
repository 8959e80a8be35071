"""Shared fixtures: small real models. Two threads at most, so that runs on one machine are comparable."""

import os
import shutil

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


@pytest.fixture(scope="module")
def browser():
    """Headless chromium, or a skip that says what to install."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()
