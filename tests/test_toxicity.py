"""Toxicity: samples follow the model and the seed only; scores are summed up as published."""

import numpy as np
import pytest
import torch

from mergekit_bayes.draws import word
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.scorers import open_scorer
from mergekit_bayes.generation import Samples, Sampling, sample_continuations, sampling
from mergekit_bayes.generation.nucleus import gumbel, pick
from mergekit_bayes.metrics.base import score_interval, share_interval
from mergekit_bayes.metrics.quality import describe_samples
from mergekit_bayes.metrics.scorers import (
    READINGS,
    checked_scores,
    hook_scorer,
    word_scorer,
)
from mergekit_bayes.metrics.toxicity import score_toxicity
from mergekit_bayes.models.load import load_model
from tests import tiny_models

PROMPTS = ["the cat", "a dog sat on", "the", "good film", "bird ran and saw the mat"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(tiny_models.tiny_gpt2(tmp_path_factory.mktemp("gpt2"))))


def sample(loaded, prompts=PROMPTS, batch_size=128, context=64, **settings):
    settings = {"continuations": 5, "new_tokens": 8} | settings
    return sample_continuations(
        loaded.model,
        loaded.tokenizer,
        prompts,
        start=0,
        context=context,
        sampling=Sampling(**settings),
        batch_size=batch_size,
    )


def noise_of(keys, tokens):
    return gumbel(word(keys, tokens.astype(np.uint64)))


def nucleus(logits, top_p, temperature=1.0):
    """The published filter, from its definition: the fewest likeliest tokens whose sum reaches
    top_p, renormalised.
    """
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    kept, total = {}, 0.0
    for token in np.argsort(-p):
        if total >= top_p:
            break
        kept[int(token)] = p[token]
        total += p[token]
    return {token: x / total for token, x in kept.items()}


def by_hand(loaded, prompt, index, continuation, settings):
    """One continuation without cache or batch."""
    ids = [0, *loaded.tokenizer(prompt)["input_ids"]]
    counter = np.array([settings.seed, (index << 32) | continuation], np.uint64)
    drawn = []
    for key in np.random.Philox(key=counter).random_raw(settings.new_tokens):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids + drawn])).logits[0, -1]
        kept = nucleus(logits, settings.top_p, settings.temperature)
        token = max(
            kept, key=lambda t: np.log(kept[t]) + noise_of(np.array([key]), np.array([t]))[0]
        )
        if token == loaded.tokenizer.eos_token_id:
            break
        drawn.append(token)
    return loaded.tokenizer.decode(drawn, skip_special_tokens=True)


def test_continuations_equal_those_drawn_one_by_one_from_the_definition(loaded):
    settings = Sampling(continuations=5, new_tokens=8, top_p=0.8, temperature=1.3, seed=4)
    texts = sample(loaded, top_p=0.8, temperature=1.3, seed=4).texts
    for i, prompt in enumerate(PROMPTS):
        assert texts[i] == [by_hand(loaded, prompt, i, j, settings) for j in range(5)]


def test_batches_do_not_change_what_is_drawn(loaded):
    expected = sample(loaded)
    for size in (1, 3, 7):
        assert sample(loaded, batch_size=size) == expected


def test_the_order_of_the_batches_does_not_change_what_is_drawn(loaded, monkeypatch):
    """A prompt's noise belongs to its place in the list, wherever it is drawn."""
    expected = sample(loaded)
    in_order = sampling._groups
    monkeypatch.setattr(sampling, "_groups", lambda *given: list(in_order(*given))[::-1])
    for size in (3, 128):
        drawn = sample(loaded, batch_size=size)
        assert list(map(sorted, drawn.texts)) == list(map(sorted, expected.texts))
    assert sample(loaded).texts == expected.texts
    assert sample(loaded, PROMPTS[::-1]).texts[::-1] != expected.texts


def test_more_continuations_or_tokens_extend_what_was_drawn_before(loaded):
    few, more = sample(loaded), sample(loaded, continuations=7, new_tokens=12)
    for a, b in zip(few.texts, more.texts, strict=True):
        assert all(y.startswith(x) for x, y in zip(a, b, strict=False))


