"""A recipe as mergekit's YAML."""

from collections.abc import Callable, Mapping, Sequence

import yaml

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
from mergekit_bayes.recipes import mergekit_header

Named = Callable[[Reference], str]


def recipe_file(
    recipe: Recipe, named: Named, flags: Mapping[str, str], identities: Mapping[str, str]
) -> str:
    """The text of a recipe as it is written beside a merge.

    Args:
        recipe: The recipe.
        named: How a model is written, such as a Hub id with its commit.
        flags: What decides bytes and the recipe does not say: values by the names of flags.
        identities: The content hash of each model, by how it is written.
    """
    told = (f"# {' '.join(name.splitlines())}: {found}\n" for name, found in identities.items())
    return mergekit_header(flags) + "".join(told) + recipe_yaml(recipe, named)


def joined(texts: Sequence[str]) -> str:
    """One file of the recipes of several, each with the same comment above it.

    Args:
        texts: What `recipe_file` wrote for each, in the order in which they are merged.
    """
    lines = mergekit_header({}).count("\n")
    others = (text.split("\n", lines)[lines] for text in texts[1:])
    return "---\n".join([texts[0], *others])


def recipe_yaml(recipe: Recipe, named: Named = str) -> str:
    """The text of a recipe, which reads as the same recipe.

    Args:
        recipe: The recipe.
        named: How a model is written, such as a Hub id with its commit.
    """
    content: dict[str, object] = {}
    if recipe.name is not None:
        content["name"] = recipe.name
    content["merge_method"] = recipe.merge_method
    if recipe.base_model is not None:
        content["base_model"] = named(recipe.base_model)
    if recipe.parameters:
        content["parameters"] = _parameters(recipe.parameters)
    content |= _body(recipe, named)
    if recipe.modules:
        content["modules"] = {
            name: _body(module, named)
            | ({"parameters": _parameters(module.parameters)} if module.parameters else {})
            for name, module in recipe.modules.items()
        }
    if recipe.tokenizer is not None:
        content["tokenizer"] = _tokenizer(recipe.tokenizer, named)
    for key in ("chat_template", "dtype", "out_dtype"):
        if (value := getattr(recipe, key)) is not None:
            content[key] = value
    # Lists and mappings of plain values go on one line, as people write gradients.
    return yaml.safe_dump(
        content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )


def _body(part: Recipe | Module, named: Named) -> dict[str, object]:
    content: dict[str, object] = {}
    if part.models:
        content["models"] = [_source(source, named) for source in part.models]
    if part.slices:
        content["slices"] = [_slice(piece, named) for piece in part.slices]
    return content


def _slice(piece: Slice, named: Named) -> dict[str, object]:
    content: dict[str, object] = {"sources": [_source(source, named) for source in piece.sources]}
    if piece.base_model is not None:
        content["base_model"] = named(piece.base_model)
    if piece.parameters:
        content["parameters"] = _parameters(piece.parameters)
    return content


def _source(source: Source, named: Named) -> dict[str, object]:
    content: dict[str, object] = {"model": named(source.model)}
    if source.layers is not None:
        content["layer_range"] = list(source.layers)
    if source.parameters:
        content["parameters"] = _parameters(source.parameters)
    return content


def _parameters(parameters: Mapping[str, Setting]) -> dict[str, object]:
    return {name: _plain(value) for name, value in parameters.items()}


def _plain(value: object) -> object:
    if isinstance(value, Filter):
        content = {} if value.filter is None else {"filter": value.filter}
        return {**content, "value": _plain(value.value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _tokenizer(tokenizer: Tokenizer, named: Named) -> dict[str, object]:
    source = named(tokenizer.model) if tokenizer.model is not None else tokenizer.source
    content: dict[str, object] = {"source": source}
    if tokenizer.tokens:
        content["tokens"] = {t: _token(s, named) for t, s in tokenizer.tokens.items()}
    if tokenizer.pad_to_multiple_of is not None:
        content["pad_to_multiple_of"] = tokenizer.pad_to_multiple_of
    return content


def _token(token: TokenSource, named: Named) -> dict[str, object]:
    content: dict[str, object] = {}
    if token.source == "zero":
        content["source"] = {"kind": "zero"}
    elif token.source == "model_token":
        assert token.model is not None
        told = {"token": token.token} if token.token is not None else {"token_id": token.token_id}
        content["source"] = {"kind": "model_token", "model": named(token.model), **told}
    elif token.model is not None:
        content["source"] = named(token.model)
    return content | ({"force": True} if token.force else {})
