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
        experts = branches(rng, 1) if rng.random() < 0.4 else {}
        layers = rng.randint(1, 3)
        number_of_experts = rng.choice((layers, 2))
        for number in range(layers):
            for name, shape in layer.items():
                shapes[f"{tower}.layers.{number}.{name}"] = shape
            for expert in range(number_of_experts):
                for name, shape in experts.items():
                    shapes[f"{tower}.layers.{number}.experts.{expert}.{name}"] = shape
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
        kind = rng.choice(("prefix", "tower", "move", "word", "wrapper", "norm", "swap"))
        word, new = rng.choice([w for n in truth.values() for w in n.split(".")[:-1]]), next(FRESH)
        first = rng.choice([n.split(".")[0] for n in truth.values()])
        for name, now in truth.items():
            parts = now.split(".")
            if kind == "prefix" or (kind == "tower" and parts[0] == first):
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
            elif kind == "swap" and sum(map(str.isdecimal, parts)) == 2:
                # A list of lists: each number keeps its word, and the two change places.
                i, j = (at for at, part in enumerate(parts) if part.isdecimal())
                if j > i + 1:
                    numbered = [*parts[j - 1 : j + 1], *parts[i + 1 : j - 1], *parts[i - 1 : i + 1]]
                    parts = [*parts[: i - 1], *numbered, *parts[j + 1 :]]
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
    for seed in range(70):
        donor, other, truth = trial(seed)
        names = find_renaming(donor, other, scope=scope).names
        wrong = {n: (new, truth[n]) for n, new in names.items() if truth[n] != new}
        assert not wrong, (seed, wrong)
        whole += all(names.get(n, n) == new for n, new in truth.items())
    assert whole >= (25, 35, 42)[scope]


def lists(*words, counts=(3, 3)):
    """Names of a list in a list: layers of experts, with the words before their numbers."""
    names = {(i, j): "" for i in range(counts[0]) for j in range(counts[1])}
    return {words[0].format(l=i, e=j): (i, j) for i, j in names}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("between", ["", "mlp."])
@pytest.mark.parametrize("counts", [(3, 3), (4, 2), (2, 4)])
@pytest.mark.parametrize("scope", list(Scope))
def test_numbers_that_change_places_follow_their_words(prefix, between, counts, scope):
    one = lists("layers.{l}." + between + "experts.{e}.w.weight", counts=counts)
    two = lists(prefix + "experts.{e}." + between + "layers.{l}.w.weight", counts=counts)
    for donor, other in ((one, two), (two, one)):
        names = find_renaming(square(*donor), square(*other), scope=scope).names
        assert len(names) == len(other)
        assert all(donor[new] == other[name] for name, new in names.items())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        # None or one of the words that numbers belong to is left.
        ("layers.{l}.experts.{e}.w.weight", "b.{e}.a.{l}.w.weight"),
        ("layers.{l}.experts.{e}.w.weight", "expert.{e}.layers.{l}.w.weight"),
        ("layers.{l}.experts.{e}.w.weight", "experts.{e}.layer.{l}.w.weight"),
        # Numbers without a word of their own.
        ("layers.{l}.experts.{e}.w.weight", "experts.layers.{e}.{l}.w.weight"),
        ("layers.{l}.experts.{e}.w.weight", "layers.experts.{e}.{l}.w.weight"),
        # The same word before both: has the first word moved, or the whole part?
        ("a.layers.{l}.b.layers.{e}.w.weight", "b.layers.{e}.a.layers.{l}.w.weight"),
    ],
)
def test_numbers_that_may_have_changed_places_are_not_paired_and_both_are_named(one, two):
    """Positions would pair every layer with another expert of the same shape."""
    one, two = lists(one), lists(two)
    for donor, other in ((one, two), (two, one)):
        for scope in Scope:
            renaming = find_renaming(square(*donor), square(*other), scope=scope)
            assert all(donor[new] == other[name] for name, new in renaming.names.items())
            for rivals in renaming.ambiguous.values():
                assert len(rivals) > 1


