"""`cispo bench rollout`, for real on workloads of a moment."""

import json

import pytest

from cispo.bench import rollout
from cispo.bench.rollout import RolloutBenchOptions, Workload, run
from cispo.types import ConfigError


def test_contenders_write_the_same_amount_and_say_true_logprobs(monkeypatch, tmp_path, capsys):
    workloads = {
        "exact": Workload(prompts=3, samples=2, prompt_tokens=5, tokens=4),
        "ends": Workload(prompts=4, samples=8, prompt_tokens=5, tokens=100, rows=8, ends=True),
    }
    monkeypatch.setattr(rollout, "WORKLOADS", workloads)
    names = ("cispo", "generate+logprobs")
    path = tmp_path / "figures.json"
    assert run(RolloutBenchOptions(tuple(workloads), names, threads=1, rounds=2, json=path)) == 0
    measured = json.loads(path.read_text())["workloads"]
    assert set(measured["exact"]["results"]) == {"generate", *names}
    for result in measured["exact"]["results"].values():
        assert result["tokens"] == [3 * 2 * 4] * 2
        assert len(result["ratios"]) == 2 and min(result["seconds"]) > 0
    for name, workload in workloads.items():
        for contender in names:
            result = measured[name]["results"][contender]
            assert result["logprob_error"] < 1e-4
            assert all(
                workload.prompts * workload.samples <= n <= workload.prompts * workload.samples * workload.tokens
                for n in result["tokens"]
            )
    assert "generate+logprobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workloads": ("shrt",)}, "short"),
        ({"contenders": ("hf",)}, "generate"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(options, words):
    with pytest.raises(ConfigError, match=words):
        run(RolloutBenchOptions(**options))
