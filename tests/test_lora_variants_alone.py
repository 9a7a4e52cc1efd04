"""Adapters of variants that are linear are merged without their base, and weighed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora import merge_adapters, open_adapted
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests import tiny
from tests.adapters import factors, tensors_of, written
from tests.lora_variants import (
    BOTH,
    MAGNITUDE,
    PATTERNS,
    Q_BIAS,
    QV,
    TABLE,
    TIED,
    VARIANTS,
    load,
    logits_folded,
    logits_of_peft,
    make_bases,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def changes(base_folder, adapter_folder):
    """What an adapter adds to each tensor of its base, in float64; heads included."""
    with open_adapted(f"{base_folder}+{adapter_folder}") as opened:
        found = {n: read_tensor(opened.mean, n).astype(np.float64) for n in opened.mean.specs}
    plain = {n: t.double().numpy() for n, t in load(base_folder).state_dict().items()}
    return {name: values - plain[name] for name, values in found.items()}


def test_equal_biases_are_kept_in_a_merge_of_adapters_alone(tmp_path, bases):
    folder = trained(tmp_path / "a", bases / "untied", r=2, **VARIANTS["bias all"])
    merge_adapters([str(folder)] * 2, tmp_path / "out", scales=(0.5,))
    computed = [
        logits_of_peft(bases / "untied", path, torch.float32) for path in (folder, tmp_path / "out")
    ]
    np.testing.assert_allclose(*computed, atol=1e-5)
    other = trained(tmp_path / "b", bases / "untied", r=2, seed=2, **VARIANTS["bias all"])
    with pytest.raises(MismatchError, match=r"hold it whole \(modules_to_save, or bias\)"):
        merge_adapters([str(folder), str(other)], tmp_path / "no")


LINEAR = {
    "lora_bias": ("untied", {"target_modules": QV, "lora_bias": True}),
    "embedding": ("untied", {"target_modules": TABLE}),
    "embedding and head": ("tied", {"target_modules": BOTH}),
    "tied": ("tied", {"target_modules": TABLE, **TIED}),
    "velora": ("untied", VARIANTS["velora"]),
    "lora_bias of one": (
        "untied",
        {"target_modules": QV},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ),
    "lora_bias beside a module without a bias": (
        "untied",
        {"target_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ),
    "patterns": ("untied", {"target_modules": QV, "use_rslora": True, **PATTERNS}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "wpe"]}),
}


@pytest.mark.parametrize("space", ["product", "concat"])
@pytest.mark.parametrize("name", LINEAR)
def test_adapters_merged_alone_are_the_sum_of_their_changes_and_load_in_peft(
    tmp_path, bases, name, space
):
    kind, first, *other = LINEAR[name]
    folders = [
        trained(tmp_path / str(i), bases / kind, seed=i, **{"r": 2, "lora_alpha": 3 + i} | settings)
        for i, settings in enumerate((first, *(other or [first])))
    ]
    scales = (0.5, -0.3)
    options = {"rank": 4} if space == "product" else {}
    report = merge_adapters(
        [str(f) for f in folders], tmp_path / "out", scales=scales, space=space, **options
    )
    of_some = [note for note in report.notes if "zeros are stored for 1 that no adapter" in note]
    assert len(of_some) == name.startswith(("lora_bias of one", "lora_bias beside"))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["velora_config"] is None
    parts = [changes(bases / kind, folder) for folder in folders]
    for tensor, found in changes(bases / kind, tmp_path / "out").items():
        expected = sum(c * part[tensor] for c, part in zip(scales, parts, strict=True))
        np.testing.assert_allclose(found, expected, atol=5e-6, err_msg=tensor)
    computed = logits_of_peft(bases / kind, tmp_path / "out", torch.float32)
    folded = logits_folded(bases / kind, tmp_path / "out", torch.float32)
    np.testing.assert_allclose(computed, folded, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "magnitudes .use_dora."),
        ("tokens", "rows of trained tokens"),
        ("pissa", "began with pissa"),
        ("olora", "began with olora"),
    ],
)
def test_what_does_not_add_up_without_the_base_is_not_merged_alone(tmp_path, bases, name, message):
    folder = str(trained(tmp_path / "a", bases / "untied", **{"r": 2, **VARIANTS[name]}))
    with pytest.raises(ConfigError, match=rf"(?s){message}.*bmerge merge BASE\+.* -o OUT"):
        merge_adapters([folder, folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_and_embeddings_are_not_merged_alone_into_what_peft_does_not_load(tmp_path, bases):
    folders = [
        str(trained(tmp_path / "a", bases / "untied", r=2, target_modules=QV, lora_bias=True)),
        str(trained(tmp_path / "b", bases / "untied", r=2, target_modules=TABLE)),
    ]
    file = tmp_path / "b/adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "base_layer" not in n}, file)
    with pytest.raises(ConfigError, match="PEFT loads no adapter of both"):
        merge_adapters(folders, tmp_path / "out")


def test_a_table_and_a_linear_layer_of_one_name_are_not_merged_alone(tmp_path):
    a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
    linear = tensors_of({"m.q": Factors(a, b)})
    table = {f"base_model.model.m.q.lora_embedding_{s}": t for s, t in (("A", b.T), ("B", a.T))}
    folders = [str(written(tmp_path / n, t)) for n, t in (("a", linear), ("b", table))]
    with pytest.raises(MismatchError, match=r"'m\.q' is a table of embeddings in one of"):
        merge_adapters(folders, tmp_path / "out")


def test_a_bias_has_the_precision_of_its_scaled_factor_and_is_weighed_by_it(tmp_path):
    shapes = {"m.q.weight": (6, 4), "m.q.bias": (6,)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, shapes))
    biases, precisions = tiny.arrays(3, {"x": (2, 6)})["x"], np.float32([[4.0], [9.0]])
    folders, alphas = [], (3, 1)
    for i in range(2):
        made = factors(i, layers={"m.q": (6, 4)})
        settings = {"r": 2, "lora_alpha": alphas[i], "lora_bias": True}
        folder = written(tmp_path / str(i), tensors_of(made) | {Q_BIAS: biases[i]}, **settings)
        stored = {n: np.ones_like(t) for n, t in tensors_of(made).items()}
        stored[Q_BIAS] = np.full(6, precisions[i, 0], np.float32)
        with SafetensorsSource(checkpoint_files(folder)) as source:
            record = PosteriorInfo(
                estimator="ggn", unit="token", observations=10.0, ess=10.0, mean=identify(source)
            )
        save_posterior(folder, stored, record)
        folders.append(str(folder))
    scales = np.array(alphas)[:, None] / 2
    for folder, scale, precision in zip(folders, scales, precisions, strict=True):
        with open_adapted(f"{tmp_path / 'base'}+{folder}") as opened:
            found = read_tensor(opened.precision, "m.q.bias")
            np.testing.assert_allclose(found, np.full(6, precision / scale**2), rtol=1e-6)
            assert opened.precision.where("m.q.bias").startswith(folder)
    merge_adapters(folders, tmp_path / "out", weights="precision")
    amounts = precisions / scales**2
    expected = (amounts * scales * biases).sum(0) / amounts.sum(0)
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    np.testing.assert_allclose(merged[Q_BIAS], expected, rtol=1e-5)


def test_what_has_magnitudes_has_no_precision_and_a_note_says_so(tmp_path):
    tensors = {"m.q.weight": (6, 4), "m.k.weight": (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    refs = []
    for i in range(2):
        made = tensors_of(factors(i, layers={"m.q": (6, 4)})) | {MAGNITUDE: np.ones(6, "f4")}
        folder = written(tmp_path / str(i), made, use_dora=True)
        with SafetensorsSource(checkpoint_files(folder)) as source:
            record = PosteriorInfo(
                estimator="ggn", unit="token", observations=10.0, ess=10.0, mean=identify(source)
            )
        save_posterior(folder, {n: np.ones_like(t) for n, t in made.items()}, record)
        refs.append(f"{tmp_path / 'base'}+{folder}")
        with open_adapted(refs[-1]) as opened:
            assert not opened.precision.specs
            assert any("magnitudes (DoRA)" in note for note in opened.mean.notes)
    config = MergeConfig(models=tuple(refs), weights="precision", out=str(tmp_path / "out"))
    with pytest.raises(PrecisionError, match=r"no precision for 'm\.q\.weight'.*magnitudes"):
        run_merge(config)
