"""What an adaptation does with a stored precision: the weight-space part, and what it stores."""

import numpy as np
import pytest
import torch

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.data import load_run
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.weights import by_parameter, make_weight_part, read_start
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, save_posterior
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2

PRIOR = 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model without a posterior, and rows to remove, add and remember."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "bare")
    for seed, name in enumerate(("remove", "add", "memory")):
        texts(folder / f"{name}.jsonl", rows=12, seed=seed)
    return folder


def with_posterior(world, name, change=lambda values: values, **fields):
    """The model with a random precision above PRIOR, stored as `change` makes it."""
    model = tiny_gpt2(world / name)
    rng = np.random.default_rng(5)
    with SafetensorsSource(checkpoint_files(model)) as source:
        record = {"observations": 100.0, "ess": 50.0, "unit": "token", **fields}
        info = PosteriorInfo(
            estimator="ggn",
            prior=Prior(kind="isotropic", precision=PRIOR),
            mean=identify(source),
            **record,
        )
        precision = {
            name: (PRIOR + rng.gamma(0.5, 4.0, spec.shape)).astype(np.float32)
            for name, spec in source.specs.items()
        }
        save_posterior(model, precision, info)
    return model, precision


@pytest.fixture(scope="module")
def start(world):
    return with_posterior(world, "start")


def config(world, model, **changes):
    rows = {"remove": {"data": str(world / "remove.jsonl")}}
    return AdaptConfig(
        **{
            "model": str(model),
            "output": str(world / "out"),
            "prior": "stored",
            "batch_size": 4,
            "max_steps": 3,
            "flush_batches": 4,
            **rows,
            **changes,
        }
    )


def part_of(run):
    return make_weight_part(run.config, run.loaded, run.places, run.units, run.parts.get("memory"))


def weights_of(model):
    """The weights by their names on disk, with an adapter merged into them."""
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in checkpoint_names(model, dict(model.named_parameters())).items()
    }


def dense(precision, before, after):
    """(theta - theta_0)' S (theta - theta_0) / 2 in float64."""
    return sum(
        float((s.astype(np.float64) * (after[n].astype(np.float64) - before[n]) ** 2).sum()) / 2
        for n, s in precision.items()
    )


def move(model):
    """Change what is trained, with a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("pool", [None, "row", "tensor"])
def test_the_penalty_of_full_weights_is_the_dense_quadratic(world, start, pool):
    model, precision = start
    run = load_run(config(world, model, pool=pool))
    part = part_of(run)
    before = weights_of(run.loaded.model)
    assert part() == 0
    move(run.loaded.model)
    for name, values in precision.items():
        axes = {None: (), "row": tuple(range(1, values.ndim)), "tensor": None}[pool]
        if axes != ():
            precision = precision | {name: values.mean(axes, keepdims=True)}
    expected = 2 * dense(precision, before, weights_of(run.loaded.model))  # observations / ess
    assert float(part().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_penalty_of_an_adapter_is_that_of_the_merged_weights(world, start):
    model, precision = start
    lora = {"r": 3, "alpha": 6, "target_modules": ["c_attn", "c_fc"]}
    run = load_run(config(world, model, lora=lora))
    part = part_of(run)
    before = weights_of(load_run(config(world, model)).loaded.model)
    assert part() == 0
    move(run.loaded.model)
    value = part()
    value.backward()
    parameter = next(p for n, p in run.loaded.model.named_parameters() if "lora_A" in n)
    with torch.no_grad():
        parameter[0, 0] += 1e-2
        above = float(part().detach())
        parameter[0, 0] -= 2e-2
        slope = (above - float(part().detach())) / 2e-2
        parameter[0, 0] += 1e-2
    assert float(parameter.grad[0, 0]) == pytest.approx(slope, rel=1e-2)
    after = weights_of(run.loaded.model)
    changed = [name for name in precision if np.any(after[name] != before[name])]
    assert len(changed) == 4
    assert float(value.detach()) == pytest.approx(2 * dense(precision, before, after), rel=1e-5)


def test_an_adapter_on_a_classifier_holds_its_head_too(world):
    """The head is trained as a whole beside the adapter, and is held by its own precision."""
    import transformers

    folder, source = world / "classifier", tiny_gpt2(world / "for classifier")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    with SafetensorsSource(checkpoint_files(folder)) as mean:
        info = PosteriorInfo(estimator="ggn", mean=identify(mean))
        save_posterior(folder, {"score.weight": np.full((2, 16), 3, np.float32)}, info)
    run = load_run(config(world, folder, lora={"r": 2}))
    part = part_of(run)
    trained = dict(run.loaded.model.named_parameters())
    [head] = [p for name, p in trained.items() if "score" in name and p.requires_grad]
    with torch.no_grad():
        head += 0.5
    assert float(part().detach()) == pytest.approx(3 * 32 * 0.25 / 2)


@pytest.mark.parametrize("shape", ["row", "tensor", "scalar"])
def test_a_precision_is_read_in_any_form(world, shape):
    import safetensors.torch

    model, precision = with_posterior(world, shape)
    made = {
        "row": lambda v: v.mean(tuple(range(1, v.ndim)), keepdims=True),
        "tensor": lambda v: v.mean(keepdims=True),
        "scalar": lambda v: np.array(v.mean()),
    }[shape]
    precision = {name: made(values) for name, values in precision.items()}
    file = model / "posterior" / "precision.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        header = opened.metadata()
    tensors = {name: torch.tensor(values) for name, values in precision.items()}
    safetensors.torch.save_file(tensors, file, header)
    run = load_run(config(world, model))
    part = part_of(run)
    before = weights_of(run.loaded.model)
    move(run.loaded.model)
    expected = 2 * dense(precision, before, weights_of(run.loaded.model))
    assert float(part().detach()) == pytest.approx(expected, rel=1e-5)


def test_base_observations_scale_the_data_and_not_the_prior(world, start):
    model, precision = start
    run = load_run(config(world, model, base_observations=300))
    read = read_start(run.config, run.places)
    stored = 2 * precision["transformer.wpe.weight"]
    assert read.prior == 2 * PRIOR
    expected = 3 * (stored - 2 * PRIOR) + 2 * PRIOR
    np.testing.assert_allclose(read.precision["transformer.wpe.weight"], expected, rtol=1e-5)


def test_the_memory_takes_its_own_curvature_out(world):
    """If S_0 is kappa H_M and a prior, the weights are held by the prior alone."""
    memory = {"data": str(world / "memory.jsonl")}
    bare = load_run(config(world, world / "bare", prior="none", memory=memory, kappa=3))
    examples = random_examples(bare.parts["memory"], len(bare.parts["memory"]), 0)
    curvature = estimate_curvature("ggn", bare.loaded, examples, batch_size=4, seed=0).total
    stored = {
        name: (PRIOR + 3 * values).numpy()
        for name, values in checkpoint_names(bare.loaded.model, curvature).items()
    }
    model = tiny_gpt2(world / "remembering")
    with SafetensorsSource(checkpoint_files(model)) as source:
        info = PosteriorInfo(
            estimator="ggn",
            prior=Prior(kind="isotropic", precision=PRIOR),
            mean=identify(source),
            unit="token",
            observations=50,
            ess=50,
        )
        save_posterior(model, stored, info)
    alone = part_of(load_run(config(world, model))).precision
    beside = part_of(load_run(config(world, model, memory=memory, kappa=3))).precision
    half = part_of(load_run(config(world, model, memory=memory, kappa=1.5))).precision
    name = "transformer.h.0.mlp.c_fc.weight"
    assert alone[name].max() > 2 * PRIOR
    torch.testing.assert_close(beside[name], torch.full_like(beside[name], PRIOR))
    torch.testing.assert_close(half[name], PRIOR + 1.5 * curvature[name])


def test_a_number_is_the_precision_of_every_weight(world):
    run = load_run(config(world, world / "bare", prior=4.0))
    part = part_of(run)
    with torch.no_grad():
        for parameter in run.loaded.model.parameters():
            parameter += 0.5
    count = sum(p.numel() for p in run.loaded.model.parameters())
    assert float(part().detach()) == pytest.approx(count * 4 * 0.25 / 2, rel=1e-5)


def test_auto_is_the_stored_precision_only_without_a_memory(world, start):
    memory = {"data": str(world / "memory.jsonl")}
    assert part_of(load_run(config(world, start[0], prior="auto"))) is not None
    assert part_of(load_run(config(world, start[0], prior="auto", memory=memory))) is None
    assert part_of(load_run(config(world, world / "bare", prior="auto"))) is None


def test_a_missing_or_foreign_precision_is_refused(world):
    with pytest.raises(ConfigError, match=r"prior: stored.*bmerge precision"):
        load_run(config(world, world / "bare"))
    model, _ = with_posterior(world, "moved")
    other = tiny_gpt2(world / "other", seed=9)
    (other / "model.safetensors").rename(model / "model.safetensors")
    with pytest.raises(PrecisionError, match="other weights"):
        load_run(config(world, model))


def test_a_parameter_that_is_stored_in_parts_has_them_in_their_places():
    from mergekit_bayes.models.places import Place

    model = torch.nn.Linear(2, 3, bias=False)
    places = [
        Place("first", model.weight, (2,), (1,), 0),
        Place("last", model.weight, (2,), (1,), 4),
    ]
    values = {"first": torch.tensor([1.0, 2.0]), "last": torch.tensor([5.0])}
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    assert torch.equal(by_parameter(model, places, values)["weight"], expected)


def test_a_run_is_held_by_its_stored_precision(world, start):
    """Adam moves every entry by the learning rate, and a strong K-prior moves it back."""
    before = weights_of(load_run(config(world, start[0])).loaded.model)
    moved = {}
    for tau in (0, 1e3):
        settings = {"tau": tau, "learning_rate": 1e-3, "max_steps": 12, "force": True}
        run_adapt(config(world, start[0], posterior="none", **settings), quiet=True)
        with SafetensorsSource(checkpoint_files(world / "out")) as source:
            changes = [read_tensor(source, n) - before[n] for n in source.specs]
        moved[tau] = np.concatenate([change.ravel() for change in changes])
    assert np.abs(moved[0]).mean() > 4 * np.abs(moved[1e3]).mean()
