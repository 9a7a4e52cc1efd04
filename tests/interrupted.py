"""Small inputs of merges that are stopped, and ways to stop one."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.merge import MergeConfig, run_merge, work
from tests import tiny

SHAPES = {f"h.{i}.weight": (40, 13 + i) for i in range(8)} | {
    "wte.weight": (300, 7),
    "empty": (0, 3),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for i, name in enumerate(("base", "a", "b")):
        tiny.posterior(
            folder / f"{name}.safetensors", tiny.arrays(i, SHAPES), tiny.precisions(i, SHAPES)
        )
    return folder


def config(inputs, **settings):
    models = tuple(str(inputs / f"{n}.safetensors") for n in "ab")
    return MergeConfig(
        models=models, base=str(inputs / "base.safetensors"), weights="precision", **settings
    )


def contents(folder="."):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def interrupt(monkeypatch, settings, after, **options):
    """Merge, and be stopped after some units."""
    real, left = work.Worker.run, [after]

    def run(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work.Worker, "run", run)
        with pytest.raises(KeyboardInterrupt):
            run_merge(settings, threads=1, **options)


def units_done(monkeypatch, settings):
    """The units that a merge does."""
    done = []
    real = work.Worker.run
    with monkeypatch.context() as patch:
        patch.setattr(
            work.Worker,
            "run",
            lambda self, unit, *rest: done.append(unit.id) or real(self, unit, *rest),
        )
        run_merge(settings)
    return done


def spoiled(inputs, folder):
    """The same merge with a model that cannot be merged."""
    tiny.write(
        folder / "bad.safetensors", {n: np.full(s, np.nan, np.float32) for n, s in SHAPES.items()}
    )
    return MergeConfig(
        models=(str(folder / "bad.safetensors"),), base=str(inputs / "base.safetensors"), out="out"
    )


def line(inputs, out):
    a, b, base = (str(inputs / f"{n}.safetensors") for n in ("a", "b", "base"))
    return ["merge", a, b, "--base", base, "--weights", "precision", "-o", out]
