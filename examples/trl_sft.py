"""trl's SFTTrainer with IVON: `SFTTrainer` becomes `IvonSFTTrainer`, and nothing else changes.

pip install 'mergekit-bayes[sft]'
python examples/trl_sft.py Qwen/Qwen3-0.6B chats.jsonl tuned
bmerge merge tuned other --weights precision -o merged
"""

import json
import sys

import torch
from datasets import Dataset
from trl import SFTConfig

from mergekit_bayes.trainer import IvonSFTTrainer


def main(model: str, data: str, output: str, steps: int = 100) -> None:
    """Train `model` on rows as SFTTrainer takes them, and write model and posterior."""
    with open(data) as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    trainer = IvonSFTTrainer(
        model=model,
        args=SFTConfig(
            f"{output}.checkpoints",
            learning_rate=1e-4,  # as for AdamW: no weight moves further in a step
            max_steps=steps,
            max_length=512,
            use_cpu=not torch.cuda.is_available(),  # where trl would ask for bfloat16 in vain
            report_to=[],
        ),
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model(output)  # the posterior, too


if __name__ == "__main__":
    main(*sys.argv[1:])
