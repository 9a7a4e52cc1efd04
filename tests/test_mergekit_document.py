"""mergekit's YAML as checked objects: every key, and everything that is refused by its name."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit import is_mergekit, read_recipes
from mergekit_bayes.mergekit.document import read_recipe
from mergekit_bayes.mergekit.objects import Filter, Reference, TokenSource
from mergekit_bayes.mergekit.stages import in_order, references
from mergekit_bayes.mergekit.values import value_at

LINEAR = "merge_method: linear\nmodels: [{model: a}]\n"


def read(tmp_path: Path, text: str):
    file = tmp_path / "r.yml"
    file.write_text(text)
    return read_recipes(file)


def read_one(tmp_path: Path, text: str):
    (recipe,) = read(tmp_path, text)
    return recipe


def test_every_key_of_a_recipe_of_models_is_read(tmp_path):
    recipe = read_one(
        tmp_path,
        """
        name: stage
        merge_method: ties
        base_model: org/base@v1
        models:
          - model: org/a
          - model: org/b+org/lora
            parameters: {density: [1, 0.7, 0.1], weight: [{filter: mlp, value: 0.5}, {value: 0}]}
        parameters: {normalize: true, eps: 1e-8, lambda: {filter: '*', value: [0, 1]}}
        dtype: torch.float16
        out_dtype: bfloat16
        chat_template: chatml
        tokenizer:
          source: org/a
          pad_to_multiple_of: 64
          tokens:
            <|im_start|>: {source: org/b}
            <|im_end|>: {source: {kind: model_token, model: org/a, token: </s>}, force: true}
            <pad>: {source: {kind: zero}}
            <1>: {source: {kind: model_token, model: org/a, token_id: 0}}
            <2>: {}
        """,
    )
    assert (recipe.name, recipe.merge_method) == ("stage", "ties")
    assert recipe.base_model == Reference(path="org/base", revision="v1")
    first, second = recipe.models
    assert (str(first.model), str(second.model)) == ("org/a", "org/b+org/lora")
    assert (first.parameters, first.layers) == ({}, None)
    assert (first.place, second.place) == ("models[0]", "models[1]")
    filters = (Filter(filter="mlp", value=0.5), Filter(filter=None, value=0))
    assert second.parameters == {"density": (1, 0.7, 0.1), "weight": filters}
    assert recipe.parameters["normalize"] is True
    assert recipe.parameters["eps"] == "1e-8"
    assert recipe.parameters["lambda"] == (Filter(filter="*", value=(0, 1)),)
    assert (recipe.dtype, recipe.out_dtype) == ("float16", "bfloat16")
    assert recipe.chat_template == "chatml"
    tokenizer = recipe.tokenizer
    assert (tokenizer.source, str(tokenizer.model)) == ("model", "org/a")
    assert tokenizer.pad_to_multiple_of == 64
    a, b = Reference(path="org/a"), Reference(path="org/b")
    assert tokenizer.tokens == {
        "<|im_start|>": TokenSource(source="model", model=b),
        "<|im_end|>": TokenSource(source="model_token", model=a, token="</s>", force=True),
        "<pad>": TokenSource(source="zero"),
        "<1>": TokenSource(source="model_token", model=a, token_id=0),
        "<2>": TokenSource(),
    }
    assert recipe.label == str(tmp_path / "r.yml")


def test_every_key_of_a_recipe_of_slices_is_read(tmp_path):
    recipe = read_one(
        tmp_path,
        """
        merge_method: slerp
        slices:
          - sources:
              - {model: a, layer_range: [0, 4], parameters: {scale: 2}}
              - {model: b, layer_range: [2, 6]}
            parameters: {t: 0.5}
            base_model: a
          - sources: [{model: a, layer_range: ["4", 6.0]}]
        """,
    )
    first, second = recipe.slices
    assert [source.layers for source in first.sources] == [(0, 4), (2, 6)]
    assert first.sources[0].parameters == {"scale": 2}
    assert first.sources[1].place == "slices[0].sources[1]"
    assert (first.parameters, first.base_model) == ({"t": 0.5}, Reference(path="a"))
    assert (second.sources[0].layers, second.place, second.base_model) == (
        (4, 6),
        "slices[1]",
        None,
    )
    assert (recipe.models, recipe.modules, recipe.tokenizer, recipe.name) == ((), {}, None, None)


def test_the_module_of_a_whole_model_is_read_as_the_model(tmp_path):
    text = """
    merge_method: linear
    parameters: {weight: 5, normalize: false}
    modules: {default: {models: [{model: a}], parameters: {weight: 3}}}
    """
    recipe = read_one(tmp_path, text)
    assert recipe.modules == {}
    assert recipe.models[0].place == "modules.default.models[0]"
    assert recipe.parameters == {"weight": 3, "normalize": False}


@pytest.mark.parametrize(
    ("near", "far", "at"),
    [
        ("3", "5", [3, 3]),
        ("[{filter: mlp, value: 3}]", "5", [3, 5]),
        ("[{filter: mlp, value: 3}]", "[0, 5]", [3, 5]),
        ("[{filter: mlp, value: 3}]", "[{filter: norm, value: 7}, {value: 8}]", [3, 7]),
        ("[{filter: mlp, value: 3}]", "null", [3, None]),
    ],
)
def test_what_no_filter_of_a_module_matches_is_as_the_recipe_says(tmp_path, near, far, at):
    module = f"models: [{{model: a}}], parameters: {{weight: {near}}}"
    text = f"merge_method: linear\nmodules: {{default: {{{module}}}}}\n"
    if far != "null":
        text += f"parameters: {{weight: {far}}}\n"
    weight = read_one(tmp_path, text).parameters["weight"]
    assert [value_at(weight, name, 1) for name in ("mlp", "norm")] == at


@pytest.mark.parametrize("template", ["auto", "chatml", "{{ bos_token }}{% if x %}{% endif %}"])
def test_templates_and_names_of_templates_are_read(tmp_path, template):
    assert read_one(tmp_path, f"{LINEAR}chat_template: '{template}'").chat_template == template


def test_other_modules_are_kept_by_name(tmp_path):
    text = """
    merge_method: linear
    modules:
      encoder: {models: [{model: a}]}
      decoder: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}
    """
    modules = read_one(tmp_path, text).modules
    assert list(modules) == ["encoder", "decoder"]
    assert modules["encoder"].models[0].place == "modules.encoder.models[0]"
    assert modules["decoder"].slices[0].sources[0].layers == (0, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", None, None, None)),
        ("org/a@main", ("org/a", "main", None, None)),
        ("a+b", ("a", None, "b", None)),
        ("a@r+b@s", ("a", "r", "b", "s")),
        ("{model: a, lora: b}", ("a", None, "b", None)),
        ("{model: a, lora: null}", ("a", None, None, None)),
        ("{model: {path: a, revision: r}, lora: {path: b, revision: s}}", ("a", "r", "b", "s")),
        ("{model: {path: a+b@c}}", ("a+b@c", None, None, None)),
        ("C:\\models\\a", ("C:\\models\\a", None, None, None)),
    ],
)
def test_models_are_referred_to_in_each_of_mergekits_ways(tmp_path, text, expected):
    recipe = read_one(tmp_path, f"merge_method: linear\nmodels:\n- model: {text}\n")
    model = recipe.models[0].model
    assert (model.path, model.revision, model.adapter, model.adapter_revision) == expected
    if not text.startswith("{"):
        assert str(model) == text


@pytest.mark.parametrize(
    "text", ["a+b+c", "a@r@s", "'+b'", "'@r'", "a+", "a@", "''", "' '", "5", "[a]", "{path: a}"]
)
def test_what_refers_to_no_model_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"r.yml: models\[0\].model"):
        read(tmp_path, f"merge_method: linear\nmodels:\n- model: {text}\n")


@pytest.mark.parametrize(
    ("key", "source", "model"),
    [
        ("tokenizer_source: union", "union", None),
        ("tokenizer_source: base", "base", None),
        ("tokenizer_source: org/a", "model", "org/a"),
        ("tokenizer_source: 'model:org/a'", "model", "org/a"),
        ("tokenizer: {}", "union", None),
        ("tokenizer: {source: {model: {path: a}}}", "model", "a"),
    ],
)
def test_the_source_of_the_tokenizer_is_read(tmp_path, key, source, model):
    tokenizer = read_one(tmp_path, LINEAR + key).tokenizer
    assert tokenizer.source == source
    assert (tokenizer.model and str(tokenizer.model)) == model


def test_null_is_as_if_the_key_were_not_there(tmp_path):
    keys = ("base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
    text = "".join(f"{key}: null\n" for key in (*keys, "chat_template", "name", "slices"))
    assert read_one(tmp_path, LINEAR + text) == read_one(tmp_path, LINEAR)


def test_several_documents_are_several_recipes(tmp_path):
    text = f"name: one\n{LINEAR}---\n{LINEAR.replace('a', 'one')}---\n"
    one, last = read(tmp_path, text)
    assert (one.name, last.name) == ("one", None)
    assert last.label.endswith("r.yml, document 2")
    with pytest.raises(ConfigError, match="document 2: name: document 1 is already called 'one'"):
        read(tmp_path, f"name: one\n{LINEAR}---\nname: one\n{LINEAR}")
    with pytest.raises(ConfigError, match="documents 1 and 3 have no 'name'"):
        read(tmp_path, f"{LINEAR}---\nname: one\n{LINEAR}---\n{LINEAR}")
    with pytest.raises(ConfigError, match="document 2: models"):
        read(tmp_path, f"{LINEAR}---\nmerge_method: linear\nmodels: [a]\n")


def stage(name, *models, **keys):
    content = {"merge_method": "x", "models": [{"model": m} for m in models], "name": name, **keys}
    return read_recipe(content, "r.yml")


def test_stages_come_before_those_that_need_them():
    last = stage(None, "b+c", tokenizer={"tokens": {"x": {"source": "d"}}})
    a, b = stage("a", "org/x"), stage("b", "a", base_model="a@main")
    c, d = stage("c", "org/y@c"), stage("d", "b", "org/z")
    assert [recipe.name for recipe in in_order([last, d, c, b, a])] == ["c", "a", "b", "d", None]
    assert in_order([a, c]) == (a, c)
    assert in_order([last]) == (last,)


def test_stages_in_a_circle_are_refused():
    for circle in ([stage("a", "b"), stage("b", "a")], [stage("a", "org/x", "a")]):
        with pytest.raises(ConfigError, match=r"r.yml: .*'a'.* are needed to make each"):
            in_order([stage("c", "org/x"), *circle, stage(None, "a")])


def test_every_model_that_a_recipe_names_is_a_reference():
    piece = {"sources": [{"model": "a", "layer_range": [0, 1]}], "base_model": "b"}
    content = {
        "merge_method": "x",
        "modules": {"m": {"slices": [piece]}, "n": {"models": [{"model": "c"}]}},
        "base_model": "d",
        "tokenizer": {"source": "e", "tokens": {"t": {"source": "f"}, "u": {}}},
    }
    assert sorted(map(str, references(read_recipe(content, "r")))) == list("abcdef")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"merge_method": "ties"}, True),
        ([{"a": 1}, {"merge_method": "ties"}], True),
        ({"method": "ties"}, False),
        ([], False),
        (None, False),
        ("merge_method", False),
    ],
)
def test_recipes_of_mergekit_are_recognised(content, expected):
    assert is_mergekit(content) is expected


SLICE = "merge_method: slerp\nslices:\n- sources:\n"
SOURCE = "  - {model: a, layer_range: [0, 2]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_metod: linear\n", r"merge_metod: unknown key; did you mean 'merge_method'\?"),
        (LINEAR + "base: b", "base: unknown key"),
        (LINEAR + "out_path: x", "out_path: unknown key; `name` names a merge"),
        (LINEAR + "weight: 1", "weight: unknown key here; it belongs under 'parameters'"),
        (LINEAR + "zzz: 1", "zzz: unknown key; possible are base_model, chat_template, dtype"),
        (LINEAR + "input_model_parameters: {a: {weight: 7}}", "input_model_parameters: unknown"),
        (LINEAR + "align_weights: zipit", "align_weights: unknown key"),
        (LINEAR + "pruning_order: [a]", "pruning_order: unknown key"),
        ("models: [{model: a}]", "merge_method: is required"),
        ("merge_method: null\nmodels: [{model: a}]", "merge_method: expected a value, found noth"),
        ("merge_method: [x]\nmodels: [{model: a}]", "merge_method: expected text, found a list"),
        ("merge_method: ''\nmodels: [{model: a}]", "merge_method: expected text, found none"),
        ("metric_method: all\nmodels: [{model: a}]", "metric_method: unknown key"),
        ("merge_method: x", "expected one of 'models', 'slices' and 'modules', found none"),
        (LINEAR + "slices: [{sources: []}]", "found 'models' and 'slices'"),
        ("merge_method: x\nmodels: []", "found none of them"),
        ("merge_method: x\nmodels: {model: a}", "models: expected a list, found keys and values"),
        ("merge_method: x\nmodels: [a]", r"models\[0\]: expected keys and values, found 'a'"),
        ("merge_method: x\nmodels: [{}]", r"models\[0\].model: is required"),
        (
            "merge_method: x\nmodels: [{model: a, lora: b}]",
            r"models\[0\].lora: unknown key; write `model: MODEL\+ADAPTER`",
        ),
        ("merge_method: x\nmodels: [{model: a, weight: 1}]", r"models\[0\].weight: .*'parameters'"),
        (
            "merge_method: x\nmodels: [{model: a, layer_range: [0, 1]}]",
            r"models\[0\].layer_range: unknown key",
        ),
        (
            "merge_method: x\nmodels: [{model: {model: a, override_architecture: X}}]",
            r"models\[0\].model.override_architecture: unknown key; tensors are paired",
        ),
        (
            SLICE + SOURCE + "  - {model: b, layer_range: [0, 2], paramters: {}}",
            r"slices\[0\].sources\[1\].paramters: unknown key; did you mean 'parameters'\?",
        ),
        (SLICE + "  - {model: a}", r"slices\[0\].sources\[0\].layer_range: is required"),
        (SLICE + SOURCE + "  residual: 1", r"slices\[0\].residual: unknown key"),
        (
            "merge_method: x\nslices: [{sources: []}]",
            r"slices\[0\].sources: expected at least one value",
        ),
        (
            SLICE + SOURCE + "  - {model: b, layer_range: [0, 3]}",
            r"slices\[0\]: expected 2 layers .* found 3 in slices\[0\].sources\[1\].layer_range",
        ),
        ("merge_method: x\nmodules: [a]", "modules: expected keys and values, found a list"),
        ("merge_method: x\nmodules: {a: {}}", "modules.a: expected one of 'models' and 'slices'"),
        (
            "merge_method: x\nmodules: {a-b: {models: [{model: a}], base_model: c}}",
            r"modules\['a-b'\].base_model: unknown key",
        ),
        (LINEAR + "parameters: []", "parameters: expected keys and values, found a list"),
        (LINEAR + "parameters: {1: 2}", "parameters: expected text as a key, found 1"),
        (LINEAR + "parameters: {on: 2}", "parameters: expected text as a key, found True"),
        (LINEAR + "1: 2", "r.yml: expected text as a key, found 1"),
        (LINEAR + "parameters: {w: null}", r"parameters.w: expected a number, found nothing"),
        (LINEAR + "parameters: {w: .nan}", "parameters.w: expected a finite number, found nan"),
        (LINEAR + "parameters: {w: [1, .inf]}", r"parameters.w\[1\]: expected a finite number"),
        (LINEAR + "parameters: {w: 2020-01-01}", "parameters.w: expected a number, found a value"),
        (LINEAR + "parameters: {w: []}", "parameters.w: expected at least one value, found none"),
        (LINEAR + "parameters: {w: [[1]]}", r"parameters.w\[0\]: expected a number, found a list"),
        (LINEAR + "parameters: {w: {a: 1}}", "parameters.w.a: unknown key"),
        (LINEAR + "parameters: {w: [{filter: m}]}", r"parameters.w\[0\].value: is required"),
        (
            LINEAR + "parameters: {w: [{pattern: m, value: 1}]}",
            r"parameters.w\[0\].pattern: unknown key; did you mean 'filter'",
        ),
        (LINEAR + "parameters: {w: [{filter: 5, value: 1}]}", r"w\[0\].filter: expected text"),
        (LINEAR + "parameters: {w: [{value: 1, x: 1}]}", r"w\[0\].x: unknown key"),
        (LINEAR + "parameters: {w: [1, {value: 1}]}", r"w\[0\]: expected keys and values, found 1"),
        (LINEAR + "parameters: {w: [{value: [{value: 1}]}]}", r"w\[0\].value: .*do not nest"),
        (LINEAR + "parameters: {w: [{value: {value: 1}}]}", r"w\[0\].value: .*do not nest"),
        (LINEAR + "dtype: bf16", "dtype: expected one of float32, .* found 'bf16'"),
        (LINEAR + "dtype: 16", "dtype: expected text, found 16"),
        (LINEAR + "out_dtype: auto", "out_dtype: expected one of"),
        (LINEAR + "name: 5", "name: expected text, found 5"),
        (LINEAR + "chat_template: {a: b}", "chat_template: expected text, found keys and values"),
        (LINEAR + "chat_template: chatlm", "chat_template: .* found 'chatlm'. Did you .*'chatml'"),
        (
            LINEAR + "chat_template: x",
            "chat_template: expected the text of a template, or auto or chatml",
        ),
        (LINEAR + "tokenizer: union", "tokenizer: expected keys and values, found 'union'"),
        (LINEAR + "tokenizer: {sorce: base}", "tokenizer.sorce: unknown key; did you mean 'source"),
        (LINEAR + "tokenizer: {}\ntokenizer_source: base", "tokenizer_source: 'tokenizer' says"),
        (LINEAR + "tokenizer_source: 5", "tokenizer_source: expected text, found 5"),
        (
            LINEAR + "tokenizer: {pad_to_multiple_of: 0}",
            "of: expected a whole number of at least 1",
        ),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 2.5}", "pad_to_multiple_of: expected a whole"),
        (LINEAR + "tokenizer: {tokens: {x: null}}", "tokenizer.tokens.x: expected keys and values"),
        (LINEAR + "tokenizer: {tokens: {1: {}}}", "tokenizer.tokens: expected text as a key"),
        (LINEAR + "tokenizer: {tokens: {<x>: {forced: true}}}", r"\['<x>'\].forced: unknown key"),
        (LINEAR + "tokenizer: {tokens: {x: {force: 1}}}", "x.force: expected true or false"),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: one}}}}",
            "x.source.kind: expected 'zero' or 'model_token', found 'one'",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}",
            "x.source.model: unknown key",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "x.source: expected one of 'token' and 'token_id'",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, token: a}}}}",
            "x.source.model: is required",
        ),
        ("genome: {models: [a]}\ntasks: []", "genome: unknown key"),
        ("- merge_method: x", "expected keys and values, found list"),
        ("", "expected keys and values, found nothing"),
        ("merge_method: x\nmerge_method: y", "is not YAML .*twice"),
        ("a: [", "is not YAML"),
        ("a: &a [*a]", "contains itself"),
        ("a: " + "[" * 200 + "]" * 200, "nested too deeply"),
        ("a: " + "{value: [" * 1000, "is not YAML .*(nested too deeply|nesting depth)"),
        ("a: [" + "0," * 200_001 + "]", "it stands for more than 200,000 values"),
        ("---\nmerge_method: x\n" * 120_000, "1,048,576"),
        ("---\na: " + "[0]\n---\nb: " * 60_000, "stands for more than 200,000 values"),
        ("a: !!python/object/apply:os.system [x]", "is not YAML"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        read(tmp_path, text)
    assert "r.yml" in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    ["3", "[0]", "[0, 1, 2]", "[3, 3]", "[4, 2]", "[-2, 3]", "[0, 2.5]", "[true, 3]", "[0, x]"],
)
def test_ranges_that_are_none_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"slices\[0\].sources\[0\].layer_range"):
        read(tmp_path, f"{SLICE}  - {{model: a, layer_range: {text}}}\n")


def test_a_message_is_short_whatever_the_key(tmp_path):
    text = f"{LINEAR}parameters:\n  ? {'q' * 10_000}\n  : null\n? {'z' * 10_000}\n: 1\n"
    with pytest.raises(ConfigError, match="unknown key") as refusal:
        read(tmp_path, text)
    assert len(str(refusal.value)) < 600
    with pytest.raises(ConfigError, match="expected a number, found nothing") as refusal:
        read(tmp_path, text[: text.index("? z")])
    assert len(str(refusal.value)) < 600


def test_a_file_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipes(tmp_path / "none.yml")


def test_a_recipe_with_many_values_is_read(tmp_path):
    gradient = ", ".join(["0.5"] * 20_000)
    recipe = read_one(tmp_path, f"{LINEAR}parameters: {{weight: [{gradient}]}}")
    assert len(recipe.parameters["weight"]) == 20_000


_KEYS = st.sampled_from(
    [
        *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
        *("name", "tokenizer", "tokenizer_source", "sources", "model", "layer_range", "lora"),
        *("filter", "value", "tokens", "source", "kind", "path", "weight", "default"),
    ]
)
_LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from("ab+@")
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | _LEAVES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.dictionaries(_KEYS, _TREES, max_size=5))
def test_any_content_is_a_recipe_or_a_config_error(content):
    recipe = None
    message = "r: "
    try:
        recipe = read_recipe({"merge_method": "linear", "models": [{"model": "a"}]} | content, "r")
    except ConfigError as error:
        message = str(error)
    assert message.startswith("r: ")
    assert not recipe or sum(map(bool, (recipe.models, recipe.slices, recipe.modules))) == 1


# Recipes in the shapes of those in mergekit's repository, and whether they can be read.
_SHAPES = {
    "gradients": (
        """
        models:
        - {model: org/a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
        - {model: org/b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
        - model: org/c
          parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
        merge_method: ties
        base_model: org/base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
        None,
    ),
    "layers": (
        """
        slices:
        - sources: [{model: org/a, layer_range: [0, 24]}]
        - sources: [{model: org/b, layer_range: [20, 40]}]
        merge_method: passthrough
        dtype: float16
        """,
        None,
    ),
    "slerp": (
        """
        slices:
        - sources: [{model: org/a, layer_range: [0, 40]}, {model: org/b, layer_range: [0, 40]}]
        merge_method: slerp
        base_model: org/a
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - value: 0.5 # for the others
        dtype: float16
        """,
        None,
    ),
    "no parameters": ("merge_method: arcee_fusion\nmodels: [{model: a}]\nparameters:\n", None),
    "stages by path": (LINEAR + "out_path: ./a\n---\n" + LINEAR, "document 1: out_path"),
    "search": ("genome: {models: [a], merge_method: dare_ties}\n", "genome"),
    "metrics": ("models: [{model: a}]\nmetric_method: all\n", "metric_method"),
    "keys of a method": (LINEAR + "default_n_val: 8\n", "default_n_val"),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_recipes_in_the_field_are_read_or_refused_by_a_key(tmp_path, shape):
    text, key = _SHAPES[shape]
    assert list(yaml.safe_load_all(text))
    if key is None:
        read_one(tmp_path, text)
    else:
        with pytest.raises(ConfigError, match=key):
            read(tmp_path, text)
