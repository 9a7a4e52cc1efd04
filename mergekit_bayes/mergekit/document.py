"""mergekit's YAML as checked objects: one recipe for each document of a file.

The reference is what mergekit 0.1.5 documents and does. Where it ignores a key that it does not
know, and a setting that its method does not have, here every key is understood or is an error that
names it.

Source: https://github.com/arcee-ai/mergekit, README.md, docs/merge_methods.md, docs/multimerge.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.configs import read_yaml_documents
from mergekit_bayes.errors import ConfigError, did_you_mean, shown
from mergekit_bayes.mergekit.objects import (
    Filter,
    Module,
    Recipe,
    Reference,
    Setting,
    Slice,
    Source,
    Tokenizer,
    TokenSource,
)
from mergekit_bayes.mergekit.places import Place

_RECIPE = frozenset(
    {"merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"}
    | {"out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name"}
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
TEMPLATES = ("auto", "chatml")  # that have a name here; others are given by their text
_BODIES = ("models", "slices", "modules")
_WHOLE = "default"  # the module that is the whole of a model with one stack of layers


def is_mergekit(content: object) -> bool:
    """Whether what a YAML file holds is a recipe of mergekit.

    It has a `merge_method` or, where that is misspelled, models with keys of their own, slices or
    modules, which ours has not.

    Args:
        content: A document, or a list of the documents of a file.
    """
    documents = content if isinstance(content, Sequence) else [content]
    return any(isinstance(one, Mapping) and _is_recipe(one) for one in documents)


def _is_recipe(content: Mapping[object, object]) -> bool:
    models = content.get("models")
    listed = isinstance(models, list) and any(isinstance(model, Mapping) for model in models)
    return listed or any(key in content for key in ("merge_method", "slices", "modules"))


def read_recipes(path: Path) -> tuple[Recipe, ...]:
    """Read the recipes of a file of mergekit's YAML, in their order.

    Args:
        path: The file, with one document for each merge.

    Raises:
        ConfigError: The file cannot be read, is no YAML, has a key that is unknown or lacks one, or
            has a value that makes no sense; the message names the key. Two documents have one name,
            or more than one has none.
    """
    documents = read_yaml_documents(path)
    labels = [str(path)]
    if len(documents) > 1:
        labels = [f"{path}, document {i}" for i in range(1, len(documents) + 1)]
    recipes = tuple(read_recipe(d, label) for d, label in zip(documents, labels, strict=True))
    _check_names(path, recipes)
    return recipes


def _check_names(path: Path, recipes: Sequence[Recipe]) -> None:
    numbers: dict[str | None, int] = {}
    for number, recipe in enumerate(recipes, 1):
        first = numbers.setdefault(recipe.name, number)
        if first == number:
            continue
        if recipe.name is None:
            raise ConfigError(
                f"{path}: documents {first} and {number} have no 'name'. Only one, whose output is "
                "that of the file, may have none."
            )
        raise ConfigError(
            f"{recipe.label}: name: document {first} is already called {shown(recipe.name)}. Give "
            "each document a name of its own."
        )


def read_recipe(content: object, label: str) -> Recipe:
    """The recipe in a document.

    Args:
        content: What YAML holds.
        label: Where it comes from, for messages.

    Raises:
        ConfigError: As `read_recipes`.
    """
    fields = Place(label, "", content).fields(_RECIPE, required=("merge_method",))
    models, slices, modules = _read_body(Place(label, "", content), fields)
    parameters = _read_parameters(fields.get("parameters"))
    if set(modules) == {_WHOLE}:
        whole = modules.pop(_WHOLE)
        models, slices = whole.models, whole.slices
        parameters = parameters | {
            name: _before(value, parameters.get(name)) for name, value in whole.parameters.items()
        }
    dtypes = {key: _read_dtype(fields[key]) for key in ("dtype", "out_dtype") if key in fields}
    return Recipe(
        merge_method=fields["merge_method"].text(),
        models=models,
        slices=slices,
        modules=modules,
        base_model=_optional_reference(fields.get("base_model")),
        parameters=parameters,
        dtype=dtypes.get("dtype"),
        out_dtype=dtypes.get("out_dtype"),
        tokenizer=_read_tokenizer(fields),
        chat_template=_read_template(fields.get("chat_template")),
        name=fields["name"].text() if "name" in fields else None,
        label=label,
    )


def _read_body(
    place: Place, fields: Mapping[str, Place]
) -> tuple[tuple[Source, ...], tuple[Slice, ...], dict[str, Module]]:
    """The models, slices or modules of a document, one of which it has."""
    given = [key for key in _BODIES if key in fields and fields[key].value not in ([], {})]
    if len(given) != 1:
        found = " and ".join(f"'{key}'" for key in given) or "none of them"
        raise place.error(f"expected one of 'models', 'slices' and 'modules', found {found}.")
    models = _read_models(fields.get("models")) if given == ["models"] else ()
    slices = _read_slices(fields.get("slices")) if given == ["slices"] else ()
    modules = {}
    if given == ["modules"]:
        modules = {name: _read_module(part) for name, part in fields["modules"].entries().items()}
    return models, slices, modules


def _read_module(place: Place) -> Module:
    fields = place.fields({"models", "slices", "parameters"})
    given = [key for key in ("models", "slices") if key in fields and fields[key].value != []]
    if len(given) != 1:
        found = " and ".join(f"'{key}'" for key in given) or "neither"
        raise place.error(f"expected one of 'models' and 'slices', found {found}.")
    return Module(
        models=_read_models(fields.get("models")) if given == ["models"] else (),
        slices=_read_slices(fields.get("slices")) if given == ["slices"] else (),
        parameters=_read_parameters(fields.get("parameters")),
        place=place.path,
    )


def _read_models(place: Place | None) -> tuple[Source, ...]:
    sources = []
    for item in place.items() if place else ():
        fields = item.fields({"model", "parameters"}, required=("model",))
        sources.append(_read_source(item, fields))
    return tuple(sources)


def _read_slices(place: Place | None) -> tuple[Slice, ...]:
    slices = []
    for item in place.items() if place else ():
        fields = item.fields({"sources", "base_model", "parameters"}, required=("sources",))
        sources = []
        for part in fields["sources"].items():
            known = ("model", "layer_range", "parameters")
            keys = part.fields(known, required=("model", "layer_range"))
            sources.append(_read_source(part, keys))
        _check_lengths(item, sources)
        slices.append(
            Slice(
                sources=tuple(sources),
                base_model=_optional_reference(fields.get("base_model")),
                parameters=_read_parameters(fields.get("parameters")),
                place=item.path,
            )
        )
    return tuple(slices)


def _check_lengths(place: Place, sources: Sequence[Source]) -> None:
    """Refuse a slice whose sources have different numbers of layers."""
    lengths = [source.layers[1] - source.layers[0] for source in sources if source.layers]
    for source, length in zip(sources, lengths, strict=True):
        if length != lengths[0]:
            raise place.error(
                f"expected {lengths[0]} layers of each source, as of the first one, found "
                f"{length} in {source.place}.layer_range."
            )


def _read_source(place: Place, fields: Mapping[str, Place]) -> Source:
    layers = fields.get("layer_range")
    return Source(
        model=read_reference(fields["model"]),
        layers=_read_range(layers) if layers else None,
        parameters=_read_parameters(fields.get("parameters")),
        place=place.path,
    )


def _read_range(place: Place) -> tuple[int, int]:
    if not isinstance(place.value, list) or len(place.value) != 2:
        raise place.expected("[START, END], the first layer and the one behind the last,")
    start, end = (item.whole_number(0) for item in place.items())
    if start >= end:
        raise place.error(
            f"expected [START, END] with at least one layer, found [{start}, {end}]. END is the "
            "layer behind the last one."
        )
    return start, end


def _optional_reference(place: Place | None) -> Reference | None:
    return read_reference(place) if place else None


def read_reference(place: Place) -> Reference:
    """The model that a value refers to.

    `MODEL`, `MODEL@REVISION` and `MODEL+ADAPTER`, or `{model: ..., lora: ...}`, each of them a path
    or `{path: ..., revision: ...}`. In the latter form `+` and `@` are part of the path.

    Raises:
        ConfigError: It is none of them.
    """
    if isinstance(place.value, dict):
        fields = place.fields({"model", "lora"}, required=("model",))
        path, revision = _read_path(fields["model"])
        adapter, adapter_revision = _read_path(fields["lora"]) if "lora" in fields else (None, None)
    else:
        model, plus, lora = place.text().partition("+")
        path, revision = _split(place, model)
        adapter, adapter_revision = _split(place, lora) if plus else (None, None)
    return Reference(
        path=path, revision=revision, adapter=adapter, adapter_revision=adapter_revision
    )


def _read_path(place: Place) -> tuple[str, str | None]:
    if not isinstance(place.value, dict):
        return place.text(), None
    fields = place.fields({"path", "revision"}, required=("path",))
    return fields["path"].text(), fields["revision"].text() if "revision" in fields else None


def _split(place: Place, text: str) -> tuple[str, str | None]:
    """A path or Hub id, and the revision behind its `@`."""
    path, at, revision = text.partition("@")
    if not path.strip() or (at and not revision) or "@" in revision or "+" in text:
        raise place.expected("MODEL, MODEL@REVISION or MODEL+ADAPTER")
    return path, revision if at else None


def _read_parameters(place: Place | None) -> dict[str, Setting]:
    if place is None:
        return {}
    return {name: _read_setting(value) for name, value in place.entries().items()}


def _read_setting(place: Place) -> Setting:
    """One value, a gradient, or filters."""
    value = place.value
    if isinstance(value, dict):
        return (_read_filter(place),)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return tuple(_read_filter(item) for item in place.items())
    return _read_value(place)


def _before(near: Setting, far: Setting | None) -> Setting:
    """A setting as it is with another one behind it, where none of its filters matches."""
    filters = _filters(near)
    if not filters or far is None:
        return near
    return (*filters, *(_filters(far) or (_catch_all(far),)))


def _filters(value: Setting) -> tuple[Filter, ...]:
    """The filters of a setting; none of a value or a gradient."""
    items = value if isinstance(value, tuple) else ()
    return tuple(item for item in items if isinstance(item, Filter))


def _catch_all(value: Setting) -> Filter:
    """A value or a gradient as a filter that is part of every name."""
    if isinstance(value, tuple):
        return Filter(filter=None, value=tuple(v for v in value if not isinstance(v, Filter)))
    return Filter(filter=None, value=value)


def _read_filter(place: Place) -> Filter:
    fields = place.fields({"filter", "value"}, required=("value",))
    if isinstance(fields["value"].value, dict) or _has_mapping(fields["value"].value):
        raise fields["value"].error("expected a number or a list of numbers; filters do not nest.")
    text = fields["filter"].value if "filter" in fields else None
    if text is not None and not isinstance(text, str):
        raise fields["filter"].expected("text")
    return Filter(filter=text, value=_read_value(fields["value"]))


def _has_mapping(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _read_value(place: Place) -> bool | int | float | str | tuple[bool | int | float | str, ...]:
    if isinstance(place.value, list):
        return tuple(item.scalar() for item in place.items())
    return place.scalar()


def _read_template(place: Place | None) -> str | None:
    """A template of Jinja, or the name of one; text without braces is a misspelled name."""
    if place is None:
        return None
    template = place.text()
    if "{" not in template and template not in TEMPLATES:
        hint = did_you_mean(template, TEMPLATES)
        names = f"expected the text of a template, or {' or '.join(TEMPLATES)}, found"
        raise place.error(f"{names} {shown(template)}. {hint[:1].upper()}{hint[1:]}".rstrip())
    return template


def _read_dtype(place: Place) -> str:
    dtype = place.text().removeprefix("torch.")
    if dtype not in _DTYPES:
        raise place.expected(f"one of {', '.join(_DTYPES)}")
    return dtype


def _read_tokenizer(fields: Mapping[str, Place]) -> Tokenizer | None:
    if "tokenizer_source" in fields:
        if "tokenizer" in fields:
            raise fields["tokenizer_source"].error(
                "'tokenizer' says the same. Write it as its 'source'."
            )
        source, model = _read_tokenizer_source(fields["tokenizer_source"])
        return Tokenizer(source=source, model=model)
    if "tokenizer" not in fields:
        return None
    keys = fields["tokenizer"].fields({"source", "tokens", "pad_to_multiple_of"})
    source, model = _read_tokenizer_source(keys["source"]) if "source" in keys else ("union", None)
    tokens = keys["tokens"].entries() if "tokens" in keys else {}
    multiple = keys.get("pad_to_multiple_of")
    return Tokenizer(
        source=source,
        model=model,
        tokens={text: _read_token(place) for text, place in tokens.items()},
        pad_to_multiple_of=multiple.whole_number(1) if multiple else None,
    )


def _read_tokenizer_source(place: Place) -> tuple[str, Reference | None]:
    if place.value in ("union", "base"):
        return str(place.value), None
    if isinstance(place.value, str):  # once `model:PATH`
        place = place._replace(value=place.value.removeprefix("model:"))
    return "model", read_reference(place)


def _read_token(place: Place) -> TokenSource:
    fields = place.fields({"source", "force"})
    force = fields["force"].truth() if "force" in fields else False
    source = fields.get("source")
    if source is None:
        return TokenSource(force=force)
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenSource(source="model", model=read_reference(source), force=force)
    keys = source.fields({"kind", "model", "token", "token_id"})
    kind = keys["kind"].value if "kind" in keys else None
    if kind == "zero":
        source.fields({"kind"})
        return TokenSource(source="zero", force=force)
    if kind != "model_token":
        raise source.entries()["kind"].expected("'zero' or 'model_token'")
    source.fields(keys, required=("model",))
    if ("token" in keys) == ("token_id" in keys):
        raise source.error("expected one of 'token' and 'token_id'.")
    return TokenSource(
        source="model_token",
        model=read_reference(keys["model"]),
        token=keys["token"].text() if "token" in keys else None,
        token_id=keys["token_id"].whole_number(0) if "token_id" in keys else None,
        force=force,
    )
