"""A sharded model for the rank that stores it: one whole tensor after the other.

Rank 0 stores, and asks for a tensor when its turn has come; all ranks then gather that one
(`ranks.lead`). No rank ever holds two whole tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from mergekit_bayes.checkpoint.layout import shard_name, write_index
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.curvature import Keeping
from mergekit_bayes.curvature.health import glance, glanced_health
from mergekit_bayes.finetune.data import Run
from mergekit_bayes.finetune.shard_files import stored_bytes, stored_dtype
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.models.places import checkpoint_names, kept_tensors, stored_places
from mergekit_bayes.models.sharding import sum_gradients
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.shards import like_shard, local, whole_tensor
from mergekit_bayes.posterior.save import Later
from mergekit_bayes.ranks import gather, lead, world

R = TypeVar("R")
_FILE = 50_000_000_000  # bytes of a file of weights at most, as `save_pretrained` has it
_ESTIMATOR = "ggn"


class _Asked(NamedTuple):
    """What rank 0 asks of all ranks.

    Attributes:
        kind: A whole weight, a whole precision, the flush, or the health.
        name: Of the parameter or buffer.
    """

    kind: Literal["weight", "precision", "flush", "health"]
    name: str = ""


class Gathered:
    """What is stored of a sharded model.

    Args:
        run: The run, whose model is trained now.
        optimizer: IVON at the end of training; None after AdamW.
    """

    def __init__(self, run: Run, optimizer: IVON | None) -> None:
        self._run, self._optimizer = run, optimizer
        self._model = run.loaded.model
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._kept = kept_tensors(self._model)
        self._curvature: dict[str, Tensor] = {}  # this rank's rows, per observation
        self._ask: Callable[[_Asked], object] = self._do
        self._found: Tensor | dict[str, float] | None = None
        self._parts: tuple[_Asked, dict[str, Tensor]] | None = None  # the last whole tensor

    def lead(self, work: Callable[[], R]) -> R:
        """Do work on rank 0, in which this object can be asked. Every rank must call this."""

        def asking(together: Callable[[_Asked], object]) -> R:
            self._ask = together
            return work()

        return lead(asking, self._do)

    def flush(self) -> None:
        """Take the curvature at the final weights, of which each rank keeps its rows."""
        self._ask(_Asked("flush"))

    def health(self) -> dict[str, float]:
        """The optimizer's numbers and those of the precision."""
        self._ask(_Asked("health"))
        assert isinstance(self._found, dict)
        return self._found

    def adapter(self, kind: Literal["weight", "precision"]) -> dict[str, Tensor]:
        """All that is trained of an adapter, which is small, by its name in memory."""
        return {name: self._whole(_Asked(kind, name)) for name in self._trained}

    def precision(self) -> dict[str, Later]:
        """The precision of every trained tensor, under the names that are stored."""

        def entries(asked: _Asked, part: str) -> Array:
            values: Array = self._stored(asked, part).float().numpy()
            return values

        return {
            part: Later(tuple(like.shape), partial(entries, _Asked("precision", name), part))
            for name, stored in stored_places(self._model, self._trained).items()
            for part, like in stored.items()
        }

    def save_model(self, folder: Path) -> None:
        """Write the weights as `save_pretrained` would, and what belongs to them.

        Raises:
            CheckpointError: They cannot be written.
        """
        if hasattr(self._model, "peft_config"):
            self._model.save_pretrained(folder, state_dict=self.adapter("weight"))
            return
        self._model.save_pretrained(folder, state_dict={})  # all but the weights
        places = stored_places(self._model, self._kept)
        owners = {part: name for name, stored in places.items() for part in stored}
        specs = {
            part: TensorSpec(stored_dtype(like), tuple(like.shape))
            for stored in places.values()
            for part, like in stored.items()
        }
        files = list(_by_file(specs))
        names = [shard_name("model", i, len(files)) for i in range(len(files))]
        for file, parts in zip(names, files, strict=True):
            own = {part: specs[part] for part in parts}
            with SafetensorsSink(folder / file, own, {"format": "pt"}) as sink:
                for part in parts:  # nothing here may name a tensor, which would then stay
                    asked = _Asked("weight", owners[part])
                    sink.write_bytes(part, 0, stored_bytes(self._stored(asked, part)))
        if len(files) > 1:
            total = sum(spec.nbytes for spec in specs.values())
            write_index(folder, "model", dict(zip(names, files, strict=True)), total)

    def _whole(self, asked: _Asked) -> Tensor:
        self._ask(asked)
        assert isinstance(self._found, Tensor)
        return self._found

    def _stored(self, asked: _Asked, part: str) -> Tensor:
        """One stored tensor; what is gathered for it is kept for the others made of it."""
        if self._parts is None or self._parts[0] != asked:
            self._parts = None
            self._parts = asked, checkpoint_names(self._model, {asked.name: self._whole(asked)})
        return self._parts[1][part]

    def _do(self, asked: _Asked) -> None:
        """What every rank does."""
        self._found = None
        if asked.kind == "flush":
            self._flush()
        elif asked.kind == "health":
            self._found = self._health()
        elif asked.kind == "weight":
            self._found = whole_tensor(self._kept[asked.name])
        else:
            self._found = whole_tensor(self._rows(asked.name))

    def _rows(self, name: str) -> Tensor:
        """The precision of a parameter, sharded as it is."""
        parameter, config = self._trained[name], self._run.config
        if config.posterior == "ivon":
            assert self._optimizer is not None
            return self._optimizer.precision([(name, parameter)])[name]
        total = float(self._run.observations)
        prior = 0.0 if self._optimizer is None else total * config.weight_decay
        return like_shard(self._curvature[name] * total + prior, parameter)

    def _flush(self) -> None:
        config = self._run.config
        sum_gradients(self._model)
        count = config.flush_batches * config.batch_size
        found = estimate_curvature(
            _ESTIMATOR,
            self._run.loaded,
            random_examples(self._run.examples, count, config.seed),
            batch_size=config.batch_size,
            seed=config.seed,
            keep=Keeping(is_shared=True, is_sharded=True, is_gathered=False),
        )
        self._curvature = {n: s.div_(found.observations) for n, s in found.total.items()}

    def _health(self) -> dict[str, float]:
        batch_size = self._run.choices.batch_size
        health = {} if self._optimizer is None else self._optimizer.health(batch_size)
        rows = (local(self._rows(name)) for name in self._trained)
        return health | glanced_health(gather(glance(rows, world())))


def _by_file(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """The names of the tensors of each file, which are filled up in order."""
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.nbytes > _FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.nbytes
    yield names
