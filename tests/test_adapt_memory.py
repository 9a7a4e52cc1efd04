"""The memory of an adaptation: what the model writes, what is kept, and which examples matter."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergekit_bayes.adapt.leverage import Variance, read_variances, self_influence
from mergekit_bayes.adapt.memory import build_memory
from mergekit_bayes.adapt.refusals import refuse_settings
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.draws import word
from mergekit_bayes.errors import BmergeError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.generation import write_texts
from mergekit_bayes.generation.nucleus import gumbel, pick
from mergekit_bayes.models.encode import Collate, batches, encode_rows, observations
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import Place
from tests import tiny_models

TEXTS = [
    *("the cat sat .", "a good film", "dull tree", "dog ran on", "a bird saw a tree", "fun"),
    *("the dog was not nice", "very very good", "mat and mat", "a film", "bad cat", "the tree ."),
]


def noise_of(keys, tokens):
    return gumbel(word(keys, tokens.astype(np.uint64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_models.tiny_gpt2(tmp_path_factory.mktemp("memory") / "gpt2")
    tiny_models.give_posterior(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", TEXTS)


def write_rows(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def settings(folder, **chosen):
    return AdaptConfig.model_validate({"model": str(folder), "output": "o"} | chosen)


def written(loaded, count=40, new_tokens=8, **chosen):
    return write_texts(
        loaded.model,
        loaded.tokenizer,
        count,
        start=loaded.start,
        context=loaded.context,
        new_tokens=new_tokens,
        **chosen,
    )


def by_hand(loaded, number, new_tokens, seed):
    """One text without cache or batch: the largest `log p + g` of all tokens."""
    tokens = [loaded.start]
    counter = np.array([seed, number], np.uint64)
    for key in np.random.Philox(key=counter).random_raw(new_tokens):
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).numpy()
        token = int((log_p + noise_of(np.array([key]), np.arange(len(log_p)))).argmax())
        if token == loaded.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return loaded.tokenizer.decode(tokens[1:], skip_special_tokens=True)


def ids(examples):
    return [tuple(example["input_ids"]) for example in examples]


# What the model writes


def test_texts_are_those_of_the_start_token_drawn_one_by_one(loaded):
    texts = written(loaded, 20, seed=3)
    assert texts == [by_hand(loaded, number, 8, seed=3) for number in range(20)]
    assert min(map(len, texts)) < max(map(len, texts))  # EOS ends some


def test_texts_depend_on_their_number_and_the_seed_only(loaded):
    texts = written(loaded)
    assert written(loaded, batch_size=7) == texts
    assert written(loaded, 25) == texts[:25]
    assert written(loaded, seed=1) != texts
    longer = written(loaded, new_tokens=12)
    assert all(b.startswith(a) for a, b in zip(texts, longer, strict=True))
    assert longer != texts


def test_texts_have_the_models_own_distribution(loaded):
    """Pearson's statistic of the first tokens, of all that the model may say."""
    count = 4000
    with torch.no_grad():
        p = loaded.model(torch.tensor([[loaded.start]])).logits[0, -1].softmax(-1).numpy()
    words = list(range(4, len(p)))  # special tokens leave no text
    texts = written(loaded, count, new_tokens=1)
    names = loaded.tokenizer.convert_ids_to_tokens(words)
    counts = np.array([texts.count(name) for name in names])
    expected = count * p[words]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - len(words)) < 4 * np.sqrt(2 * len(words))


