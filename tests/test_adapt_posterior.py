"""What an adaptation does with a stored precision: the weight-space part, and what it stores."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.data import CollateParts, Mixture, load_run
from mergekit_bayes.adapt.objective import Objective
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.stopping import Outcome
from mergekit_bayes.adapt.store import save_adapted
from mergekit_bayes.adapt.teacher import FrozenCopy
from mergekit_bayes.adapt.trainer import ivon_arguments
from mergekit_bayes.adapt.units import choose_units
from mergekit_bayes.adapt.weights import by_parameter, make_weight_part, read_start
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.finetune.identity import digest
from mergekit_bayes.hub.card import make_card
from mergekit_bayes.hub.push import plan_push
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import (
    Anchor,
    Edit,
    EditedRows,
    EditMemory,
    Identity,
    MergeTrace,
    PosteriorInfo,
    Prior,
    Term,
    identify,
    open_posterior,
    parse_info,
    save_posterior,
)
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2

PRIOR = 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model without a posterior, and rows to remove, add and remember."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "bare", layers=1)
    for seed, name in enumerate(("remove", "add", "memory")):
        texts(folder / f"{name}.jsonl", rows=12, seed=seed)
    return folder


def with_posterior(world, name, scale=4.0):
    """The model with a random precision above PRIOR."""
    model = tiny_gpt2(world / name, layers=1)
    rng = np.random.default_rng(5)
    with SafetensorsSource(checkpoint_files(model)) as source:
        record = {"observations": 1000.0, "ess": 500.0, "unit": "token"}
        info = PosteriorInfo(
            estimator="ggn",
            prior=Prior(kind="isotropic", precision=PRIOR),
            mean=identify(source),
            **record,
        )
        precision = {
            name: (PRIOR + scale * (1 + rng.gamma(0.5, 1.0, spec.shape))).astype(np.float32)
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


def precisions_of(settings):
    """S_w of a run by the parameter's name."""
    run = load_run(settings)
    terms = {id(term.parameter): term.precision for term in part_of(run).terms}
    return {name: terms[id(p)] for name, p in run.loaded.model.named_parameters() if id(p) in terms}


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
    assert len(changed) == 2
    assert float(value.detach()) == pytest.approx(2 * dense(precision, before, after), rel=1e-5)


def test_an_adapter_on_a_classifier_holds_its_head_too(world):
    """The head is trained as a whole beside the adapter, and is held by its own precision."""
    import transformers

    folder, source = world / "classifier", tiny_gpt2(world / "for classifier", layers=1)
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
    file = model / "posterior" / "precision.posterior"
    with safetensors.safe_open(file, "np") as opened:
        header = opened.metadata()
    tensors = {f"precision:{name}": torch.tensor(values) for name, values in precision.items()}
    safetensors.torch.save_file(tensors, file, header)
    run = load_run(config(world, model))
    part = part_of(run)
    before = weights_of(run.loaded.model)
    move(run.loaded.model)
    expected = 2 * dense(precision, before, weights_of(run.loaded.model))
    assert float(part().detach()) == pytest.approx(expected, rel=1e-5)


def test_base_observations_scale_the_data_and_not_the_prior(world, start):
    model, precision = start
    run = load_run(config(world, model, base_observations=3000))
    read = read_start(run.config, run.places, "token")
    stored = 2 * precision["transformer.wpe.weight"]
    assert read.prior == 2 * PRIOR
    expected = 3 * (stored - 2 * PRIOR) + 2 * PRIOR
    np.testing.assert_allclose(read.precision["transformer.wpe.weight"], expected, rtol=1e-5)
    # 3,000 examples are not three times 1,000 tokens.
    read = read_start(run.config, run.places, "example")
    np.testing.assert_allclose(read.precision["transformer.wpe.weight"], stored, rtol=1e-5)


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
    model = tiny_gpt2(world / "remembering", layers=1)
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
    alone = precisions_of(config(world, model))
    beside = precisions_of(config(world, model, memory=memory, kappa=3))
    half = precisions_of(config(world, model, memory=memory, kappa=1.5))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert alone[name].max() > 2 * PRIOR
    torch.testing.assert_close(beside[name], torch.full_like(beside[name], PRIOR))
    torch.testing.assert_close(half[name], PRIOR + 1.5 * curvature[name])
    settings = config(world, model, memory=memory, kappa=1.5, pool="row")
    by_row = precisions_of(settings)[name]
    torch.testing.assert_close(by_row, PRIOR + 1.5 * curvature[name].mean(1, keepdim=True))


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
    other = tiny_gpt2(world / "other", seed=9, layers=1)
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
        changes = {"tau": tau, "learning_rate": 1e-3, "max_steps": 6, "force": True}
        run_adapt(config(world, start[0], posterior="none", **changes), quiet=True)
        with SafetensorsSource(checkpoint_files(world / "out")) as source:
            changes = [read_tensor(source, n) - before[n] for n in source.specs]
        moved[tau] = np.concatenate([change.ravel() for change in changes])
    assert np.abs(moved[0]).mean() > 3 * np.abs(moved[1e3]).mean()


