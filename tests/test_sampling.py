"""Draws have the stored Gaussian, are averaged, leave no trace, and need a proper posterior."""

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.metrics.classification import class_probabilities
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable, sampling_obstacle
from mergekit_bayes.posterior import Prior, open_posterior
from tests import tiny, tiny_models

TEXTS = ["the cat sat on the mat .", "a dull film , not good", "dog", "a bird saw a tree"]
PRIOR = tiny_models.PRIOR


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tiny_models.tiny_bert(tmp_path_factory.mktemp("models") / "bert", labels=3)
    tiny_models.give_posterior(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tiny_models.tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")
    tiny_models.give_posterior(folder)
    return folder


def state(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Table(torch.nn.Module):
    """Plain parameters with the names of `tiny.SHAPES`."""

    def __init__(self, tensors):
        super().__init__()
        for name, values in tensors.items():
            module = self
            for part in name.split(".")[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(name.split(".")[-1], torch.nn.Parameter(torch.tensor(values)))


def table(tmp_path, precision=None, **options):
    mean = tiny.arrays(0)
    precision = precision or tiny.precisions(0)
    path = tiny.posterior(tmp_path / "a.safetensors", mean, precision, prior=0.05, **options)
    return Table(mean), open_samplable(str(path)), mean, precision


def drawn(model, draws, name):
    with draws:
        return np.stack([model.get_parameter(name).detach().numpy().copy() for _ in draws])


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_draws_have_the_posteriors_mean_and_variance(tmp_path, temperature):
    model, posterior, mean, precision = table(tmp_path)
    draws = PosteriorDraws(model, posterior, 4000, temperature=temperature, seed=3)
    for name in ("wte.weight", "h.0.scalar"):
        z = (drawn(model, draws, name) - mean[name]) * np.sqrt(precision[name] / temperature)
        assert abs(z.mean(axis=0)).max() < 5 / np.sqrt(4000)
        assert abs(z.var(axis=0) - 1).max() < 5 * np.sqrt(2 / 4000)
        if z.ndim > 1:  # entries are independent
            correlation = np.corrcoef(z.reshape(4000, -1).T) - np.eye(z[0].size)
            assert abs(correlation).max() < 5 / np.sqrt(4000)


def test_a_given_prior_takes_the_place_of_the_stored_one(tmp_path):
    model, posterior, mean, precision = table(tmp_path)
    draws = PosteriorDraws(model, posterior, 4000, prior=2.0)
    z = (drawn(model, draws, "wte.weight") - mean["wte.weight"]) * np.sqrt(
        precision["wte.weight"] - 0.05 + 2.0
    )
    assert abs(z.var(axis=0) - 1).max() < 5 * np.sqrt(2 / 4000)
    assert (draws.report.prior, draws.report.given) == (2.0, True)


def test_draws_are_the_same_again_and_others_under_another_seed(tmp_path):
    model, posterior, _, _ = table(tmp_path)
    draws = PosteriorDraws(model, posterior, 5, seed=1)
    first = drawn(model, draws, "wte.weight")
    assert np.array_equal(first, drawn(model, draws, "wte.weight"))
    assert np.array_equal(
        first[:3], drawn(model, PosteriorDraws(model, posterior, 3, seed=1), "wte.weight")
    )
    assert not np.isin(
        first, drawn(model, PosteriorDraws(model, posterior, 5, seed=2), "wte.weight")
    ).any()
    assert len(np.unique(first)) == first.size  # no draw and no entry repeats another's noise


def test_one_number_a_row_or_a_tensor_stands_for_all_its_entries(tmp_path):
    pooled = tiny.precisions(0)
    pooled["wte.weight"] = np.linspace(1, 7, 7, dtype=np.float32).reshape(7, 1)
    pooled["h.0.attn.weight"] = np.full((1, 1), 3, np.float32)
    whole = {n: np.broadcast_to(p, tiny.SHAPES[n]).copy() for n, p in pooled.items()}
    model, posterior, _, _ = table(tmp_path / "whole", whole)
    tiny.write(tmp_path / "b.safetensors", pooled, metadata={"format": "pt"})
    other = open_samplable(
        str(posterior.path), precision=str(tmp_path / "b.safetensors"), prior=0.05
    )
    for name in pooled:
        expected = drawn(model, PosteriorDraws(model, posterior, 2), name)
        # The pooled file has no information, so its prior is added to what it holds.
        add = PosteriorDraws(model, other, 2, prior=1e-6)
        np.testing.assert_allclose(drawn(model, add, name), expected, atol=1e-5)


@pytest.mark.parametrize("failing", [False, True])
def test_the_mean_comes_back_exactly(bert, failing):
    loaded, posterior = load_model(str(bert)), open_samplable(str(bert))
    before = state(loaded.model)
    draws = PosteriorDraws(loaded.model, posterior, 3)
    moved = 0
    try:
        with draws:
            for k in draws:
                moved += not same(state(loaded.model), before)
                if failing and k == 1:
                    raise KeyError("in the middle")
    except KeyError:
        assert failing
    assert moved == (2 if failing else 3)
    assert same(state(loaded.model), before)
    with pytest.raises(RuntimeError, match="context"):
        next(iter(draws))


def test_averaged_probabilities_are_those_of_models_built_from_the_draws(bert):
    """Brute force: K whole models, one softmax each, averaged."""
    loaded, posterior = load_model(str(bert)), open_samplable(str(bert))
    draws = PosteriorDraws(loaded.model, posterior, 4, seed=5)
    with draws:
        states = [state(loaded.model) for _ in draws]
        averaged = class_probabilities(
            loaded.model, loaded.tokenizer, TEXTS, max_length=64, draws=draws
        )
    single = []
    for weights in states:
        other = load_model(str(bert)).model
        other.load_state_dict(weights)
        one = [
            other(**loaded.tokenizer(t, return_tensors="pt")).logits.softmax(-1).detach()[0]
            for t in TEXTS
        ]
        single.append(torch.stack(one).numpy())
    assert np.ptp(single, axis=0).max() > 0.1  # the draws disagree
    np.testing.assert_allclose(np.exp(averaged), np.mean(single, axis=0), atol=1e-6)


def test_perplexity_averages_the_probability_of_each_token(gpt2):
    loaded, posterior = load_model(str(gpt2)), open_samplable(str(gpt2))
    draws = PosteriorDraws(loaded.model, posterior, 3)
    chances = {text: [] for text in TEXTS}
    with draws:
        for _ in draws:
            for text in TEXTS:
                ids = torch.tensor([[0, *loaded.tokenizer(text)["input_ids"]]])
                p = loaded.model(input_ids=ids).logits[0, :-1].double().softmax(-1).detach()
                chances[text].append(p[torch.arange(len(ids[0]) - 1), ids[0, 1:]].numpy())
        averaged = measure_perplexity(
            loaded.model, loaded.tokenizer, TEXTS, start=0, window=64, draws=draws
        )
    expected = [-np.log(np.mean(chances[text], axis=0)).sum() for text in TEXTS]
    np.testing.assert_allclose(averaged.document_nats, expected, rtol=1e-5)
    assert draws.report.held == 0  # the tied head counts once


class Logistic(torch.nn.Module):
    """Two classes, linear in the mean of fixed random features of the words."""

    def __init__(self, words, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("features", torch.randn(words, width))
        self.linear = torch.nn.Linear(width, 2)

    def inputs(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return (self.features[input_ids] * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.linear(self.inputs(input_ids, attention_mask)))


def test_many_draws_of_a_logistic_regression_give_its_predictive_integral(tmp_path, bert):
    """The difference of the logits is Gaussian; its sigmoid is integrated by Gauss and Hermite."""
    tokenizer = load_model(str(bert)).tokenizer
    model = Logistic(len(tokenizer), 6, seed=0)
    mean = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    rng = np.random.default_rng(0)
    precision = {n: rng.uniform(0.3, 3, m.shape).astype(np.float32) for n, m in mean.items()}
    path = tiny.posterior(tmp_path / "a.safetensors", mean, precision, prior=0.1)
    with PosteriorDraws(model, open_samplable(str(path)), 6000) as draws:
        averaged = np.exp(
            class_probabilities(model, tokenizer, TEXTS, max_length=64, batch_size=4, draws=draws)
        )[:, 1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for text, p in zip(TEXTS, averaged, strict=True):
        x = np.append(
            model.inputs(
                **{
                    k: v
                    for k, v in tokenizer(text, return_tensors="pt").items()
                    if k != "token_type_ids"
                }
            ).numpy(),
            1,
        )
        m = np.concatenate([mean["linear.weight"], mean["linear.bias"][:, None]], axis=1)
        v = 1 / np.concatenate(
            [precision["linear.weight"], precision["linear.bias"][:, None]], axis=1
        )
        centre, spread = (m[1] - m[0]) @ x, np.sqrt((v[0] + v[1]) @ x**2)
        sigmoid = 1 / (1 + np.exp(-(centre + spread * nodes)))
        expected, second = (weights @ sigmoid**power / weights.sum() for power in (1, 2))
        assert spread > 0.5
        assert abs(p - expected) < 4 * np.sqrt((second - expected**2) / 6000)
        # The probability at the mean is another.
        assert abs(expected - 1 / (1 + np.exp(-centre))) < 0.5


def test_a_merged_posterior_with_a_proper_base_can_be_drawn_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        tiny_models.give_posterior(tiny_models.tiny_bert(tmp_path / name, seed=i), seed=i)
    args = ["merge", "a", "b", "--base", "base", "--weights", "precision", "-o", "ab"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    loaded, posterior = load_model("ab"), open_samplable("ab")
    assert posterior.info.prior.kind == "base"
    draws = PosteriorDraws(loaded.model, posterior, 2)
    assert draws.report.held == 0
    assert draws.report.prior == pytest.approx(PRIOR)
    with draws:
        assert len(list(draws)) == 2
    average = CliRunner().invoke(app, ["merge", "a", "b", "--weights", "precision", "-o", "mean"])
    assert average.exit_code == 0, average.output
    assert sampling_obstacle(open_posterior("mean").info) is None


def test_an_adapters_posterior_moves_the_adapter_only(tmp_path):
    base = tiny_models.tiny_bert(tmp_path / "base", labels=3)
    loaded = load_model(str(base))
    config = peft.LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False
    )
    model = peft.get_peft_model(loaded.model, config)
    model.save_pretrained(tmp_path / "adapter")
    tiny_models.give_posterior(tmp_path / "adapter", load_model(str(tmp_path / "adapter")))
    loaded = load_model(str(tmp_path / "adapter"))
    posterior = open_samplable(str(tmp_path / "adapter"))
    before = state(loaded.model)
    with PosteriorDraws(loaded.model, posterior, 1) as draws:
        for _ in draws:
            moved = {n for n, t in state(loaded.model).items() if not torch.equal(t, before[n])}
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert moved == trained
    assert any("lora_A" in n for n in moved)
    assert same(state(loaded.model), before)


def test_experts_that_a_file_holds_apart_are_drawn_where_they_are_stacked(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=28,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    precision = tiny_models.give_posterior(tmp_path, SimpleNamespace(model=model))
    draws = PosteriorDraws(model, open_samplable(str(tmp_path)), 300)
    assert draws.report.held == 0
    assert sum(".experts." in n for n in precision) == 9
    mean = checkpoint_names(model, state(model))
    total = {n: np.zeros(p.shape) for n, p in precision.items()}
    with draws:
        for _ in draws:
            for name, t in checkpoint_names(model, state(model)).items():
                total[name] += ((t - mean[name]).numpy() ** 2) * precision[name]
    for name, z2 in total.items():
        assert z2.mean() / 300 == pytest.approx(1, abs=6 * np.sqrt(2 / (300 * z2.size))), name


def test_parameters_without_a_precision_stay(bert, tmp_path):
    folder = tiny_models.tiny_bert(tmp_path / "bert", labels=3)
    tiny_models.give_posterior(folder, only="classifier")
    loaded = load_model(str(folder))
    draws = PosteriorDraws(loaded.model, open_samplable(str(folder)), 1)
    head = sum(p.numel() for n, p in loaded.model.named_parameters() if "classifier" in n)
    assert draws.report.parameters == head
    assert draws.report.held == sum(p.numel() for p in loaded.model.parameters()) - head


@pytest.mark.parametrize(
    ("stored_prior", "reason"),
    [
        (Prior(), "bare curvature"),
        (Prior(kind="isotropic", precision=1e-12), "bare curvature"),
        (Prior(kind="base", precision=0.0), "bare curvature"),
        (Prior(kind="unknown"), "is not known"),
    ],
)
def test_a_posterior_without_a_proper_prior_is_refused_until_one_is_given(
    tmp_path, stored_prior, reason
):
    folder = tiny_models.tiny_bert(tmp_path / "bert")
    tiny_models.give_posterior(folder, stored_prior=stored_prior, prior=0)
    assert reason in sampling_obstacle(open_posterior(str(folder)).info)
    with pytest.raises(PrecisionError, match=f"cannot be sampled: .*{reason}.*--prior X"):
        open_samplable(str(folder))
    posterior = open_samplable(str(folder), prior=10.0)
    report = PosteriorDraws(load_model(str(folder)).model, posterior, 1, prior=10.0).report
    assert report.largest_sigma < 10**-0.5


def test_zeros_in_a_precision_that_claims_a_prior_are_refused(tmp_path):
    precision = tiny.precisions(0)
    precision["h.0.ln.bias"][1] = 0
    model, posterior, _, _ = table(tmp_path, precision)
    with pytest.raises(PrecisionError, match=r"'h.0.ln.bias' has 1 entries of 1e-11 or less"):
        PosteriorDraws(model, posterior, 1)
    assert PosteriorDraws(model, posterior, 1, prior=0.5).report.largest_sigma <= 2**0.5


def test_what_does_not_belong_together_is_refused(tmp_path, bert):
    bare = tiny_models.tiny_bert(tmp_path / "bare")
    with pytest.raises(PrecisionError, match="no precision for"):
        open_samplable(str(bare))
    with pytest.raises(PrecisionError, match="taken at other weights"):
        open_samplable(str(bare), precision=str(bert))
    with pytest.raises(CheckpointError, match="no such file"):
        open_samplable(str(tmp_path / "none"))
    model, posterior, mean, _ = table(tmp_path)
    for bad in ({"samples": 0}, {"prior": 0.0}, {"prior": 1e-12}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="expected"):
            PosteriorDraws(model, posterior, **({"samples": 1} | bad))
    with pytest.raises(MismatchError, match=r"no parameter 'h\.0\.ln\.bias'"):
        PosteriorDraws(Table({n: m for n, m in mean.items() if n != "h.0.ln.bias"}), posterior, 1)
    with pytest.raises(
        MismatchError, match=r"'wte.weight' is F32 \[7, 4\], the model's tensor \[8, 4\]"
    ):
        PosteriorDraws(Table(mean | {"wte.weight": np.zeros((8, 4), np.float32)}), posterior, 1)
