"""The process that the `math` reward asks: is this completion's answer the gold answer, as mathematics?

The only door to math-verify. Run by its path (`python -P math_worker.py LIMIT_S`), so that starting it imports neither
torch nor cispo: it reads one JSON object a line, `{"gold", "completion"}`, and answers each with `{"reward"}` or
`{"error"}`. A process of its own, because an expression such as 9^9^9^9 keeps sympy in C code that no signal and no
thread can stop. Past LIMIT_S seconds on one line a watchdog that does not need the interpreter ends the process, and
the caller starts another; so it also never outlives a trainer that was killed.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
from typing import Any

START_LIMIT_S = 120.0  # for importing sympy on a cold disk
MEMORY_LIMIT = 4 << 30  # bytes of address space; a tower of powers must not take the trainer down with it
UNTIMED: Any = None  # math-verify's own timeouts are signals; the watchdog replaces them
DELIMITERS = ("$", r"\(", r"\[", r"\boxed")


def gold_text(gold: str) -> str:
    """What of a data row's answer is the answer, delimited so that it parses as one expression.

    GSM8K writes its reasoning and then `#### 72`. Bare LaTeX such as `\\frac{1}{2}` needs delimiters.
    """
    gold = gold.rsplit("####", 1)[-1].strip()
    return gold if any(delimiter in gold for delimiter in DELIMITERS) else rf"\boxed{{{gold}}}"


def serve(limit_s: float) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # whatever a library prints must not become an answer
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - held open for the watchdog
    faulthandler.dump_traceback_later(START_LIMIT_S, exit=True, file=nowhere)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limit_memory()
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def reward(gold: str, completion: str) -> dict[str, Any]:
        wanted = parse(gold_text(gold), extraction, parsing_timeout=UNTIMED)
        if not wanted:
            return {"error": f"math-verify finds no expression in the gold answer {gold!r}"}
        given = parse(completion, extraction, parsing_timeout=UNTIMED)
        return {"reward": float(verify(wanted, given, timeout_seconds=UNTIMED))}

    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
        answer = reward(**json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers)


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))


if __name__ == "__main__":
    serve(float(sys.argv[1]))
