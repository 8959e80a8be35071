"""The report, the inspector and the live page: in Python, and in headless Chromium where it is installed.

The browser tests drive Debian's `chromium` through Selenium and skip with a reason where either is missing.

    python -m pytest tests/test_report.py
"""

import contextlib
import json
import math
import re
import shutil
import socket
import struct
import threading
import time
import urllib.request
from base64 import b64decode

import numpy as np
import pytest
import torch

import cispo
from cispo import config as configs
from cispo import objectives
from cispo.report.page import ReportOptions, embed, page_data, report, write_page
from cispo.report.runs import Tail, find_runs, new_runs, read_run, recipes
from cispo.report.tokens import PPO, ForkCounter, choose_steps, encode_step, pusher, read_lines, silenced, spread
from cispo.report.tui import picture, sparkline
from cispo.report.watch import Cursor, Hub, WatchOptions, make_app, watch
from cispo.types import ConfigError, DataError
from tests.browsing import wait

NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{data}}"


# ------------------------------------------------------------------------------------------------------- small runs


def completion(step, group, sample, tokens, *, advantage=1.0, shift=0.0, prompt="what?", **more):
    """A line of a rollout file; `shift` is log r of every token."""
    n = len(tokens)
    return {
        "step": step, "update": group, "admission": group, "sample": sample, "prompt_id": f"p{group}", "prompt": prompt,
        "completion": "".join(tokens), "reward": float(advantage > 0), "rewards": {"correct": float(advantage > 0)},
        "correct": advantage > 0, "advantage": advantage, "truncated": False, "trained": advantage != 0,
        "version": step - 1, "tokens": [ord(t[0]) for t in tokens], "pieces": list(tokens),
        "sampler_logprobs": [-0.5 - 0.1 * i for i in range(n)],
        "logprobs": [-0.5 - 0.1 * i + shift for i in range(n)], "entropy": [0.3] * n, "weights": [0.125] * n,
        "versions": [step - 1] * n, **more,
    }  # fmt: skip


def write_run(folder, *, steps=4, seed=0, cap=4.0, prompt="what?", forks=(1, 3, 7, 8), groups=4, size=8):
    """A run in the trainer's format, in which the share of completions that open with `~` rises step by step."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"seed: {seed}\nsteps: {steps}\ntask: {{type: think}}\nalgorithm:\n"
        f"  objective: {{type: cispo, clip_low_threshold: 0.0, clip_high_threshold: {cap}}}\n"
    )
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps + 1):
            line = {"step": step, "eval/accuracy": 0.1 + 0.2 * step + 0.01 * seed}
            if step:
                line |= {"reward/mean": 0.2 * step, "reward/std": 0.4, "ratio/max": 2.0 * step, "ratio/p50": 1.0,
                         "ratio/p99": 1.5, "clip/ppo_silenced": 0.1 / step, "time/step_s": 1.0, "time/sample_s": 0.6,
                         "time/train_s": 0.3, "tokens/total": 100 * step, "staleness/histogram": [90, 10],
                         "policy/entropy": 1.0 / step}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    for step in range(1, steps + 1):
        with open(folder / "rollouts" / f"step-{step:06d}.jsonl", "w") as file:
            for g in range(groups):
                for s in range(size):
                    opens = s < forks[step - 1]
                    tokens = ["~", "1", "=", "1"] if opens else ["=", "2"]
                    line = completion(
                        step,
                        g,
                        s,
                        tokens,
                        prompt=prompt,
                        advantage=1.0 if opens else -0.5,
                        shift=0.5 if opens else -0.1,
                    )
                    file.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Three real steps of `think`."""
    folder = tmp_path_factory.mktemp("real") / "run"
    words = "--steps 3 --eval.every 1 --eval.max_prompts 64 --threads 1 --rollout.groups_per_step 16"
    words += f" --algorithm.updates_per_rollout 8 --run_dir {folder}"
    return cispo.train(configs.load(None, words.split()))


# --------------------------------------------------------------------------------------------------------- formulas


def coefficients(objective, r, A, w):
    n = len(r)
    push = pusher(objective)
    return push(np.zeros(n), np.log(r), np.asarray(A, float), np.asarray(w, float), np.zeros(n))


