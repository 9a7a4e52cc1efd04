"""A stored copy of a tied tensor changes no result, and what a config ties is equal in the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.checkpoint.ties import (
    find_ties,
    have_same_values,
    stored_copies,
    ties_embeddings,
    untying,
)
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import MergeConfig, Part, run_merge
from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.recipes import read_recipe
from tests import tiny
from tests.model_forms import here  # noqa: F401

# Of each architecture: a few tensors under their usual names, and the copies of tied ones.
ARCHITECTURES = {
    "gpt2": ({"transformer.wte.weight": (6, 4)}, {"lm_head.weight": "transformer.wte.weight"}),
    "llama": (
        {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "vision-language": (
        {
            "model.language_model.embed_tokens.weight": (6, 4),
            "model.visual.proj_out.weight": (3, 4),
        },
        {"lm_head.weight": "model.language_model.embed_tokens.weight"},
    ),
    "neox": (
        {"gpt_neox.embed_in.weight": (6, 4)},
        {"embed_out.weight": "gpt_neox.embed_in.weight"},
    ),
    "opt": (
        {"model.decoder.embed_tokens.weight": (6, 4)},
        {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    ),
    "whisper": (
        {"model.decoder.embed_tokens.weight": (6, 4), "model.encoder.conv1.weight": (4, 3, 2)},
        {"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ),
    "t5": (
        {"shared.weight": (6, 4), "encoder.block.0.weight": (4, 4), "decoder.block.0.weight": (4,)},
        dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
            "shared.weight",
        ),
    ),
    "bart": (
        {
            "model.shared.weight": (6, 4),
            "model.encoder.layers.0.weight": (4, 4),
            "model.decoder.layers.0.weight": (4,),
        },
        dict.fromkeys(
            (
                "model.encoder.embed_tokens.weight",
                "model.decoder.embed_tokens.weight",
                "lm_head.weight",
            ),
            "model.shared.weight",
        ),
    ),
    "roberta": (
        {
            "roberta.embeddings.word_embeddings.weight": (6, 4),
            "lm_head.dense.weight": (4, 4),
            "lm_head.bias": (6,),
        },
        {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
    ),
    "bert": (
        {
            "bert.embeddings.word_embeddings.weight": (6, 4),
            "cls.predictions.transform.dense.weight": (4, 4),
            "cls.predictions.bias": (6,),
        },
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "albert": (
        {
            "albert.embeddings.word_embeddings.weight": (6, 4),
            "predictions.dense.weight": (4, 4),
            "predictions.bias": (6,),
        },
        {
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
    ),
    "distilbert": (
        {"distilbert.embeddings.word_embeddings.weight": (6, 4)},
        {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ),
    "electra": (
        {"electra.embeddings.word_embeddings.weight": (6, 4)},
        {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ),
    "modernbert": (
        {"model.embeddings.tok_embeddings.weight": (6, 4)},
        {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
    "mamba": (
        {"backbone.embeddings.weight": (6, 4)},
        {"lm_head.weight": "backbone.embeddings.weight"},
    ),
}
INPUTS = ("base", "a", "b")


def write(architecture, storing):
    """The three models, with a precision; those in `storing` also store the copies."""
    shapes, copies = ARCHITECTURES[architecture]
    for seed, name in enumerate(INPUTS):
        mean = tiny.arrays(seed, shapes)
        more = {n: mean[source] for n, source in copies.items()} if name in storing else {}
        # The copies come first, so that nothing depends on the order in a file.
        save_model(name, more | mean, tiny.precisions(seed, shapes))


def save_model(name, mean, precision):
    """A file with its precision, in place of the one before."""
    for file in (f"{name}.safetensors", f"{name}.posterior"):
        Path(file).unlink(missing_ok=True)
    tiny.posterior(f"{name}.safetensors", mean, precision)


def merged(models=("a", "b"), **settings):
    """The tensors of a merge, those of its precision, and its report."""
    settings = {"out": "x.safetensors", "force": True} | settings
    if settings.get("base"):
        settings["base"] += ".safetensors"
    precision = Path(settings["out"].replace(".safetensors", ".posterior"))
    precision.unlink(missing_ok=True)
    report = run_merge(MergeConfig(models=tuple(f"{m}.safetensors" for m in models), **settings))
    return tiny.read(settings["out"]), tiny.read(precision) if precision.exists() else {}, report


def told(report):
    """What a report counts."""
    models = [model.model_dump(exclude={"identity"}) for model in report.models]
    counts = report.model_dump(include={"merged_tensors", "copied", "changed_share", "lost_share"})
    return models, counts


def check_copies(mean, precision, report, plain, copies):
    """A merge equals the one without copies, and its own copies equal their sources."""
    assert told(report) == told(plain[2])
    for name, values in (plain[0] | {n: plain[0][s] for n, s in copies.items()}).items():
        if name in mean or name not in copies:
            np.testing.assert_array_equal(mean[name], values, err_msg=name)
    assert precision.keys() == plain[1].keys()
    for name, values in plain[1].items():
        np.testing.assert_array_equal(precision[name], values, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ties_of_the_field_are_known(architecture):
    shapes, copies = ARCHITECTURES[architecture]
    assert {n: t.source for t in find_ties(shapes) for n in t.names[1:]}.items() <= copies.items()
    ties = find_ties(shapes | {n: shapes[source] for n, source in copies.items()})
    assert {n: t.source for t in ties for n in t.names[1:]} == copies
    values = tiny.arrays(0, shapes)
    stored = MemorySource(values | {n: values[source] for n, source in copies.items()})
    assert stored_copies(stored) == copies


SLOW = pytest.mark.slow
FAST = ("llama", "bart", "roberta")


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in FAST else SLOW) for a in ARCHITECTURES]
)
def test_stored_copies_change_no_result_whoever_stores_them(architecture):
    _, copies = ARCHITECTURES[architecture]
    rule = {"base": "base", "method": "dare_linear", "param": {"density": 0.5}}
    write(architecture, ())
    plain = merged(**rule)
    for storing in (("base", "b"), ("a",)):
        write(architecture, storing)
        mean, precision, report = merged(**rule)
        check_copies(mean, precision, report, plain, copies)
        assert (copies.keys() <= mean.keys()) == ("base" in storing)


# RegMean, which needs matrices, takes what is tied as `average` does.
@pytest.mark.parametrize("method", [n for n in METHODS if n != "regmean"])
def test_stored_copies_change_no_result_under_any_rule(method):
    _, copies = ARCHITECTURES["t5"]
    rule = {"method": method, "base": "base" if METHODS[method].needs_base else None}
    rule["models"] = ("a", "b")[: METHODS[method].tasks]
    variants = [{"param": {p.name: c}} for p in METHODS[method].parameters for c in p.choices]
    write("t5", ())
    plain = [merged(**rule, **variant) for variant in variants or [{}]]
    write("t5", INPUTS)
    for variant, expected in zip(variants or [{}], plain, strict=True):
        check_copies(*merged(**rule, **variant), expected, copies)


def test_a_copy_is_chosen_and_scaled_as_what_it_is_a_copy_of():
    _, copies = ARCHITECTURES["roberta"]
    for settings in (
        {"only": "embeddings"},
        {"scale": ("a.safetensors:embeddings=0.5",)},
        {"weights": "precision", "scale": ("a.safetensors:lm_head[.]bias=-0.5",)},
        {"on_missing": "skip"},
    ):
        write("roberta", ())
        plain = merged(base="base", **settings)
        write("roberta", ("base", "b"))
        check_copies(*merged(base="base", **settings), plain, copies)
    with pytest.raises(
        ConfigError, match=r"--scale 'a.*'lm_head.decoder.weight' is a copy of 'rob"
    ):
        merged(base="base", scale=("a.safetensors:decoder=0",))
    with pytest.raises(
        ConfigError, match=r"--only 'decoder' matches no .*'lm_head.decoder.weight' is a copy of 'r"
    ):
        merged(base="base", only="decoder")


@pytest.mark.parametrize("architecture", ["llama", "t5", "roberta"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_what_one_model_unties_is_written_apart_in_any_order(architecture, order):
    shapes, copies = ARCHITECTURES[architecture]
    copy = next(reversed(copies))
    write(architecture, ())
    own = tiny.arrays(1, shapes)
    own |= {copy: own[copies[copy]] + 1}
    save_model("a", own, tiny.precisions(1, shapes))
    base, b = tiny.read("base.safetensors"), tiny.read("b.safetensors")
    average, _, _ = merged(order)
    edited, _, report = merged(order, base="base", method="task_arithmetic")
    assert set(average) == set(edited) == {*shapes, copy}
    for name in average:
        tied = base[copies.get(name, name)], b[copies.get(name, name)]
        np.testing.assert_allclose(average[name], (own[name] + tied[1]) / 2, rtol=1e-5)
        np.testing.assert_allclose(
            edited[name], own[name] + tied[1] - tied[0], rtol=1e-5, atol=1e-6
        )
    assert f"'b.safetensors' ties it to '{copies[copy]}'" in report.ruled[copy]


def test_a_merge_with_copies_merges_again_and_on_many_machines():
    """Also its precision, which is stored under the source's name only."""
    _, copies = ARCHITECTURES["t5"]
    write("t5", ())
    merged(base="base", weights="precision", out="ab.safetensors")
    plain = merged(("ab", "b"), base="base", weights="precision")
    bare = tiny.read("ab.safetensors")
    write("t5", ("a", "b"))
    config = {"base": "base.safetensors", "weights": "precision", "out": "ab.safetensors"}
    config = MergeConfig(models=("a.safetensors", "b.safetensors"), force=True, **config)
    for part in (Part(1, 2), Part(2, 2), None):
        run_merge(config, part=part, threads=1)
    check_copies(*merged(("ab", "b"), base="base", weights="precision"), plain, copies)
    write("t5", INPUTS)
    for part in (Part(1, 2), Part(2, 2), None):
        run_merge(config, part=part, threads=1)
    full = tiny.read("ab.safetensors")
    assert full.keys() == bare.keys() | copies
    for name in full:
        np.testing.assert_array_equal(full[name], bare[copies.get(name, name)])
    again = read_recipe(Path("ab.merge_recipe.yaml"))
    run_merge(MergeConfig(**again, out="again.safetensors"))
    assert Path("again.safetensors").read_bytes() == Path("ab.safetensors").read_bytes()


