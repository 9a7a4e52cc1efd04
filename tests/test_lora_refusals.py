"""Adapters that are no plain product, or do not fit their base, are refused by name."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bmerge_cli
import mergekit_bayes
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter, refuse_other_base
from mergekit_bayes.lora.misplaced import note_on_name
from mergekit_bayes.lora.writers import FOLD_ALL
from mergekit_bayes.posterior import identify
from tests.adapters import adapter, base, factors, precise


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_qalora": True}, "use_qalora=True"),
        ({"bias": "some"}, "bias='some'"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_adapters_of_variants_that_are_not_read_are_refused(tmp_path, config, match):
    adapter(tmp_path / "a", factors(0), **config)
    with pytest.raises(ConfigError, match=match):
        open_adapter(str(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=match):
        open_adapter(str(tmp_path / "a"))


def test_an_adapter_that_does_not_fit_its_base_or_itself_is_refused(tmp_path):
    folder = base(tmp_path / "base")
    adapter(tmp_path / "shape", factors(0, layers={"m.q": (6, 5)}))
    with pytest.raises(MismatchError, match=r"changes a weight of \[6, 5\], but 'm\.q\.weight'"):
        open_adapted(f"{folder}+{tmp_path / 'shape'}")
    adapter(tmp_path / "name", factors(0, layers={"m.other": (6, 4)}))
    with pytest.raises(MismatchError, match=r"'m\.other\.weight', which .* does not hold"):
        open_adapted(f"{folder}+{tmp_path / 'name'}")
    adapter(tmp_path / "rank", factors(0), rank_pattern={"q": 3})
    with pytest.raises(MismatchError, match=r"gives it rank 3"):
        open_adapter(str(tmp_path / "rank"))
    with pytest.raises(CheckpointError, match=r"is not an adapter: it has no adapter_config\.json"):
        open_adapted(f"{folder}+{folder}")
    made = factors(0)
    made["m.q"].b[0, 0] = np.nan
    adapter(tmp_path / "nan", made)
    with (
        open_adapted(f"{folder}+{tmp_path / 'nan'}") as opened,
        pytest.raises(
            CheckpointError, match=r"m\.q\.lora_B\.weight' has entries that are not finite"
        ),
    ):
        read_tensor(opened.mean, "m.q.weight")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"peft_type": "LORA"}',
        '{"r": 0, "lora_alpha": 1}',
        '{"r": 1, "lora_alpha": "x"}',
        "[" * 100_000,
    ],
)
def test_a_broken_config_is_named(tmp_path, text):
    adapter(tmp_path / "a", factors(0))
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: cannot be read as a LoRA config"
    ):
        open_adapter(str(tmp_path / "a"))


OTHER_FORMS = {
    "modules_to_save": [5, "score", [1], {"score": 1}, True],
    "target_modules": [5, [1, None], {"q": 1}],
    "use_rslora": ["no", 1],
    "fan_in_fan_out": ["x", 0],
    "ensure_weight_tying": ["no"],
    "init_lora_weights": [["pissa"], 1],
    "task_type": [["SEQ_CLS"], 3],
    "base_model_name_or_path": [{"a": 1}, 7],
    "rank_pattern": [{"[": 2}, {"q{99999999999}": 2}, {"(" * 5000 + ")" * 5000: 2}],
    "alpha_pattern": [{"*q": 2}, {"(?P<x": 2}],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in OTHER_FORMS.items() for v in vs])
def test_a_key_whose_value_has_another_form_than_peft_gives_it_is_named(tmp_path, key, value):
    adapter(tmp_path / "a", factors(0), **{key: value})
    message = rf"adapter_config\.json: {key} (is|has the key) .*save the adapter again\.$"
    with pytest.raises(ConfigError, match=message):
        open_adapter(str(tmp_path / "a"))
    # Not given is as PEFT's default.
    adapter(tmp_path / "b", factors(0), **{key: None})
    with open_adapter(str(tmp_path / "b")) as opened:
        assert len(opened.layers) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"r": True},
        {"lora_alpha": True},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"rank_pattern": {"q": True}},
        {"rank_pattern": {"q": "2"}},
        {"rank_pattern": [2]},
        {"rank_pattern": "q"},
        {"alpha_pattern": {"q": True}},
        {"alpha_pattern": {"q": None}},
        {"alpha_pattern": {"q": 10**400}},
    ],
)
def test_ranks_and_alphas_that_are_no_numbers_are_named(tmp_path, settings):
    adapter(tmp_path / "a", factors(0), **settings)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read as a LoRA"):
        open_adapter(str(tmp_path / "a"))


def test_a_precision_of_other_factors_is_refused(tmp_path):
    made = factors(0)
    adapter(tmp_path / "a", made, precision=precise(made, 0))
    adapter(tmp_path / "b", factors(1))
    (tmp_path / "a" / "posterior").rename(tmp_path / "b" / "posterior")
    with pytest.raises(PrecisionError, match="taken at other weights"):
        open_adapter(str(tmp_path / "b"))


def test_another_base_than_the_recorded_one_is_told(tmp_path):
    made = factors(0)
    folder = base(tmp_path / "base")
    with SafetensorsSource(checkpoint_files(folder)) as source:
        adapter(tmp_path / "a", made, precision=precise(made, 0), info={"base": identify(source)})
    half = base(tmp_path / "half", "BF16")
    for with_precision in (True, False):  # a merge by equal weights opens none
        for path, is_other in ((folder, False), (half, True)):
            with open_adapted(f"{path}+{tmp_path / 'a'}", with_precision=with_precision) as opened:
                notes = [n for n in opened.mean.notes if "made on other weights" in n]
                assert len(notes) == is_other
                with (
                    pytest.raises(MismatchError, match=r"Name the base .* --on-base apply")
                    if is_other
                    else nullcontext()
                ):
                    refuse_other_base(opened, "add --on-base apply")


def test_advice_to_fold_several_adapters_names_the_base_so_that_they_are_added():
    folders = [Path(package.__file__).parent for package in (mergekit_bayes, bmerge_cli)]
    commands = [
        found
        for folder in folders
        for file in folder.rglob("*.py")
        for found in re.findall(
            r"`bmerge merge BASE\+\w+ BASE\+[^`]*`", re.sub(r'"\s+f?"', "", file.read_text())
        )
    ]
    assert FOLD_ALL in commands
    assert [c for c in commands if "--base BASE" not in c and "{base}" not in c] == []


def test_adapters_that_need_their_base_are_refused_with_the_command_that_adds_them(tmp_path):
    refs = [
        str(adapter(tmp_path / name, factors(1), init_lora_weights="pissa"))
        for name in ("a", "b c")
    ]
    for given, end in ((refs, f"'BASE+{refs[1]}' --base BASE -o OUT`."), (refs[:1], "a -o OUT`.")):
        with pytest.raises(ConfigError, match="began with pissa") as caught:
            merge_adapters(given, tmp_path / "out")
        assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    ("named", "given", "is_told"),
    [
        ("org/one", "org/two", True),
        ("org/one@1", "org/One@2", False),
        ("{}/base", "{}/link", False),
        ("{}/base", "{}/copy", True),
        ("{}/gone", "{}/base", False),
        ("org/one", "{}/base", False),
        (None, "{}/base", False),
    ],
)
def test_a_base_of_another_name_than_the_config_has_is_told(tmp_path, named, given, is_told):
    base(tmp_path / "base")
    base(tmp_path / "copy")
    (tmp_path / "link").symlink_to("base")
    named = None if named is None else named.format(tmp_path)
    given = given.format(tmp_path)
    folder = str(adapter(tmp_path / "a", factors(1), base_model_name_or_path=named))
    with open_adapter(folder) as opened:
        assert (note_on_name(opened, given) is not None) == is_told
        with SafetensorsSource(checkpoint_files(tmp_path / "base")) as source:
            recorded = replace(opened, base=identify(source).blocks)
            assert note_on_name(recorded, given) is None  # the hash counts
    if given.startswith(str(tmp_path)):
        with open_adapted(f"{given}+{folder}") as both:
            told = f"'{folder}' names the base '{named}' in adapter_config.json, and is applied to"
            assert any(note.startswith(told) for note in both.mean.notes) == is_told