def settings(world, name, **changes):
    return {"prior": "auto", "force": True, "output": str(world / name), **changes}


def at_the_start(world, model, name, change=lambda model: None, **changes):
    """What an adaptation stores in `name` that made no step, but what `change` does."""
    run = load_run(config(world, model, **settings(world, name, **changes)))
    change(run.loaded.model)
    return save_adapted(run, Outcome(0, 0), None), world / name


def stored(folder):
    """The record, the weights and the precision of a folder."""
    with open_posterior(str(folder)) as posterior:
        assert posterior.info.mean.blocks == posterior.identity
        means = {name: read_tensor(posterior.mean, name) for name in posterior.mean.specs}
        values = {name: read_tensor(posterior.precision, name) for name in means}
        return posterior.info, means, values


@pytest.fixture(scope="module")
def sure(world):
    """A start whose precision is larger than what any rows here can take from it."""
    model, precision = with_posterior(world, "sure", scale=1000)
    return model, {name: 2 * values for name, values in precision.items()}


ADD = {"data": "add.jsonl", "where": {"label": 1}}


@pytest.fixture(scope="module")
def edited(world, sure):
    """The start without the rows to remove, and with those to add."""
    add = ADD | {"data": str(world / "add.jsonl")}
    changes = settings(world, "edited", add=add, learning_rate=1e-2)
    return run_adapt(config(world, sure[0], **changes), quiet=True), world / "edited"


def test_the_stored_precision_is_that_of_the_edited_data(world, sure, edited):
    report, folder = edited
    info, _, values = stored(folder)
    run = load_run(config(world, sure[0], add=ADD | {"data": str(world / "add.jsonl")}))
    at_the_end = load_run(config(world, folder)).loaded
    sums = {}
    for part in ("remove", "add"):
        chosen = random_examples(run.parts[part], 16, 0)
        total, count, *_ = estimate_curvature("ggn", at_the_end, chosen, batch_size=4, seed=0)
        scale = getattr(run.units, {"remove": "removed", "add": "added"}[part]) / count
        sums[part] = checkpoint_names(
            at_the_end.model, {name: scale * h for name, h in total.items()}
        )
    for name, start in sure[1].items():
        expected = start + sums["add"][name].numpy() - sums["remove"][name].numpy()
        np.testing.assert_allclose(values[name], expected, rtol=1e-4)
    units = run.units
    assert (info.observations, info.ess) == (1000 + units.added - units.removed,) * 2
    assert info.prior == Prior(kind="isotropic", precision=2 * PRIOR)
    assert info.anchor == Anchor(kind="base", precision=None)
    assert report.estimator == info.estimator == "ggn"
    assert report.without_precision is None
    assert info.health["guarded_share"] == 0
    with open_posterior(str(sure[0])) as start:
        assert info.edits == (
            Edit(
                rows=(
                    EditedRows(
                        kind="remove",
                        label="remove.jsonl",
                        observations=units.removed,
                        sha256=digest(run.parts["remove"]),
                    ),
                    EditedRows(
                        kind="add",
                        label="add.jsonl",
                        observations=units.added,
                        sha256=digest(run.parts["add"]),
                    ),
                ),
                removal="npo",
                prior="stored",
                steps=3,
                base=1000,
                base_is_recorded=True,
                start=run.base,
                start_precision=Identity(blocks=start.precision_identity),
                start_count=2,
            ),
        )


def test_what_is_added_again_gives_the_precision_back(world, sure):
    """At the same mean, S_0 - H_R + H_R = S_0, for as many observations."""
    _, without = at_the_start(world, sure[0], "without")
    rows = {"data": str(world / "remove.jsonl")}
    _, again = at_the_start(world, without, "again", remove=None, add=rows)
    info, _, values = stored(again)
    less, _, fewer = stored(without)
    assert less.observations < 1000 == info.observations
    assert [edit.rows[0].kind for edit in info.edits] == ["remove", "add"]
    for name, start in sure[1].items():
        np.testing.assert_allclose(values[name], start, rtol=1e-5)
        assert np.all(fewer[name] <= start)
        assert name.endswith("bias") or np.any(fewer[name] < start)