def test_copies_are_found_where_names_have_another_prefix():
    """Also under names that the donor does not store, in both orders."""
    (shapes, copies), prefix = ARCHITECTURES["bart"], "model."
    write("bart", ())
    plain = merged(base="base")
    for storing in (("a", "b"), ("base", "b")):
        write("bart", storing)
        for name in ("base", "a"):
            tensors = tiny.read(f"{name}.safetensors")
            Path(f"{name}.safetensors").unlink()
            cut = prefix if name == "base" else ""
            tiny.write(f"{name}.safetensors", {n.removeprefix(cut): t for n, t in tensors.items()})
        mean, _, report = merged(base="base")
        stored = copies if "base" in storing else {}
        assert set(mean) == {name.removeprefix(prefix) for name in (*shapes, *stored)}
        for name in (*shapes, *stored):
            expected = plain[0][copies.get(name, name)]
            np.testing.assert_array_equal(mean[name.removeprefix(prefix)], expected)
        assert all("tied to" in reason for reason in report.left_out.values())


def test_copies_do_not_count_for_the_dtype_on_record():
    embedding = torch.ones(6, 4, dtype=torch.bfloat16)
    tensors = {"wte.weight": embedding, "h.0.mlp.weight": torch.ones(6, 5, dtype=torch.float16)}
    names = ("base.safetensors", "a.safetensors")
    for copies in ({}, {"lm_head.weight": embedding.clone()}):
        for name in names:
            save_file(tensors | copies, name, {"format": "pt"})
        config = MergeConfig(
            models=names[1:], base=names[0], weights="precision", isotropic=dict.fromkeys(names, 1)
        )
        with plan_merge(config) as plan:
            assert plan.info.dtype == "F16"


