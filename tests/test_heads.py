"""The model whose head is written decides the labels and the architecture of the output."""

import json

import numpy as np
import pytest

from mergekit_bayes.checkpoint.model_config import architecture_for
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny
from tests.adapters import adapter, factors

HEADS = (
    "score",
    "classifier",
    "classifier.out_proj",
    "classification_head.out_proj",
    "logits_proj",
)
NAMES, SWAPPED = ("negative", "positive"), ("positive", "negative")
BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


def named(names, **more):
    return BERT | {"id2label": dict(enumerate(names)), **more}


def classifier(folder, config, seed=0, head="classifier", rows=2):
    shapes = {"m.q.weight": (6, 4), f"{head}.weight": (rows, 4), f"{head}.bias": (rows,)}
    (folder / "model.safetensors").unlink(missing_ok=True)
    tiny.write(folder / "model.safetensors", tiny.arrays(seed, shapes))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def merged_config(tmp_path, *models, **settings):
    """The config that a merge writes, and its report."""
    out = tmp_path / "out"
    report = run_merge(MergeConfig(models=models, out=str(out), force=True, **settings))
    return json.loads((out / "config.json").read_text()), report


@pytest.mark.parametrize("head", HEADS)
def test_heads_whose_rows_stand_for_other_labels_are_refused(tmp_path, head):
    one = classifier(tmp_path / "one", named(NAMES), 0, head)
    swapped = classifier(tmp_path / "two", named(SWAPPED), 1, head)
    other = classifier(tmp_path / "three", named(("spam", "ham")), 2, head)
    inverse = BERT | {"label2id": {"positive": 0, "negative": 1}}
    by_name = classifier(tmp_path / "four", inverse, 3, head)
    for models in ((one, swapped), (swapped, one), (one, by_name)):
        for choice in ("error", "base"):  # no flag makes one row of two classes
            with pytest.raises(MismatchError, match=r"labels.*two classes"):
                merged_config(tmp_path, *models, on_config=choice)
    with pytest.raises(MismatchError, match=r"labels.*two classes"):
        merged_config(tmp_path, swapped, base=one)
    with pytest.raises(MismatchError, match=r"stand for other labels.*--on-config base"):
        merged_config(tmp_path, one, other)
    config, report = merged_config(tmp_path, one, other, on_config="base")
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert any("taken to be the same" in note for note in report.notes)
    # A head that is not merged is not compared, and is the first model's with its labels.
    config, report = merged_config(tmp_path, swapped, one, only=r"^m\.")
    assert config["id2label"] == {"0": "positive", "1": "negative"}
    written = tiny.read(report.path)[f"{head}.weight"]
    np.testing.assert_array_equal(written, tiny.read(swapped)[f"{head}.weight"])


def test_labels_that_differ_in_spelling_or_are_numbered_are_no_conflict(tmp_path):
    one = classifier(tmp_path / "one", named(("not_ok", "OK")), 0)
    for names in (("Not OK", "ok"), ("LABEL_0", "LABEL_1")):
        other = classifier(tmp_path / "two", named(names), 1)
        for models in ((one, other), (other, one)):
            config, _ = merged_config(tmp_path, *models)
            wanted = names if models[0] is other and "LABEL_0" not in names else ("not_ok", "OK")
            assert tuple(config["id2label"].values()) == wanted
    spelled = classifier(tmp_path / "spelled", named(("Not OK", "ok")), 1)
    config, _ = merged_config(tmp_path, spelled, base=one)  # the task's rows, the task's names
    assert tuple(config["id2label"].values()) == ("Not OK", "ok")
    swapped = classifier(tmp_path / "swapped", named(("OK", "not_ok")), 1)
    merged_config(tmp_path, one, swapped, scale=(1.0, 0.0))  # of which nothing is taken
    # Labels that only their punctuation tells apart are compared as they are.
    one = classifier(tmp_path / "three", named(("A+", "A-")), 0)
    with pytest.raises(MismatchError, match="two classes"):
        merged_config(tmp_path, one, classifier(tmp_path / "four", named(("A-", "A+")), 1))


def test_the_labels_are_those_of_the_task_whose_head_is_written(tmp_path):
    base = classifier(tmp_path / "base", BERT, 0)
    config = named(NAMES, problem_type="multi_label_classification")
    task = classifier(tmp_path / "task", config, 1)
    config, report = merged_config(tmp_path, task, base=base)
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert config["problem_type"] == "multi_label_classification"
    assert any(f"the labels of '{task}'" in note for note in report.notes)
    other = classifier(tmp_path / "other", named(("spam", "ham")), 2)
    for models, base_ref, names in (((task,), other, ("spam", "ham")), ((other,), task, NAMES)):
        config, _ = merged_config(tmp_path, *models, base=base_ref, on_config="base")
        assert tuple(config["id2label"].values()) == names
    # A task of scale zero, and a head that is copied, decide nothing.
    for settings in ({"scale": (0.0,)}, {"only": r"^m\."}):
        config, _ = merged_config(tmp_path, task, base=base, **settings)
        assert "id2label" not in config


def test_how_a_head_is_read_is_written_also_where_its_labels_keep_their_names(tmp_path):
    """A fine-tune says it, and the base that it started from may not."""
    names = ("toxic", "insult", "threat")
    kind = {"problem_type": "single_label_classification"}
    base = classifier(tmp_path / "base", named(names), 0)
    task = classifier(tmp_path / "task", named(names, **kind), 1)
    config, _ = merged_config(tmp_path, task, base=base)
    assert config["problem_type"] == "single_label_classification"
    assert tuple(config["id2label"].values()) == names
    for settings in ({"scale": (0.0,)}, {"only": r"^m\."}):
        config, _ = merged_config(tmp_path, task, base=base, **settings)
        assert "problem_type" not in config


