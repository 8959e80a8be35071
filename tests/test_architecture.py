"""The rooms of the design, asserted from the import statements: a floor imports only the floors below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cispo"

FLOORS = {
    "types": 0,
    "config": 0,
    "metrics": 0,
    "objectives": 1,
    "corrections": 1,
    "advantages": 1,
    "batching": 1,
    "head": 1,
    "model": 2,
    "learner": 2,
    "sharded": 2,
    "transfer": 2,
    "sampling": 2,
    "checkpoint": 2,
    "tasks": 3,
    "rollout": 3,
    "buffer": 3,
    "measure": 3,
    "trainer": 3,
    "cluster": 4,
    "console": 5,
    "check": 5,
    "plan": 4,
    "dialects": 5,
    "server": 5,
    "report": 5,
    "bench": 5,
    "integrations": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}
SIBLINGS = {
    "config": {"types"},
    "metrics": {"types"},
    "head": {"objectives"},
    "learner": {"model"},
    "sharded": {"model", "learner", "checkpoint", "transfer"},
    "sampling": {"model", "transfer"},
    "rollout": {"buffer", "tasks"},
    "measure": {"rollout"},
    "trainer": {"rollout", "buffer", "tasks", "measure"},
    "bench": {"report", "cli"},
}
DOORS = {
    "ray": {"cluster"},
    "triton": {"head/triton.py"},
    "vllm": {"sampling/vllm.py", "bench"},
    "fastapi": {"server", "report"},
    "peft": {"model", "bench"},
    "plotly": {"report", "bench"},
    "trl": {"integrations", "bench"},
}
LATE = {"__init__"}  # `cispo.train` is reached through the package, which imports the command line only when called


def modules():
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full dotted names of everything a module imports, type-checking imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative imports hide which room they reach")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_floor_imports_only_the_floors_below_it(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor; add it to the table and say why it exists"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "cispo" or len(parts) < 2:
            continue
        target = parts[1] if parts[1] in FLOORS else "__init__"
        if target == room or room in LATE or (target == "__init__" and parts[1] == "__version__"):
            continue
        below = FLOORS[target] < FLOORS[room]
        assert below or target in SIBLINGS.get(room, set()), (
            f"{room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[target]})"
        )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_each_heavy_library_has_one_door(path):
    place = str(path.relative_to(SOURCE))
    for name in imported(path):
        library = name.split(".")[0]
        if library in DOORS:
            assert any(place == door or room_of(path) == door for door in DOORS[library]), (
                f"{place} imports {library}, whose door is {', '.join(sorted(DOORS[library]))}"
            )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_opens_with_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path.relative_to(SOURCE)} has no opening paragraph"