def test_equality_is_that_of_all_entries():
    values = np.zeros((1200, 1000), np.float32)
    other = values.copy()
    other[700, 3] = 1e-6  # between the sampled blocks
    source = MemorySource({"a": values, "b": values.copy(), "c": other, "d": values.astype("f2")})
    assert have_same_values(source, "a", "b")
    assert not have_same_values(source, "a", "c")
    assert have_same_values(source, "a", "d")
    assert not have_same_values(source, "c", "d")
    named = {"wte.weight": values, "lm_head.weight": other}
    assert stored_copies(MemorySource(named)) == {}


TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 8, "max_position_embeddings": 24, "pad_token_id": 1}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2}
SEQ = {"vocab_size": 20, "d_model": 8, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
SEQ |= {"decoder_start_token_id": 2}
REAL = {
    "gpt2": lambda **more: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2, **more
        )
    ),
    "llama": lambda **more: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT | {"tie_word_embeddings": True} | more)
    ),
    "bert": lambda **more: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **more)),
    "roberta": lambda **more: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**TEXT, **more)
    ),
    "bart": lambda **more: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **SEQ,
            **{
                f"{part}_{key}": 2
                for part in ("encoder", "decoder")
                for key in ("attention_heads",)
            },
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            max_position_embeddings=24,
            **more,
        )
    ),
    "t5": lambda **more: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SEQ, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **more)
    ),
}
UNTIED = (("bart", "tied"), ("bert", "untied"))
IDS = torch.arange(3, 15)[None]


