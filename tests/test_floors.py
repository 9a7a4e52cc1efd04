"""The import rule of the house: a module imports from lower floors only, and heavy libraries stay where used."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "gaussian": 0, "compiled": 0,
    "methods": 1, "optim": 1, "curvature": 1, "metrics": 1, "tensors": 1, "sources": 1, "configs": 1,
    "kernels": 1.5,
    "posterior": 2, "names": 2,
    "lora": 2.5, "plan": 3, "models": 3, "trainer": 3, "sampling": 3.5,
    "merge": 4, "finetune": 4, "precision": 4, "evaluate": 4, "inspect": 4, "convert": 4, "hub": 4,
    "detox": 5,
}  # fmt: skip


def modules() -> list[Path]:
    return sorted((ROOT / "mergekit_bayes").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "mergekit_bayes").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_floor():
    assert {room(p) for p in modules()} - {"__init__"} <= set(FLOORS)


def test_modules_import_from_lower_floors_only():
    for path in modules():
        here = room(path)
        for name in imports(path):
            if not name.startswith("mergekit_bayes."):
                continue
            there = name.split(".")[1]
            if there not in FLOORS or there == here:
                continue
            assert FLOORS[there] < FLOORS[here], f"{here} must not import {there}"


def test_members_of_a_family_do_not_import_each_other():
    for path in modules():
        if path.parent.name not in ("methods", "metrics") or path.name == "__init__.py":
            continue
        for name in imports(path):
            if name.startswith(f"mergekit_bayes.{path.parent.name}."):
                assert name.split(".")[2] == "base", f"{path.name} imports {name}"


def test_the_package_never_imports_the_command_line():
    assert not [p for p in modules() if any(n.startswith("bmerge_cli") for n in imports(p))]


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_command_line_and_the_merge_load_no_heavy_library():
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "sklearn", "huggingface_hub"}
    assert not heavy & loaded_by("import bmerge_cli.main, mergekit_bayes.merge, mergekit_bayes.inspect")
