"""The keys of a recipe that choose tokens: each one's effect, and what is no such key."""

import pytest

from mergekit_bayes.documents import parse_yaml
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit.tokens import read_token_choice
from mergekit_bayes.plan.unions import RowChoice, TokenChoice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("merge_method: linear", None),
        ("tokenizer_source: union", TokenChoice("union")),
        ("tokenizer_source: base", TokenChoice("base")),
        ("tokenizer_source: org/name@main", TokenChoice("org/name@main")),
        ("tokenizer_source: model:/some/path", TokenChoice("/some/path")),
        ("tokenizer: {}", TokenChoice("union")),
        ("tokenizer: {source: base, pad_to_multiple_of: 64}", TokenChoice("base", {}, 64)),
        ("tokenizer: {source: {model: {path: a/b}}, pad_to_multiple_of: null}", TokenChoice("a/b")),
        (
            """
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: chatml/model}
    <|eot|>: {source: llama/model, force: true}
    <a>: {source: zero}
    <b>: {source: {kind: zero}, force: true}
    <c>: {source: {kind: model_token, model: m, token: <|o|>}}
    <d>: {source: {kind: model_token, model: {model: {path: m}}, token_id: 0}}
""",
            TokenChoice(
                "union",
                {
                    "<|im_start|>": RowChoice("chatml/model"),
                    "<|eot|>": RowChoice("llama/model", is_forced=True),
                    "<a>": RowChoice(None),
                    "<b>": RowChoice(None, is_forced=True),
                    "<c>": RowChoice("m", "<|o|>"),
                    "<d>": RowChoice("m", token_id=0),
                },
            ),
        ),
    ],
)
def test_keys_are_read_as_they_are_documented(text, choice):
    assert read_token_choice(parse_yaml(text)) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenizer_source: union\ntokenizer: {}", "both given"),
        ("tokenizer_source: 3", "tokenizer_source: 3, expected base, union or a model"),
        ("tokenizer_source: ''", "tokenizer_source: '', expected"),
        ("tokenizer: union", "tokenizer: 'union', expected a mapping"),
        ("tokenizer: {source: [union]}", "tokenizer.source"),
        ("tokenizer: {sources: union}", "no key 'sources'.* did you mean 'source'"),
        ("tokenizer: {tokens: [a]}", "tokenizer.tokens: .*, expected a mapping by token"),
        ("tokenizer: {tokens: {3: {source: m}}}", "tokenizer.tokens: 3 is no token"),
        ("tokenizer: {tokens: {a: m}}", "'a': 'm', expected a mapping"),
        ("tokenizer: {tokens: {a: {force: true}}}", "'a' has no source"),
        ("tokenizer: {tokens: {a: {source: m, froce: true}}}", "did you mean 'force'"),
        ("tokenizer: {tokens: {a: {source: m, force: yes please}}}", "force is 'yes please'"),
        ("tokenizer: {tokens: {a: {source: {kind: nul}}}}", "kind is 'nul', expected zero or"),
        ("tokenizer: {tokens: {a: {source: {kind: [zero]}}}}", "kind is"),
        ("tokenizer: {tokens: {a: {source: {kind: zero, model: m}}}}", "no key 'model'"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: m}}}}", "either token or"),
        (
            "tokenizer: {tokens: {a: {source: {kind: model_token, model: m, token: b, token_id: 1}}}}",
            "either token or token_id",
        ),
        (
            "tokenizer: {tokens: {a: {source: {kind: model_token, token: b}}}}",
            "model: None, expected a model",
        ),
        (
            "tokenizer: {tokens: {a: {source: {kind: model_token, model: m, token: 3}}}}",
            "token is 3, expected text",
        ),
        (
            "tokenizer: {tokens: {a: {source: {kind: model_token, model: m, token_id: -1}}}}",
            "token_id is -1, expected a number from 0",
        ),
        ("tokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of: 0, expected a number from 1"),
        ("tokenizer: {pad_to_multiple_of: true}", "pad_to_multiple_of: True"),
        ("tokenizer: {pad_to_multiple_of: 1000000000}", "pad_to_multiple_of: 1000000000"),
    ],
)
def test_what_is_no_such_key_is_an_error_that_names_it(text, message):
    with pytest.raises(ConfigError, match=message):
        read_token_choice(parse_yaml(text))
