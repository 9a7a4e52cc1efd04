"""Regular expressions from outside: honest ones are compiled, no other one can take long."""

import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora.config import check_adapter_patterns
from mergekit_bayes.merge import MergeConfig
from mergekit_bayes.patterns import LONGEST_NAME, PatternError, compile_pattern
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.plan.options import parse_scales

_WORDS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
_PROJECTIONS = "k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj"
_OF_UNSLOTH = (
    rf"(?:.*?(?:language|text).*?(?:{_WORDS}).*?(?:{_PROJECTIONS}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{_WORDS})\.(?:(?:{_PROJECTIONS})))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "q_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.(\d+)\.(mlp|attn)\..*",
        r"^(?!.*lm_head).*proj$",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*(?:lm_head|vision|merger)).*(?:q_proj|k_proj|v_proj|o_proj).*",
        r".*\.layers\.\d+\.experts\.\d+\.\w+\.\w+$",
        r"model\.layers\.(1[0-9]|2[0-9]|3[01])\.self_attn\.(q|k|v|o)_proj\.weight",
        r"(\w+\.)*q_proj",
        r"(?:(?:self_attn|mlp)\.)+x",
        r"[^.]+\.[^.]+\.weight",
        r".*(?<!lm_head)$",
    ],
)
def test_honest_patterns_are_compiled_as_they_are(pattern: str) -> None:
    assert compile_pattern(pattern).pattern == pattern
    compile_pattern(pattern, anywhere=True)
    compile_pattern(rf"(.*\.)?({pattern})$")


def test_the_patterns_of_other_tools_for_target_modules_are_compiled() -> None:
    assert compile_pattern(_OF_UNSLOTH).fullmatch("model.layers.11.mlp.up_proj")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a+)+$", "several ways"),
        (r"(a|a)*b", "several ways"),
        (r"(a|aa)+$", "several ways"),
        (r"(\w+\d+)*x", "several ways"),
        (r"(x+x+)+y", "several ways"),
        (r"(\.\d+|\.\w+)*x", "several ways"),
        (r"([^b]|a)*c", "several ways"),
        (r"(a{1,50}){1,50}b", "several ways"),
        (r"(?=(a+)+b)", "several ways"),
        (r"(a*)*b", "empty"),
        (r"(a?){50}a{50}", "empty"),
        (r".*.*.*.*x", "too many ways"),
        (r"\w*\w*\w*\w*\w*!", "too many ways"),
        (r".*aaa.*aaa.*aaa.*b", "too many ways"),
        ("a?" * 30 + "a" * 30, "too many ways"),
        ("(a|a)" * 30 + "b", "too many ways"),
        ("((a|a)b){30}c", "too many ways"),
        (r"(a)\1", "refers back"),
        (r"(?P<a>x)(?(a)y|z)", "refers back"),
        ("a" * 1001, "1,001 characters"),
        ("[", "unterminated"),
        ("a{99999999999999999999}", "too large"),
        ("(" * 499 + ")" * 499, "nested too deeply"),
    ],
)
def test_a_pattern_that_may_take_long_is_refused_with_a_reason(pattern: str, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(PatternError, match=reason):
        compile_pattern(pattern)
    assert time.process_time() - start < 1


def test_no_pattern_that_is_compiled_takes_long() -> None:
    """Random patterns of letters that overlap, on the names that are worst for them."""
    rng = random.Random(20)
    atoms = ["a", "b", "aa", ".", r"\w", "[ab]", "[^b]", r"\d", "[a-z]", "(?=a)"]
    repeats = ["", "", "", "*", "+", "?", "{2,5}", "*?", "{3}", "{0,40}"]

    def pattern(depth: int) -> str:
        parts = []
        for _ in range(rng.randint(1, 3)):
            part = rng.choice(atoms)
            if depth and rng.random() < 0.5:
                part = f"(?:{'|'.join(pattern(depth - 1) for _ in range(rng.randint(1, 3)))})"
            parts.append(part + rng.choice(repeats))
        return "".join(parts)

    names = ["a" * LONGEST_NAME, "ab" * (LONGEST_NAME // 2), "aab" * (LONGEST_NAME // 3) + "!"]
    compiled: list[re.Pattern[str]] = []
    for _ in range(400):
        try:
            compiled.append(compile_pattern(pattern(2) + "!x"))
        except PatternError:
            continue
    start = time.process_time()
    for one in compiled:
        for name in names:
            one.match(name)
    assert len(compiled) > 100
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"(a+)+": 4}},
        {"alpha_pattern": {"q_proj": 4, "x)|((a+)+": 4}},
        {"target_modules": "(a+)+"},
        {"exclude_modules": r"(\w+\d+)*x"},
        {"layers_pattern": ["layers", "(a|a)*"]},
        {"modules_to_save": ["(a+)+"]},
        {"rank_pattern": {str(i): 4 for i in range(20_001)}},
        {"rank_pattern": {f".*.*{i}$": 4 for i in range(9)}},
    ],
)
def test_what_peft_makes_a_pattern_of_is_checked_in_an_adapters_config(
    config: dict[str, object],
) -> None:
    with pytest.raises(ConfigError, match=rf"^adapter_config.json: {next(iter(config))} has"):
        check_adapter_patterns(config, Path("adapter_config.json"))


def test_the_patterns_of_an_honest_adapter_pass_and_odd_forms_are_skipped() -> None:
    honest: dict[str, object] = {
        "target_modules": _OF_UNSLOTH,
        "exclude_modules": ["(a+)+ as a name"],
        "layers_pattern": "layers",
        "modules_to_save": ["lm_head", "embed_tokens"],
        "rank_pattern": {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(2000)},
        "alpha_pattern": {r".*\.(\d+)\.(q|v)_proj": 8},
    }
    check_adapter_patterns(honest, Path())
    for odd in (None, 3, [None, 3, {}], {}, [[]], True):
        check_adapter_patterns(dict.fromkeys(honest, odd), Path())


@pytest.mark.parametrize(
    "pattern",
    [
        _OF_UNSLOTH,
        r".*h\.(?:0|1|2).*attn.*c_attn.*weight.*",
        r".*encoder.*layer.*attention.*self.*query.*weight.*",
        r"^(?!.*vision).*layers\.(1[0-9]|2[0-3])\..*(q|k|v)_proj.*",
    ],
)
def test_a_pattern_for_tensors_is_judged_by_the_names_that_they_have(pattern: str) -> None:
    compile_pattern(pattern, anywhere=True, longest=80)


def test_patterns_for_tensors_are_refused_with_the_name_that_they_take_long_with(
    tmp_path: Path,
) -> None:
    for model in "ab":
        tensors = {"a" * n: np.zeros(2, np.float32) for n in (3, 200)}
        save_file(tensors, tmp_path / f"{model}.safetensors")
    models = tuple(str(tmp_path / f"{model}.safetensors") for model in "ab")
    slow = ".*a.*a.*a.*a.*b"
    for options, setting in (
        ({"only": slow}, "--only"),
        ({"scale": (f"{models[0]}:{slow}=2",)}, "--scale"),
    ):
        config = MergeConfig(models=models, out=str(tmp_path / "c.safetensors"), **options)
        with pytest.raises(ConfigError, match=rf"^{setting} .*names such as 'aaa.*too many ways"):
            plan_merge(config)


def test_the_patterns_of_a_recipe_are_checked() -> None:
    settings = {"models": ("a", "b"), "out": "c"}
    with pytest.raises(ConfigError, match=r"--scale 'a:.*several ways"):
        parse_scales(MergeConfig(**settings, scale=("a:(a+)+=2",)))