def test_the_whole_distribution_is_drawn_from_without_its_unlikely_logarithms():
    """The quick choice of candidates loses no winner, of sharp and of flat distributions."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 1.0, 5.0, 40.0]).repeat_interleave(50)[:, None]
    logits = spread * torch.randn(200, 3000, generator=generator)
    keys = np.random.default_rng(1).integers(2**64, size=200, dtype=np.uint64)
    noise = noise_of(keys[:, None], np.arange(3000)[None])
    with np.errstate(divide="ignore"):
        heights = np.log(logits.softmax(-1).numpy(), dtype=np.float64) + noise
    assert pick(logits, keys, 1.0).tolist() == heights.argmax(axis=1).tolist()


# What is kept of it


def test_rows_and_the_models_texts_are_one_memory(folder, loaded, rows):
    config = settings(folder, memory={"data": str(rows)}, memory_self_generated=20, max_length=10)
    memory = build_memory(config, loaded)
    texts = written(loaded, 20, new_tokens=9)
    assert memory.texts == texts
    expected = encode_rows({"text": TEXTS + texts}, loaded, max_length=10)
    assert sorted(ids(memory.examples) + ids(memory.held_out)) == sorted(ids(expected))
    facts = memory.facts
    assert (facts.rows, facts.self_generated, facts.left_out, facts.select) == (12, 20, 0, "all")
    assert (facts.examples, facts.held_out) == (29, 3)
    assert facts.observations == observations(memory.examples, "causal-lm")
    assert facts.held_out_observations == observations(memory.held_out, "causal-lm")
    assert facts.describe() == (
        f"12 rows of {rows} and 20 texts that the model wrote; 29 examples, 3 held out"
    )


def test_a_memory_read_back_from_its_texts_is_the_same(folder, loaded, tmp_path):
    memory = build_memory(settings(folder, memory_self_generated=30, max_length=10), loaded)
    stored = write_rows(tmp_path / "memory.jsonl", memory.texts)
    again = build_memory(settings(folder, memory={"data": str(stored)}, max_length=10), loaded)
    assert (again.examples, again.held_out) == (memory.examples, memory.held_out)
    assert again.facts.sha256 == memory.facts.sha256
    other = build_memory(settings(folder, memory_self_generated=30, max_length=10, seed=1), loaded)
    assert other.texts == written(loaded, 30, new_tokens=9, seed=1)
    assert other.facts.sha256 != memory.facts.sha256


def test_random_memories_of_all_sizes_are_nested_and_checked_on_the_same_rows(folder, loaded, rows):
    chosen = {"memory": {"data": str(rows)}, "memory_held_out": 0.25}
    full = build_memory(settings(folder, **chosen), loaded)
    assert (len(full.examples), len(full.held_out), full.facts.select) == (9, 3, "all")
    assert not set(ids(full.examples)) & set(ids(full.held_out))
    some = build_memory(settings(folder, **chosen, memory_rows=4), loaded)
    assert (some.examples, some.held_out) == (full.examples[:4], full.held_out)
    assert some.facts.select == "random"
    assert some.facts.describe().endswith("; 4 examples chosen at random, 3 held out")
    assert some.facts.sha256 != full.facts.sha256


@pytest.mark.parametrize(
    ("share", "count", "held_out"), [(0.0, 12, 0), (0.01, 12, 1), (0.99, 12, 11), (0.5, 1, 0)]
)
def test_some_example_is_held_out_and_some_is_trained_on(
    folder, loaded, rows, share, count, held_out
):
    chosen = {"memory": {"data": str(rows)}, "max_rows": count, "memory_held_out": share}
    memory = build_memory(settings(folder, **chosen), loaded)
    assert (len(memory.held_out), len(memory.examples)) == (held_out, count - held_out)


def test_texts_that_the_scorer_finds_are_left_out(folder, loaded, tmp_path, monkeypatch):
    """From the threshold on, by a function that is tried before anything is written."""
    (tmp_path / "graded.py").write_text(
        "def score(texts):\n    return [min(1, text.split().count('good') / 4) for text in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    generated = settings(folder, memory_self_generated=40, max_length=20)
    every = build_memory(generated, loaded).texts
    chosen = generated.model_copy(update={"memory_filter": "graded:score", "threshold": 0.25})
    memory = build_memory(chosen, loaded)
    assert memory.texts == [text for text in every if "good" not in text.split()]
    assert 0 < memory.facts.left_out == 40 - len(memory.texts)
    assert "left out by graded:score)" in memory.facts.describe()
    milder = build_memory(chosen.model_copy(update={"threshold": 0.26}), loaded)
    assert milder.texts == [text for text in every if text.split().count("good") < 2]
    assert len(milder.texts) > len(memory.texts)


def test_a_filter_that_leaves_nothing_is_refused(folder, loaded, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(tiny_models.WORDS[:-2]))
    config = settings(folder, memory_self_generated=3, memory_filter=f"words:{words}")
    with pytest.raises(ConfigError, match=r"every text that the model wrote \(3\) 0\.5 or more"):
        build_memory(config, loaded)


def test_a_filter_that_cannot_be_opened_is_named(folder, loaded, monkeypatch):
    monkeypatch.setattr("mergekit_bayes.adapt.memory.write_texts", None)
    config = settings(folder, memory_self_generated=3, memory_filter="words:nowhere.txt")
    with pytest.raises(BmergeError, match=r"^memory_filter: .*nowhere\.txt cannot be read"):
        build_memory(config, loaded)


def test_without_rows_and_texts_there_is_no_memory(folder, loaded):
    assert build_memory(settings(folder), loaded) is None


def test_a_classifier_keeps_rows_and_writes_nothing(tmp_path, rows):
    folder = tiny_models.tiny_bert(tmp_path / "bert")
    loaded = load_model(str(folder))
    memory = build_memory(settings(folder, memory={"data": str(rows)}), loaded)
    assert memory.facts.observations == len(memory.examples) == 11
    assert set(memory.examples[0]) == {"input_ids"}  # its own distribution is held, not labels
    with pytest.raises(ConfigError, match="a classifier writes no text"):
        build_memory(settings(folder, memory_self_generated=3), loaded)
    tiny_models.give_posterior(folder, loaded)
    chosen = {"memory": {"data": str(rows)}, "memory_select": "leverage", "memory_rows": 3}
    with pytest.raises(MismatchError, match="label"):
        build_memory(settings(folder, **chosen), loaded)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"memory_rows": 3}, "memory_rows: there is no memory"),
        ({"memory_select": "leverage"}, "memory_select: there is no memory"),
        ({"memory_filter": "a:b"}, "memory_filter: there is no memory"),
        ({"memory": {"data": "m"}, "memory_filter": "a:b"}, "Set memory_self_generated"),
        ({"memory": {"data": "m"}, "memory_select": "leverage"}, "Say how many"),
    ],
)
def test_settings_of_a_memory_that_mean_nothing_are_refused(chosen, message):
    with pytest.raises(ConfigError, match=message):
        refuse_settings(settings("m", remove={"data": "r"}, **chosen))


# Which examples matter


class Linear(torch.nn.Module):
    """Outputs `x' theta` with the squared error, called like a classifier of transformers."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(theta)
        self.dropout = torch.nn.Dropout(0.5)
        self.config = SimpleNamespace(problem_type="regression", num_labels=1)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.dropout(input_ids) @ self.theta[:, None])


