"""Write an extracted adapter as PEFT reads it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, encode
from mergekit_bayes.checkpoint.side_files import CHAT, copy_side_file, group_of, side_files
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, TensorSpec
from mergekit_bayes.extract.approximate import Approximation
from mergekit_bayes.extract.changes import Models
from mergekit_bayes.extract.modules import Kind, Place
from mergekit_bayes.extract.settings import Dtype
from mergekit_bayes.lora.config import BASE, CONFIG, PREFIX, WEIGHTS

_CHUNK = 1 << 20  # entries that are copied at a time
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose labels are named in the model's config alone


class Factors(NamedTuple):
    """Where the factors of a module are kept until all ranks are known.

    Attributes:
        place: The module, and whether its weight is stored transposed.
        rank: k.
        start: Offset of A's bytes in the spool; B's follow.
        a: Shape of the first factor, as PEFT stores it.
        b: Shape of the second one.
    """

    place: Place
    rank: int
    start: int
    a: tuple[int, int]
    b: tuple[int, int]

    @property
    def names(self) -> tuple[str, str]:
        """Their names on disk."""
        stem = f"{PREFIX}{self.place.module}"
        if self.place.kind is Kind.EMBEDDING:
            return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


class Spool:
    """Factors in a file, so that memory holds those of one layer."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        """Start without a file, which the first factors make and `remove` removes."""
        self._path, self._dtype, self._size = path, dtype, 0
        self.factors: list[Factors] = []

    def add(self, place: Place, found: Approximation) -> None:
        """Append the factors of a module."""
        # A weight that is stored as (d_in, d_out), and an embedding, are the transpose of B A.
        turned = place.transposed or place.kind is Kind.EMBEDDING
        a, b = (found.left.T, found.right.T) if turned else (found.right, found.left)
        start = self._size
        with open(self._path, "ab") as file:
            for values in (a, b):
                data = encode(np.ascontiguousarray(values, np.float32).reshape(-1), self._dtype)
                self._size += file.write(data)
        self.factors.append(Factors(place, found.rank, start, _pair(a), _pair(b)))

    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of all factors, by their names on disk."""
        return {
            name: TensorSpec(self._dtype, shape)
            for each in self.factors
            for name, shape in zip(each.names, (each.a, each.b), strict=True)
        }

    def copy(self, sink: SafetensorsSink) -> None:
        """Write all factors into an adapter's file."""
        specs = self.specs()
        with open(self._path, "rb") as content:
            for each in self.factors:
                content.seek(each.start)
                for name in each.names:
                    sink.write_bytes(name, 0, memoryview(content.read(specs[name].nbytes)))

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


class Extra(NamedTuple):
    """What an adapter holds beside its factors.

    Attributes:
        whole: Modules that are stored whole.
        biases: Biases whose change is stored; None where `lora_bias` is off.
        tied: The heads that follow an adapted embedding, each with that embedding's module.
    """

    whole: Sequence[str]
    biases: Sequence[str] | None
    tied: Mapping[str, str]


def write_tensors(models: Models, spool: Spool, extra: Extra, folder: Path) -> int:
    """Write `adapter_model.safetensors`, with the content hash of the base.

    Returns:
        How many numbers it holds.
    """
    specs = spool.specs()
    copied = {
        f"{PREFIX}{place.module}.{place.tensor}": name
        for name, place in models.modules.places.items()
        if name in models.pairing.tuned and _is_in(place.module, extra.whole)
    }
    tuned = models.tuned.mean
    specs |= {disk: tuned.specs[models.pairing.tuned[name]] for disk, name in copied.items()}
    biases = _biases(models, spool, extra)
    specs |= {disk: TensorSpec("F32", values.shape) for disk, values in biases.items()}
    metadata = {"format": "pt"}
    if (
        not models.base.parts
    ):  # of a base with an adapter PEFT loads the fold, which is another file
        metadata[BASE] = models.base.identity
    with SafetensorsSink(folder / WEIGHTS, specs, metadata) as sink:
        spool.copy(sink)
        for disk, values in biases.items():
            sink.write_bytes(disk, 0, encode(values, "F32"))
        for disk, name in copied.items():
            stored = models.pairing.tuned[name]
            item = ITEM_SIZE[tuned.specs[stored].dtype]
            for start, stop in chunks(tuned.specs[stored], _CHUNK):
                raw = np.empty((stop - start) * item, np.uint8)
                tuned.read_bytes(stored, start * item, raw.data)
                sink.write_bytes(disk, start * item, raw.data)
    return sum(spec.size for spec in specs.values())


def write_config(models: Models, spool: Spool, extra: Extra, folder: Path) -> None:
    """Write `adapter_config.json`, with alpha = r for every module, so that the scaling is 1."""
    ranks = {each.place.module: each.rank for each in spool.factors}
    ranks |= {head: ranks[embedding] for head, embedding in extra.tied.items()}
    most = max(ranks.values(), default=1)
    pattern = _rank_pattern(ranks, most)
    base = models.base
    parts = [(part.ref, part.path) for part in base.parts or (base,)]
    revision = base.ref.partition("@")[2] if len(parts) == 1 and is_hub_id(base.ref) else ""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": models.modules.task,
        "base_model_name_or_path": "+".join(_place(*part) for part in parts),
        "revision": revision or None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": list(extra.whole) or None,
        "fan_in_fan_out": any(each.place.transposed for each in spool.factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if extra.tied:
        config["ensure_weight_tying"] = True
    if extra.biases is not None:
        config["lora_bias"] = True
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _place(ref: str, path: Path) -> str:
    """Where PEFT finds a model from any folder: a Hub id, or the full path of its folder."""
    if is_hub_id(ref):
        return ref.partition("@")[0]
    return str((path if path.is_dir() else path.parent).resolve())


def copy_documents(models: Models, folder: Path) -> None:
    """Copy the tuned model's tokenizer and chat template; of a classifier also its config.

    Raises:
        CheckpointError: As `side_files`.
    """
    source = models.tuned.path
    if not source.is_dir():
        return
    for name in side_files(source):
        is_labels = name == Path("config.json") and models.modules.task in _LABELLED
        if group_of(name) in ("tokenizer", CHAT) or is_labels:
            copy_side_file(source / name, name, folder)


def _biases(models: Models, spool: Spool, extra: Extra) -> dict[str, Array]:
    """The changes of the biases of all adapted layers, by their names on disk."""
    if extra.biases is None:
        return {}
    by_module = {models.modules.places[name].module: name for name in extra.biases}
    found = {}
    for each in spool.factors:
        module = each.place.module
        rows = each.b[0]
        values = np.zeros(rows, np.float32)
        if module in by_module:
            tuned, base = models.values(by_module[module])
            values = (tuned - base).astype(np.float32)
        found[f"{PREFIX}{module}.lora_B.bias"] = values
    return found


def _rank_pattern(ranks: Mapping[str, int], most: int) -> dict[str, int]:
    """The ranks that are not the largest, the longest names first.

    PEFT takes the first pattern that matches the end of a name, from a dot on.
    """
    others = {module: rank for module, rank in ranks.items() if rank != most}
    ends = {f".{module}" for module in others}
    hidden = {m: most for m in ranks if m not in others and any(map(m.endswith, ends))}
    return dict(sorted((others | hidden).items(), key=lambda item: (-len(item[0]), item[0])))


def _is_in(module: str, whole: Sequence[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in whole)


def _pair(values: Array) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns
