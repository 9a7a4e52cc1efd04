"""A small merge to preview: a base, two tasks moved from it, precisions, texts and recipes."""

from pathlib import Path

import torch
import yaml

from mergekit_bayes.models.load import load_model
from tests.tiny_models import WORDS, give_posterior, tiny_bert, tiny_gpt2, tiny_mixtral

TASKS = ("a", "b")
MODELS = {"gpt2": tiny_gpt2, "bert": tiny_bert, "mixtral": tiny_mixtral}


def world(folder, kind="gpt2", tasks=TASKS, weights=True, spread=0.02):
    """Folders `base` and the tasks, `cats.csv` and `films.csv`; texts have labels."""
    folder = Path(folder)
    for seed, name in enumerate(("base", *tasks)):
        MODELS[kind](folder / name)
        loaded = load_model(str(folder / name))
        if seed:
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in loaded.model.parameters():
                    parameter += spread * torch.randn_like(parameter)
            loaded.model.save_pretrained(folder / name)
        if weights:
            give_posterior(folder / name, loaded, seed=seed)
    for number, name in enumerate(("cats", "films")):
        lines = [
            f"{' '.join(WORDS[(i * 5 + number + j * (number + 2)) % 20] for j in range(9))},{i % 2}"
            for i in range(6)
        ]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder


def recipe(path, **settings):
    """A recipe of the tasks on the base."""
    content = {"models": list(TASKS), "base": "base", **settings}
    Path(path).write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return str(path)
