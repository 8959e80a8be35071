"""`cispo bench head` on a size of a few milliseconds: contenders compute equal gradients, and files are written."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from cispo.bench import BENCHES, load
from cispo.bench.head import HeadBenchOptions, run
from cispo.types import ConfigError


def test_figures_table_and_picture(tmp_path, capsys):
    options = HeadBenchOptions(
        sizes=("tiny",), threads=1, rounds=1, memory=False, json=tmp_path / "head.json", plot=tmp_path / "head.svg"
    )
    assert run(options) == 0
    assert "T=4096 D=256 V=1024 float32" in capsys.readouterr().out
    (results,) = json.loads(options.json.read_text())["sizes"].values()
    assert {"floor", "cispo chunked", "full-logits autograd"} <= set(results)
    for name, result in results.items():
        assert len(result["seconds"]) == 1 and result["seconds"][0] > 0
        assert result["gradient_error"] is None or result["gradient_error"] < 1e-6, name
    assert results["floor"]["ratios"] == [1.0]
    assert ElementTree.parse(options.plot).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ("huge",)}, "'huge' is unknown; choose from tiny"),
        ({"contenders": ("x",)}, "'x' is not available here"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(HeadBenchOptions(**options))


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_can_be_loaded(name):
    options, run_ = load(name)
    assert callable(run_) and options() is not None