def test_the_push_is_clipped_under_cispo_and_zero_under_ppo():
    r, A, w = [0.5, 1.0, 1.5, 9.0], [2.0, 2.0, 2.0, -1.0], [0.5] * 4
    assert coefficients({"type": "cispo", "clip_high_threshold": 4.0}, r, A, w) == pytest.approx([0.5, 1.0, 1.5, -2.0])
    assert coefficients(PPO, r, A, w) == pytest.approx([0.5, 1.0, 0.0, -4.5])
    assert silenced(np.array([1.5, 0.5, 0.5, 1.5]), np.array([1, 1, -1, -1])).tolist() == [True, False, True, False]


def test_tokens_that_were_not_trained_have_no_push():
    push = pusher({"type": "cispo"})
    nan = math.nan
    found = push(np.zeros(3), np.array([nan, 0.0, 0.0]), np.array([1.0, nan, 1.0]), np.ones(3), np.zeros(3))
    assert found.tolist() == [0.0, 0.0, 1.0]


def test_sequence_objectives_get_their_rows_and_unknown_ones_none():
    gspo = pusher({"type": "gspo", "clip_low_threshold": 0.5, "clip_high_threshold": 2.0})
    sampler, logprobs = np.zeros(4), np.array([0.1, 0.3, -0.2, 0.0])
    A, w, rows = np.array([1.0, 1.0, -1.0, -1.0]), np.full(4, 0.25), np.array([0, 0, 5, 5])
    leaf = torch.from_numpy(logprobs).requires_grad_()
    loss = objectives.gspo(
        leaf, anchor_logprobs=torch.from_numpy(sampler), advantages=torch.from_numpy(A),
        rows=torch.tensor([0, 0, 1, 1]), clip_low_threshold=0.5, clip_high_threshold=2.0,
    )  # fmt: skip
    (loss * 0.25).sum().backward()
    assert gspo(sampler, logprobs, A, w, rows) == pytest.approx((-leaf.grad).numpy())
    assert pusher({"type": "of another version"}) is None


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_tail_reads_every_byte_once_and_says_when_the_file_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.poll() == []
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    assert [line["step"] for line in tail.poll()] == [0, 1] and tail.torn
    with open(path, "ab") as file:
        file.write(b'ep": 2}\nnot json\n{"step": 3}\n')
    assert [line["step"] for line in tail.poll()] == [2, 3] and not tail.torn and tail.bad == 1
    path.write_bytes(b'{"step": 0}\n')
    assert [line["step"] for line in tail.poll()] == [0] and tail.restarted
    assert tail.poll() == [] and not tail.restarted


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(DataError, match="no run is named"):
        report(ReportOptions(runs=()))
    with pytest.raises(DataError, match="not a run folder"):
        report(ReportOptions(runs=(tmp_path,)))


def test_what_is_broken_is_said_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "r")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-30])
    rollouts = folder / "rollouts" / "step-000004.jsonl"
    rollouts.write_text(rollouts.read_text()[:-100])
    (folder / "config.yaml").unlink()
    data = page_data([read_run(folder)])
    (run,) = data["runs"]
    notes = " ".join(run["notes"])
    assert "config.yaml is missing" in notes and "incomplete" in notes
    assert len(run["lines"]) == 4 and len(run["steps"]["4"]["groups"]) == 4
    assert len(run["steps"]["4"]["groups"][-1]["completions"]) == 7
    assert write_page(tmp_path / "r.html", [read_run(folder)]).stat().st_size > 50_000


def test_an_empty_run_still_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    data = page_data([read_run(tmp_path)])
    assert "no whole line yet" in " ".join(data["runs"][0]["notes"])
    write_page(tmp_path / "report.html", [read_run(tmp_path)])


