"""The wheel holds the whole package, installs, and runs."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where each package of the wheel lies in the tree.
FOLDERS = {"mergekit_bayes": "mergekit_bayes", "bmerge_cli": "cli/bmerge_cli"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made from a copy of the tree, so that the build leaves nothing behind in it."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mergekit_bayes", "cli"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    output = tmp_path_factory.mktemp("wheels")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", "-q", *options, "-w", output, source])
    (path,) = output.glob("mergekit_bayes-*.whl")
    return path


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_of_the_tree_and_no_other(wheel):
    modules = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names_in(wheel) if name.endswith(".py")} == modules


def test_the_wheel_holds_the_marker_of_types_the_panel_and_the_licence(wheel):
    names = names_in(wheel)
    assert "mergekit_bayes/py.typed" in names
    assert "mergekit_bayes/evaluate/built_in_panels/toxicity.yaml" in names
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "bmerge = bmerge_cli.entry:main" in archive.read(name).decode()


@pytest.mark.slow
def test_the_wheel_runs_in_a_fresh_environment(wheel, tmp_path):
    """The environment has the wheel of its own and sees this environment's libraries behind it."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    folders = {"base": tmp_path / "venv", "platbase": tmp_path / "venv"}
    packages = Path(sysconfig.get_path("purelib", "venv", folders))
    scripts = Path(sysconfig.get_path("scripts", "venv", folders))
    python = scripts / Path(sys.executable).name
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", f"--python={python}", "install", "-q", *options, wheel])
    # addsitedir would process the .pth of an editable install, which would win over the wheel.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import mergekit_bayes, bmerge_cli; print(mergekit_bayes.__file__, bmerge_cli.__file__)"
    clean = [python, "-I", "-c", code]
    assert run(clean).count(str(packages)) == 2
    command = scripts / "bmerge"
    version = run([python, "-I", command, "--version"])
    assert version.strip().endswith(wheel.name.split("-")[1])
    assert "precision_average" in run([python, "-I", command, "methods"])
