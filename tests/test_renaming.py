"""Rules by which two checkpoints name one model: found or refused, and never wrong."""

import random
import time

import pytest

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import NameChange, find_renaming
from mergekit_bayes.checkpoint.specs import TensorSpec

FRESH = iter(f"word{i}" for i in range(10**9))  # words that no other name has
MODULES = ("attn", "mlp", "norm", "query", "key", "fc", "proj", "embed", "dense", "gate")
TOWERS = ("text", "vision", "audio", "encoder", "decoder")


def specs(shapes):
    return {name: TensorSpec("F32", tuple(shape)) for name, shape in shapes.items()}


def square(*names):
    return specs(dict.fromkeys(names, (4, 4)))


def model(rng):
    """A random model of one to three towers with layers, and something outside of them."""
    shapes = {}
    towers = rng.sample(TOWERS, rng.randint(1, 3))
    layer = branches(rng, 2)
    for tower in towers:
        if rng.random() < 0.5:  # else as in the tower before: the hardest case
            layer = branches(rng, 2)
        for number in range(rng.randint(1, 3)):
            for name, shape in layer.items():
                shapes[f"{tower}.layers.{number}.{name}"] = shape
        for name, shape in branches(rng, 1).items():
            shapes[f"{tower}.{name}"] = shape
    for name, shape in branches(rng, 1).items():
        shapes[name] = shape
    return specs(shapes)


def branches(rng, depth):
    """Modules with their parameters, one in another."""
    shapes = {}
    for module in rng.sample(MODULES, rng.randint(1, 4)):
        if depth > 1 and rng.random() < 0.6:
            inner = branches(rng, depth - 1)
        elif rng.random() < 0.3:
            inner = {"weight": (rng.choice((2, 4)),), "bias": (rng.choice((2, 4)),)}
        else:
            inner = {"weight": (rng.choice((2, 4)), 4)}
        shapes |= {f"{module}.{name}": shape for name, shape in inner.items()}
    return shapes


def rename(rng, names):
    """A random systematic renaming: the new name of each name."""
    truth = {name: name for name in names}
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(("prefix", "tower", "move", "word", "wrapper", "norm"))
        word, new = rng.choice([w for n in truth.values() for w in n.split(".")[:-1]]), next(FRESH)
        first = rng.choice([n.split(".")[0] for n in truth.values()])
        for name, now in truth.items():
            parts = now.split(".")
            if kind == "prefix":
                parts = [new, *parts]
            elif kind == "tower" and parts[0] == first:
                parts = [new, *parts]
            elif kind == "move" and parts[0] == first and len(parts) > 2:
                parts = [parts[1], parts[0], *parts[2:]]
            elif kind == "word" and not word.isdecimal():
                parts = [new if p == word else p for p in parts]
            elif kind == "wrapper" and word in parts[:-1] and not word.isdecimal():
                at = parts.index(word)
                parts = [*parts[:at], new, *parts[at:]]
            elif kind == "norm" and "norm" in parts and parts[-1] in ("weight", "bias"):
                parts[-1] = {"weight": "gamma", "bias": "beta"}[parts[-1]]
            truth[name] = ".".join(parts)
    return truth


def trial(seed, lose=0.0):
    """A model and the same under other names, in one or the other role; some names are lost."""
    rng = random.Random(seed)
    one = model(rng)
    truth = rename(rng, one)
    changed = {new for old, new in truth.items() if new != old}
    if len(set(truth.values())) < len(truth) or changed & set(one):
        return trial(seed + 10**6, lose)  # a name would stand for two tensors
    two = {truth[name]: spec for name, spec in one.items()}
    if rng.random() < 0.5:
        one, two, truth = two, one, {new: old for old, new in truth.items()}
    donor, other = (
        {name: spec for name, spec in side.items() if rng.random() >= lose} for side in (two, one)
    )
    return donor, other, truth


@pytest.mark.parametrize("scope", list(Scope))
def test_a_systematic_renaming_is_found_or_refused_and_never_wrong(scope):
    whole = 0
    for seed in range(150):
        donor, other, truth = trial(seed)
        names = find_renaming(donor, other, scope=scope).names
        wrong = {n: (new, truth[n]) for n, new in names.items() if truth[n] != new}
        assert not wrong, (seed, wrong)
        whole += all(names.get(n, n) == new for n, new in truth.items())
    assert whole > (30, 60, 75)[scope]