def test_a_step_is_encoded_without_loss(tmp_path):
    folder = write_run(tmp_path / "r")
    lines = list(read_lines(folder / "rollouts" / "step-000002.jsonl"))
    encoded = encode_step(lines, {"type": "cispo"}, token_budget=10**6)
    c = encoded["groups"][0]["completions"][0]
    indices = struct.unpack("<4I", b64decode(c["t"]))
    assert [encoded["pieces"][i] for i in indices] == ["~", "1", "=", "1"]
    assert struct.unpack("<4f", b64decode(c["l"])) == pytest.approx([0.0, -0.1, -0.2, -0.3], abs=1e-6)
    assert (c["w"], c["v"], c["advantage"]) == (0.125, 1.0, 1.0)
    assert "g" not in c
    given = encode_step(lines, {"type": "sapo"}, token_budget=10**6)["groups"][0]["completions"][0]["g"]
    assert all(g > 0 for g in struct.unpack("<4f", b64decode(given)))


def test_large_runs_are_sampled_evenly_and_say_so(tmp_path):
    assert spread(list(range(100)), 3) == [0, 50, 99]
    assert spread([1, 2], 5) == [1, 2]
    folder = write_run(tmp_path / "r")
    first = folder / "rollouts" / "step-000001.jsonl"
    for step in range(5, 301):
        (folder / "rollouts" / f"step-{step:06d}.jsonl").symlink_to(first)
    files = read_run(folder).rollout_steps()
    chosen = choose_steps(files, most=10, most_bytes=10**9)
    assert len(chosen.steps) == 10 and {1, 300} <= set(chosen.steps) and "10 of 300" in chosen.note
    assert len(choose_steps(files, most=10, most_bytes=1).steps) == 2
    notes = " ".join(page_data([read_run(folder)])["runs"][0]["notes"])
    assert "24 of 300 steps are in this page" in notes and "120 of 300 rollout files" in notes
    lines = list(read_lines(first))
    assert len(encode_step(lines, PPO, token_budget=200)["groups"]) == 1


def test_fork_tokens_are_those_that_rose_with_the_push_they_got(tmp_path):
    folder = write_run(tmp_path / "r")
    counter = ForkCounter({"type": "cispo"})
    for step, path in read_run(folder).rollout_steps().items():
        counter.add(step, list(read_lines(path)))
    found = counter.forks()
    top = found["forks"][0]
    assert (top["before"], top["token"]) == (None, "~")
    assert top["series"] == [1 / 8, 3 / 8, 7 / 8, 1.0]
    assert (top["first"], top["last"]) == (0.25, 0.9375)  # two steps from either end are pooled
    count = 4 * (1 + 3 + 7 + 8)
    assert top["count"] == count
    assert top["got"] == pytest.approx(count * 0.125 * math.exp(0.5))
    assert top["ppo"] == 0 and top["silenced"] == count  # exp(0.5) is above 1.2
    assert all(f["last"] > f["first"] for f in found["forks"])


def test_seeds_of_one_recipe_are_grouped_and_recipes_named_by_what_differs(tmp_path):
    for cap in (4.0, 8.0):
        for seed in (0, 1):
            write_run(tmp_path / f"c{cap}-s{seed}", cap=cap, seed=seed)
    groups = recipes(find_runs([tmp_path]))
    assert [(label, len(runs)) for label, runs in groups] == [("cispo 0/4", 2), ("cispo 0/8", 2)]


def test_a_comparisons_folder_stands_for_its_runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"cispo-s{seed}", seed=seed)
    assert [run.name for run in find_runs([tmp_path])] == ["cispo-s0", "cispo-s1"]


# ----------------------------------------------------------------------------------------------------------- writing


def test_nothing_that_a_run_wrote_can_leave_its_script_element(tmp_path):
    page = write_page(tmp_path / "r.html", [read_run(write_run(tmp_path / "r", prompt=NASTY))]).read_text()
    assert "hacked" in page
    data = page[page.index('<script id="data"') :]
    assert "<" not in data[data.index(">") + 1 : data.index("</script>")]
    assert json.loads(embed({"a": NASTY, "b": math.nan})) == {"a": NASTY, "b": None}


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    page = write_page(tmp_path / "r.html", [read_run(write_run(tmp_path / "r"))]).read_text()
    assert "default-src 'none'" in page and "connect-src" not in page
    assert re.findall(r"""(?:src|href)=["']?https?:""", page) == []


