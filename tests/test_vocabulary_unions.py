"""Models with different tokenizers, brought to one list of tokens: which tokens, which files."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.tokenizer_parts import read_parts
from mergekit_bayes.checkpoint.tokenizers import TokenList
from mergekit_bayes.errors import BmergeError, CheckpointError, MismatchError
from mergekit_bayes.plan.unions import RowChoice, TokenChoice, plan_tokens
from tests import tokenized
from tests.test_tokenizers import field
from tests.tokenized import CHARACTERS, SPECIAL, bpe, byte_level, unigram, word_level, word_piece

MERGES = [("a", "b"), ("c", "d")]
LONGER = [*MERGES, ("ab", "cd")]
OTHERS = [("b", "c"), ("a", "b")]
WORDS = ["a", "b", "c"]

KINDS = {
    "words": (word_level(WORDS), word_level(WORDS, ["<x>", "<y>"]), word_level([*WORDS, "d"])),
    "pieces": (
        word_piece(["a", "##b"]),
        word_piece(["a", "##b"], ["<x>"]),
        word_piece(["a", "##c", "ab"], ["<y>"]),
    ),
    "merges": (bpe(MERGES), bpe(MERGES, ["<x>", "<y>"]), bpe(LONGER, ["<z>"])),
    "other merges": (bpe(MERGES, ["<x>"]), bpe(OTHERS, ["<y>"]), bpe(LONGER)),
    "bytes": (byte_level(MERGES), byte_level(LONGER, ["<x>"]), byte_level(MERGES, ["<y>"])),
    "unigram": (
        unigram(["a", "b", "ab"]),
        unigram(["a", "b", "ab"], ["<x>"]),
        unigram(["a", "b", "ba"], ["<y>"]),
    ),
    "order": (bpe(MERGES), bpe(MERGES, ["<x>"], alphabet=list("dcba")), bpe(MERGES, ["<y>"])),
}


def union(tmp_path, *tokenizers, base=0, choice=None, **settings):
    folders = [
        tokenized.model(tmp_path / f"m{i}", tokenizer, i, **settings)
        for i, tokenizer in enumerate(tokenizers)
    ]
    return plan_tokens(tokenized.opened(*folders), base, choice)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_model_has_its_number_in_the_loaded_tokenizer(tmp_path, kind):
    for first in range(3):
        order = [*KINDS[kind][first:], *KINDS[kind][:first]]
        plan = union(tmp_path, *order)
        loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
        own = order[0].get_vocab()
        assert {t: plan.tokens.numbers[t] for t in own} == own  # the base's stay
        everything = set().union(*(t.get_vocab() for t in order))
        assert plan.tokens.numbers.keys() == everything
        assert sorted(plan.tokens.numbers.values()) == list(range(len(everything)))
        for token, number in plan.tokens.numbers.items():
            assert loaded.convert_tokens_to_ids(token) == number, token
            assert loaded.convert_ids_to_tokens(number) == token
        added = [t for t in everything if t[0] == "<" and t[1:] and t not in SPECIAL]
        for token in added:
            assert loaded.encode(f"a{token}b", add_special_tokens=False).count(
                plan.tokens.numbers[token]
            ), token
            assert token not in loaded.decode([plan.tokens.numbers[token]], True)
        # Read again by ourselves the numbers are the same.
        assert read_parts(tmp_path / "out").numbers == plan.tokens.numbers


@pytest.mark.parametrize("kind", ["words", "merges", "bytes"])
def test_texts_are_split_as_before_where_one_tokenizer_continues_the_other(tmp_path, kind):
    plan = union(tmp_path, *KINDS[kind])
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    longest = max(KINDS[kind], key=lambda t: len(t.get_vocab().keys() & {"abcd", "d"}))
    for text in ("abcd", "ab cd", "a b c d", "bcd"):
        assert loaded.tokenize(text) == longest.encode(text, add_special_tokens=False).tokens


def test_other_merges_are_said_in_a_note_and_keep_the_bases_first(tmp_path):
    plan = union(tmp_path, bpe(MERGES), bpe(OTHERS))
    assert any("learned apart" in note for note in plan.notes)
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    # A token that only one has is found by its merge, and is not cut out of every text.
    assert loaded.tokenize("abcd") == ["ab", "cd"]
    assert loaded.tokenize("dbca") == ["d", "bc", "a"]
    assert not any("learned apart" in n for n in union(tmp_path, bpe(MERGES), bpe(LONGER)).notes)
    same = union(tmp_path, bpe(MERGES), bpe(MERGES, ["<x>"]))
    assert not any("otherwise" in note for note in same.notes)
    for kind in (bpe(OTHERS), unigram(["a", "b", "c", "d", "ab", "bc"])):
        chosen = TokenChoice("base")
        plan = union(tmp_path, bpe(MERGES), kind, choice=chosen)
        assert [n for n in plan.notes if "splits some texts otherwise" in n]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (bpe(MERGES), unigram([*CHARACTERS, "bc"])),
        (unigram(["a"]), bpe(MERGES)),
        (bpe(MERGES), byte_level(MERGES)),
        (word_piece(["a"]), word_level(["b"])),
    ],
)
def test_a_union_of_tokenizers_of_different_kinds_is_refused_with_the_reason(tmp_path, one, other):
    with pytest.raises(MismatchError, match=r"learned tokens.*different ways.*no tokenizer"):
        union(tmp_path, one, other)
    # The tokens of one of them are another matter.
    assert union(tmp_path, one, other, choice=TokenChoice("base")).tokens.numbers == one.get_vocab()


def test_tokenizers_of_different_kinds_are_united_where_only_added_tokens_are_new(tmp_path):
    plan = union(tmp_path, bpe(MERGES), unigram([*CHARACTERS, "ab"], ["<x>"]))
    assert plan.tokens.numbers["<x>"] == bpe(MERGES).get_vocab_size()
    assert any("splits some texts otherwise than" in note for note in plan.notes)


def test_the_list_is_the_same_whatever_the_seed_of_hashes_is(tmp_path):
    folders = [
        str(tokenized.model(tmp_path / str(i), bpe(MERGES, added), i))
        for i, added in enumerate((["<p>"], ["<q>", "<r>"], ["<r>", "<t>", "<p>"]))
    ]
    plan = plan_tokens(tokenized.opened(*folders), None)
    told = f"{sorted(plan.tokens.numbers.items())} {dict(plan.written)} {plan.notes}\n"
    assert "('<p>', 9), ('<q>', 10), ('<r>', 11)" in told
    code = f"""from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.plan.unions import plan_tokens
