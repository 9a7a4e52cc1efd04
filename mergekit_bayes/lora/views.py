"""A base under the names of the model in memory, where its files stack or split tensors otherwise.

transformers 5 stacks the experts of a mixture when it loads files that hold them one by one, and
`gate_proj` on `up_proj` in one tensor:

    experts.gate_up_proj[e] = [experts.e.gate_proj.weight; experts.e.up_proj.weight]

so that an adapter of such a model names tensors that the files lack. A view has them, and says of
which rows of which stored tensors they are made. Adapters of older versions adapt single experts,
which a view splits from those that files hold stacked; and some adapters were trained on a Phi-3
whose fused projections had been split. All of this is only another order of rows, stacked matrices
(E, d_out, d_in) taken as (E d_out, d_in).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource, TensorSpec
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.writers import FOLD

# The stacked parameters of experts and the tensors that files may hold for each expert,
# in the order of rows (transformers 5.23, `conversion_mapping.py`).
_STACKED = _GATE_UP, _DOWN, _UP = "gate_up_proj", "down_proj", "up_proj"
_GATED = (
    {_GATE_UP: ("gate_proj", "up_proj"), _DOWN: ("down_proj",)},
    {_GATE_UP: ("w1", "w3"), _DOWN: ("w2",)},
    {_GATE_UP: ("fc1", "fc3"), _DOWN: ("fc2",)},
)
_PLAIN = {_UP: ("up_proj",), _DOWN: ("down_proj",)}  # experts without a gate, as of Nemotron-H
_SINGLE = re.compile(r"(?P<owner>.+)\.(?P<expert>0|[1-9]\d{0,5})\.(?P<piece>\w+)\.weight")
# The block of a mixture has another name in files than in memory.
_ON_DISK, _IN_MEMORY = ".block_sparse_moe.", ".mlp."
_PHI3 = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# Names of fused projections, and of their pieces.
_FUSED = (
    *("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv", "att_proj", "in_proj_weight"),
    *("gate_up_proj", "up_gate_proj", "w12", "weights_in", "ff_proj", "dense_h_to_4h"),
)
# The experts of a gpt-oss that bitsandbytes quantised are modules of their own.
_SPLIT_EXPERTS = ("gate_up_projs", "down_projs")
_SPLIT = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "gate_proj", "up_proj")
_BLOCK = re.compile(r".*?\.\d+\.")  # the beginning of a name up to the number of its block


class Segment(NamedTuple):
    """Rows of a tensor of a view, and where they are stored.

    Attributes:
        name: The stored tensor.
        start: The first of the rows in the view's tensor.
        at: The first of the rows in the stored tensor.
        rows: Number of rows.
    """

    name: str
    start: int
    at: int
    rows: int


class View(NamedTuple):
    """A base whose tensors have the names and shapes that an adapter expects.

    Attributes:
        base: The base.
        specs: Dtype and shape of every tensor of the view, by name.
        segments: Of what the tensors are made that the base has in other pieces.
        renamed: The stored name of tensors that only have another name.
    """

    base: CheckpointSource
    specs: Mapping[str, TensorSpec]
    segments: Mapping[str, tuple[Segment, ...]] = {}
    renamed: Mapping[str, str] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's files."""
        return self.base.files

    def stored(self, name: str) -> str:
        """The base's name of a tensor, or of the first tensor of which it is made."""
        segments = self.segments.get(name)
        return segments[0].name if segments else self.renamed.get(name, name)

    def where(self, name: str) -> str:
        """The file that holds a tensor, or the first part of it, for messages."""
        return self.base.where(self.stored(name))


class _Made(NamedTuple):
    spec: TensorSpec
    segments: tuple[Segment, ...]


def view_base(base: CheckpointSource, layers: Iterable[Layer], whole: Iterable[str] = ()) -> View:
    """See a base as an adapter does.

    Args:
        base: The base.
        layers: The adapter's layers. A base that holds all that they adapt is left as it is.
        whole: The tensors that the adapter holds whole.
    """
    missing = [layer for layer in layers if layer.tensor not in base.specs]
    stacks = [
        layer.tensor for layer in missing if layer.is_parameter and layer.parameter in _STACKED
    ]
    others = [name for name in whole if name not in base.specs]
    stacks += [name for name in others if name.rpartition(".")[2] in _STACKED]
    singles = [match for layer in missing if (match := _SINGLE.fullmatch(layer.tensor))]
    if stacks:
        made = _stack_experts(base.specs, {name.rpartition(".")[0] for name in stacks})
    elif singles:
        made = _split_experts(base.specs, {match["piece"] for match in singles})
    else:
        made = _split_phi3(base, missing)
    return _view(base, dict(made), _other_words(base, [x.tensor for x in missing] + others))