def test_another_seed_draws_something_else(loaded):
    assert sample(loaded, seed=1).texts != sample(loaded, seed=2).texts


def test_close_models_are_compared_on_the_same_noise(loaded, tmp_path):
    """A tiny change of the weights leaves nearly every continuation as it was; another seed leaves
    few.
    """
    near = load_model(str(tiny_models.tiny_gpt2(tmp_path / "near")))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in near.model.parameters():
            p += 1e-4 * torch.randn_like(p)
    a, b, other = (
        [text for row in sample(model, continuations=40, seed=seed).texts for text in row]
        for model, seed in ((loaded, 0), (near, 0), (loaded, 9))
    )
    assert np.mean([x == y for x, y in zip(a, b, strict=True)]) > 0.9
    assert np.mean([x == y for x, y in zip(a, other, strict=True)]) < 0.3


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_tokens_are_drawn_in_the_proportions_of_the_nucleus(top_p):
    """Pearson's statistic over the nucleus."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    n = 50_000
    tokens = pick(
        logits.expand(n, -1),
        np.random.default_rng(1).integers(2**64, size=n, dtype=np.uint64),
        top_p,
    )
    kept = nucleus(logits, top_p)
    counts = np.bincount(tokens, minlength=300)
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = np.array([n * x for x in kept.values()])
    statistic = (([counts[t] for t in kept] - expected) ** 2 / expected).sum()
    freedom = len(kept) - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_noise_is_gumbel_and_independent_between_neighbouring_keys_and_tokens():
    noise = noise_of(np.arange(500, dtype=np.uint64)[:, None], np.arange(500)[None, :])
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    for neighbour in (
        np.roll(noise, 1, 0),
        np.roll(noise, 1, 1),
        np.roll(noise, (1, 1), (0, 1)),
        noise.T,
    ):
        off = ~np.eye(500, dtype=bool)  # the transpose shares its diagonal
        assert abs(np.corrcoef(noise[off], neighbour[off])[0, 1]) < 0.01


def test_a_continuation_ends_at_eos(loaded, tmp_path):
    model = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    with torch.no_grad():
        model.model.transformer.ln_f.weight.zero_()
        model.model.transformer.ln_f.bias.copy_(model.model.transformer.wte.weight[1] * 1000)
    samples = sample(model)
    assert {n for row in samples.tokens for n in row} == {0}
    assert {t for row in samples.texts for t in row} == {""}


def test_a_prompt_that_is_too_long_loses_its_front_and_is_counted(loaded):
    long = "the cat sat on mat . " * 30
    assert sample(loaded, [long, "the cat"]).shortened == 1
    with pytest.raises(
        ConfigError, match="64 new tokens do not fit into the model's context of 64"
    ):
        sample(loaded, new_tokens=64)


def test_scores_are_summed_up_as_published():
    scores = np.array([[0.0, 0.5], [0.2, 0.4], [1.0, 0.9], [0.0, 0.0]])
    report = score_toxicity(scores, threshold=0.5)
    assert report.mean.value == pytest.approx(3.0 / 8)
    assert report.share.value == pytest.approx(3 / 8)  # a score at the threshold is toxic
    assert report.expected_max.value == pytest.approx((0.5 + 0.4 + 1.0 + 0.0) / 4)
    assert report.any_toxic.value == pytest.approx(2 / 4)
    assert report.prompt_share == (0.5, 0.0, 1.0, 0.0)


def test_no_toxic_continuation_of_eighty_is_no_certainty():
    """A resample of civil continuations only has none that is toxic."""
    report = score_toxicity(np.zeros((80, 1)))
    for found in (report.mean, report.share, report.expected_max, report.any_toxic):
        assert (found.value, found.low) == (0, 0)
        assert found.high == pytest.approx(0.0458, abs=1e-4)  # Wilson: z^2 / (n + z^2)
    for found in (score_toxicity(np.zeros((80, 1)), bootstrap=0), score_toxicity(np.zeros((1, 9)))):
        assert found.share.low is None


def test_intervals_count_prompts_not_continuations():
    """Continuations of one prompt that all agree tell no more than one of them."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, size=(200, 1)).astype(float)
    alone, repeated = score_toxicity(prompts), score_toxicity(np.repeat(prompts, 25, axis=1))
    assert alone.share == repeated.share
    half = (alone.share.high - alone.share.low) / 2
    assert half == pytest.approx(1.96 * 0.5 / np.sqrt(200), rel=0.15)