def test_the_command_writes_into_the_run(tmp_path, capsys):
    folder = write_run(tmp_path / "r")
    assert report(ReportOptions(runs=(folder,))) == 0
    assert (folder / "report.html").exists() and "report.html" in capsys.readouterr().out.replace("\n", "")


# -------------------------------------------------------------------------------------------------------------- live


def test_the_hub_sends_what_is_new_and_only_that(tmp_path):
    folder = write_run(tmp_path / "r")
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(text[:3]))
    hub = Hub([read_run(folder)])
    cursor = Cursor()
    hub.refresh()
    first = hub.news(0, cursor)
    assert [line["step"] for line in first["lines"]] == [0, 1, 2] and first["rollouts"] == [1, 2]
    assert hub.news(0, cursor) is None
    with open(metrics, "a") as file:
        file.writelines(text[3:])
    hub.refresh()
    news = hub.news(0, cursor)
    assert [line["step"] for line in news["lines"]] == [3, 4] and news["forks"]["steps"] == [1, 2, 3, 4]
    metrics.write_text("".join(text[:2]))
    hub.refresh()
    again = hub.news(0, cursor)
    assert again["restarted"] and [line["step"] for line in again["lines"]] == [0, 1]
    assert hub.step(0, 99) is None and hub.step(7, 1) is None and len(hub.step(0, 1)["groups"]) == 4


@contextlib.contextmanager
def serving_hub(hub):
    """The hub's page over a real socket; gives its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra server)")
    pytest.importorskip("starlette", reason="starlette is not installed (extra server)")
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # what connects before the server is up waits
    app = make_app(hub, every=0.05)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture
def served(tmp_path):
    """A run that is being watched; gives (url, folder)."""
    folder = write_run(tmp_path / "r")
    with serving_hub(Hub([read_run(folder)])) as url:
        yield url, folder


def test_the_live_page_serves_steps_and_events_to_loopback_only(served):
    url, folder = served
    with urllib.request.urlopen(url) as answer:
        assert b"connect-src 'self'" in answer.read()
    with urllib.request.urlopen(url + "api/run/0/step/2") as answer:
        assert len(json.load(answer)["groups"]) == 4
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + "api/run/0/step/77")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"host": "evil.example"}))
    with urllib.request.urlopen(url + "api/events", timeout=10) as events:
        assert events.readline() == b"event: run\n"
        assert len(json.loads(events.readline()[6:])["lines"]) == 5
        events.readline()
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 5, "reward/mean": 1.0}\n')
        assert events.readline() == b"event: run\n"
        assert json.loads(events.readline()[6:])["lines"] == [{"step": 5, "reward/mean": 1.0}]


def test_a_run_that_begins_in_a_watched_folder_joins_and_the_page_is_told(tmp_path):
    write_run(tmp_path / "runs" / "a")
    paths = [tmp_path / "runs"]
    hub = Hub(find_runs(paths), lambda known: new_runs(paths, known))
    cursor = hub.cursor(0)
    hub.refresh()
    assert [run.name for run in hub.runs] == ["a"] and hub.news(0, cursor)
    write_run(tmp_path / "runs" / "0")  # sorts before, and comes after: what pages have numbered stays
    hub.refresh()
    assert [run.name for run in hub.runs] == ["a", "0"] and hub.news(0, cursor) is None
    hub.refresh()
    assert len(hub.runs) == 2 and len(hub.news(1, hub.cursor(1))["lines"]) == 5
    assert hub.step(1, 2)["groups"]


def test_watch_names_what_is_wrong(tmp_path):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra server)")
    folder = write_run(tmp_path / "r")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with pytest.raises(ConfigError, match="port: .* choose another"):
        watch(WatchOptions(runs=(folder,), port=taken.getsockname()[1]))
    taken.close()
    with pytest.raises(ConfigError, match="every: 0"):
        watch(WatchOptions(runs=(folder,), every=0))


def test_the_terminal_dashboard_draws_once_where_there_is_no_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "r", prompt="a\x1b[2Jb")
    assert watch(WatchOptions(runs=(folder,), tui=True)) == 0
    drawn = capsys.readouterr().out
    assert "step 4 of 4" in drawn and "held-out accuracy" in drawn and "\x1b[2J" not in drawn
    assert sparkline([0, 1, 2, 3]) == "▁▃▆█" and sparkline([1.0, 1.0]) == "▁▁"
    assert picture([read_run(folder)])


# ------------------------------------------------------------------------------------------------------- the browser


def show(browser, url, *, width=1280, height=800):
    """Opens a page, waits until it has drawn, and gives the seconds that took."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    start = time.perf_counter()
    browser.get(url if "://" in str(url) else f"file://{url}")
    wait(
        browser, "return document.documentElement.dataset.ready === 'true' && !!document.querySelector('.plot canvas')"
    )
    return time.perf_counter() - start