def moved(model, seed):
    """The model, moved as by a fine-tune; biases away from zero, too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save(model, folder, *, copies=False):
    """The model as a folder; with `copies`, the file stores every tied tensor under each name."""
    model.save_pretrained(folder)
    if copies:
        tensors = load_file(Path(folder, "model.safetensors"))
        tensors |= {
            name: tensors[source].clone() for name, source in model.all_tied_weights_keys.items()
        }
        save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})


def logits(model):
    """The logits of a model, in float64."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.double().eval()(IDS, **more).logits


def check_ties(folder, model):
    """What the written config ties is equal in the written file, wherever both are stored."""
    tensors = load_file(Path(folder, "model.safetensors"))
    tied = json.loads(Path(folder, "config.json").read_text())["tie_word_embeddings"]
    pairs = [
        (name, source)
        for name, source in model.all_tied_weights_keys.items()
        if name in tensors and source in tensors
    ]
    if tied:
        assert all(torch.equal(tensors[name], tensors[source]) for name, source in pairs)
    return tied


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("t5", "roberta") else SLOW) for k in REAL]
)
def test_real_models_with_and_without_copies_merge_and_load(kind):
    torch.manual_seed(0)
    one, two = moved(REAL[kind](), 1), moved(REAL[kind](), 2)
    for name, model in (("one", one), ("two", two)):
        save(model, f"{name}-bare")
        save(model, f"{name}-full", copies=True)
    mean = REAL[kind]().double()
    with torch.no_grad():
        for parts in zip(mean.parameters(), one.parameters(), two.parameters(), strict=True):
            parts[0].copy_((parts[1].double() + parts[2].double()) / 2)
    expected = logits(mean)
    for kinds in (("bare", "full"), ("full", "bare")):
        models = [f"one-{kinds[0]}", f"two-{kinds[1]}"]
        out = "-".join(models)
        report = run_merge(MergeConfig(models=models, out=out))
        assert check_ties(out, mean) is True
        assert not any("written apart" in note for note in report.notes)
        loaded = type(mean).from_pretrained(out)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        pytest.param(k, first, marks=() if (k, first) in UNTIED else SLOW)
        for k in REAL
        if k != "t5"
        for first in ("tied", "untied")
    ],
)
def test_real_models_tied_and_untied_merge_and_load(kind, first):
    """Every name that the architecture ties is trained on its own in one of the two."""
    untied = moved(REAL[kind](tie_word_embeddings=False), 1)
    tied = moved(REAL[kind](), 2)
    save(untied, "untied")
    save(tied, "tied", copies=first == "untied")
    mean = REAL[kind](tie_word_embeddings=False).double()
    other = tied.state_dict()
    mean.load_state_dict(
        {n: (t.double() + other[n].double()) / 2 for n, t in untied.state_dict().items()}
    )
    models = sorted(("tied", "untied"), reverse=first == "untied")
    run_merge(MergeConfig(models=models, out="out"))
    assert check_ties("out", tied) is False
    loaded = type(mean).from_pretrained("out")
    torch.testing.assert_close(logits(loaded), logits(mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_an_adapter_unties_what_it_trains_a_copy_of(saved):
    """Of a tied pair PEFT trains copies, and leaves the other one as it is."""
    base = moved(REAL["llama"](), 1)
    save(base, "bare")
    save(base, "full", copies=True)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(saved))
    adapted = peft.get_peft_model(base, settings)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained("adapter")
    with torch.no_grad():
        expected = adapted.double().eval()(IDS).logits
    for folder in ("bare", "full"):
        run_merge(MergeConfig(models=(f"{folder}+adapter",), base=folder, out=f"{folder}-out"))
        loaded = transformers.LlamaForCausalLM.from_pretrained(f"{folder}-out")
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
        config = json.loads(Path(f"{folder}-out/config.json").read_text())
        assert config["tie_word_embeddings"] is False


def test_an_untied_head_of_t5_keeps_the_scale_of_its_outputs():
    tied, untied = moved(REAL["t5"](), 1), moved(REAL["t5"](), 2)
    save(tied, "tied")
    save(untied, "untied", copies=True)
    tensors = load_file("untied/model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, "untied/model.safetensors", {"format": "pt"})
    for folder in ("tied", "untied"):  # as older versions write it
        config = json.loads(Path(folder, "config.json").read_text())
        del config["scale_decoder_outputs"]
        Path(folder, "config.json").write_text(json.dumps(config))
    run_merge(MergeConfig(models=("untied",), base="tied", out="out"))
    assert check_ties("out", tied) is False
    task, out = (
        transformers.T5ForConditionalGeneration.from_pretrained(f) for f in ("untied", "out")
    )
    torch.testing.assert_close(logits(out), logits(task), rtol=1e-5, atol=1e-6)


def test_a_bias_alone_may_be_untied_and_the_file_then_stores_all_names():
    tied, untied = moved(REAL["roberta"](), 1), moved(REAL["roberta"](), 2)
    save(tied, "tied")
    save(untied, "untied", copies=True)
    tensors = load_file("untied/model.safetensors")
    tensors["lm_head.decoder.bias"] += 1
    del tensors["lm_head.decoder.weight"]
    save_file(tensors, "untied/model.safetensors", {"format": "pt"})
    run_merge(MergeConfig(models=("untied",), base="tied", out="out"))
    out = load_file("out/model.safetensors")
    assert check_ties("out", tied) is False
    assert torch.equal(
        out["lm_head.decoder.weight"], out["roberta.embeddings.word_embeddings.weight"]
    )
    loaded = type(tied).from_pretrained("out")
    with torch.no_grad():
        untied.lm_head.decoder.bias = torch.nn.Parameter(tensors["lm_head.decoder.bias"])
    torch.testing.assert_close(logits(loaded), logits(untied), rtol=1e-4, atol=1e-5)


def test_a_head_that_was_lost_is_never_the_embedding():
    model = moved(REAL["llama"](tie_word_embeddings=False), 1)
    save(model, "base")
    save(moved(model, 2), "task")
    tensors = load_file("task/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, "task/model.safetensors", {"format": "pt"})
    lost = (
        r"'lm_head.weight' is in 'base' but not in 'task'. The config.json of 'task' has tie_word"
    )
    config = MergeConfig(models=("task",), base="base", out="out")
    with pytest.raises(MismatchError, match=lost + ".*keeps that of 'base'"):
        run_merge(config)
    with pytest.raises(MismatchError, match=lost):
        run_merge(MergeConfig(models=("base", "task"), out="out"))
    missing = r"'base' but not in 'task'. The config.json .* no such head[?]$"
    with pytest.raises(MismatchError, match=missing):
        run_merge(MergeConfig(models=("task", "base"), out="out"))
    # It is lost also where the base has the same values in both.
    for name, value in (("copied", True), ("untied", False)):
        shutil.copytree("base", name)
        equal = load_file("base/model.safetensors")
        equal["lm_head.weight"] = equal["model.embed_tokens.weight"].clone()
        save_file(equal, f"{name}/model.safetensors", {"format": "pt"})
        content = json.loads(Path(name, "config.json").read_text())
        content["tie_word_embeddings"] = value
        Path(name, "config.json").write_text(json.dumps(content))
        with pytest.raises(MismatchError, match=r"'lm_head.weight' is in '.*' but not in 'task'"):
            run_merge(MergeConfig(models=("task",), base=name, out="out"))
    run_merge(MergeConfig(models=("task",), base="copied", out="skipped", on_missing="skip"))
    content = json.loads(Path("skipped/config.json").read_text())
    assert content["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file("skipped/model.safetensors")
    run_merge(config.model_copy(update={"on_missing": "base"}))
    kept = load_file("out/model.safetensors")["lm_head.weight"]
    assert torch.equal(kept, load_file("base/model.safetensors")["lm_head.weight"])
    content = json.loads(Path("task/config.json").read_text())
    del content["tie_word_embeddings"]
    Path("task/config.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="does not set tie_word_embeddings, which is false for"):
        run_merge(config.model_copy(update={"force": True}))


def test_the_default_of_an_architecture_is_that_of_transformers():
    from mergekit_bayes.checkpoint import ties

    types = [t for t in transformers.CONFIG_MAPPING if ties._UNTIED_BY_DEFAULT.fullmatch(t)]
    assert len(types) > 45
    for model_type in types:
        assert transformers.CONFIG_MAPPING[model_type]().tie_word_embeddings is False, model_type


def test_a_nested_config_is_read_and_untied_in_both_places():
    assert ties_embeddings({}) is None
    assert ties_embeddings({"model_type": "mistral"}) is False
    assert ties_embeddings({"tie_word_embeddings": False, "text_config": {}}) is False
    nested = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert ties_embeddings(nested) is True
    assert untying(nested) == {"tie_word_embeddings": False}
    assert untying({"tie_word_embeddings": False}) == {}
    embedding = {"model.language_model.embed_tokens.weight": (6, 4)}
    for name, more in (("base", {}), ("a", {"lm_head.weight": (6, 4)})):
        tiny.write(f"{name}/model.safetensors", tiny.arrays(1, embedding | more))
        Path(name, "config.json").write_text(json.dumps({"x": 1} | nested))
    run_merge(MergeConfig(models=("a",), base="base", out="out"))
    written = json.loads(Path("out/config.json").read_text())
    assert written == {
        "x": 1,
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
    }


def test_names_that_only_look_tied_are_left_alone():
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "vision.proj_out.weight": (6, 4),
        "decoder.weight": (6, 5),
        "encoder.lm_head.weight": (6, 3),
    }
    assert find_ties(shapes) == ()
    two = {"a.embed_tokens.weight": (6, 4), "b.embed_tokens.weight": (6, 4)}
    assert find_ties(two | {"lm_head.weight": (6, 4)}) == ()
    (tie,) = find_ties(two | {"b.lm_head.weight": (6, 4)})
    assert tie.names == ("b.embed_tokens.weight", "b.lm_head.weight")


@pytest.mark.parametrize("form", ["average", "as the base", "alone on a base"])
def test_a_head_that_was_lost_is_not_made_up(tmp_path, form):
    """No model stores a head, and one of them says that it is not the embedding."""
    paths = {}
    for seed, (name, ties) in enumerate((("tied", True), ("lost", False))):
        paths[name] = str(tmp_path / name)
        tiny.write(tmp_path / name / "model.safetensors", tiny.arrays(seed, LOST))
        about = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": ties}
        (tmp_path / name / "config.json").write_text(json.dumps(about))
    settings = {
        "average": {"models": (paths["lost"], paths["tied"])},
        "as the base": {"models": (paths["tied"],), "base": paths["lost"]},
        "alone on a base": {"models": (paths["lost"],), "base": paths["tied"]},
    }[form]
    with pytest.raises(MismatchError, match="has no output head: its config"):
        plan_merge(MergeConfig(**settings, out=str(tmp_path / "out")))
    # A model without a head, and one that has it under a name of its own, have lost nothing.
    config = tmp_path / "lost" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "Model"))
    plan_merge(MergeConfig(**settings, out=str(tmp_path / "out"))).close()


LOST = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.weight": (4, 4)}
