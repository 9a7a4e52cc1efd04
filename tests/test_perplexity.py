"""Perplexity: equal to lm-eval, to a loop by hand, and to itself whatever the batch."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import processors

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.metrics import perplexity
from mergekit_bayes.metrics.base import resampled_sums
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model
from tests import tiny_models

CONTEXT = 16
TASK = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""


def documents(seed=0, lengths=(1, 3, 15, 16, 17, 31, 32, 33, 40, 7)):
    """Texts shorter than, as long as and longer than a window, with odd blanks."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(tiny_models.WORDS, size=n)) for n in lengths]
    return [*texts, "  the cat \n sat "]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(tiny_models.tiny_gpt2(tmp_path_factory.mktemp("gpt2"), context=CONTEXT)))


def measure(loaded, texts, **options):
    options = {"start": loaded.start, "window": CONTEXT, "bootstrap": 50} | options
    return measure_perplexity(loaded.model, loaded.tokenizer, texts, **options)


def by_hand(loaded, ids, start, window, stride):
    """Nats of a stream, one window at a time, from the definition."""
    stream, nats, at = [start, *ids], [], 0
    while at < len(ids):
        end = min(at + (window if at == 0 else stride), len(ids))
        inputs = stream[max(0, end - window) : end]
        with torch.no_grad():
            logp = loaded.model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        nats += [-logp[len(inputs) - end + i, ids[i]].item() for i in range(at, end)]
        at = end
    return np.array(nats)