def chart_data(browser, title):
    return browser.execute_script(
        "const title = (chart) => chart.querySelector('strong').textContent;"
        "return [...document.querySelectorAll('.chart')].find((c) => title(c) === arguments[0]).chart.data()",
        title,
    )


def tokens_of(browser, completion, what):
    """`what` (an expression in t, the element) of every token of a completion's card."""
    script = "return [...document.querySelectorAll('.tokens')[arguments[0]].querySelectorAll('.t')].map((t) => "
    return browser.execute_script(f"{script}{what})", completion)


def tip_of(browser, completion, token):
    """The inspector's numbers of one token, by their labels."""
    rows = browser.execute_script(
        "document.querySelectorAll('.tokens')[arguments[0]].querySelectorAll('.t')[arguments[1]].click();"
        "return [...document.querySelectorAll('.tip tr')].map((r) => [...r.children].map((c) => c.textContent))",
        completion, token,
    )  # fmt: skip
    return {key: float(value.split(" ")[0]) for key, value in rows if value[0] in "-0123456789"}


def test_the_report_of_a_real_run_opens_whole(browser, real_run, tmp_path):
    show(browser, write_page(tmp_path / "r.html", [read_run(real_run)]))
    assert browser.get_log("browser") == []
    lines = read_run(real_run).metrics
    steps, accuracy, low, high = chart_data(browser, "Held-out accuracy")
    assert steps == [0, 1, 2, 3]
    assert accuracy == pytest.approx([line["eval/accuracy"] for line in lines], abs=1e-5)
    assert all(a <= b <= c for a, b, c in zip(low, accuracy, high)) and low[0] < accuracy[0] < high[0]
    titles = browser.execute_script("return [...document.querySelectorAll('.chart strong')].map(e => e.textContent)")
    missing = browser.execute_script("return [...document.querySelectorAll('.chart .empty')].map(e => e.textContent)")
    assert len(titles) >= 20 and missing == []
    assert "start" in browser.execute_script("return document.querySelector('#forks .scroll tbody tr').textContent")


