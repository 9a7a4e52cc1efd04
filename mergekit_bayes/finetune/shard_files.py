"""Checkpoints of a run on shards: each rank writes its own rows of every tensor, and reads them.

    weights-rank-0-of-2.safetensors       what is trained, and the model's buffers
    optimizer-rank-0-of-2.safetensors     the optimizer's state; its settings in the header

No rank gathers anything, and no file is a pickle. Only a run of as many processes can read them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.documents import parse_json
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.models.sharding import is_sharded
from mergekit_bayes.optim.shards import like_shard, local
from mergekit_bayes.ranks import in_step, own_number, world

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import TrainingArguments

_GROUPS = "param_groups"  # in the header of the optimizer's file
_SCHEDULER = "scheduler.pt"  # the Trainer's own name
_ADVICE = "Remove this checkpoint, to resume from the one before it."
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardsMixin:
    """In front of transformers' Trainer: a sharded model is trained as it is, and saved in shards.

    Any other model is left to the Trainer.
    """

    model: torch.nn.Module
    optimizer: Optimizer
    lr_scheduler: "LRScheduler"
    args: "TrainingArguments"
    accelerator: "Accelerator"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if is_sharded(self.model):
            prepare = self.accelerator.prepare_model
            # As for an evaluation: the model gets its autocast, and no DDP around it.
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def save_model(self, *args: object, **kwargs: object) -> None:
        """Write the model as the Trainer does; not its whole weights, where they are sharded."""
        if not is_sharded(self.model):
            super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        folder = Path(output_dir)
        files = own_files(folder)  # inside of `in_step` a rank does not know the others
        in_step(lambda: save_shards(self.model, self.optimizer, *files))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER)

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]
            return
        file = own_files(Path(checkpoint))[0]
        in_step(lambda: load_weights(self.model, file))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self.load_optimizer(checkpoint)
        scheduler = torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def load_optimizer(self, checkpoint: str) -> None:
        """Load the state of a sharded model's optimizer. Every rank must call this."""
        file = own_files(Path(checkpoint))[1]
        in_step(lambda: load_optimizer(self.model, self.optimizer, file))

    def _load_best_model(self) -> None:
        if not is_sharded(self.model):
            super()._load_best_model()  # type: ignore[misc]
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[attr-defined]


def own_files(folder: Path) -> tuple[Path, Path]:
    """This rank's files of weights and of the optimizer, in a checkpoint's folder."""
    rank = f"rank-{own_number()}-of-{world()}.safetensors"
    return folder / f"weights-{rank}", folder / f"optimizer-{rank}"


def save_shards(model: torch.nn.Module, optimizer: Optimizer, weights: Path, state: Path) -> None:
    """Write this rank's rows of what is trained, and of the optimizer's state.

    Args:
        model: A sharded model.
        optimizer: Its optimizer.
        weights: File of the weights, in a folder that may not be there yet.
        state: File of the optimizer.

    Raises:
        CheckpointError: They cannot be written.
    """
    weights.parent.mkdir(parents=True, exist_ok=True)
    _write(weights, {name: local(t) for name, t in _changing(model).items()}, {})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    rows = {name: local(tensor) for name, tensor in _states(model, optimizer)}
    _write(state, rows, {_GROUPS: json.dumps(groups)})


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Read this rank's rows into a sharded model.

    Raises:
        CheckpointError: They cannot be read, or are of another model.
    """
    expected = {name: local(tensor) for name, tensor in _changing(model).items()}

    def shape_of(name: str) -> tuple[int, ...] | None:
        return tuple(expected[name].shape) if name in expected else None

    found = dict(_read(file, shape_of)[0])
    if lost := sorted(set(expected) - set(found)):
        raise CheckpointError(f"{file}: does not hold '{lost[0]}', which is trained. {_ADVICE}")
    with torch.no_grad():
        for name, tensor in found.items():
            expected[name].copy_(tensor)


def load_optimizer(model: torch.nn.Module, optimizer: Optimizer, file: Path) -> None:
    """Read this rank's rows of an optimizer's state.

    Raises:
        CheckpointError: They cannot be read, or are of another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def shape_of(name: str) -> tuple[int, ...] | None:
        parameter = parameters.get(name.partition(" ")[0])
        return None if parameter is None else tuple(local(parameter).shape)

    tensors, metadata = _read(file, shape_of, scalars=True)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        owner, _, key = name.partition(" ")
        parameter = parameters[owner]
        # Scalars, such as the number of steps, are the same on all ranks.
        whole = like_shard(tensor.to(local(parameter).device), parameter) if tensor.ndim else tensor
        states.setdefault(owner, {})[key] = whole
    names = {id(p): name for name, p in parameters.items()}
    owners = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    order = {name: i for i, name in enumerate(n for group in owners for n in group)}
    groups = _groups(metadata, file, len(owners))
    optimizer.load_state_dict(
        {
            "state": {order[name]: state for name, state in states.items()},
            "param_groups": [
                {**group, "params": [order[name] for name in own]}
                for group, own in zip(groups, owners, strict=True)
            ],
        }
    )


def _changing(model: torch.nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters and buffers, by name; frozen weights do not change."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def _states(model: torch.nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the optimizer's state, by the names of their parameter and of the value."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name} {key}", value


def _groups(metadata: Mapping[str, str], file: Path, count: int) -> list[dict[str, Any]]:
    """The optimizer's settings, from a header."""
    try:
        groups = parse_json(metadata[_GROUPS])
    except (KeyError, ValueError):
        groups = None
    is_list = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not isinstance(groups, list) or not is_list or len(groups) != count:
        raise CheckpointError(f"{file}: does not hold the optimizer's settings. {_ADVICE}")
    return [{k: tuple(v) if isinstance(v, list) else v for k, v in g.items()} for g in groups]


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    specs = {n: TensorSpec(_DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    with SafetensorsSink(path, specs, metadata, shared=True) as sink:
        for name, tensor in tensors.items():
            sink.write_bytes(name, 0, stored_bytes(tensor))


def stored_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a file of safetensors has them."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    bytes_: memoryview = flat.view(torch.uint8).numpy().data
    return bytes_


def stored_dtype(tensor: Tensor) -> str:
    """The name of a tensor's dtype in files of safetensors."""
    return _DTYPES[tensor.dtype]


def _read(
    file: Path, shape_of: Callable[[str], tuple[int, ...] | None], *, scalars: bool = False
) -> tuple[list[tuple[str, Tensor]], Mapping[str, str]]:
    """All tensors of a file, and its metadata.

    Args:
        file: The file.
        shape_of: The shape that a tensor should have; None for a name that should not be there.
        scalars: Whether any tensor may be a scalar instead.

    Raises:
        CheckpointError: It cannot be read, or holds other names, shapes or dtypes.
    """
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    tensors = []
    with SafetensorsSource([file]) as source:
        for name, spec in source.specs.items():
            expected = shape_of(name)
            is_scalar = scalars and not spec.shape
            if expected is None or spec.dtype not in dtypes:
                raise CheckpointError(f"{file}: holds '{name}', which is not trained. {_ADVICE}")
            if spec.shape != expected and not is_scalar:
                raise CheckpointError(
                    f"{file}: this rank's rows of '{name}' are {list(spec.shape)}, expected "
                    f"{list(expected)}. {_ADVICE}"
                )
            tensor = torch.empty(spec.shape, dtype=dtypes[spec.dtype])
            source.read_bytes(name, 0, stored_bytes(tensor))  # into the tensor itself
            tensors.append((name, tensor))
        return tensors, source.metadata