def test_numbers_without_their_words_are_paired_where_no_other_order_fits():
    one = lists("layers.{l}.experts.{e}.a.weight", counts=(4, 2))
    one |= lists("layers.{l}.experts.{e}.b.weight", counts=(4, 2))
    two = {n.replace("layers", "block").replace("experts", "e"): where for n, where in one.items()}
    names = find_renaming(square(*one), square(*two), scope=Scope.REPLACED).names
    assert len(names) == len(two)
    assert all(one[new] == two[name] for name, new in names.items())


def test_lost_tensors_do_not_turn_a_renaming_into_another_one():
    """Where each tensor is missing with probability 0.3, which no model is, one in 100 is wrong."""
    wrong = 0
    for seed in range(120):
        donor, other, truth = trial(seed, lose=0.3)
        names = find_renaming(donor, other, scope=Scope.NESTED).names
        wrong += any(truth[n] != new for n, new in names.items())
    assert wrong <= 1


OLD = square(
    *(f"language_model.model.layers.{i}.self_attn.{p}.weight" for i in range(2) for p in "qkv"),
    *(f"vision_tower.encoder.layers.{i}.mlp.{p}.weight" for i in range(2) for p in ("fc1", "fc2")),
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    "multi_modal_projector.linear.weight",
)


def new_name(name):
    """What transformers has called it since 4.52."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "lm_head.weight" if "lm_head" in name else f"model.{name}"


def test_old_and_new_names_of_vision_language_models_are_paired_and_the_changes_counted():
    new = {new_name(name): spec for name, spec in OLD.items()}
    renaming = find_renaming(new, OLD)
    assert dict(renaming.names) == {name: new_name(name) for name in OLD}
    assert renaming.changes == (
        NameChange("language_model.model.*", "model.language_model.*", 8),
        NameChange("*", "model.*", 5),
        NameChange("language_model.*", "*", 1),
    )
    assert renaming.describe().startswith("language_model.model.* -> model.language_model.* (8), ")
    back = find_renaming(OLD, new)
    assert dict(back.names) == {new: old for old, new in renaming.names.items()}


def test_gamma_and_beta_are_weight_and_bias_and_never_the_other_way():
    hub = square(
        "e.LayerNorm.gamma", "e.LayerNorm.beta", "l.0.n.gamma", "l.0.n.beta", "l.0.q.weight"
    )
    changed = {n.replace("gamma", "weight").replace("beta", "bias"): s for n, s in hub.items()}
    for donor, other in ((hub, changed), (changed, hub)):
        renaming = find_renaming(donor, other, scope=Scope.MOVED)
        truth = dict(zip(other, donor, strict=True))
        assert dict(renaming.names) == {n: new for n, new in truth.items() if n != new}
    assert NameChange("LayerNorm.gamma", "LayerNorm.weight", 1) in renaming.changes


@pytest.mark.parametrize(
    ("donor", "other"),
    [
        # One of three projections of one shape: which is the first?
        (("l.0.a.q.weight", "l.0.a.k.weight"), ("l.0.a.one.weight", "l.0.a.two.weight")),
        # Another place of the norm is another architecture.
        (("l.0.pre_norm.weight", "l.0.q.weight"), ("l.0.post_norm.weight", "l.0.q.weight")),
        # Another head of the same shape is another task.
        (("score.weight", "h.0.w"), ("qa_outputs.weight", "h.0.w")),
        # Two twins, told apart by their names only.
        (
            ("one.a.weight", "one.b.weight", "two.a.weight", "two.b.weight"),
            ("x.a.weight", "x.b.weight", "y.a.weight", "y.b.weight"),
        ),
        # Layers have numbers, and are not moved.
        (("h.0.w.weight", "h.1.w.weight"), ("h.2.w.weight", "h.3.w.weight")),
        # Words of which nothing is left.
        (("bert.layer.0.q.weight", "bert.emb.weight"), ("x.y.0.z.weight", "u.v.weight")),
    ],
)
def test_what_may_be_two_things_is_not_renamed(donor, other):
    for scope in Scope:
        assert not find_renaming(square(*donor), square(*other), scope=scope).names


def test_words_are_replaced_only_for_whole_models_and_only_if_nothing_is_left_of_both():
    bert, electra = (
        square(*(f"{m}.layer.{i}.{p}.weight" for i in range(3) for p in ("q", "k", "out.dense")))
        for m in ("bert", "electra")
    )
    assert len(find_renaming(bert, electra, scope=Scope.REPLACED).names) == len(bert)
    for scope in (Scope.MOVED, Scope.NESTED):
        assert not find_renaming(bert, electra, scope=scope).names
    longer, wider = specs({"bert.emb.weight": (9, 4)}), specs({"electra.emb.weight": (9, 5)})
    assert not find_renaming(bert | longer, electra | wider, scope=Scope.REPLACED).names


def test_a_part_that_fits_two_towers_is_ambiguous_and_says_so():
    base = square(
        *(f"model.{t}.layers.0.attn.{p}.weight" for t in ("text", "vision") for p in "qv")
    )
    renaming = find_renaming(base, square("layers.0.attn.q.weight", "layers.0.attn.v.weight"))
    assert not renaming.names
    assert renaming.ambiguous["layers.0.attn.q.weight"] == (
        "model.text.layers.0.attn.q.weight",
        "model.vision.layers.0.attn.q.weight",
    )
    # Another number of layers, or another shape, tells which one it is.
    longer = base | square(*(f"model.text.layers.1.attn.{p}.weight" for p in "qv"))
    part = square(*(f"layers.{i}.attn.{p}.weight" for i in range(2) for p in "qv"))
    assert (
        find_renaming(longer, part)("layers.1.attn.q.weight") == "model.text.layers.1.attn.q.weight"
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6])
def test_a_part_is_of_the_only_tower_that_has_all_of_its_layers(layers):
    """Adapters of language models name no tower, and vision towers are often less deep."""
    base = square(
        *(f"model.vision.layers.{i}.attn.{p}.weight" for i in range(2) for p in "qv"),
        *(f"model.text.layers.{i}.attn.{p}.weight" for i in range(4) for p in "qv"),
    )
    part = square(*(f"model.layers.{i}.attn.{p}.weight" for i in range(layers) for p in "qv"))
    renaming = find_renaming(base, part)
    if layers in (3, 4):
        assert dict(renaming.names) == {name: name.replace("model", "model.text") for name in part}
    else:  # both towers have them all, or none has
        assert not renaming.names
        assert renaming.ambiguous


def test_vocabularies_of_another_length_are_paired_and_other_shapes_left_to_the_comparison():
    donor = specs({"wte.weight": (7, 4), "h.0.w.weight": (4, 4), "h.0.v.weight": (4, 4)})
    other = specs({"t.wte.weight": (9, 4), "t.h.0.w.weight": (4, 4), "t.h.0.v.weight": (3, 4)})
    assert set(find_renaming(donor, other).names.values()) == set(donor)


def test_ten_thousand_names_take_less_than_a_second():
    modules = [f"part{i}.sub{j}.proj{k}" for i in range(5) for j in range(5) for k in range(4)]
    old = square(*(f"encoder.layer.{i}.{m}.weight" for i in range(100) for m in modules))
    new = {n.replace("encoder.layer", "layers").replace("sub1", "x"): s for n, s in old.items()}
    flat = square(*(f"m{i}.weight" for i in range(3_000)))
    for donor, other, scope in (
        (new, old, Scope.REPLACED),
        (square(*(f"z{n}" for n in flat)), flat, Scope.REPLACED),
    ):
        taken = []
        for _ in range(3):  # garbage of other tests may be collected meanwhile
            start = time.process_time()
            names = find_renaming(donor, other, scope=scope).names
            taken.append(time.process_time() - start)
            assert len(names) == (10_000 if other is old else 0)
        assert min(taken) < 1, taken
