"""What a recipe of mergekit says, as checked objects."""

from typing import TypeAlias

from mergekit_bayes.records import Frozen

Number: TypeAlias = bool | int | float
Scalar: TypeAlias = bool | int | float | str


class Reference(Frozen):
    """A model, and an adapter on it, each a path or a Hub id with a revision of it.

    Attributes:
        path: The model.
        revision: Its branch, tag or commit.
        adapter: The adapter; None without one.
        adapter_revision: Its branch, tag or commit.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        """As recipes write it: `MODEL@REVISION+ADAPTER@REVISION`."""
        text = _pinned(self.path, self.revision)
        if self.adapter is not None:
            text += f"+{_pinned(self.adapter, self.adapter_revision)}"
        return text


def _pinned(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


class Filter(Frozen):
    """A value for the tensors whose names contain a text.

    Attributes:
        filter: The text; None or `*` is in every name.
        value: One value, or a gradient.
    """

    filter: str | None
    value: Scalar | tuple[Scalar, ...]


# One value; a gradient; or filters, of which the first that matches counts.
Setting: TypeAlias = Scalar | tuple[Scalar, ...] | tuple[Filter, ...]


class Source(Frozen):
    """A model that a merge, or a slice of it, is made of.

    Attributes:
        model: The model.
        layers: The first of its layers, and the one behind the last; None for all.
        parameters: What is set for it.
        place: Where the recipe says it, `slices[0].sources[1]`, for messages.
    """

    model: Reference
    layers: tuple[int, int] | None = None
    parameters: dict[str, Setting] = {}
    place: str = ""


class Slice(Frozen):
    """Layers of the output, made of as many layers of each source.

    Attributes:
        sources: The models and their layers.
        base_model: The base, in place of the recipe's.
        parameters: What is set for it.
        place: Where the recipe says it, `slices[0]`, for messages.
    """

    sources: tuple[Source, ...]
    base_model: Reference | None = None
    parameters: dict[str, Setting] = {}
    place: str = ""


class Module(Frozen):
    """A part of a model, such as the language model of a vision-language model.

    Attributes:
        models: Whole models that it is made of; empty where it is made of slices.
        slices: Slices that it is made of, from below; empty where it is made of models.
        parameters: What is set for it.
        place: Where the recipe says it, `modules.text_decoder`, for messages.
    """

    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: dict[str, Setting] = {}
    place: str = ""


class TokenSource(Frozen):
    """Where the rows of one token come from.

    Attributes:
        source: `zero`, a model that has the token, or `model_token` for another token of `model`;
            None where each model's own row is merged.
        model: The model; None where `source` is `zero` or None.
        token: The other token, by its text.
        token_id: The other token, by its number.
        force: Whether all models get this row, and not only those without the token.
    """

    source: str | None = None
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


class Tokenizer(Frozen):
    """Which tokens the output has, and where their rows come from.

    Attributes:
        source: `union`, `base`, or `model` for that of `model`.
        model: The model whose tokenizer it is.
        tokens: Sources of the rows of single tokens, by the token's text.
        pad_to_multiple_of: The number of rows is rounded up to a multiple of it.
    """

    source: str = "union"
    model: Reference | None = None
    tokens: dict[str, TokenSource] = {}
    pad_to_multiple_of: int | None = None


class Recipe(Frozen):
    """One merge, as a document of mergekit's YAML describes it.

    Exactly one of `models`, `slices` and `modules` is not empty. A module named `default` alone is
    the whole model, and is read as `models` or `slices`.

    Attributes:
        merge_method: The name of the rule.
        models: Whole models.
        slices: Slices, from below.
        modules: Parts of a model, by name.
        base_model: The model that task vectors are taken from.
        parameters: What is set for all tensors, where nothing nearer sets it.
        dtype: That of the arithmetic, in torch's words (`float32`); None for that of the models.
        out_dtype: That of the output; None for `dtype`.
        tokenizer: The tokens of the output; None where nothing is said about them.
        chat_template: A template, the name of one, or `auto`.
        name: What later documents call the output; None for the last one.
        label: The file, and the number of the document in it, for messages.
    """

    merge_method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, Module] = {}
    base_model: Reference | None = None
    parameters: dict[str, Setting] = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    label: str = ""
