"""Bounds on metrics: what holds, what fails, and that absence never passes."""

import json

import pytest

from cispo import cli
from cispo.check import judge, parse
from cispo.types import ConfigError

RECORDS = [{"step": i, "ratio/max": float(i), "eval/pass@4": 0.5} for i in range(4)] + [{"step": 4, "ratio/max": None}]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("max(ratio/max) <= 3", True),
        ("max(ratio/max) < 3", False),
        ("mean(ratio/max) == 1.5", True),
        ("median(ratio/max)==1.5", True),
        ("last(ratio/max) != 3", False),
        ("count(ratio/max) >= 4", True),
        ("sum(eval/pass@4) > 1e0", True),
        ("first(ratio/max) >= 0", True),
        ("min(nothing/here) >= 0", False),
    ],
)
def test_bounds(text, held):
    assert judge(parse(text), RECORDS).held is held


@pytest.mark.parametrize(
    "text",
    ["ratio/max < 3", "max(ratio/max)", "worst(ratio/max) < 3", "max(x) < three", "__import__('os').system('x')"],
)
def test_what_is_no_bound_is_refused_and_never_run(text):
    with pytest.raises(ConfigError):
        parse(text)


def test_a_run_that_did_not_get_there_fails(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("steps: 4\n")
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in RECORDS[:3])
    assert cli.main(["check", str(tmp_path), "max(ratio/max) < 9"]) == 1
    assert "the last is 2" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path), "--step", "2", "max(ratio/max) < 9"]) == 0
    assert cli.main(["check", str(tmp_path), "--step", "2", "max(ratio/max) < 1"]) == 1
    assert cli.main(["check", str(tmp_path / "no"), "max(ratio/max) < 1"]) == 2
