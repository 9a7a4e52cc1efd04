"""Settings of an adaptation that contradict each other, or that would have no effect."""

import math

import pytest

from mergekit_bayes.adapt import AdaptConfig, Rows, data
from mergekit_bayes.adapt.refusals import OF_MEMORY, refuse_settings
from mergekit_bayes.detox import adaptations
from mergekit_bayes.errors import ConfigError

MEMORY = {"memory": {"data": "m"}}
SCORED = {"prompts": "p", "scorer": "words:w"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": None}, "nothing to do"),
        ({"removal": "contrast"}, "belong together"),
        ({"contrast": {"data": "c"}}, "belong together"),
        ({"remove": None, "removal": "ascent"}, "removal: there are no rows to remove"),
        ({"remove": None, "held_out": {"data": "h"}}, "held_out: there are no rows to remove"),
        ({"remove": None, "npo_beta": 0.5}, "npo_beta: it belongs to"),
        ({"removal": "ascent", "npo_beta": 0.5}, "npo_beta: it belongs to removal: npo or"),
        ({"until": {"toxic_share": 0.1}}, "until: toxic_share needs prompts and a scorer"),
        ({"prompts": "p"}, "prompts and scorer belong together"),
        ({"scorer": "words:w", "until": {"toxic_share": 0.1}}, "prompts and scorer belong"),
        ({"remove": None, "until": {"held_out_rise": 0.1}}, "until: held_out_rise needs rows"),
        ({"until": {"memory_kl": 0.1}}, "until: memory_kl needs a memory"),
        ({**MEMORY, "until": {"memory_kl": 0.1}, "memory_held_out": 0}, "memory_held_out is 0"),
        ({"memory_held_out": 0.5}, "memory_held_out: there is no memory"),
        ({"kappa": 2.0}, "kappa: there is no memory"),
        ({"leap": 8.0}, "leap: there is no memory"),
        ({"memory_rows": 8}, "memory_rows: there is no memory"),
        ({**MEMORY, "memory_select": "leverage"}, "memory_select: leverage chooses memory_rows"),
        ({**MEMORY, "memory_filter": "words:w"}, "memory_filter: it scores the texts that"),
        ({"prompt_rows": 8}, "prompt_rows: there are no prompts"),
        ({"continuations": 8}, "continuations: there are no prompts"),
        ({"new_tokens": 8}, "new_tokens: there are no prompts"),
        ({"threshold": 0.9}, "threshold: nothing is scored"),
        ({"check_every": 5}, "check_every: there is nothing to check"),
        ({"teacher": "adapter"}, r"teacher: there is no adapter .*\(lora\)"),
        ({"top_k": 8}, "top_k: it belongs to teacher: stored"),
        ({"base_observations": 9.0, "base_multiple": 2.0}, "base_multiple: base_observations says"),
        ({"keep_steps": [0]}, "keep_steps: 0 is no step of a run of 200"),
        ({"keep_steps": [5, 201]}, "keep_steps: 201 is no step of a run of 200"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    start = {"model": "m", "output": "o", "remove": {"data": "r"}}
    refuse_settings(AdaptConfig.model_validate(start))
    config = AdaptConfig.model_validate({**start, **changes})
    if config.remove is None and "nothing" not in message:
        config = config.model_copy(update={"add": Rows(data="a")})
    with pytest.raises(ConfigError, match=message):
        refuse_settings(config)


def test_lists_of_settings_name_settings():
    """A setting that is renamed would otherwise fall out of a list without a word."""
    unused = {name for names in adaptations._UNUSED.values() for name in names}
    changed = {name for names in adaptations._CHANGES.values() for name in names}
    lists = (data._FREE, OF_MEMORY, adaptations._OURS, adaptations._NO_RESULT, unused, changed)
    for names in lists:
        assert set(names) <= set(AdaptConfig.model_fields)


def test_what_a_fine_tune_can_set_too_reaches_its_machinery():
    given = {"save_steps": 3, "seed": 7, "dtype": "bfloat16", "bf16": True, "lora": {"r": 3}}
    given |= {
        "resume": True,
        "force": True,
        "num_processes": 2,
        "report_to": "none",
        "pack": "joined",
    }
    given |= {"optimizer": "ivon", "keep_checkpoints": True, "logging_steps": 2, "max_steps": 9}
    config = AdaptConfig.model_validate({"model": "m", "output": "o", "add": {"data": "a"}} | given)
    training = data.training_config(config)
    for name in given:
        assert getattr(training, name) == getattr(config, name), name
    assert training.paths == ("a",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": -5}, "prior: -5 is not 'auto', 'stored' or 'none', nor a number of at least 0"),
        ({"prior": math.nan}, "prior: nan is not"),
        ({"tau": math.inf}, "tau: expected a number of at least 0, found inf"),
        ({"kappa": math.inf}, "kappa: expected a number of at least 0, found inf"),
    ],
)
def test_a_weight_of_the_prior_is_a_number_that_holds(changes, message):
    with pytest.raises(ConfigError, match=message):
        AdaptConfig.model_validate({"model": "m", "output": "o", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {**SCORED, "threshold": 0.9, "check_every": 5, "prompt_rows": 3, "new_tokens": 3},
        {**MEMORY, "kappa": 1.0, "leap": 2.0, "until": {"memory_kl": 0.1}, "memory_rows": 4},
        {"memory_self_generated": 9, "memory_filter": "words:w", "threshold": 0.9},
        {"removal": "contrast", "contrast": {"data": "c"}, "npo_beta": 0.5},
        {"held_out": {"data": "h"}, "check_every": 5, "keep_steps": [1, 200]},
        {"teacher": "stored", "top_k": 8, "lora": {"r": 2}},
        {"teacher": "adapter", "lora": {"r": 2}, "base_multiple": 2.0},
    ],
)
def test_settings_that_belong_together_are_not_refused(changes):
    start = {"model": "m", "output": "o", "remove": {"data": "r"}}
    refuse_settings(AdaptConfig.model_validate({**start, **changes}))