def test_the_guard_bounds_what_removed_rows_take(world):
    """Of a start that knows nothing, `guard` times their own curvature is left, and the prior."""
    model, _ = with_posterior(world, "unsure", scale=0)
    report, folder = at_the_start(world, model, "guarded")
    info, _, values = stored(folder)
    run = load_run(config(world, model))
    chosen = random_examples(run.parts["remove"], 16, 0)
    total, count, *_ = estimate_curvature("ggn", run.loaded, chosen, batch_size=4, seed=0)
    name = "transformer.h.0.mlp.c_fc.weight"
    expected = 2 * PRIOR + 0.2 * run.units.removed / count * total[name].numpy()
    np.testing.assert_allclose(values[name], expected, rtol=1e-4)
    assert report.health["guarded_share"] == info.health["guarded_share"] > 0.8
    assert min(v.min() for v in values.values()) >= 2 * PRIOR * (1 - 1e-6)


def test_without_a_stored_precision_the_memory_stands_for_the_base(world):
    memory = {"data": str(world / "memory.jsonl")}
    changes = {"kappa": 3.0, "prior": 0.25, "memory": memory}
    report, folder = at_the_start(world, world / "bare", "remembered", **changes)
    info, _, values = stored(folder)
    run = load_run(config(world, world / "bare", **changes))
    sums = {}
    for part in ("memory", "remove"):
        chosen = random_examples(run.parts[part], 16, 0)
        total, count, *_ = estimate_curvature("ggn", run.loaded, chosen, batch_size=4, seed=0)
        name = "transformer.h.0.mlp.c_fc.weight"
        examples = observations(run.parts[part], "causal-lm")
        sums[part] = total[name].numpy() * examples / count
    data, taken = 3 * sums["memory"], sums["remove"]
    expected = 0.25 + np.maximum(data - taken, 0.2 * (data + taken))
    np.testing.assert_allclose(values[name], expected, rtol=1e-4)
    assert info.observations == 3 * run.units.memory - run.units.removed
    [edit] = info.edits
    assert edit.memory == EditMemory(
        kind="rows", observations=run.units.memory, sha256=digest(run.parts["memory"])
    )
    assert (edit.kappa, edit.prior, edit.start_count, edit.start_precision) == (3, 0.25, None, None)
    assert info.anchor == Anchor(kind="base", precision=None)
    assert report.memory == run.units.memory


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "neither a stored precision of the start nor a memory"),
        ({"lora": {"r": 1}, "memory": "memory.jsonl"}, "an adapter has no numbers"),
        ({"posterior": "none"}, "the settings ask for none"),
    ],
)
def test_where_no_precision_is_stored_the_report_says_why(world, changes, reason):
    if "memory" in changes:
        changes = changes | {"memory": {"data": str(world / changes["memory"])}}
    report, folder = at_the_start(world, world / "bare", "nothing", **changes)
    assert report.estimator is None
    assert reason in report.without_precision
    assert not (folder / "posterior").exists()
    written = json.loads((folder / "adapt_report.json").read_text())
    assert reason in written["without_precision"]
    assert "path" not in written
    assert written["removed"] == report.removed > 0


def merged(tmp_path, models, **changes):
    """The means, the precision and the record of a merge by precision."""
    out = tmp_path / "merged"
    run_merge(
        MergeConfig(models=list(map(str, models)), output=str(out), weights="precision", **changes)
    )
    return stored(out)