def test_rolling_perplexity_equals_lm_eval(loaded, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="a test dependency")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = documents()
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "texts.yaml").write_text(TASK.format(path=data))
    expected = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=CONTEXT, batch_size=1
        ),
        tasks=["texts"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["texts"]
    report = measure(loaded, texts)
    assert report.protocol == "rolling"
    assert report.word.value == pytest.approx(expected["word_perplexity,none"], rel=1e-6)
    assert report.byte.value == pytest.approx(expected["byte_perplexity,none"], rel=1e-6)
    assert report.bits_per_byte.value == pytest.approx(expected["bits_per_byte,none"], rel=1e-6)


@pytest.fixture
def adding(tmp_path):
    """The same model, whose tokenizer begins a text with BOS by itself, as Llama's does."""
    folder = tiny_models.tiny_gpt2(tmp_path / "adding", context=CONTEXT)
    inner = tiny_models.tokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.save(str(folder / "tokenizer.json"))
    return load_model(str(folder))


@pytest.mark.parametrize("add_bos", [False, None])
@pytest.mark.parametrize("kind", ["loaded", "adding"])
def test_lm_eval_differs_only_where_it_scores_bos(kind, add_bos, request):
    """By its default it keeps what a tokenizer adds: BOS is predicted once and seen twice."""
    pytest.importorskip("lm_eval", reason="a test dependency")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded = request.getfixturevalue(kind)
    texts = documents()
    other = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=CONTEXT,
        batch_size=1,
        add_bos_token=add_bos,
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = -np.array(other.loglikelihood_rolling(requests, disable_tqdm=True))
    report = measure(loaded, texts)
    assert report.special_tokens == (kind == "adding")
    if kind == "loaded" or add_bos is False:
        np.testing.assert_allclose(theirs, report.document_nats, rtol=1e-5)
        return
    assert (np.abs(theirs - report.document_nats) > 0.01).all()
    encoded = [loaded.tokenizer(text)["input_ids"] for text in texts]
    assert all(ids[0] == 0 for ids in encoded)
    expected = [by_hand(loaded, ids, 0, CONTEXT, CONTEXT).sum() for ids in encoded]
    np.testing.assert_allclose(theirs, expected, rtol=1e-5)


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_every_token_of_a_document_is_scored_once_from_the_start_token(loaded, stride):
    texts = documents()
    report = measure(loaded, texts, stride=stride)
    for text, nats, tokens in zip(texts, report.document_nats, report.document_tokens, strict=True):
        ids = loaded.tokenizer(text)["input_ids"]
        assert tokens == len(ids)
        assert nats == pytest.approx(by_hand(loaded, ids, 0, CONTEXT, stride).sum(), rel=1e-5)
    assert report.tokens == sum(report.document_tokens)
    assert report.token.value == pytest.approx(math.exp(sum(report.document_nats) / report.tokens))


@pytest.mark.parametrize("stride", [16, 7])
def test_concatenated_texts_are_one_stream_joined_by_eos(loaded, stride):
    texts = documents()
    report = measure(loaded, texts, concatenate=True, stride=stride)
    ids = loaded.tokenizer("</s>".join(texts))["input_ids"]
    nats = by_hand(loaded, ids, 0, CONTEXT, stride)
    assert (report.protocol, report.stride, report.tokens) == ("concatenate", stride, len(ids))
    assert report.nats == pytest.approx(nats.sum(), rel=1e-5)
    first = len(loaded.tokenizer(texts[0])["input_ids"]) + 1  # its EOS is its own
    assert report.document_nats[0] == pytest.approx(nats[:first].sum(), rel=1e-5)


def test_the_order_of_the_texts_and_the_size_of_the_logits_do_not_change_the_numbers(
    loaded, monkeypatch
):
    texts = documents()
    order = np.random.default_rng(3).permutation(len(texts))
    expected = np.array(measure(loaded, texts).document_nats)
    for most in (perplexity.LOGITS, 1):
        monkeypatch.setattr(perplexity, "LOGITS", most)
        found = measure(loaded, [texts[i] for i in order]).document_nats
        np.testing.assert_allclose(found, expected[order], rtol=1e-6)


def test_a_batch_holds_no_more_logits_than_a_cpu_is_quick_with(loaded, monkeypatch):
    longest: list[int] = []
    scored = perplexity._score
    monkeypatch.setattr(
        perplexity,
        "_score",
        lambda model, batch: longest.append(len(batch)) or scored(model, batch),
    )
    texts = documents(lengths=[CONTEXT] * 9)[:9]
    for rows, expected in ((1000, 9), (4, 4), (0, 1)):
        longest.clear()
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        monkeypatch.setattr(perplexity, "LOGITS", rows * CONTEXT * vocabulary)
        measure(loaded, texts, batch_size=50)
        assert max(longest) == expected


def test_batches_do_not_change_the_numbers(loaded):
    texts = documents(1, lengths=range(1, 40))
    one, many = measure(loaded, texts, batch_size=1), measure(loaded, texts, batch_size=50)
    np.testing.assert_allclose(one.document_nats, many.document_nats, rtol=1e-5)


def test_more_context_of_a_repeating_text_changes_the_loss_but_not_the_tokens(loaded):
    text = ["the cat sat on mat . " * 20]
    apart, overlapping = measure(loaded, text), measure(loaded, text, stride=1)
    assert apart.tokens == overlapping.tokens
    assert apart.nats != overlapping.nats


def test_the_interval_is_that_of_the_ratio_over_resampled_documents(loaded):
    report = measure(loaded, documents(2, lengths=range(1, 60)), bootstrap=400, seed=3)
    rng = np.random.default_rng(3)
    nats, tokens = np.array(report.document_nats), np.array(report.document_tokens)
    draws = []
    for _ in range(400):
        rows = rng.integers(len(nats), size=len(nats))
        draws.append(nats[rows].sum() / tokens[rows].sum())
    low, high = np.percentile(draws, (2.5, 97.5), method="nearest")
    assert (report.loss.low, report.loss.high) == pytest.approx((low, high))
    assert report.token.low == pytest.approx(math.exp(low))
    assert report.loss.low < report.loss.value < report.loss.high


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(0).normal(size=(400, 1))
    means = resampled_sums(values, 2000, 1)[:, 0] / 400
    assert means.std() == pytest.approx(values.std() / 20, rel=0.1)


def test_one_document_has_no_interval(loaded):
    assert measure(loaded, ["the cat sat"]).loss.low is None


def test_a_window_or_stride_that_makes_no_sense_is_refused(loaded):
    with pytest.raises(ConfigError, match="stride 17: expected 1 to 16"):
        measure(loaded, documents(), stride=17)
    with pytest.raises(ConfigError, match="no token to score"):
        measure(loaded, ["", ""])


def test_a_model_with_nan_is_an_error_that_names_the_text(tmp_path):
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    with torch.no_grad():
        loaded.model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="text 1 is nan"):
        measure(loaded, documents())