X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
Y = torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=torch.float64)
ERRORS = np.array([0.076923076923, -0.153846153846, 0.615384615385, -0.615384615385])
VARIANCES = np.array([0.384615384615, 0.205128205128, 0.282051282051, 0.615384615385])


def ridge_influence(x, theta, precision):
    """The leverage of each row, one example a batch."""
    model = Linear(theta)
    place = Place("theta", model.theta, (2,), None, 0)
    rows = [
        {"input_ids": a[None], "attention_mask": torch.ones(1, 2), "labels": b[None, None]}
        for a, b in zip(x, Y, strict=True)
    ]
    return self_influence(model, rows, [Variance(place, 1 / precision)])


def test_on_ridge_regression_it_is_the_published_variance_times_the_squared_error():
    """In the basis where the Hessian is diagonal, so that the stored diagonal is the posterior."""
    hessian = X.T @ X + torch.eye(2, dtype=torch.float64)
    values, basis = torch.linalg.eigh(hessian)
    theta = basis.T @ torch.linalg.solve(hessian, X.T @ Y)
    scores = ridge_influence(X @ basis, theta, values)
    np.testing.assert_allclose(scores, VARIANCES * ERRORS**2, rtol=1e-6)


def test_it_is_the_rise_of_an_examples_own_loss_when_a_little_of_it_is_removed():
    def own_losses(share, j):
        weights = torch.ones(4, dtype=torch.float64)
        weights[j] -= share
        hessian = X.T @ (weights[:, None] * X) + torch.eye(2, dtype=torch.float64)
        theta = torch.linalg.solve(hessian, X.T @ (weights * Y))
        return 0.5 * (X @ theta - Y).square()[j]

    rises = [float(own_losses(1e-6, j) - own_losses(0.0, j)) / 1e-6 for j in range(4)]
    np.testing.assert_allclose(rises, VARIANCES * ERRORS**2, rtol=1e-4)


def dense_influence(loaded, example, variances):
    """`e' J Sigma J' e` with all of J, over the observations and outputs of one example."""
    tokens = torch.tensor([example["input_ids"]])
    logits = loaded.model(tokens).logits[0, :-1]
    truth = torch.nn.functional.one_hot(tokens[0, 1:], logits.shape[-1])
    error = (logits.softmax(-1) - truth).detach().flatten()
    parameters = [place.parameter for place, _ in variances]
    jacobian = [
        torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True)
        for z in logits.flatten()
    ]
    sigma2 = torch.cat([s.expand(place.shape).flatten() for place, s in variances])
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in jacobian])
    prediction_variance = (matrix * sigma2) @ matrix.T
    return float(error @ prediction_variance @ error)