def test_where_no_reward_is_known_nothing_is_called_incorrect_and_the_map_shows_advantages(browser, tmp_path):
    """Completions as the server writes them, which trains for a client that alone knows their rewards."""
    folder = write_run(tmp_path / "run", steps=1)
    (folder / "metrics.jsonl").write_text('{"step": 1, "ratio/p50": 1.0}\n')
    unknown = {"reward": None, "rewards": {}, "correct": None, "truncated": None, "version": None, "versions": None}
    lines = [completion(1, 0, i, ["1", "2"], advantage=a, **unknown) for i, a in enumerate((0.5, -0.25))]
    (folder / "rollouts" / "step-000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(browser, write_page(tmp_path / "r.html", [read_run(folder)]))
    assert browser.get_log("browser") == []
    wait(browser, "return document.querySelectorAll('.card').length === 2")
    assert browser.execute_script("return [...document.querySelectorAll('.card .badge')].map(e => e.textContent)") == []
    cells = "return [...document.querySelectorAll('.columns .cell')].map(e => e.style.background)"
    high, low = browser.execute_script(cells)
    assert (high, low) == ("rgba(0, 114, 210, 0.75)", "rgba(224, 108, 0, 0.376)")  # blue; orange, half as strong
    key = browser.execute_script("return document.querySelector('.mapkey').textContent")
    assert "advantage −0.5" in key and "advantage +0.5" in key and "reward" not in key


def test_the_inspectors_numbers_are_those_of_the_rollout_file(browser, real_run, tmp_path):
    show(browser, write_page(tmp_path / "r.html", [read_run(real_run)]))
    step = int(wait(browser, "return document.querySelector('.step').textContent"))
    group = browser.execute_script(
        "return [...document.querySelectorAll('.group')].findIndex(g => g.getAttribute('aria-pressed') === 'true')"
    )
    lines = list(read_lines(real_run / "rollouts" / f"step-{step:06d}.jsonl"))
    admissions = list(dict.fromkeys(line.head["admission"] for line in lines))
    mine = [line for line in lines if line.head["admission"] == admissions[group]]
    assert len(browser.find_elements("css selector", ".card")) == len(mine) == 16
    own = objectives.bind(configs.load(real_run / "config.yaml").algorithm)
    checked = 0
    for i, line in enumerate(mine):
        assert tokens_of(browser, i, "t.textContent") == list(line.pieces)
        cut = silenced(np.exp(line.logprobs - line.sampler), np.full(len(line.ids), line.advantage))
        assert tokens_of(browser, i, "t.classList.contains('silenced')") == cut.tolist()
        leaf = torch.tensor(line.logprobs, requires_grad=True)
        columns = {"anchor_logprobs": torch.tensor(line.sampler), "advantages": torch.full_like(leaf, line.advantage)}
        (own(leaf, **columns) * torch.tensor(line.weights)).sum().backward()
        for k in range(len(line.ids)):
            number = tip_of(browser, i, k)
            assert number["log μ, at sampling"] == pytest.approx(line.sampler[k], rel=1e-4, abs=1e-9)
            assert number["log π, at its update"] == pytest.approx(line.logprobs[k], rel=1e-4, abs=1e-9)
            assert number["ratio r = π/μ"] == pytest.approx(math.exp(line.logprobs[k] - line.sampler[k]), rel=1e-4)
            assert number["reduction's weight w"] == pytest.approx(line.weights[k], rel=1e-4)
            assert number["gradient −∂loss/∂log π"] == pytest.approx(-float(leaf.grad[k]), rel=2e-4, abs=1e-9)
            checked += 1
    assert checked > 32


@pytest.mark.parametrize("objective", ["cispo", "grpo", "clip_higher"])
def test_the_switch_shows_the_batch_under_another_objective(browser, tmp_path, objective):
    folder = write_run(tmp_path / "r")
    lines = [json.loads(line) for line in (folder / "rollouts" / "step-000001.jsonl").open()]
    ratios = [0.1, 0.79, 0.81, 1.0, 1.19, 1.25, 1.3, 3.9, 9.0]
    for i, sign in enumerate((1.0, -1.0)):
        lines[i] = completion(1, 0, i, list("abcdefghi"), advantage=sign, reward=sign)
        lines[i]["logprobs"] = [s + math.log(r) for s, r in zip(lines[i]["sampler_logprobs"], ratios)]
    (folder / "rollouts" / "step-000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(browser, write_page(tmp_path / "r.html", [read_run(folder)]))
    wait(browser, "return document.querySelectorAll('.group').length === 4")
    browser.execute_script(f"document.querySelector('.choice button[data-value={objective}]').click()")
    browser.execute_script("document.querySelector('.group').click()")
    section = {"cispo": {"type": "cispo"}, "grpo": PPO, "clip_higher": {**PPO, "clip_high_threshold": 1.28}}[objective]
    for i, sign in enumerate((1.0, -1.0)):
        expected = coefficients(section, ratios, [sign] * 9, [0.125] * 9)
        for k in range(9):
            value = tip_of(browser, i, k)["gradient −∂loss/∂log π"]
            assert value == pytest.approx(expected[k], rel=1e-3, abs=1e-12), (sign, ratios[k])
        struck = tokens_of(browser, i, "t.classList.contains('cut')")
        assert struck == (expected == 0).tolist()


def test_a_prompt_with_a_script_is_shown_as_text(browser, tmp_path):
    run = read_run(write_run(tmp_path / "r", prompt=NASTY))
    run.name = NASTY
    show(browser, write_page(tmp_path / "r.html", [run]))
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelector('.prompt pre').textContent") == NASTY
    assert browser.execute_script("return document.querySelector('h1').textContent") == NASTY
    assert browser.get_log("browser") == []


def test_bars_share_a_scale_and_legends_show_the_last_value(browser, tmp_path):
    folder = write_run(tmp_path / "r")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line in lines[1:]:
        line["time/reward_s"] = 0.2  # within the 0.6 s of sampling
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(browser, write_page(tmp_path / "r.html", [read_run(folder)]))
    bars = browser.execute_script(
        "return [...document.querySelectorAll('.bars')].at(-1).querySelectorAll('.bar').values().map((b) => "
        "[b.children[0].textContent, b.children[1].offsetWidth, b.children[2].textContent]).toArray()"
    )
    assert [(label, text.split(" ·")[0]) for label, _, text in bars] == [
        ("sampling", "40 %"), ("waiting for rewards", "20 %"), ("forward and backward", "30 %"),
        ("the rest: metrics, writing", "10 %"),
    ]  # fmt: skip
    assert len({width for _, width, _ in bars}) == 1 and bars[0][1] > 50
    legend = wait(browser, "return document.querySelector('.u-legend .u-series:nth-child(2) .u-value')?.textContent")
    assert legend == "0.9"  # held-out accuracy at step 4
    assert browser.get_log("browser") == []


def test_the_keyboard_reaches_everything(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, write_page(tmp_path / "r.html", [read_run(write_run(tmp_path / "r"))]))
    slider = browser.find_element(By.CSS_SELECTOR, "input[type=range]")
    slider.send_keys(Keys.HOME)
    wait(browser, "return document.querySelector('.step').textContent === '1'")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    wait(browser, "return document.querySelector('.step').textContent === '3'")
    tokens = browser.find_element(By.CSS_SELECTOR, ".tokens")
    tokens.send_keys(Keys.ARROW_RIGHT)
    head = "return document.querySelector('.tip').hidden ? '' : document.querySelector('.tiphead').textContent"
    first = wait(browser, head)
    tokens.send_keys(Keys.END)
    assert wait(browser, head) != first
    tokens.send_keys(Keys.ESCAPE)
    assert browser.execute_script("return document.querySelector('.tip').hidden")
    groups = browser.find_elements(By.CSS_SELECTOR, ".group")
    groups[2].send_keys(Keys.ENTER)
    wait(browser, "return document.querySelectorAll('.group')[2].getAttribute('aria-pressed') === 'true'")
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select')].filter(e => !e.textContent.trim() && "
        "!e.getAttribute('aria-label') && !e.closest('label')).map(e => e.outerHTML)"
    )
    assert unlabelled == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, real_run, tmp_path, width):
    show(browser, write_page(tmp_path / "r.html", [read_run(real_run)]), width=width, height=844)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_theme_can_be_changed(browser, tmp_path):
    show(browser, write_page(tmp_path / "r.html", [read_run(write_run(tmp_path / "r"))]))
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    browser.find_element("css selector", ".theme").click()
    assert browser.execute_script(ground) != before
    assert browser.execute_script("return document.querySelectorAll('.plot canvas').length") >= 3