def adapted(tmp_path, stored, *, head="score", own=None, **config):
    """The config that the average of BASE+ADAPTER with itself writes, and the report.

    The adapter trained a head of three rows; `own` is the content of a config.json beside it.
    """
    name = f"{len(list(tmp_path.iterdir()))}"
    base, folder = tmp_path / name / "base", tmp_path / name / "adapter"
    tiny.write(base / "model.safetensors", tiny.arrays(0, {"m.q.weight": (6, 4)}))
    (base / "config.json").write_text(json.dumps(stored))
    whole = {f"{head}.weight": np.ones((3, 4), np.float32)}
    adapter(
        folder, factors(0, layers={"m.q": (6, 4)}), whole=whole, modules_to_save=[head], **config
    )
    if own is not None:
        (folder / "config.json").write_text(json.dumps(own))
    return merged_config(tmp_path, f"{base}+{folder}", f"{base}+{folder}")


def test_a_head_that_an_adapter_trained_is_kept_by_folding_it_where_there_is_one_model(tmp_path):
    adapted(tmp_path, BERT)
    base, folder = (next(tmp_path.glob(f"*/{name}")) for name in ("base", "adapter"))
    with pytest.raises(MismatchError) as error:
        run_merge(
            MergeConfig(models=(f"{base}+{folder}",), base=str(base), out=str(tmp_path / "x"))
        )
    assert "PeftModel.merge_and_unload()" in str(error.value)
    assert "without --base" not in str(error.value)  # one model alone is no merge


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize(
    ("task", "head", "architecture"),
    [
        ("SEQ_CLS", "score", "GPT2ForSequenceClassification"),
        ("TOKEN_CLS", "classifier", "GPT2ForTokenClassification"),
        ("QUESTION_ANS", "qa_outputs", "GPT2ForQuestionAnswering"),
    ],
)
def test_a_head_that_an_adapter_trained_gets_its_class_and_as_many_labels_as_rows(
    tmp_path, task, head, architecture
):
    config, report = adapted(tmp_path, GPT2, head=head, task_type=task)
    assert config["architectures"] == [architecture]
    if head == "qa_outputs":
        assert "id2label" not in config
        return
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert any("does not record the names of its 3 labels" in note for note in report.notes)


def test_an_adapter_that_names_its_labels_and_a_base_with_as_many_keep_them(tmp_path):
    config, _ = adapted(tmp_path, named("abc") | GPT2, task_type="SEQ_CLS")
    assert list(config["id2label"].values()) == ["a", "b", "c"]
    stale = GPT2 | {"id2label": {"0": "x", "1": "y"}, "num_labels": 2}
    own = {"id2label": dict(enumerate("pqr"))}
    config, _ = adapted(tmp_path, stale, own=own, task_type="SEQ_CLS")
    assert list(config["id2label"].values()) == ["p", "q", "r"]
    assert config["num_labels"] == 3


def test_an_architecture_without_a_known_class_is_kept_and_told(tmp_path):
    config, report = adapted(tmp_path, {"architectures": ["Own"]}, task_type="SEQ_CLS")
    assert config["architectures"] == ["Own"]
    assert any("has no known class" in note for note in report.notes)
    config, _ = adapted(tmp_path, GPT2)  # an adapter that does not say its task
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert len(config["id2label"]) == 3


def test_the_class_of_a_head_is_the_one_that_transformers_has():
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "ForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "ForTokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "ForQuestionAnswering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    stored = (
        auto.MODEL_MAPPING_NAMES,
        auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *tasks.values(),
    )
    compared = 0
    for ending, classes in tasks.items():
        for model_type, name in classes.items():
            for mapping in stored:
                of_type = mapping.get(model_type, ())
                for stem in (of_type,) if isinstance(of_type, str) else of_type:
                    config = {"model_type": model_type, "architectures": [stem]}
                    assert architecture_for(config, ending) == name, config
                    compared += 1
    assert compared > 1000
    assert architecture_for({"architectures": ["Own"]}, "ForSequenceClassification") is None
    assert architecture_for({}, "ForSequenceClassification") is None


def test_a_classifier_of_an_adapter_loads_as_one_and_gives_the_same_logits(tmp_path):
    """A base stored without a prefix, as GPT-2 is, and a trained head."""
    import torch
    import transformers

    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, pad_token_id=0)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "base")
    layers = factors(0, layers={"h.0.attn.c_attn": (24, 8)})
    head = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "fan_in_fan_out": True}
    settings["target_modules"] = ["c_attn"]
    adapter(tmp_path / "a", layers, whole={"score.weight": head}, alpha=2, **settings)
    ref = f"{tmp_path / 'base'}+{tmp_path / 'a'}"
    run_merge(MergeConfig(models=(ref, ref), out=str(tmp_path / "out")))
    kind = transformers.AutoModelForSequenceClassification
    loaded = kind.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.architectures == ["GPT2ForSequenceClassification"]
    expected = kind.from_pretrained(tmp_path / "base", num_labels=3).eval()
    a, b = layers["h.0.attn.c_attn"]
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        expected.score.weight.copy_(torch.tensor(head))
        expected.transformer.h[0].attn.c_attn.weight.add_(torch.tensor(b @ a).T)
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)