plan = plan_tokens([open_posterior(f, with_precision=False) for f in {folders!r}], None)
print(f"{{sorted(plan.tokens.numbers.items())}} {{dict(plan.written)}} {{plan.notes}}")"""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == told


def test_new_tokens_are_in_the_order_of_their_numbers_and_not_of_the_file(tmp_path):
    one = tokenized.model(tmp_path / "one", bpe(MERGES))
    other = tokenized.model(tmp_path / "other", bpe([*LONGER, ("a", "c")], ["<x>", "<y>"]), 1)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["added_tokens"].reverse()
    (other / "tokenizer.json").write_text(json.dumps(content))
    numbers = plan_tokens(tokenized.opened(one, other), 0).tokens.numbers
    assert [numbers[t] for t in ("abcd", "ac", "<x>", "<y>")] == [9, 10, 11, 12]


def test_pieces_that_are_no_text_have_the_numbers_of_another_list(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    pieces = [("<unk>", 2), ("<s>", 3), ("a", 1), ("b", 1), ("c", 1), ("<mask>", 3)]
    content = b"".join(field(1, field(1, p.encode()) + field(3, kind)) for p, kind in pieces)
    (folder / "tokenizer.model").write_bytes(content)
    own = {"<s>": 0, "<pad>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "<mask>": 6, "<more>": 7}
    reference = TokenList(folder / "tokenizer.json", {n: t for t, n in own.items()})
    assert read_parts(folder, reference).numbers == {t: n for t, n in own.items() if n < 7}


def test_flags_are_those_of_the_first_model_that_has_the_token(tmp_path):
    left, right = AddedToken("<t>", lstrip=True, special=False), AddedToken("<t>", rstrip=True)
    for first, second in ((left, right), (right, left)):
        plan = union(tmp_path, bpe(MERGES), bpe(MERGES, [first]), bpe(MERGES, [second]))
        written = json.loads(plan.written[Path("tokenizer.json")])
        (entry,) = [e for e in written["added_tokens"] if e["content"] == "<t>"]
        assert (entry["lstrip"], entry["rstrip"]) == (first.lstrip, first.rstrip)


def test_nothing_but_the_tokens_changes_in_the_files(tmp_path):
    one = tokenized.model(tmp_path / "one", bpe(MERGES))
    config = json.loads((one / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{{ x }}", "added_tokens_decoder": {"1": {"content": "<s>"}}}
    (one / "tokenizer_config.json").write_text(json.dumps(config))
    (one / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')
    for stale in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
        (one / stale).write_text("{}")
    other = tokenized.model(tmp_path / "other", bpe(MERGES, ["<x>"]))
    plan = plan_tokens(tokenized.opened(one, other), 0)
    assert {str(name) for name in plan.copied} == {"special_tokens_map.json"}
    before = json.loads((one / "tokenizer.json").read_text())
    after = json.loads(plan.written[Path("tokenizer.json")])
    assert after.pop("added_tokens")[:-1] == before.pop("added_tokens")
    assert after == before
    written = json.loads(plan.written[Path("tokenizer_config.json")])
    assert written.pop("added_tokens_decoder")["9"]["content"] == "<x>"
    assert written == {k: v for k, v in config.items() if k != "added_tokens_decoder"}
    same = plan_tokens(tokenized.opened(one, one), 0)
    assert not same.written
    assert {str(n) for n in same.copied} > {"vocab.json", "tokenizer.json"}
    assert isinstance(same.models[1].mean, SafetensorsSource)  # no tensor is wrapped


def test_tokens_are_added_to_a_tokenizer_in_the_older_files(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    tokenized.model(one, byte_level(MERGES))
    content = json.loads((one / "tokenizer.json").read_text())["model"]
    (one / "tokenizer.json").unlink()
    (one / "vocab.json").write_text(json.dumps(content["vocab"]))
    (one / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content["merges"])))
    (one / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenized.model(other, byte_level(MERGES, ["<x>"]))
    plan = plan_tokens(tokenized.opened(one, other), 0)
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    number = byte_level(MERGES).get_vocab_size()
    assert loaded.encode("ab<x>cd")[1:2] == [number] == [plan.tokens.numbers["<x>"]]
    assert [n for n in plan.notes if "otherwise" in n] == []
    tokenized.model(other, byte_level(LONGER))
    with pytest.raises(MismatchError, match=r"no place for them.*save_pretrained"):
        plan_tokens(tokenized.opened(one, other), 0)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_tokenizers_of_models_own_classes_load_with_the_new_numbers(tmp_path, name):
    make = byte_level if name != "LlamaTokenizer" else bpe
    one = tokenized.model(tmp_path / "one", make(MERGES))
    other = tokenized.model(tmp_path / "other", make(LONGER, ["<x>", "<y>"]), 1)
    for folder, tokenizer in ((one, make(MERGES)), (other, make(LONGER, ["<x>", "<y>"]))):
        entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        decoder = {str(e.pop("id")): e for e in entries}
        tokenized.save(folder, tokenizer, tokenizer_class=name, added_tokens_decoder=decoder)
    plan = plan_tokens(tokenized.opened(one, other), 0)
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    for token, number in plan.tokens.numbers.items():
        assert loaded.convert_tokens_to_ids(token) == number, token


def test_a_list_with_gaps_keeps_its_numbers(tmp_path):
    one = tokenized.model(tmp_path / "one", bpe(MERGES, ["<far>"]), rows=16)
    content = json.loads((one / "tokenizer.json").read_text())
    content["model"]["vocab"]["cd"] = 11
    content["added_tokens"][-1]["id"] = 14
    (one / "tokenizer.json").write_text(json.dumps(content))
    other = tokenized.model(tmp_path / "other", bpe(LONGER, ["<x>"]), 1)
    plan = plan_tokens(tokenized.opened(one, other), 0)
    expected = {"cd": 11, "<far>": 14, "abcd": 15, "<x>": 16}
    assert {t: plan.tokens.numbers[t] for t in expected} == expected
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    assert {t: loaded.convert_tokens_to_ids(t) for t in expected} == expected
    assert plan.tokens.rows == 17 == plan.models[0].mean.specs[tokenized.HEAD].shape[0]


def test_numbers_in_configs_follow_the_tokens(tmp_path):
    one = tokenized.model(tmp_path / "one", bpe(MERGES), pad_token_id=0)
    other = tokenized.model(
        tmp_path / "other",
        bpe(MERGES, ["<x>"], alphabet=list("dcba")),
        1,
        eos_token_id=[2, 9],
        image_token_id=3,
        pad_token_id=-1,
    )
    models = tokenized.opened(one, other)
    assert plan_tokens(models, 0).config_changes == {"vocab_size": 10}
    # The tokenizer of the second, and the config of the first.
    plan = plan_tokens(models, 0, TokenChoice(str(other)))
    expected = {"vocab_size": 10, "eos_token_id": [2, 9], "image_token_id": 3, "pad_token_id": -1}
    assert plan.config_changes == expected
    plan = plan_tokens(models, 0)
    ids = {"eos_token_id": [2, 9], "pad_token_id": 400, "image_token_id": 3, "hidden": 3}
    d = plan.tokens.numbers["d"]
    assert plan.new_ids(1, ids) == {"image_token_id": d, "pad_token_id": None}
    assert plan.new_ids(0, ids) == {}


def test_tokens_that_the_user_names_are_added_at_the_end(tmp_path):
    rows = {"<new>": RowChoice(None), "a": RowChoice(None), " two words": RowChoice(None)}
    plan = union(
        tmp_path, bpe(MERGES), bpe(MERGES, ["<x>"]), choice=TokenChoice("union", rows, multiple=8)
    )
    assert [plan.tokens.numbers[t] for t in ("<x>", "<new>", " two words")] == [9, 10, 11]
    assert plan.tokens.rows == 16 == plan.config_changes["vocab_size"]
    loaded = tokenized.ids(tokenized.write_tokenizer(plan, tmp_path / "out"))
    assert {10, 11} <= set(loaded.encode("ab two words<new>"))
    # A token that only another model has, added to the base's.
    rows = {"<x>": RowChoice(str(tmp_path / "m1"))}
    plan = union(tmp_path, bpe(MERGES), bpe(MERGES, ["<x>"]), choice=TokenChoice("base", rows))
    assert plan.tokens.numbers["<x>"] == 9
    entry = json.loads(plan.written[Path("tokenizer.json")])["added_tokens"][-1]
    assert (entry["special"], entry["normalized"]) == (True, False)


HOSTILE = {
    "a number beyond all": {"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}},
    "a number as text": {"model": {"vocab": {"a": "1"}}},
    "a negative number": {"model": {"vocab": {"a": -1}}},
    "merges of no tokens": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[1, 2], 3, "x"]}
    },
    "steps that are no steps": {"model": {"vocab": {"a": 0}}, "normalizer": [[]], "decoder": 3},
    "added tokens without text": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 3}]},
    "scores of text": {"model": {"vocab": [["a", "x"], ["b", None]]}},
    "flags of text": {
        "model": {"vocab": {"a": 0}},
        "added_tokens": [{"id": 1, "content": "<x>", "special": "no", "lstrip": [1]}],
    },
    "no model": {"added_tokens": [{"id": 0, "content": "a"}]},
    "a kind of its own": {"model": {"type": "Own", "vocab": {"a": 0}, "merges": 3}},
    "a kind of no text": {"model": {"type": [1], "vocab": {"z": 0}}},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("is_base", [True, False])
def test_a_tokenizer_from_anybody_is_read_or_is_one_message(tmp_path, case, is_base):
    plain = tokenized.model(tmp_path / "plain", bpe(MERGES, ["<t>"]))
    hostile = tokenized.model(tmp_path / "hostile", bpe(MERGES), 1)
    (hostile / "tokenizer.json").write_text(json.dumps(HOSTILE[case]))
    models = tokenized.opened(*((hostile, plain) if is_base else (plain, hostile)))
    for source in ("union", "base"):
        said = ""
        try:
            plan = plan_tokens(models, 0, TokenChoice(source))
        except (CheckpointError, MismatchError) as error:
            said = str(error)
        assert "hostile" in said if said else plan.tokens.rows < 100


def places_in(content, place=()):
    """All places of a document: the keys and numbers that lead to each."""
    yield place
    entries = content.items() if isinstance(content, dict) else ()
    entries = enumerate(content) if isinstance(content, list) else entries
    for key, inner in entries:
        yield from places_in(inner, (*place, key))


JUNK = (None, True, -1, 3, 1e300, "x", "", [], {}, [[]], [1, "a"], {"a": {"b": []}}, "\u0000")


@pytest.mark.parametrize("make", [bpe, unigram, word_piece])
def test_any_value_in_any_place_of_a_tokenizer_is_read_or_is_one_message(tmp_path, make):
    rng = random.Random(make.__name__)
    words = MERGES if make is bpe else ["a", "b", "ab"]
    plain = tokenized.model(tmp_path / "plain", make(words, ["<t>"]))
    other = tokenized.model(tmp_path / "other", make(words, ["<u>"]), 1)
    whole = (other / "tokenizer.json").read_text()
    places = [p for p in places_in(json.loads(whole)) if p and "vocab" not in p[:-1]]
    models, planned = tokenized.opened(other, plain), 0
    for place in rng.choices(places, k=25):
        content = inner = json.loads(whole)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = rng.choice(JUNK)
        (other / "tokenizer.json").write_text(json.dumps(content))
        for base in (0, 1):
            with contextlib.suppress(BmergeError):
                planned += plan_tokens(models, base).tokens.rows > 0
    assert planned > 12


def test_a_model_that_lists_no_tokens_is_refused(tmp_path):
    one = tokenized.model(tmp_path / "one", bpe(MERGES))
    other = tokenized.model(tmp_path / "other", bpe(MERGES))
    (other / "tokenizer.json").unlink()
    with pytest.raises(MismatchError, match=r"other.*lists no tokens"):
        plan_tokens(tokenized.opened(one, other), 0)
