"""Lightning with IVON by manual optimization.

pip install lightning
python examples/lightning_manual.py openai-community/gpt2 texts.jsonl tuned
bmerge merge tuned other --weights precision -o merged
"""

import json
import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import add_logit_curvature, ivon_settings, save_trained


class LanguageModel(lightning.LightningModule):
    """A causal language model that IVON trains."""

    def __init__(self, name: str, tokens: int, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = AutoModelForCausalLM.from_pretrained(name).train()
        self.tokens, self.steps = tokens, steps

    def configure_optimizers(self) -> IVON:
        """IVON, with settings for these data and this number of steps."""
        settings = ivon_settings(self.model, self.tokens, self.steps, learning_rate=1e-4)
        return IVON(self.model.parameters(), **settings)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        """One step: IVON calls the closure once for each weight sample, at that sample."""
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            outputs = self.model(**batch)
            add_logit_curvature(optimizer.optimizer, outputs.logits, batch["labels"])
            self.manual_backward(outputs.loss)
            return outputs.loss

        optimizer.step(closure=closure)


def main(name: str, data: str, output: str, steps: int = 100) -> None:
    """Train a language model on the column `text`, and write model and posterior."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(data) as lines:
        texts = [json.loads(line)["text"] for line in lines]

    def collate(rows: list[str]) -> dict:
        batch = tokenizer(rows, truncation=True, max_length=512, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}

    tokens = sum(
        len(ids) - 1 for ids in tokenizer(texts, truncation=True, max_length=512).input_ids
    )
    module = LanguageModel(name, tokens, steps)
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, logger=False, devices=1)
    trainer.fit(module, DataLoader(texts, 8, shuffle=True, collate_fn=collate))
    optimizer = module.optimizers().optimizer
    save_trained(module.model, optimizer, output, observations=tokens, tokenizer=tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