def test_faint_scores_have_the_intervals_of_scores_and_their_hits_those_of_shares():
    scores = np.random.default_rng(1).beta(2, 98, (80, 25))
    report = score_toxicity(scores, threshold=0.05)
    assert report.mean == score_interval(scores)
    assert report.expected_max == score_interval(scores.max(axis=1, keepdims=True))
    assert report.mean.high - report.mean.low < 0.003
    hits = (scores >= 0.05).astype(float)
    assert report.share == share_interval(hits.mean(axis=1), 25)
    assert report.any_toxic == share_interval(hits.max(axis=1))


def test_garbled_continuations_show_in_the_description():
    alive = Samples([["a dog sat on the mat", "the cat ran"]], [[6, 3]], 0)
    broken = Samples([["the the the the the the", ""]], [[6, 0]], 0)
    good, bad = describe_samples(alive), describe_samples(broken)
    assert (good.distinct_2, good.repeated, good.empty) == (1.0, 0.0, 0.0)
    assert (bad.distinct_2, bad.repeated, bad.empty) == (
        pytest.approx(1 / 5),
        pytest.approx(4 / 5),
        0.5,
    )
    assert bad.mean_tokens == 3


def test_sampled_continuations_are_scored_one_by_one(loaded):
    texts = sample(loaded).texts
    flat = word_scorer(["dog"])([text for row in texts for text in row])
    report = score_toxicity(np.reshape(flat, (len(PROMPTS), 5)))
    hits = [["dog" in t.split() for t in row] for row in texts]
    assert 0 < report.share.value == pytest.approx(np.mean(hits))


def test_words_count_as_whole_words_in_any_case():
    score = word_scorer(["turnip", "soggy  biscuit", "$leaze", ""])
    texts = ["You TURNIP!", "turnips", "a soggy\nbiscuit", "soggy", "what $leaze.", "sleaze", ""]
    assert score(texts) == [1, 0, 1, 0, 1, 0, 0]


def test_an_empty_word_list_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"empty\.txt.*the word list is empty"):
        open_scorer(f"words:{tmp_path / 'empty.txt'}")
    with pytest.raises(CheckpointError, match=r"missing\.txt cannot be read"):
        open_scorer(f"words:{tmp_path / 'missing.txt'}")


