"""Real files of Adam's second moments: a short run of the Trainer, and what else writes them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from mergekit_bayes.models.encode import Collate, encode_rows
from mergekit_bayes.models.load import load_model
from tests.tiny_models import tiny_gpt2
from tests.trainers import ROWS

BETA2 = 0.99
COUNTS = {"observations": 5000, "batch_observations": 40}


class Run(NamedTuple):
    """A run of the Trainer.

    Attributes:
        folder: Where it wrote `checkpoint-3` and `checkpoint-5`.
        squares: Squared gradients of each step as the optimizer got them, by parameter name.
    """

    folder: Path
    squares: list[dict[str, torch.Tensor]]

    def expected(self, step: int) -> dict[str, torch.Tensor]:
        """What the precision must be: N B of the debiased moving average, by name in memory."""
        factor = COUNTS["observations"] * COUNTS["batch_observations"] / (1 - BETA2**step)
        average = {name: torch.zeros_like(g) for name, g in self.squares[0].items()}
        for squares in self.squares[:step]:
            average = {n: BETA2 * v + (1 - BETA2) * squares[n] for n, v in average.items()}
        return {name: v * factor for name, v in average.items()}


class Watch(transformers.TrainerCallback):
    def __init__(self):
        self.squares = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.squares.append({n: p.grad.double().square() for n, p in model.named_parameters()})


def trainer(model, tokenizer, rows, folder, **arguments):
    """A Trainer with AdamW, whose groups are with and without decay."""
    watch = Watch()
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "adam_beta2": BETA2,
        "weight_decay": 0.1,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "optim": "adamw_torch",
        **arguments,
    }
    return watch, transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=Collate(2),
        callbacks=[watch],
        processing_class=tokenizer,
    )


def trained(folder):
    """The run that the tests share."""
    loaded = load_model(str(tiny_gpt2(folder / "start")))
    watch, inner = trainer(
        loaded.model, loaded.tokenizer, encode_rows(ROWS, loaded), folder / "run"
    )
    inner.train()
    return Run(folder / "run", watch.squares)


def copied(checkpoint, folder, *without):
    """A copy of a checkpoint's folder, without some of its files."""
    shutil.copytree(checkpoint, folder)
    for name in without:
        (folder / name).unlink()
    return folder


class InChunks(torch.Tensor):
    """A tensor that torch.distributed.checkpoint stores in two chunks of rows, as two ranks do."""

    @staticmethod
    def of(tensor):
        return torch.Tensor._make_subclass(InChunks, tensor)

    def _parts(self):
        half = self.shape[0] // 2
        return [(0, half), (half, self.shape[0])]

    def __create_chunk_list__(self):
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rest = tuple(self.shape[1:])
        return [
            ChunkStorageMetadata(
                offsets=torch.Size((a, *(0 for _ in rest))), sizes=torch.Size((b - a, *rest))
            )
            for a, b in self._parts()
        ]

    def __create_write_items__(self, fqn, tensor):
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size(self.shape),
                ),
            )
            for i, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __get_tensor_shard__(self, index):
        a, b = self._parts()[0 if index.offset[0] == 0 else 1]
        return self.as_subclass(torch.Tensor)[a:b].clone()


def shards(folder, state):
    """A folder of torch.distributed.checkpoint, written by one process."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder
