"""A loop with accelerate, on one device or as replicas on many.

accelerate launch examples/accelerate_loop.py openai-community/gpt2 texts.jsonl tuned
bmerge merge tuned other --weights precision -o merged
"""

import json
import sys

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import add_logit_curvature, ivon_settings, save_trained


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
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(name)
    model, loader = accelerator.prepare(
        model, DataLoader(texts, 8, shuffle=True, collate_fn=collate)
    )
    # The optimizer stays unwrapped, so that `sampled_params` is at hand.
    settings = ivon_settings(model, observations=tokens, steps=steps, learning_rate=1e-4)
    optimizer = IVON(model.parameters(), **settings)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model.train()
    done = 0
    while done < steps:
        for batch in loader:
            with optimizer.sampled_params(train=True):
                outputs = model(**batch)
                add_logit_curvature(optimizer, outputs.logits, batch["labels"])
                accelerator.backward(outputs.loss)
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    model = accelerator.unwrap_model(model)
    save_trained(model, optimizer, output, observations=tokens, tokenizer=tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
