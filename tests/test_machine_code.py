"""Compiled passes are kept as machine code that another process runs without numba."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.code_cache import code_folder, is_trusted
from mergekit_bayes.kernels import launch, machine_code, sources
from tests import tiny
from tests.test_kernels import case, run

pytest.importorskip("numba", reason="the compiled pass needs numba")
# Of these, kernels take types, and what runs before anything is compiled.
TYPES_ONLY = tuple(
    f"mergekit_bayes.{name}" for name in ("code_cache", "methods.base", "kernels.sources")
)
ROOT = Path(__file__).parent.parent
MERGE = """
import sys
from pathlib import Path
from mergekit_bayes.merge import MergeConfig, run_merge
config = MergeConfig(models=("a.safetensors", "b.safetensors"), base="base.safetensors",
                     scale=(1.0, -0.5), out=sys.argv[1], force=True)
run_merge(config, fused=True)
print("numba" in sys.modules)
"""


def merged(folder, out, cache):
    done = subprocess.run(
        [sys.executable, "-c", MERGE, out],
        cwd=folder,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1] == "True", Path(folder, out).read_bytes()


def test_a_second_process_merges_without_numba_and_to_the_same_bytes(tmp_path):
    for i, name in enumerate(("base", "a", "b")):
        tiny.write(tmp_path / f"{name}.safetensors", tiny.arrays(i))
    cache = tmp_path / "cache"
    uses_numba, first = merged(tmp_path, "one.safetensors", cache)
    assert uses_numba
    assert list((cache / "bmerge").glob("*.code"))
    uses_numba, second = merged(tmp_path, "two.safetensors", cache)
    assert not uses_numba
    assert second == first


def test_code_of_another_version_or_with_other_bytes_is_not_run_but_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_code, "_object_code", lambda kernel, layout: kernel)
    monkeypatch.setattr(machine_code, "_loaded", lambda code, layout: code)
    old, new = machine_code.Name("f", "1"), machine_code.Name("f", "2")
    machine_code.keep(old, "d", b"one")
    assert machine_code.find(old, "d") == b"one"
    for name, layout in ((new, "d"), (old, "q"), (machine_code.Name("g", "1"), "d")):
        assert machine_code.find(name, layout) is None
    machine_code.keep(new, "d", b"two")
    assert (machine_code.find(new, "d"), machine_code.find(old, "d")) == (b"two", None)
    (file,) = (tmp_path / "bmerge").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert machine_code.find(new, "d") is None


def test_a_layout_tells_every_difference_that_code_may_depend_on():
    f32, wide = np.zeros(3, np.float32), np.zeros((2, 4), np.float32)
    arguments = [
        (f32,),
        (f32.astype(np.float64),),
        (f32.view(np.uint32),),
        (wide,),
        (f32, f32),
        ((f32, f32),),
        ((f32,), f32),
        (np.float32(1),),
        (1.0,),
        (1,),
        (np.uint64(1),),
        ((1, 2), 3),
        ((1,), (2, 3)),
    ]
    layouts = [machine_code.flatten(a)[0] for a in arguments]
    assert len(set(layouts)) == len(layouts)
    assert machine_code.flatten((np.ones(3, np.float32),))[0] == layouts[0]
    for odd in (wide[:, ::2], wide[:, :2].T, "text", None, True, np.float16(1)):
        with pytest.raises(TypeError):
            machine_code.flatten((odd,))
    locked = np.zeros(3)
    locked.flags.writeable = False
    with pytest.raises(TypeError):
        machine_code.flatten((locked,))


def test_a_constant_is_laid_out_as_its_value_is():
    numbers, array = ((1.0, np.float32(2)), (), (np.uint64(3),)), np.zeros(3)
    plain = machine_code.flatten((array, numbers, 4))
    assert machine_code.flatten((array, machine_code.Constant(numbers), 4)) == plain
    with pytest.raises(TypeError):
        machine_code.flatten((machine_code.Constant((1.0, "text")),))


def test_a_rule_that_was_made_at_run_time_is_not_kept(monkeypatch):
    kind, _, _ = case("task_arithmetic")
    assert launch._name_of("pass", kind, type(None)) is not None
    factor = np.float32(2)

    def twice(base, tasks, scales, facts):
        return kind.method.combine(base, tasks, (factor * scales[0], *scales[1:]), facts)

    made = kind._replace(method=kind.method._replace(combine=twice))
    assert launch._name_of("pass", made, type(None)) is None


def test_other_sources_numbers_of_models_and_kinds_have_other_names():
    names = [
        launch._name_of("pass", kind, type(None))
        for kind in (
            case("task_arithmetic")[0],
            case("task_arithmetic")[0]._replace(has_base=False),
            case("average")[0],
            case("gradient_matching")[0],
            case("gradient_matching", removes=True)[0],
        )
    ]
    assert len(set(names)) == len(names)


def test_every_value_that_kernels_import_is_in_their_checksum():
    """Else a number is changed in its source, and code with the old one still runs."""
    for module in sources._SHARED:
        tree = ast.parse(Path(import_module(module).__file__).read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("mergekit_bayes"):
                continue
            values = [getattr(import_module(node.module), a.name, None) for a in node.names]
            if any(isinstance(v, int | float | tuple) or callable(v) for v in values):
                assert {node.module} <= {*sources._SHARED, *TYPES_ONLY}, (module, node.module)


def test_arguments_that_no_code_is_kept_for_are_left_to_numba():
    """Views of a larger array are not contiguous: numba compiles them in their own way."""
    kind, chunk, numbers = case("task_arithmetic")
    expected = run(kind, chunk, numbers, fused=True)[0]
    wide = np.repeat(chunk.means, 2, axis=1)
    found = run(kind, chunk._replace(means=wide[:, ::2]), numbers, fused=True)[0]
    np.testing.assert_array_equal(found, expected)


def test_code_is_kept_beside_its_source_or_in_a_folder_of_this_account(tmp_path, monkeypatch):
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert code_folder(source) == source.parent / "__pycache__"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    assert code_folder(source) == tmp_path / "named" / "bmerge"
    for folder, mode in ((tmp_path / "open", 0o777), (tmp_path / "named" / "bmerge", 0o777)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        monkeypatch.setenv(
            "NUMBA_CACHE_DIR", str(folder if folder.name == "open" else folder.parent)
        )
        is_trusted.cache_clear()
        assert code_folder(source) is None  # others could put code there
    is_trusted.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert code_folder(source) is None


@pytest.mark.parametrize("home", ["", "caches"])
def test_an_account_without_a_home_gets_no_cache_where_it_works(tmp_path, monkeypatch, home):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").touch()  # nothing can be written beside a source in it
    assert code_folder(tmp_path / "package" / "module.py") is None
    assert os.listdir() == ["package"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
@pytest.mark.parametrize("name", ["cache", "cache/bmerge"])
def test_no_code_is_kept_behind_a_link_of_another_account(tmp_path, name):
    (tmp_path / "mine" / "bmerge").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    link, target = tmp_path / name, tmp_path / "mine"
    if name == "cache":
        link.rmdir()
    else:
        target = target / "bmerge"
    link.symlink_to(target)
    is_trusted.cache_clear()
    assert is_trusted(tmp_path / "cache" / "bmerge")
    os.chown(link, 12345, 12345, follow_symlinks=False)
    is_trusted.cache_clear()
    assert not is_trusted(tmp_path / "cache" / "bmerge")
    is_trusted.cache_clear()


FACTOR = 2.0


def scaled(base, tasks, scales, facts):
    return FACTOR * base


def test_a_constant_of_another_module_is_part_of_the_version(monkeypatch):
    kind = case("task_arithmetic")[0]
    made = kind._replace(method=kind.method._replace(combine=scaled))
    before = launch._name_of("pass", made, type(None))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    after = launch._name_of("pass", made, type(None))
    assert before.identity == after.identity
    assert before.version != after.version