def test_an_adapted_model_on_its_own_start_adds_only_its_edit(world, sure, edited, tmp_path):
    """A task at scale 1 is itself again; the start's precision does not count twice."""
    info, means, values = merged(tmp_path, [edited[1]], base=str(sure[0]))
    one, its_means, its_values = stored(edited[1])
    for name in its_means:
        np.testing.assert_allclose(means[name], its_means[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values[name], its_values[name], rtol=1e-4)
    added = one.observations - 1000
    assert info.observations == pytest.approx(added)
    assert info.prior.kind == "base"
    assert [edit.rows for edit in info.edits] == [edit.rows for edit in one.edits]
    assert info.edits[0].start_count is None  # how much of it is left the merge cannot say


def test_two_edits_of_one_start_add_up(world, sure, edited, tmp_path):
    rows = {"data": str(world / "memory.jsonl")}
    _, other = at_the_start(world, sure[0], "other", move, remove=None, add=rows)
    info, means, values = merged(tmp_path, [edited[1], other], base=str(sure[0]), scale=[1, 1])
    start, first, second = stored(sure[0]), stored(edited[1]), stored(other)
    for name in means:
        s0, m0 = 2 * start[2][name].astype(np.float64), start[1][name].astype(np.float64)
        s1, s2 = first[2][name], second[2][name]
        total = s0 + (s1 - s0) + (s2 - s0)
        moved = s1 * (first[1][name] - m0) + s2 * (second[1][name] - m0)
        np.testing.assert_allclose(values[name], total, rtol=1e-4)
        np.testing.assert_allclose(means[name], m0 + moved / total, rtol=1e-4, atol=1e-6)
    assert len(info.edits) == 2


def test_a_chain_of_edits_counts_on_its_first_start(world, sure, edited, tmp_path):
    """Also where a later edit took the model to stand for more than it records."""
    rows = {"data": str(world / "memory.jsonl")}
    changes = {"base_observations": 3000, "remove": rows}
    report, folder = at_the_start(world, edited[1], "later", **changes)
    one, _, _ = stored(edited[1])
    two, _, values = stored(folder)
    factor = 3000 / one.observations
    assert two.edits[1].start_count == pytest.approx(factor)
    assert two.observations == 3000 - report.removed
    info, _, on_start = merged(tmp_path, [folder], base=str(sure[0]))
    assert info.observations == pytest.approx(two.observations / factor - 1000)
    for name in values:
        expected = (values[name] - 2 * PRIOR) / factor + 2 * PRIOR
        np.testing.assert_allclose(on_start[name], expected, rtol=1e-4)


def test_an_adapted_model_is_averaged_and_built_on_like_any_other(world, sure, edited, tmp_path):
    (one, means, values), (_, its_means, its_values) = stored(edited[1]), stored(sure[0])
    info, averaged, _ = merged(tmp_path, [edited[1], sure[0]], counts="recorded")
    base = {"base": str(edited[1]), "counts": "recorded"}
    on_it, _, larger = merged(tmp_path / "on it", [sure[0]], **base)
    for name in means:
        weights = values[name].astype(np.float64), 2 * its_values[name].astype(np.float64)
        expected = weights[0] * means[name] + weights[1] * its_means[name]
        np.testing.assert_allclose(averaged[name], expected / sum(weights), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(larger[name], sum(weights) - 2 * PRIOR, rtol=1e-4)
    assert info.edits[0].rows == on_it.edits[0].rows == one.edits[0].rows


def test_a_start_inside_of_two_tasks_on_another_base_is_told(start, sure, edited, tmp_path):
    words = "each holds the precision of one start"
    models = (str(edited[1]), str(sure[0]))

    def notes(name, base, **changes):
        settings = {"output": str(tmp_path / name), "weights": "precision", "base": base}
        return " ".join(run_merge(MergeConfig(models=models, **settings, **changes)).notes)

    assert f"'{models[0]}', '{models[1]}': {words}" in notes("twice", str(start[0]), scale=[1, 1])
    assert words not in notes("difference", str(start[0]), scale=[1, -1])
    assert words not in notes("average", None)


def test_what_an_adapted_model_counts_on_its_start_is_not_set_by_hand(
    world, sure, edited, tmp_path
):
    base = {"base": str(sure[0])}
    with pytest.raises(ConfigError, match="was adapted from"):
        merged(tmp_path, [edited[1]], observations={str(edited[1]): "3x"}, **base)
    with pytest.raises(MismatchError, match=r"was adapted from.*--shrink"):
        merged(tmp_path, [edited[1]], shrink="0.1", **base)


def test_the_card_and_inspect_tell_of_the_edit(world, edited):
    report, folder = edited
    (folder / "memory.jsonl").write_text("{}")
    words = (
        f"removed {report.removed} tokens of remove.jsonl (npo) and added {report.added} tokens of "
        "add.jsonl; held by its stored precision, tau 1; 3 steps from a start that stood for 1,000 "
        "tokens"
    )
    shown = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "300"})
    assert f"adapted: {words}" in shown.output
    card = make_card(folder).text
    assert words.replace("_", "\\_") in card
    assert f"- removed: {report.removed} tokens of `remove.jsonl`" in card
    assert "- held by the stored precision of its start; tau 1" in card
    assert str(world) not in card
    pushed = plan_push(folder, "org/x")
    assert "adapt_report.json" in [file.path for file in pushed.files]
    assert pushed.left_out["memory.jsonl"] == "text that the model wrote, which may hold anything"