def influence(loaded, examples, variances):
    singles = batches(examples, 1, Collate(loaded.pad))
    return self_influence(loaded.model, singles, variances)


def test_on_a_language_model_it_is_the_dense_product_of_error_and_variance(folder, loaded):
    variances = read_variances(settings(folder), loaded)
    assert sum(s.numel() for _, s in variances) == sum(p.numel() for p in loaded.model.parameters())
    examples = encode_rows({"text": ["a good", "dull tree ."]}, loaded)
    expected = [dense_influence(loaded, example, variances) for example in examples]
    np.testing.assert_allclose(influence(loaded, examples, variances), expected, rtol=1e-4)


@pytest.mark.parametrize("pool", [None, "row", "tensor"])
def test_the_variance_is_that_of_the_stored_precision_or_of_its_mean(folder, loaded, pool):
    stored = tiny_models.give_posterior(folder)
    axes = {None: (), "row": (1,), "tensor": (0, 1)}[pool]
    name = "transformer.wte.weight"
    read = read_variances(settings(folder, pool=pool), loaded)
    variances = {place.name: sigma2 for place, sigma2 in read}
    expected = 1 / stored[name].mean(axis=axes, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(variances[name], expected, rtol=1e-6)


def test_leverage_chooses_the_largest_of_the_part_that_is_trained_on(folder, loaded, rows):
    chosen = {"memory": {"data": str(rows)}, "memory_held_out": 0.25}
    full = build_memory(settings(folder, **chosen), loaded)
    choices = []
    for pool in (None, "row"):
        leverage = {"memory_select": "leverage", "memory_rows": 7, "pool": pool}
        memory = build_memory(settings(folder, **chosen, **leverage), loaded)
        variances = read_variances(settings(folder, pool=pool), loaded)
        best = set(np.argsort(influence(loaded, full.examples, variances))[-7:])
        assert memory.examples == [e for i, e in enumerate(full.examples) if i in best]
        assert memory.held_out == full.held_out
        assert memory.facts.select == "leverage"
        choices.append(best)
    assert choices[0] != choices[1]


def test_the_model_stays_as_it_was(folder, loaded, rows):
    model = loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head, first = model.transformer.wpe.weight, model.transformer.wte.weight
    head.requires_grad_(False)
    first.grad = torch.ones_like(first)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    try:
        chosen = {"memory": {"data": str(rows)}, "memory_select": "leverage", "memory_rows": 4}
        build_memory(settings(folder, **chosen, memory_self_generated=3), loaded)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(first.grad, torch.ones_like(first))
        assert all(p.grad is None for p in (head, *model.transformer.h.parameters()))
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert not head.requires_grad
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    finally:
        head.requires_grad_(True)
        first.grad = None
        model.eval()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("none", ConfigError, "none is stored with it. Make one with `bmerge precision"),
        ("bare", ConfigError, "without a proper prior. Make one with `bmerge precision"),
        ("moved", PrecisionError, "was taken at other weights"),
    ],
)
def test_leverage_needs_a_proper_posterior_of_these_weights(tmp_path, rows, change, error, message):
    folder = tiny_models.tiny_gpt2(tmp_path / "m", layers=1)
    loaded = load_model(str(folder))
    if change == "bare":
        tiny_models.give_posterior(folder, loaded, prior=0)
    if change == "moved":
        tiny_models.give_posterior(folder, loaded)
        tiny_models.tiny_gpt2(folder, seed=1, layers=1)
    chosen = {"memory": {"data": str(rows)}, "memory_select": "leverage", "memory_rows": 4}
    with pytest.raises(error, match=message):
        build_memory(settings(folder, **chosen), loaded)


def test_another_precision_can_be_named(tmp_path, rows):
    bare = tiny_models.tiny_gpt2(tmp_path / "m", layers=1)
    loaded = load_model(str(bare))
    tiny_models.give_posterior(bare, loaded)
    (bare / "posterior").rename(tmp_path / "elsewhere")
    chosen = {"memory": {"data": str(rows)}, "memory_select": "leverage", "memory_rows": 4}
    with pytest.raises(ConfigError, match="none is stored with it"):
        build_memory(settings(bare, **chosen), loaded)
    named = settings(bare, **chosen, precision=str(tmp_path / "elsewhere"))
    assert build_memory(named, loaded).facts.examples == 4