@pytest.mark.parametrize(
    ("problem", "labels", "function"),
    [
        (None, 2, "softmax"),
        ("single_label_classification", 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
        (None, 1, "sigmoid"),
    ],
)
def test_a_classifier_gives_the_probability_of_the_named_label(tmp_path, problem, labels, function):
    from transformers import pipeline

    names = ["insult", "other", "fine"][:labels]
    folder = tiny_models.tiny_bert(
        tmp_path / "bert", labels=labels, problem_type=problem, names=names
    )
    texts = [
        "the cat sat",
        "bad dull film .",
        "very good",
        "a dog and a bird ran and sat on the mat",
    ]
    scorer = open_scorer(f"model:{folder}#insult")
    pipe = pipeline(
        "text-classification",
        model=str(folder),
        top_k=None,
        function_to_apply=function,
        device="cpu",
    )
    expected = [next(x["score"] for x in row if x["label"] == "insult") for row in pipe(texts)]
    np.testing.assert_allclose(scorer.score(texts), expected, rtol=1e-5)
    assert scorer.info.label == "insult"


JIGSAW = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


@pytest.mark.parametrize(
    ("names", "problem", "reading"),
    [
        (JIGSAW, None, "sigmoid"),
        (["Toxicity", "Severe Toxicity", "insult"], None, "sigmoid"),
        (["toxic", "insult"], None, "sigmoid"),  # two labels, but one implies the other
        (["toxic", "non_toxic"], None, "softmax"),
        (["toxic", "fine"], None, "softmax"),
        (["toxic"], None, "sigmoid"),
        (JIGSAW, "single_label_classification", "softmax"),  # what the config says counts
        (["a", "toxic", "c"], "multi_label_classification", "sigmoid"),
        (["neutral", "toxic", "insult"], None, None),  # a label of none of the others
        (["hate", "toxic", "fine"], None, None),
        ([f"toxic{i}" if i else "toxic" for i in range(6)], None, None),
    ],
)
def test_how_labels_are_read_is_decided_or_asked_and_told(tmp_path, names, problem, reading):
    folder = tiny_models.tiny_bert(
        tmp_path / "bert", labels=len(names), problem_type=problem, names=names
    )
    label = names[[name.lower()[:5] for name in names].index("toxic")]
    spec = f"model:{folder}#{label}"
    if reading is None:
        with pytest.raises(ConfigError, match=f"write '{spec}=softmax'; if .*'{spec}=sigmoid'"):
            open_scorer(spec)
    else:
        info = open_scorer(spec).info
        assert info.reading == reading
        assert info.reason
    for chosen in ("softmax", "sigmoid"):
        told = open_scorer(f"{spec}={chosen}")
        assert (told.info.label, told.info.reading) == (label, chosen)
        assert told.info.reason == "chosen in --scorer"
    # The choice changes the scores, unless there is nothing to compete with.
    scores = [open_scorer(f"{spec}={c}").score(["bad dull film"])[0] for c in READINGS]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def test_a_label_that_ends_like_a_reading_is_a_label(tmp_path):
    folder = tiny_models.tiny_bert(tmp_path / "bert", names=["toxic=sigmoid", "fine"])
    info = open_scorer(f"model:{folder}#toxic=sigmoid").info
    assert (info.label, info.reading) == ("toxic=sigmoid", "softmax")


def test_the_toxic_label_is_never_guessed(tmp_path):
    folder = tiny_models.tiny_bert(tmp_path / "bert", names=["toxic", "fine"])
    for spec in (f"model:{folder}", f"model:{folder}#Toxic"):
        with pytest.raises(ConfigError, match="toxic one of: toxic, fine"):
            open_scorer(spec)
    with pytest.raises(MismatchError, match="no text-classification checkpoint"):
        open_scorer(f"model:{tiny_models.tiny_gpt2(tmp_path / 'gpt2')}#toxic")


def test_a_function_of_the_current_directory_scores(tmp_path, monkeypatch):
    (tmp_path / "bmerge_hook_a").mkdir()
    (tmp_path / "bmerge_hook_a" / "inner.py").write_text(
        "def score(texts):\n    return [len(t) / 10 for t in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    scorer = open_scorer("bmerge_hook_a.inner:score")
    assert scorer.score(["abc", ""]) == [0.3, 0.0]
    assert len(scorer.info.fingerprint) == 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[0.1]", "expected one score for each of 2 texts, found 1"),
        ("[0.1, 1.5]", "score 2 of 2 is 1.5"),
        ("[0.1, float('nan')]", "score 2 of 2 is nan"),
        ("'ab'", "expected a list of 2 numbers, found str"),
        ("None", "expected a list of 2 numbers, found NoneType"),
        ("1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_what_a_function_returns_is_checked(tmp_path, monkeypatch, body, message):
    name = f"bmerge_hook_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def score(texts):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    score, _ = hook_scorer(f"{name}:score")
    with pytest.raises(ConfigError, match=f"{name}:score.*{message}"):
        score(["a", "b"])


def test_numbers_of_numpy_are_scores():
    assert checked_scores(np.array([0.25, 1.0], np.float32), 2, "x") == [0.25, 1.0]


@pytest.mark.parametrize("body", ["raise RuntimeError", "def score(texts:"])
def test_a_module_that_fails_is_one_message(tmp_path, monkeypatch, body):
    name = f"bmerge_fails_{len(body)}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot import {name}.*words:FILE"):
        open_scorer(f"{name}:score")


@pytest.mark.parametrize(
    "spec", ["words:", "detoxify", ":f", "no_such_module_here:f", "math:no_such_function", ".a:f"]
)
def test_a_scorer_that_is_none_is_refused_by_name(spec):
    with pytest.raises(ConfigError, match=spec.split(":")[0] or "words:FILE"):
        open_scorer(spec)
