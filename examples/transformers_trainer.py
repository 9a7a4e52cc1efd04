"""transformers' Trainer with IVON: `Trainer` becomes `IvonTrainer`, and nothing else changes.

python examples/transformers_trainer.py openai-community/gpt2 texts.jsonl tuned
bmerge merge tuned other --weights precision -o merged
"""

import json
import sys

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from mergekit_bayes.trainer import IvonTrainer


def main(model: str, data: str, output: str, steps: int = 100) -> None:
    """Train `model` on the column `text` of a JSON lines file, and write model and posterior."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(data) as lines:
        texts = Dataset.from_list([json.loads(line) for line in lines])
    rows = texts.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512),
        remove_columns=texts.column_names,
    )
    trainer = IvonTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=TrainingArguments(
            f"{output}.checkpoints",
            learning_rate=1e-4,  # as for AdamW: no weight moves further in a step
            max_steps=steps,
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(output)  # the posterior, too


if __name__ == "__main__":
    main(*sys.argv[1:])