def test_several_runs_overlay_with_seeds_as_bands(browser, tmp_path):
    for cap in (4.0, 8.0):
        for seed in range(3):
            write_run(tmp_path / f"c{cap}-s{seed}", cap=cap, seed=seed)
    show(browser, write_page(tmp_path / "r.html", find_runs([tmp_path])))
    data = chart_data(browser, "Held-out accuracy")
    assert len(data) == 1 + 2 * 3  # steps, and for each recipe its mean and both edges of its band
    values = [0.1, 0.11, 0.12]
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    assert (data[1][0], data[2][0], data[3][0]) == pytest.approx((0.11, 0.11 - half, 0.11 + half), abs=1e-6)
    differing = browser.execute_script("return [...document.querySelectorAll('.config th')].map((e) => e.textContent)")
    assert {"algorithm.objective.clip_high_threshold", "seed"} <= set(differing) and "steps" not in differing
    assert browser.get_log("browser") == []


def test_a_forecast_and_a_comparison_are_drawn_on_top(browser, tmp_path):
    from cispo.report.forecast import FitOptions, forecast

    for seed in range(2):
        write_run(tmp_path / f"r{seed}", seed=seed)
        with open(tmp_path / f"r{seed}" / "metrics.jsonl", "a") as file:
            for step in range(5, 20):
                file.write(json.dumps({"step": step, "eval/accuracy": 0.95, "tokens/total": 100 * step}) + "\n")
    runs = find_runs([tmp_path])
    found = forecast("both", runs, FitOptions(runs=(), resamples=10))
    table = {"title": "A title", "notes": ["a note"], "columns": ["arm", "steps"], "rows": [["<b>x</b>", "1 2"]]}
    show(browser, write_page(tmp_path / "r.html", runs, forecasts=[found], comparison=table))
    data = chart_data(browser, "eval/accuracy over tokens")
    C, R = data[0], data[1]
    drawn = [(c, r) for c, r in zip(C, R) if r is not None]
    assert len(drawn) == len(found.line) and drawn[-1] == pytest.approx(found.line[-1][:2], rel=1e-5)
    assert found.verdict in browser.execute_script("return document.getElementById('forecast').textContent")
    cells = browser.execute_script("return [...document.querySelectorAll('#comparison td')].map((c) => c.textContent)")
    assert cells == ["<b>x</b>", "1 2"] and browser.get_log("browser") == []