def _other_words(base: CheckpointSource, missing: Sequence[str]) -> tuple[str, str] | None:
    """How the block of a mixture is called in the base, and by the tensors that it lacks."""
    is_on_disk = any(_ON_DISK in name for name in base.specs)
    if any(_ON_DISK in name for name in missing):
        return None if is_on_disk else (_IN_MEMORY, _ON_DISK)
    is_wanted = is_on_disk and any(_IN_MEMORY in name for name in missing)
    return (_ON_DISK, _IN_MEMORY) if is_wanted else None


def _view(base: CheckpointSource, made: Mapping[str, _Made], words: tuple[str, str] | None) -> View:
    """A view with the tensors `made` in place of those of which they are made.

    Args:
        base: The base.
        made: The tensors.
        words: A part of names, and what stands for it in the view.
    """
    if not made and words is None:
        return View(base, base.specs)
    used = {segment.name for tensor in made.values() for segment in tensor.segments}

    def renamed(name: str) -> str:
        return name if words is None else name.replace(*words)

    names = {renamed(name): name for name in base.specs if name not in used}
    segments = {renamed(name): tensor.segments for name, tensor in made.items()}
    specs = {renamed(name): tensor.spec for name, tensor in made.items()}
    specs |= {name: base.specs[stored] for name, stored in names.items()}
    return View(base, specs, segments, {n: stored for n, stored in names.items() if n != stored})


def _stack_experts(
    specs: Mapping[str, TensorSpec], owners: Collection[str]
) -> Iterator[tuple[str, _Made]]:
    """Stack experts that are stored one by one, below modules with the last word of `owners`."""
    words = {owner.rpartition(".")[2] for owner in owners}
    groups: dict[str, dict[str, dict[int, str]]] = {}
    for name in specs:
        match = _SINGLE.fullmatch(name)
        if match and match["owner"].rpartition(".")[2] in words:
            experts = groups.setdefault(match["owner"], {}).setdefault(match["piece"], {})
            experts[int(match["expert"])] = name
    for owner, pieces in groups.items():
        for alternative in (*_GATED, _PLAIN):
            if all(piece in pieces for names in alternative.values() for piece in names):
                for parameter, names in alternative.items():
                    made = _stack(specs, [pieces[piece] for piece in names])
                    if made is not None:
                        yield f"{owner}.{parameter}", made
                break