def test_an_error_below_its_noise_is_no_number_on_the_card(edited, tmp_path):
    folder = shutil.copytree(edited[1], tmp_path / "noisy")
    report = json.loads((folder / "adapt_report.json").read_text())
    for error, words in ((-0.01, "below its noise"), (0.125, "0.125")):
        (folder / "adapt_report.json").write_text(
            json.dumps(report | {"reconstruction_error": error})
        )
        assert f"held-out memory: {words}" in make_card(folder).text


def test_a_merge_whose_scales_cancel_stands_for_its_base():
    info = PosteriorInfo(
        estimator="ggn",
        unit="token",
        observations=0,
        prior=Prior(kind="base"),
        mean=Identity(blocks="a"),
        merge=MergeTrace(common_count=500),
    )
    config = AdaptConfig(model="m", output="o", learning_rate=1.0)
    units = choose_units(config, None, {"add": 10}, info, "token")
    assert (units.base, units.base_is_recorded) == (500, True)


def test_a_record_without_edits_is_written_as_before():
    """SHA-256 of the record as it was written before there were edits, but for its format."""
    info = PosteriorInfo(
        estimator="ggn",
        unit="token",
        observations=10,
        ess=5,
        sampled=3,
        prior=Prior(kind="isotropic", precision=0.5),
        anchor=Anchor(kind="zero", precision=0.1),
        mean=Identity(blocks="a", full="b"),
        base=Identity(blocks="c"),
        tokenizer="d",
        dtype="float32",
        training={"optimizer": "ivon", "lr": 0.1},
        health={"kappa": 1.5},
        aliases={"x": "y"},
        terms=(Term(label="t", mean=Identity(blocks="e"), scale=-1),),
        merge=MergeTrace(common_count=7, shrink="0.1"),
    )
    assert '"format":2,' in info.to_metadata()["bmerge"]
    info = info.model_copy(update={"format": 1})
    written = info.model_dump_json()
    assert hashlib.sha256(written.encode()).hexdigest().startswith("55b97b7bf26796a7")
    indented = info.model_dump_json(indent=2)
    assert hashlib.sha256(indented.encode()).hexdigest().startswith("80825969a1cde041")
    assert parse_info({"bmerge": written}, Path("old")) == info


def test_numbers_of_an_edit_with_which_no_merge_can_count_are_refused():
    edit = Edit(rows=(), steps=1, base=1.0, start_count=0.0)
    info = PosteriorInfo(estimator="ggn", mean=Identity(blocks="a"), edits=(edit,))
    with pytest.raises(PrecisionError, match=r"edits\.0\.start_count is 0\.0"):
        parse_info(info.to_metadata(), Path("file"))


def ivon_run(world, model, **changes):
    """A run with IVON, its objective and its weight-space part, which becomes the prior."""
    memory = {"data": str(world / "memory.jsonl")}
    changes = {"memory": memory, "optimizer": "ivon", "posterior": "none"} | changes
    run = load_run(config(world, model, **changes))
    sizes = {name: len(examples) for name, examples in run.parts.items()}
    teacher = FrozenCopy(run.loaded.model)
    objective = Objective(run.units, sizes, "npo", 0.1, teacher)
    return run, objective, part_of(run)


def test_ivon_has_the_weight_space_part_as_its_prior(world, start):
    """Over ess it is what AdamW's loss has over N: the objective of the mean is the same."""
    run, _, part = ivon_run(world, start[0], tau=3, kappa=0)
    arguments = ivon_arguments(run, part)
    optimizer = IVON(run.loaded.model.parameters(), **arguments)
    name = "transformer.h.0.mlp.c_fc.weight"
    parameter = run.loaded.model.get_parameter(name)
    centre, decay = optimizer._prior[parameter]
    assert torch.equal(centre, parameter)
    expected = 3 * 2 * torch.tensor(start[1][name]) / run.units.edited
    torch.testing.assert_close(decay, expected)
    assert arguments["ess"] > run.units.edited
    assert arguments["clip_radius"] == 1e-3
    weaker = ivon_arguments(run, None)["prior"][parameter]
    assert weaker[1] == pytest.approx(1e-6 * arguments["ess"])


