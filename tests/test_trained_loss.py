"""The curvature is that of the loss which transformers trains with, for every kind of model."""

import doctest
import re
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, GPT2Config

from mergekit_bayes import heads
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import PrecisionConfig
from tests.tiny_models import tiny_bert

SIZES = {
    "vocab_size": 7,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BERT = partial(BertConfig, **SIZES)
GPT2 = partial(
    GPT2Config,
    vocab_size=7,
    n_positions=8,
    n_embd=4,
    n_layer=1,
    n_head=1,
    initializer_range=0.5,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2], [3, 3, 2, 6]])
SEQUENCE = transformers.BertForSequenceClassification
FLOATS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
NUMBERS = torch.tensor([[0.3, -1.0, 2.0], [0.1, 0.5, 0.0], [1.0, -2.0, 0.7]])
SOME = torch.tensor([[-100, 2, -100, 1], [0, -100, 2, -100], [-100, 1, 1, -100]])  # labels
CLASSES = torch.tensor([0, 2, 1])
# Model, config, labels, and whether one observation a batch gives the diagonal without noise:
# then the square of a sign is all that is random.
MENU = {
    "regression, one number": (SEQUENCE, BERT(num_labels=1), NUMBERS[:, 0], True),
    "regression, three numbers": (
        SEQUENCE,
        BERT(num_labels=3, problem_type="regression"),
        NUMBERS,
        True,
    ),
    "several labels": (
        SEQUENCE,
        BERT(num_labels=3, problem_type="multi_label_classification"),
        FLOATS,
        True,
    ),
    "several labels that only the data tell": (SEQUENCE, BERT(num_labels=3), FLOATS, True),
    "one label": (
        SEQUENCE,
        BERT(num_labels=3, problem_type="single_label_classification"),
        CLASSES,
        False,
    ),
    "one label that only the data tell": (
        SEQUENCE,
        BERT(num_labels=3, id2label={0: "toxic", 1: "insult", 2: "threat"}),
        CLASSES,
        False,
    ),
    "a label for each token": (
        transformers.BertForTokenClassification,
        BERT(num_labels=3),
        SOME,
        False,
    ),
    "masked tokens": (transformers.BertForMaskedLM, BERT(), SOME, False),
    # A config that speaks of a regression does not make one of a language model.
    "next tokens": (transformers.GPT2LMHeadModel, GPT2(num_labels=1), IDS, False),
}


def head_of(model):
    """The weights and the bias of the last layer, in which the logits are linear."""
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    for p in model.parameters():
        p.requires_grad_(False)
    return list(dict(last.named_parameters(recurse=False)).values())


@pytest.mark.parametrize("kind", MENU)
def test_the_curvature_is_the_hessian_of_the_models_own_loss(kind):
    """Where logits are linear in the weights, the Gauss-Newton matrix is the Hessian."""
    model_class, config, labels, is_exact = MENU[kind]
    torch.manual_seed(0)
    model = model_class(config).eval()
    head = head_of(model)
    for p in head:
        p.requires_grad_(True)
    # `problem_type` as the config has it: transformers writes it into the config at the first loss.
    problem = config.problem_type
    rows = [{"input_ids": IDS[i : i + 1], "labels": labels[i : i + 1]} for i in range(3)]
    draws = 1 if is_exact else 150
    estimate = ggn_diagonal(model, rows * draws, seed=1)
    assert config.problem_type == problem

    of_tokens = labels.shape == IDS.shape
    scored = labels[:, 1:] if kind == "next tokens" else labels
    count = int((scored != -100).sum()) if of_tokens else len(IDS)
    assert estimate.observations == draws * count
    loss = model(input_ids=IDS, labels=labels).loss * count
    gradients = torch.autograd.grad(loss, head, create_graph=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [tuple(estimate.total[n].shape) for n in names] == [tuple(p.shape) for p in head]
    found, expected = [], []
    for name, p, gradient in zip(names, head, gradients, strict=True):
        found.append(estimate.total[name].flatten() / draws)
        expected += [
            torch.autograd.grad(g, p, retain_graph=True)[0].flatten()[i]
            for i, g in enumerate(gradient.flatten())
        ]
    found, expected = torch.cat(found), torch.stack(expected)
    if is_exact:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    else:
        # Three batches a draw, of relative variance at most 2: four deviations are 27 %.
        assert float(found.sum() / expected.sum()) == pytest.approx(1, abs=0.27)
        assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.95


@pytest.mark.parametrize(
    ("labels", "problem", "weight"),
    [
        (1, None, lambda z: torch.full_like(z, 2.0)),
        (3, "regression", lambda z: torch.full_like(z, 2 / 3)),
        (3, "multi_label_classification", lambda z: z.sigmoid() * (1 - z.sigmoid()) / 3),
    ],
)
def test_a_stored_precision_is_in_the_unit_of_transformers_loss(tmp_path, labels, problem, weight):
    """The bias of the head: at one row a batch its draws have no noise."""
    folder = tiny_bert(tmp_path / "bert", labels=labels, problem_type=problem)
    texts = ["the cat sat on the mat .", "a dog ran", "good film", "dull"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    config = PrecisionConfig(
        model=str(folder), data=str(tmp_path / "texts.txt"), batch_size=1, prior=0.25
    )
    report = run_precision(config, quiet=True)
    loaded = load_model(str(folder))
    (batch,) = batches(encode_rows({"text": texts}, loaded), 4, Collate(loaded.pad))
    with torch.no_grad():
        expected = weight(loaded.model(**batch).logits).sum(0) + 0.25
    (file,) = report.path.glob("*.posterior")
    loss = "squared error" if problem in (None, "regression") else "binary cross-entropy"
    with open_posterior(str(folder)) as posterior:
        recorded = posterior.info.training["loss"]
    assert recorded.startswith(loss)
    assert recorded.endswith(", mean over the outputs")
    stored = load_file(file)["precision:classifier.bias"]
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "problem", "words"),
    [
        (["a", "b", "c"], None, "assumed: config.json names no problem_type"),
        (["a", "b", "c"], "single_label_classification", "softmax.*single_label_classification"),
        (["toxic", "insult", "male"], None, "binary cross-entropy.*'toxic' and 'insult' at once"),
        (["toxic", "insult", "b"], None, "assumed: config.json names no problem_type"),
        (["a"], None, "squared error.*one output"),
    ],
)
def test_the_loss_is_told_with_what_says_so(names, problem, words):
    config = BERT(num_labels=len(names), problem_type=problem, id2label=dict(enumerate(names)))
    described = trained_loss(SEQUENCE(config)).describe()
    assert re.search(words, described), described