def _stack(specs: Mapping[str, TensorSpec], pieces: Sequence[Mapping[int, str]]) -> _Made | None:
    """One stacked tensor of the experts' tensors, or None if they do not fit together."""
    count = len(pieces[0])
    shapes = [{specs[name].shape for name in experts.values()} for experts in pieces]
    if any(set(experts) != set(range(count)) for experts in pieces) or any(
        len(found) > 1 for found in shapes
    ):
        return None
    matrices = [next(iter(found)) for found in shapes]
    if any(len(shape) != 2 for shape in matrices) or len({s[1] for s in matrices}) > 1:
        return None
    segments, row = [], 0
    for expert in range(count):
        for experts, (rows, _) in zip(pieces, matrices, strict=True):
            segments.append(Segment(experts[expert], row, 0, rows))
            row += rows
    shape = (count, row // count, matrices[0][1])
    return _Made(TensorSpec(_dtype(specs[s.name].dtype for s in segments), shape), tuple(segments))


def _dtype(dtypes: Iterable[str]) -> str:
    """The dtype of which messages speak: the first that adapters are not applied to, if any."""
    found = list(dict.fromkeys(dtypes))
    return next((dtype for dtype in found if dtype not in MERGEABLE), found[0])


def _split_experts(
    specs: Mapping[str, TensorSpec], words: Collection[str]
) -> Iterator[tuple[str, _Made]]:
    """Split stacked experts into tensors of the names that an adapter uses.

    Only where both stacks of a gated mixture are there, whose shapes show that they are laid out
    as (experts, d_out, d_in).
    """
    by_word = (names for names in _GATED if {*words} & {p for some in names.values() for p in some})
    names = next(by_word, None)
    for up, spec in specs.items() if names is not None else ():
        owner, _, parameter = up.rpartition(".")
        down = specs.get(f"{owner}.{_DOWN}")
        if parameter != _GATE_UP or down is None or len(spec.shape) != 3 or len(down.shape) != 3:
            continue
        count, wide, columns = spec.shape
        if down.shape != (count, columns, wide // 2) or wide % 2:
            continue
        for parameter, pieces in (names or {}).items():
            stacked = f"{owner}.{parameter}"
            rows = specs[stacked].shape[1] // len(pieces)
            shape = (rows, specs[stacked].shape[2])
            for expert in range(count):
                for i, piece in enumerate(pieces):
                    at = (expert * len(pieces) + i) * rows
                    part = _Made(
                        TensorSpec(specs[stacked].dtype, shape), (Segment(stacked, 0, at, rows),)
                    )
                    yield f"{owner}.{expert}.{piece}.weight", part


def _split_phi3(base: CheckpointSource, missing: Sequence[Layer]) -> Iterator[tuple[str, _Made]]:
    """Split the fused projections of a Phi-3 for an adapter that was trained on split ones."""
    wanted = {layer.module for layer in missing}
    if not any(module.endswith(p) for module in wanted for p in sum(_PHI3.values(), ())):
        return
    if read_config(base.files[0].parent).get("model_type") != "phi3":
        return
    rows: dict[str, set[int]] = {}
    for layer in missing:
        rows.setdefault(".".join(layer.module.split(".")[-2:]), set()).add(layer.rows)
    for fused, pieces in _PHI3.items():
        for name, spec in base.specs.items():
            owner = name.removesuffix(f"{fused}.weight")
            if owner == name or len(spec.shape) != 2:
                continue
            start = 0
            for piece, size in zip(pieces, _sizes(spec.shape[0], pieces, rows), strict=False):
                part = TensorSpec(spec.dtype, (size, spec.shape[1]))
                yield f"{owner}{piece}.weight", _Made(part, (Segment(name, 0, start, size),))
                start += size


def _sizes(
    total: int, pieces: Sequence[str], rows: Mapping[str, Collection[int]]
) -> tuple[int, ...]:
    """Rows of the pieces of a fused weight, or none if the adapter's rows do not tell.

    The gate is as high as `up_proj`, keys as values; the queries are a multiple of them.
    """
    if len(pieces) == 2:
        return (total // 2, total // 2) if total % 2 == 0 else ()
    queries, keys = rows.get(pieces[0], ()), {*rows.get(pieces[1], ()), *rows.get(pieces[2], ())}
    if len(queries) > 1 or len(keys) > 1 or not (queries or keys):
        return ()
    key = next(iter(keys)) if keys else (total - next(iter(queries))) // 2
    query = next(iter(queries)) if queries else total - 2 * key
    fits = key > 0 and query > 0 and query + 2 * key == total and query % key == 0
    return (query, key, key) if fits else ()


def explain_fused(view: View, name: str) -> str | None:
    """What to do where the base has fused projections, and an adapter split ones, or the reverse.

    Args:
        view: The base.
        name: The tensor that it lacks.

    Returns:
        None if it has neither.
    """
    words = name.removesuffix(".weight").split(".")
    module = words[-1]
    if any(word in words for word in _SPLIT_EXPERTS):
        return (
            "These are experts of a gpt-oss that was quantised for training; the base has them "
            f"stacked, and in which order of rows is not known. {FOLD}"
        )
    others = _FUSED if module in _SPLIT else _SPLIT if module in _FUSED else ()
    block = _BLOCK.match(name)
    for stored in view.base.specs if others and block else ():
        ends = stored.split(".")[-2:]
        if block and stored.startswith(block[0]) and any(word in others for word in ends):
            return (
                f"The base has '{stored}': it stores fused what the adapter has in pieces, or the "
                "reverse, and which rows are whose is known to the model's code only. "
                f"{FOLD}"
            )
    return None
