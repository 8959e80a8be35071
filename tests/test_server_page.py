"""The page at `/`, in a real browser, with real sessions and runs in it."""
# ruff: noqa: E402 (what follows needs the extra)

import pytest

tinker = pytest.importorskip("tinker", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")

from tinker import types

from tests.browsing import wait
from tests.serving import client_of, datums, serving


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("page"), model=[f"tiny={tiny_folder}"]) as started:
        yield started


def step(run, seed):
    run.forward_backward(datums(2, seed), "cispo").result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_asks_for_the_key_and_shows_the_runs_live(browser, server, width, scheme):
    run = client_of(server).create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
    step(run, 0)
    step(run, 1)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(server.url + "/")
    browser.execute_script("sessionStorage.clear()")
    browser.get(server.url + "/")
    for key, shown in (("tml-wrong", "not known here"), (server.key, run.model_id)):
        wait(browser, "return !document.getElementById('ask').hidden")
        script = "document.getElementById('key').value = arguments[0]; document.querySelector('form').requestSubmit()"
        browser.execute_script(script, key)
        wait(browser, f"return document.body.innerText.includes({shown!r})")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    mine = f"[...document.querySelectorAll('.run')].find((r) => r.textContent.includes({run.model_id!r}))"
    loss = f"{mine}.querySelector('figcaption span:last-child').textContent"
    before = browser.execute_script(f"return {loss}")
    assert browser.execute_script(f"return {mine}.querySelectorAll('polyline').length") >= 6
    step(run, 2)
    wait(browser, f"return {mine}.textContent.includes('3 steps shown') && {loss} !== {before!r}")
    refused = "401 (Unauthorized)"  # of the first look and of the wrong key
    assert [entry for entry in browser.get_log("browser") if refused not in entry["message"]] == []
