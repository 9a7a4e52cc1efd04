"""Which tensors of which models each tensor of a merge of slices is made of, judged by names.

The layers of a model are a stack: tensors that are named alike but for a number, which counts from
0 to L - 1, as `model.layers.3.mlp.up_proj.weight`. Slices take layers of stacks and number them
anew. Tensors outside of the stack are those of the first slice if they are before the layers
(embeddings, towers of other modalities and what projects from them), and those of the last slice if
they are behind them (the last norm, heads). mergekit 0.1.5 does the same for the architectures that
it describes, as Llama, Mistral, Qwen, Gemma and Phi; of others (OPT, BLOOM, GPT-J, GPT-Neo) it
takes the last norm and the head from the first slice, too.

The position of a tensor, at which gradients of settings are evaluated, is i / (n - 1) in layer i of
the n layers of a slice, 1 in a slice of one layer, and 0 outside of layers.

All functions take names, and no files: that a model has no output layer, because it is tied to the
embeddings, is for the caller to see.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import output_layer
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.mergekit.objects import Slice, Source

_Inside = tuple[int, str]  # a number of a layer, and what stands behind it in a name

_NUMBERED = re.compile(r"((?:.*?\.)?)(0|[1-9][0-9]{0,8})((?:\..*)?)", re.DOTALL)
# Towers of other modalities, what projects from them, and what predicts further tokens.
_OTHER_PARTS = re.compile(
    r"vis(ion|ual)|image|img|audio|speech|project(or|ion)|connector|merger|(^|\.)mm_|(^|\.)mtp\b"
)
_BEHIND = re.compile(r"(^|[._])(norm|ln|layer_?norm|rmsnorm)\w*(?=\.|$)|_norm\b|project_out")
_EMBEDDING = re.compile("embed")
_LAST_NORM = re.compile(r"(^|\.)embedding_norm\.")  # of LFM2, behind the layers in spite of it
_CODERS = (re.compile(r"(^|\.)encoder(\.|$)"), re.compile(r"(^|\.)decoder(\.|$)"))


class ModelNames(NamedTuple):
    """What is known of a model of a merge.

    Attributes:
        ref: What the user calls it.
        names: Its tensors.
        layers: The number of its layers, as its config says; None if it does not.
    """

    ref: str
    names: Collection[str]
    layers: int | None = None


class OutputTensor(NamedTuple):
    """A tensor of the output, and what it is made of.

    Attributes:
        name: Its name.
        slice: The index of the slice whose models and settings it is merged with.
        position: Where gradients are evaluated, in [0, 1].
        sources: Its name in the model of each source of the slice; None where that lacks it.
    """

    name: str
    slice: int
    position: float
    sources: tuple[str | None, ...]


class Stack(NamedTuple):
    """The numbered layers of a model.

    Attributes:
        prefix: What stands before the number, `model.layers.`.
        layers: How many there are.
        inside: The names of tensors, by number and by what stands behind it.
        outside: The other names.
    """

    prefix: str
    layers: int
    inside: Mapping[_Inside, str]
    outside: tuple[str, ...]


def find_stack(model: ModelNames) -> Stack:
    """The stack of layers of a model's language part.

    Raises:
        MismatchError: There is none, or layers of it are missing, or an encoder and a decoder have
            a stack each.
    """
    stacks = _group(model.names)
    parts = {p: inside for p, inside in stacks.items() if not _is_other_part(p)} or stacks
    coders = [prefix for prefix in sorted(parts) if any(c.search(prefix) for c in _CODERS)]
    if all(any(coder.search(prefix) for prefix in coders) for coder in _CODERS):
        raise MismatchError(
            f"'{model.ref}' has layers of an encoder and of a decoder, {_listed(coders)}, so that "
            "'slices' cannot say which. Merge it with 'models'."
        )
    if not parts:
        raise MismatchError(
            f"'{model.ref}' has no numbered layers, which 'slices' takes. Merge it with 'models'."
        )
    prefix = _largest(parts, model.layers)
    inside = parts[prefix]
    numbers = {number for number, _ in inside}
    layers = model.layers if model.layers is not None else max(numbers) + 1
    if (min(numbers), max(numbers), len(numbers)) != (0, layers - 1, layers):
        counted = ", as its config.json counts them" if model.layers is not None else ""
        raise MismatchError(
            f"'{model.ref}' has the layers {_ranges(numbers)} of '{prefix}*', expected 0 to "
            f"{layers - 1}{counted}. Fetch or save it with all of its shards, and without layers "
            "that predict further tokens."
        )
    inner = set(inside.values())
    return Stack(prefix, layers, inside, tuple(n for n in model.names if n not in inner))


def map_models(models: Sequence[ModelNames]) -> list[OutputTensor]:
    """The tensors of a merge of whole models, those of the first one first.

    Each stack of layers, also of a tower or an encoder, has positions of its own.

    Args:
        models: The models, with names as the first one has them.

    Raises:
        MismatchError: A stack has another number of layers in one of the models.
    """
    positions: dict[str, float] = {}
    depths: dict[str, tuple[int, str]] = {}
    for model in models:
        stacks = _group(model.names)
        for prefix, layers in _depths(stacks, model.layers).items():
            first, ref = depths.setdefault(prefix, (layers, model.ref))
            if first != layers:
                raise MismatchError(
                    f"There are {first} '{prefix}*' in '{ref}' and {layers} in '{model.ref}'. "
                    "Models of different depth are merged by 'slices' with a 'layer_range' each."
                )
            for (number, _), name in stacks[prefix].items():
                positions[name] = _position(number, layers)
    names = dict.fromkeys(name for model in models for name in model.names)
    known = [set(model.names) for model in models]
    return [
        OutputTensor(name, 0, positions.get(name, 0.0), _present(name, known)) for name in names
    ]


def _depths(stacks: Mapping[str, Mapping[_Inside, str]], layers: int | None) -> dict[str, int]:
    """The number of layers of each stack; what is behind the last one predicts further tokens."""
    depths = {prefix: _count(inside) for prefix, inside in stacks.items()}
    parts = {p: inside for p, inside in stacks.items() if not _is_other_part(p)}
    if parts and layers:
        main = _largest(parts, layers)
        depths[main] = min(depths[main], layers)
    return depths


def _present(name: str, known: Sequence[set[str]]) -> tuple[str | None, ...]:
    return tuple(name if name in names else None for names in known)


def map_slices(
    slices: Sequence[Slice], models: Sequence[Sequence[ModelNames]], label: str
) -> list[OutputTensor]:
    """The tensors of a merge of slices, from below; those outside of layers come first.

    They are named as in the first source of the first slice.

    Args:
        slices: The slices, from below.
        models: The models of the sources of each slice.
        label: The recipe's label, for messages.

    Raises:
        ConfigError: A range ends behind the layers of its model.
        MismatchError: As `find_stack`.
    """
    found: dict[str, Stack] = {}  # by reference, for models that are in many slices
    stacks: list[list[Stack]] = []
    for piece, row in zip(slices, models, strict=True):
        for model in row:
            if model.ref not in found:
                found[model.ref] = find_stack(model)
        stacks.append([found[model.ref] for model in row])
        for source, model, stack in zip(piece.sources, row, stacks[-1], strict=True):
            if range_of(source)[1] > stack.layers:
                raise ConfigError(
                    f"{label}: {source.place}.layer_range: expected an end of at most "
                    f"{stack.layers}, the number of layers of '{model.ref}', found "
                    f"{range_of(source)[1]}."
                )
    lead = stacks[0][0]
    tensors = list(_map_outside(stacks, lead))
    start = 0
    for index, piece in enumerate(slices):
        ranges = [range_of(source) for source in piece.sources]
        length = ranges[0][1] - ranges[0][0]
        for layer in range(length):
            numbers = [first + layer for first, _ in ranges]
            for tail, names in _in_layer(stacks[index], numbers).items():
                name = f"{lead.prefix}{start + layer}{tail}"
                tensors.append(OutputTensor(name, index, _position(layer, length), names))
        start += length
    return tensors


def range_of(source: Source) -> tuple[int, int]:
    """The first layer of a source of a slice, and the one behind its last; a recipe says both."""
    assert source.layers is not None
    return source.layers


def layer_sources(slices: Sequence[Slice]) -> list[tuple[int, int]]:
    """Of each layer of a merge of slices: the slice, and the number in its first source.

    Those are the layers whose settings in a config the output's layers keep.
    """
    sources = []
    for index, piece in enumerate(slices):
        sources += [(index, number) for number in range(*range_of(piece.sources[0]))]
    return sources


def _in_layer(stacks: Sequence[Stack], numbers: Sequence[int]) -> dict[str, tuple[str | None, ...]]:
    """The names of each tensor of one layer, by what stands behind the number."""
    tails: dict[str, None] = {}
    for stack, number in zip(stacks, numbers, strict=True):
        tails |= dict.fromkeys(tail for n, tail in stack.inside if n == number)
    pairs = list(zip(stacks, numbers, strict=True))
    return {tail: tuple(s.inside.get((n, tail)) for s, n in pairs) for tail in tails}


def _map_outside(stacks: Sequence[Sequence[Stack]], lead: Stack) -> Iterator[OutputTensor]:
    """The tensors outside of layers: those before them of the first slice, others of the last."""
    ends = ((0, False), (len(stacks) - 1, True))
    for index, behind in ends:
        names: dict[str, list[str | None]] = {}
        for i, stack in enumerate(stacks[index]):
            for name in stack.outside:
                if is_behind(name) is behind:
                    own = _as_in(lead, stack, name)
                    names.setdefault(own, [None] * len(stacks[index]))[i] = name
        for name, sources in names.items():
            yield OutputTensor(name, index, 0.0, tuple(sources))


def _as_in(lead: Stack, stack: Stack, name: str) -> str:
    """The name of a tensor in the first model, where the part of the model is called otherwise."""
    own, leads = stack.prefix.split("."), lead.prefix.split(".")
    while own and leads and own[-1] == leads[-1]:
        own.pop()
        leads.pop()
    root = "".join(f"{part}." for part in own)
    if not name.startswith(root) or own == leads or output_layer(name):
        return name
    return "".join(f"{part}." for part in leads) + name[len(root) :]


def is_behind(name: str) -> bool:
    """Whether a tensor outside of layers is used behind them, judged by its name."""
    if _is_other_part(name):
        return False
    if output_layer(name) or _LAST_NORM.search(name):
        return True
    return bool(_BEHIND.search(name)) and not _EMBEDDING.search(name)


def _position(number: int, layers: int) -> float:
    return min(number / (layers - 1), 1.0) if layers > 1 else 1.0


def _is_other_part(name: str) -> bool:
    return bool(_OTHER_PARTS.search(name))


def _group(names: Collection[str]) -> dict[str, dict[_Inside, str]]:
    """Names by what stands before their first number; lists that do not begin with 0 are none."""
    groups: dict[str, dict[_Inside, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            groups.setdefault(match[1], {})[int(match[2]), match[3]] = name
    return {p: inside for p, inside in groups.items() if any(n == 0 for n, _ in inside)}


def _largest(stacks: Mapping[str, Mapping[_Inside, str]], layers: int | None) -> str:
    """The stack with the most tensors, of those with as many layers as a config says, if any."""
    counted = [p for p, inside in stacks.items() if _count(inside) == layers]
    return max(counted or stacks, key=lambda p: (len(stacks[p]), p))


def _count(inside: Mapping[_Inside, str]) -> int:
    return max(number for number, _ in inside) + 1


def _listed(prefixes: Sequence[str]) -> str:
    return " and ".join(f"'{prefix}*'" for prefix in prefixes[:3])


def _ranges(numbers: set[int]) -> str:
    """Numbers in a message: `0 to 2, 5`."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    parts = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
