"""Quality of continuations: n-grams are counted, and a judge reads what follows a prompt."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mergekit_bayes.compare.run import run_compare
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.compare.wording import columns_of
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate import EvaluateConfig, read_report, run_evaluate
from mergekit_bayes.evaluate.judge import following, open_judge
from mergekit_bayes.generation import Samples, Sampling, sample_continuations
from mergekit_bayes.metrics.base import share_interval
from mergekit_bayes.metrics.conditional import conditional_nats
from mergekit_bayes.metrics.quality import (
    SamplesReport,
    describe_judged,
    describe_samples,
    distinct_change,
    judge_continuations,
    judged_change,
    repeated_change,
)
from mergekit_bayes.models.load import load_model
from tests import tiny_models

PROMPTS = ["the cat", "a dog sat on", "the", "good film was"]
CONTINUATIONS = [
    [" sat on the mat", " ran"],
    [" a tree .", ""],
    [" dog", " \n"],
    [" bad", " fun ,"],
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return load_model(str(tiny_models.tiny_gpt2(tmp_path_factory.mktemp("judge"), seed=3)))


def samples_of(*rows):
    return Samples([list(row) for row in rows], [[len(t.split()) for t in row] for row in rows], 0)


def test_counts_of_n_grams_are_those_by_hand():
    report = describe_samples(samples_of(("a b a b", "a b c"), ("", "c c c c c c")))
    assert report.distinct_1 == pytest.approx(3 / 13)
    assert report.distinct_2 == pytest.approx(4 / 10)  # ab, ba, bc, cc of 3 + 2 + 0 + 5
    assert report.distinct_3 == pytest.approx(4 / 7)  # aba, bab, abc, ccc of 2 + 1 + 0 + 4
    assert report.repeated == pytest.approx((1 / 3 + 0 + 4 / 5) / 3)
    assert (report.empty, report.looping, report.mean_tokens) == (1 / 4, 1 / 4, 13 / 4)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("so it goes on and on and on and on", True),
        ("on and on and on and", True),  # the last time is cut off
        ("he said that he said that he said that he", True),
        ("no no no no no no", True),
        ("no no no no no", False),  # a phrase of two words, not three times
        ("and on and on and on again", False),  # it goes on after the loop
        ("he said that he said that he", False),
        ("", False),
    ],
)
def test_a_loop_is_a_phrase_three_times_at_the_end(text, loops):
    assert describe_samples(samples_of([text])).looping == loops


def test_shares_have_wilsons_interval_and_means_that_of_resampled_prompts():
    rng = np.random.default_rng(0)
    rows = [
        [" ".join(rng.choice(list("abcde"), rng.integers(9))) for _ in "12345"] for _ in "." * 30
    ]
    report = describe_samples(samples_of(*rows))
    empty = np.array([[not text for text in row] for row in rows], float)
    assert report.intervals["empty"] == share_interval(empty.mean(axis=1), 5)
    lengths = np.array([[len(text.split()) for text in row] for row in rows]).mean(axis=1)
    mean = report.intervals["mean_tokens"]
    assert mean.value == pytest.approx(lengths.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * lengths.std() / np.sqrt(30), rel=0.15)
    assert describe_samples(samples_of(*rows)) == report
    assert not describe_samples(samples_of(*rows), bootstrap=0).intervals
    for name, found in report.intervals.items():
        assert found.value == getattr(report, name)
        assert found.low < found.value < found.high or found.value == 0, name


def test_the_interval_of_distinct_words_is_the_jackknife_over_prompts():
    rows = [["a b", "a c"], ["c c", "d"], ["e a", "b b b"]]
    report = describe_samples(samples_of(*rows))
    without = [
        describe_samples(samples_of(*(r for j, r in enumerate(rows) if j != i))).distinct_1
        for i in range(3)
    ]
    half = 1.96 * np.sqrt(2 / 3 * ((np.array(without) - np.mean(without)) ** 2).sum())
    found = report.intervals["distinct_1"]
    assert found.value == pytest.approx(5 / 12)
    assert found.low == pytest.approx(5 / 12 - half, abs=1e-4)
    assert found.high == pytest.approx(5 / 12 + half, abs=1e-4)


def test_intervals_of_distinct_words_hold_their_expectation():
    """Words of a Zipf law, with a subject for each prompt: 95 %, within what 200 sets can tell."""
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, 301)
    chances /= chances.sum()
    found = []
    for _ in range(200):
        rows = rng.choice(300, (25, 12), p=chances) + 300 * rng.integers(4, size=(25, 1))
        report = describe_samples(samples_of(*([" ".join(map(str, row))] for row in rows)))
        found.append(report.intervals["distinct_1"])
    truth = np.mean([x.value for x in found])
    assert np.mean([x.low <= truth <= x.high for x in found]) > 0.9


def drawn(rng, prompts, words, noise):
    """Four continuations of each prompt, and those of a model that mostly says the same words."""
    rows = rng.integers(words, size=(prompts, 4, 8)) * rng.integers(1, 3, size=(prompts, 1, 1))
    others = np.where(rng.random(rows.shape) < noise, rng.integers(3, size=rows.shape), rows)
    both = [[[" ".join(map(str, text)) for text in row] for row in one] for one in (rows, others)]
    return [Samples(texts, [[8] * 4] * prompts, 0) for texts in both]


@pytest.mark.parametrize("change", [repeated_change, distinct_change])
def test_changes_of_quality_are_paired_and_hold_their_expectation(change):
    """Two models that share most of their words: pairs are narrower than two sets apart."""
    rng = np.random.default_rng(0)
    found = [change(*drawn(rng, 40, 12, 0.3)) for _ in range(60)]
    truth = np.mean([x.value for x in found])
    assert sum(x.low <= truth <= x.high for x in found) >= 0.9 * 60
    assert np.mean([x.high - x.low for x in found]) < 1.9 * 2 * 1.96 * np.std(
        [x.value for x in found]
    )
    one, two = drawn(rng, 40, 12, 0.3)
    field = "repeated" if change is repeated_change else "distinct_2"
    new, old = (getattr(describe_samples(samples), field) for samples in (two, one))
    assert change(one, two).value == pytest.approx(new - old)
    assert new != old
    same = change(one, one)
    assert same.value == 0
    assert same.low is None or same.low < same.high


@pytest.mark.parametrize(
    ("rows", "distinct"),
    [
        ([["", " "], ["\n", ""]], (0, 0, 0)),
        ([["word"]], (1, 0, 0)),
        ([["", "word"], ["", ""]], (1, 0, 0)),
        ([["word word", "word"], ["word", "word"]], (1 / 5, 1, 0)),
    ],
)
def test_sets_without_text_have_numbers(rows, distinct):
    report = describe_samples(samples_of(*rows))
    assert (report.distinct_1, report.distinct_2, report.distinct_3) == distinct
    assert (report.repeated, report.looping) == (0, 0)
    for name, found in report.intervals.items():
        assert 0 <= found.low <= found.value <= found.high < np.inf
        assert found.low < found.high or name == "mean_tokens"


def test_no_repeat_in_ten_prompts_is_no_certainty():
    report = describe_samples(samples_of(*[["a b c", ""]] * 10))
    assert report.intervals["repeated"] == share_interval(np.zeros(10))
    assert report.intervals["repeated"].high > 0.2


def test_reports_are_read_back_from_json():
    report = describe_samples(samples_of(["a b a b", "a b c"], ["", "c c c c c c"]))
    assert report.intervals
    assert SamplesReport.model_validate_json(report.model_dump_json()) == report


def test_a_report_from_before_the_new_numbers_is_read():
    old = {"prompts": 2, "continuations": 4, "mean_tokens": 3.5, "empty": 0.25}
    report = SamplesReport.model_validate(old | {"distinct_2": 0.5, "repeated": 0, "shortened": 1})
    assert (report.distinct_1, report.distinct_3, report.looping, report.intervals) == (
        *(None, None, None),
        {},
    )


def nats_by_hand(model, ids, first):
    """Token after token, without a batch."""
    total = 0.0
    for i in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, -1)[ids[i]].item()
    return total


def judged(judge, continuations=CONTINUATIONS, batch_size=8, window=None, prompts=PROMPTS):
    return judge_continuations(
        judge.model,
        judge.tokenizer,
        prompts,
        continuations,
        start=judge.start,
        window=window or judge.context,
        batch_size=batch_size,
    )


def test_nats_are_those_of_the_continuation_alone_after_its_prompt(judge):
    found = judged(judge)
    for i, (prompt, row) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        before = [0, *judge.tokenizer(prompt)["input_ids"]]
        for j, text in enumerate(row):
            ids = [*before, *judge.tokenizer(text)["input_ids"]]
            expected = nats_by_hand(judge.model, ids, len(before))
            assert found.nats[i, j] == pytest.approx(expected, rel=1e-5)
            assert found.tokens[i, j] == len(ids) - len(before)
            assert found.bytes[i, j] == (len(text) if text.split() else 0)
    report = describe_judged(found)
    assert (report.continuations, report.left_out) == (6, 2)
    assert report.tokens == report.words == 4 + 1 + 3 + 1 + 1 + 2
    assert report.token.value == pytest.approx(np.exp(found.nats.sum() / 12))
    assert report.bits_per_byte.value == pytest.approx(
        found.nats.sum()
        / np.log(2)
        / sum(len(t) for row in CONTINUATIONS for t in row if t.split())
    )
    assert report.prompt_nats == pytest.approx(found.nats.sum(axis=1))
    assert (report.prompt_tokens, report.prompt_bytes) == ((5, 3, 1, 3), (19, 9, 4, 10))
    assert report.loss.low < report.loss.value < report.loss.high


def test_batches_change_nothing(judge):
    expected = judged(judge)
    for size in (1, 2, 50):
        np.testing.assert_allclose(judged(judge, batch_size=size).nats, expected.nats, rtol=1e-5)


def test_a_prompt_that_is_too_long_loses_its_front_and_is_counted(judge):
    long, text = f"{'the cat sat on mat . ' * 2}the cat sat", " the dog ran"
    found = judged(judge, [[text], [text]], window=8, prompts=[long, "a"])
    assert found.shortened == 1
    ids = [0, *judge.tokenizer(long + text)["input_ids"]]
    end = ids[-9:]  # the last token is predicted from eight
    expected = nats_by_hand(judge.model, end, 6)
    assert found.nats[0, 0] == pytest.approx(expected, rel=1e-5)
    # A continuation that is longer than the context is scored in full, in several windows.
    found = judged(judge, [[f" {long}"]], window=8, prompts=["a"])
    assert found.tokens[0, 0] == 15


def bpe(folder):
    """A judge whose tokenizer merges letters across the end of a prompt."""
    vocabulary = ["<s>", "</s>", "<pad>", "<unk>", *"cats", "Ġ", "ca", "cat", "Ġs", "at", "Ġsat"]
    merges = [("c", "a"), ("ca", "t"), ("a", "t"), ("Ġ", "s"), ("Ġs", "at")]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    folder = tiny_models.tiny_gpt2(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return load_model(str(folder))


def test_a_token_over_the_boundary_is_scored_whole(tmp_path):
    loaded = bpe(tmp_path / "bpe")
    cut = ["cat", " sat"]
    assert loaded.tokenizer.tokenize("cat sat") == ["cat", "Ġsat"]
    assert loaded.tokenizer.tokenize("ca") == ["ca"]
    for before, after, first in [("cat", " sat", 2), ("ca", "t sat", 1), ("cat s", "at", 2)]:
        assert before + after == "".join(cut)
        ids = [0, *loaded.tokenizer("cat sat")["input_ids"]]
        found = conditional_nats(
            loaded.model, loaded.tokenizer, [(before, after)], start=0, window=64
        )
        assert found.nats[0] == pytest.approx(nats_by_hand(loaded.model, ids, first), rel=1e-5)
        assert found.tokens[0] == 3 - first


def test_the_space_between_prompt_and_continuation_is_kept(judge, tmp_path):
    """Whether a tokenizer has it in its tokens or not."""
    words = sample_continuations(
        *(judge.model, judge.tokenizer, PROMPTS),
        start=0,
        context=64,
        sampling=Sampling(continuations=4, new_tokens=3),
    )
    whole = following(judge.tokenizer, PROMPTS, words)
    assert whole == [[f" {text}" if text else "" for text in row] for row in words.texts]
    letters = bpe(tmp_path / "bpe").tokenizer
    ids = letters(" sat")["input_ids"], letters("t sat")["input_ids"]
    drawn = Samples([[" sat", "t sat"]], [[1, 2]], 0, [list(ids)])
    assert following(letters, ["ca"], drawn) == drawn.texts


def without_special_tokens(loaded):
    """The same, with a chance of exp(-30) for what the text of a continuation does not show."""
    body = loaded.model.transformer
    with torch.no_grad():
        body.ln_f.weight[0], body.ln_f.bias[0] = 0, 1
        body.wte.weight[:, 0] = 0
        body.wte.weight[:4, 0] = -30
    return loaded


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_judged_by_itself_has_the_perplexity_of_its_entropy(tmp_path, seed):
    """exp(entropy / tokens), with the entropy of two tokens summed over all of them."""
    loaded = without_special_tokens(load_model(str(tiny_models.tiny_gpt2(tmp_path / "m", seed))))
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.choice(tiny_models.WORDS, 3)) for _ in range(60)]
    sampling = Sampling(continuations=10, new_tokens=2, top_p=1, temperature=1, seed=seed)
    samples = sample_continuations(
        loaded.model, loaded.tokenizer, prompts, start=0, context=64, sampling=sampling
    )
    found = describe_judged(
        judged(loaded, following(loaded.tokenizer, prompts, samples), prompts=prompts)
    )
    words, entropy = torch.arange(4, len(loaded.tokenizer)), 0.0
    for prompt in prompts:
        ids = torch.tensor([0, *loaded.tokenizer(prompt)["input_ids"]])
        both = torch.cat([ids.expand(len(words), -1), words[:, None]], dim=1)
        with torch.no_grad():
            log_p = torch.log_softmax(loaded.model(both).logits.double(), -1)
        first, second = log_p[0, -2, words], log_p[:, -1]
        entropy -= (first.exp() * first).sum().item()
        entropy -= (first.exp() @ (second.exp() * second).sum(-1)).item()
    assert (found.tokens, found.left_out) == (1200, 0)
    assert found.token.low < np.exp(entropy / 120) < found.token.high


def test_nothing_to_read_is_no_perplexity(judge):
    report = describe_judged(judged(judge, [[""], [" "], ["\n"], [""]]))
    assert (report.continuations, report.left_out, report.tokens) == (0, 4, 0)
    assert report.token is None
    assert judged_change(report, report) is None
    one = describe_judged(judged(judge, [["dog"], [""], [""], [""]]))
    assert (one.tokens, one.token.low) == (1, None)
    # Resamples of the prompts without a word have no loss.
    two = describe_judged(judged(judge, [["dog"], ["a mat"], [""], [""]]))
    assert two.loss.low < two.loss.value < two.loss.high
    change = judged_change(two, one)
    assert change.low < change.value < change.high


def test_models_are_compared_over_the_same_prompts(judge):
    """Each loss with its own number of tokens: a text twice as long has the loss that it has."""
    before = describe_judged(judged(judge))
    after = describe_judged(judged(judge, [[" the mat"] * 2] * 4))
    change = judged_change(before, after)
    assert change.value == pytest.approx(after.loss.value - before.loss.value)
    assert change.low < change.value < change.high
    same = judged_change(before, before)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_judge_of_broken_weights_is_named(judge, tmp_path):
    folder = tiny_models.tiny_gpt2(tmp_path / "m")
    broken = open_judge(str(folder), new_tokens=5)
    with torch.no_grad():
        broken.loaded.model.transformer.wte.weight[6] = float("nan")
    with pytest.raises(CheckpointError, match=r"judge '.*m': .*log-probability of text 1 is nan"):
        broken.read(PROMPTS, CONTINUATIONS, 8, lambda *_: None)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"text": t}) + "\n" for t in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    (tmp_path / "words.txt").write_text("dog\n")
    tiny_models.tiny_gpt2("model")
    tiny_models.tiny_gpt2("judge", seed=3)
    return tmp_path


def config(**options):
    options = {"toxicity": "prompts.jsonl", "scorer": ("words:words.txt",)} | options
    return EvaluateConfig(model="model", continuations=5, new_tokens=4, **options)


def test_the_judge_is_in_the_report_and_its_numbers_are_read_back(world):
    plain, report = run_evaluate(config()), run_evaluate(config(judge="judge", output="out"))
    assert (plain.judged, plain.judge) == (None, None)
    assert report.samples == plain.samples
    assert (report.judge.model, report.judge.context, report.judge.dtype) == (
        "judge",
        64,
        "float32",
    )
    assert len(report.judge.fingerprint) == 64
    assert report.judge.fingerprint != report.model_identity
    assert read_report("out") == report
    assert len(read_report("out").judged.prompt_nats) == len(PROMPTS)
    rows = [json.loads(line)["judge"] for line in (world / "out/continuations.jsonl").open()]
    assert sum(row["nats"] for row in rows) == pytest.approx(report.judged.nats)
    assert sum(row["tokens"] for row in rows) == report.judged.tokens
    own = run_evaluate(config(judge="model"))
    assert own.judge.fingerprint == own.model_identity
    assert own.judged.nats < report.judged.nats  # which another model knows less about


def test_a_judge_that_cannot_read_is_refused(world):
    tiny_models.tiny_bert("bert")
    tiny_models.tiny_gpt2("short", context=4)
    for ref, error, message in [
        ("bert", MismatchError, "judge 'bert' is a classifier, expected a causal"),
        ("short", ConfigError, "judge 'short': 4 new tokens do not fit .* context of 4"),
    ]:
        with pytest.raises(error, match=message):
            run_evaluate(config(judge=ref))
    with pytest.raises(ConfigError, match="a judge reads continuations"):
        run_evaluate(
            config(judge="judge", toxicity=None, scorer=(), perplexity={"a": "prompts.jsonl"})
        )
    with pytest.raises(CheckpointError, match="judge"):
        run_evaluate(config(judge="judge", output="judge", force=True))


def test_models_side_by_side_are_read_by_one_judge(world):
    settings = config(judge="judge").model_dump(exclude={"model"})
    report = run_compare(CompareConfig(**settings, models=("model", "judge")))
    first, second = (one.report.judged for one in report.evaluations)
    changes = {d.measure: d.change for d in report.differences}
    found = changes["nats a token by judge"]
    assert found.value == pytest.approx(second.loss.value - first.loss.value)
    assert found.low < found.value < found.high
    assert changes["looping"].value == 0
    (column,) = (c for c in columns_of(report.evaluations) if c.measure == "perplexity by judge")
    assert list(column.values.values()) == [first.token, second.token]
