"""A real browser, for the tests of pages. The fixture `browser` is in conftest.py."""

import time


def wait(browser, script, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        assert time.monotonic() < deadline, f"still false: {script}\n{browser.get_log('browser')}"
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return value