def test_ivons_curvature_is_that_of_what_is_kept_by_its_weights(world):
    """The squares are those of the added and memory rows, times their weights in J / N."""
    add = {"data": str(world / "add.jsonl")}
    run, objective, _ = ivon_run(world, world / "bare", prior="none", add=add, kappa=2.5, tau=2)
    batch = CollateParts(run.loaded.pad)(Mixture(run.parts, 3, 0))
    weights = objective.curvature_weights(batch)
    per_row = (batch["labels"][:, 1:] != -100).sum(1)
    expected = torch.repeat_interleave(
        torch.tensor([0.0] * 3 + [12 / 3] * 3 + [2 * 2.5 * len(run.parts["memory"]) / 3] * 3),
        per_row,
    )
    torch.testing.assert_close(weights, expected)
    assert objective.edited == run.units.removed + run.units.added


def test_a_run_with_ivon_leaves_the_mean(world, start, monkeypatch):
    """Its curvature is taken of a whole batch, and no noise stays in the weights."""
    taken, means, priors = [], [], []
    add, step = IVON.add_curvature, IVON.step

    def add_curvature(self, projected, observations):
        taken.append(observations)
        add(self, projected, observations)

    def look(self, *arguments):
        step(self, *arguments)
        first = self.param_groups[0]["params"][0]
        means.append(first.detach().numpy().copy())
        priors.append(self._prior[first][1])

    monkeypatch.setattr(IVON, "add_curvature", add_curvature)
    monkeypatch.setattr(IVON, "step", look)
    memory = {"data": str(world / "memory.jsonl")}
    changes = {"optimizer": "ivon", "posterior": "none", "memory": memory, "max_steps": 2}
    report = run_adapt(config(world, start[0], force=True, **changes), quiet=True)
    assert taken == [report.removed]
    with SafetensorsSource(checkpoint_files(world / "out")) as source:
        saved = read_tensor(source, "transformer.wte.weight")
    np.testing.assert_array_equal(saved, means[-1])
    assert np.any(means[0] != means[1])
    assert isinstance(priors[0], torch.Tensor)  # the stored precision, not one small number


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["stored", "none"])
def test_ivon_reaches_about_the_objective_of_adamw(world, start, prior):
    """From one start, by the objective on all rows at the end."""
    memory = {"data": str(world / "memory.jsonl")}
    reached = {}
    for optimizer in ("adamw", "ivon"):
        changes = {
            "optimizer": optimizer,
            "learning_rate": 3e-3,
            "add": {"data": str(world / "add.jsonl")},
            "memory": memory,
            "prior": prior,
            "posterior": "none",
            "max_steps": 100,
            "force": True,
        }
        settings = config(world, start[0], **changes)
        run = load_run(settings)
        teacher, part = FrozenCopy(run.loaded.model), part_of(run)
        sizes = {name: len(examples) for name, examples in run.parts.items()}
        objective = Objective(run.units, sizes, "npo", 0.1, teacher, part)
        batch = CollateParts(run.loaded.pad)(Mixture(run.parts, 12, 0))
        before = float(objective(run.loaded.model, batch).total.detach())
        run_adapt(settings, quiet=True)
        after = weights_in(world / "out")
        with torch.no_grad():
            for name, parameter in run.loaded.model.named_parameters():
                parameter.copy_(after[name])
        reached[optimizer] = before - float(objective(run.loaded.model, batch).total.detach())
    assert reached["adamw"] > 0.2
    assert reached["ivon"] > 0.8 * reached["adamw"]


def weights_in(folder):
    """The weights of a folder by name, as torch's tensors."""
    with SafetensorsSource(checkpoint_files(folder)) as source:
        return {name: torch.tensor(read_tensor(source, name)) for name in source.specs}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_run_with_ivon_goes_on_bit_for_bit(world, start, tmp_path, lora):
    changes = {
        "optimizer": "ivon",
        "output": str(tmp_path / "out"),
        "memory": {"data": str(world / "memory.jsonl")},
        "max_steps": 5,
        "save_steps": 3,
        "keep_checkpoints": True,
        "gradient_accumulation": 2,
        "lora": lora,
    }
    run_adapt(config(world, start[0], **changes), quiet=True)
    through = weights_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out.checkpoints" / "checkpoint-3").is_dir()
    for later in (tmp_path / "out.checkpoints").glob("checkpoint-5"):
        shutil.rmtree(later)
    run_adapt(config(world, start[0], resume=True, **changes), quiet=True)
    for name, weights in weights_in(tmp_path / "out").items():
        assert torch.equal(weights, through[name]), name