def test_an_adapter_hides_neither_the_loss_nor_the_labels():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    found = trained_loss(
        get_peft_model(SEQUENCE(BERT(num_labels=3, problem_type="regression")), lora)
    )
    assert (found.likelihood, found.averages, found.scale(3)) == ("gaussian", True, 2 / 3)
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    found = trained_loss(get_peft_model(transformers.GPT2LMHeadModel(GPT2(num_labels=1)), lora))
    assert (found.likelihood, found.shifts, found.scale(7)) == ("categorical", True, 1)


@pytest.mark.parametrize(
    ("names", "problem", "likelihood"),
    [
        (["rude", "angry"], "multi_label_classification", "bernoulli"),
        (["x", "y", "z"], "multi_label_classification", "bernoulli"),
        (["score"], "regression", "gaussian"),
        (["u", "v"], "regression", "gaussian"),
        (["toxic", "insult", "threat"], "single_label_classification", "categorical"),
    ],
)
@pytest.mark.parametrize("of_base", [True, False])
def test_a_saved_adapter_keeps_its_problem(tmp_path, names, problem, likelihood, of_base):
    """What its own config.json says, else that of the base whose head it adapts."""
    from peft import LoraConfig, get_peft_model

    others = {"multi_label_classification": "regression"}.get(problem, "multi_label_classification")
    base = tiny_bert(
        tmp_path / "base",
        labels=len(names),
        names=names,
        problem_type=problem if of_base else others,
    )
    loaded = load_model(str(base))
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(loaded.model, lora).save_pretrained(tmp_path / "adapter")
    loaded.model.config.problem_type = None if of_base else problem
    loaded.model.config.save_pretrained(tmp_path / "adapter")
    read = load_model(str(tmp_path / "adapter"))
    assert trained_loss(read.model).likelihood == likelihood
    assert heads.head_of(read.model.config) == (likelihood, f"config.json says {problem}")
    assert list(read.model.config.id2label.values()) == names


@pytest.mark.parametrize(
    "unknown",
    ["benign", "civil", "healthy", "negative", "nothing", "not abusive", "neutral", "OK", "spam"],
)
def test_one_unknown_label_leaves_open_whether_labels_exclude_each_other(unknown):
    for known in (["toxic", "insult"], ["Toxicity", "threat", "obscene"]):
        assert heads.read_head(None, dict(enumerate(known)), len(known)).likelihood == "bernoulli"
        names = [*known, unknown]
        assert heads.read_head(None, dict(enumerate(names)), len(names)).likelihood is None


def test_the_examples_of_heads_run():
    assert doctest.testmod(heads) == (0, 2)