def test_the_live_page_grows_with_the_run(browser, served):
    url, folder = served
    show(browser, url)
    assert chart_data(browser, "Reward in training")[0] == [1, 2, 3, 4]
    wait(browser, "return document.querySelectorAll('.card').length === 8")
    shutil.copy(folder / "rollouts" / "step-000004.jsonl", folder / "rollouts" / "step-000005.jsonl")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "reward/mean": 0.9, "reward/std": 0.1, "eval/accuracy": 1.0}) + "\n")
    wait(browser, "return document.querySelector('input[type=range]').max === '4'")
    wait(
        browser,
        "return [...document.querySelectorAll('.chart')].find(c => c.querySelector('strong').textContent === "
        "'Reward in training').chart.data()[0].length === 5",
    )
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []


def test_the_live_page_takes_in_a_run_that_begins(browser, tmp_path):
    write_run(tmp_path / "a")
    hub = Hub(find_runs([tmp_path]), lambda known: new_runs([tmp_path], known))
    with serving_hub(hub) as url:
        show(browser, url)
        assert browser.execute_script("return document.querySelector('h1').textContent") == "a"
        write_run(tmp_path / "b")
        wait(browser, "return document.querySelector('h1')?.textContent === '2 runs'")
        wait(browser, "return document.documentElement.dataset.ready === 'true'")


@pytest.mark.slow
def test_a_thousand_steps_open_within_two_seconds_and_fifteen_megabytes(browser, tmp_path):
    folder = write_run(tmp_path / "r", groups=32, size=16, forks=(1, 3, 7, 8))
    first = folder / "rollouts" / "step-000004.jsonl"
    long = [json.loads(line) for line in first.open()]
    for line in long:  # 512 completions of 40 tokens
        for key in ("tokens", "pieces", "sampler_logprobs", "logprobs", "entropy", "weights", "versions"):
            line[key] = (line[key] * 20)[:40]
    first.write_text("".join(json.dumps(line) + "\n" for line in long))
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    names = [f"task/metric{i}" for i in range(50)]
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(5, 1001):
            (folder / "rollouts" / f"step-{step:06d}.jsonl").symlink_to(first)
            more = {name: math.sin(step / 100 + i) for i, name in enumerate(names)}
            file.write(json.dumps({**line, **more, "step": step}) + "\n")
    path = tmp_path / "r.html"
    write_page(path, [read_run(folder)])
    assert path.stat().st_size < 15e6
    assert min(show(browser, path) for _ in range(3)) < 2.0
