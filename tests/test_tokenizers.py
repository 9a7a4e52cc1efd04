"""Token lists in every form that model folders store, compared with each other."""

import base64
import json
import random
from itertools import product

import pytest

from mergekit_bayes.checkpoint.tokenizers import (
    read_tokens,
    special_token_ids,
    tokenizer_identity,
    tokens_apart,
)
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny

WORDS = ["a", "b", "cat", "dog", "sat", "on", "mat", "the", "tree"]
OTHER_ORDER = [*WORDS[:4], *reversed(WORDS[4:])]


def write_json(file, content):
    file.write_text(json.dumps(content))


def bpe(folder, words):
    write_json(folder / "tokenizer.json", {"model": {"vocab": {w: i for i, w in enumerate(words)}}})


def unigram(folder, words):
    write_json(
        folder / "tokenizer.json",
        {"model": {"vocab": [[w, -float(i)] for i, w in enumerate(words)]}},
    )


def fairseq_json(folder, words):
    """The list of a tokenizer that shifts its SentencePiece model by one."""
    unigram(folder, ["<s>", "<pad>", "</s>", "<unk>", *words])


def vocab_txt(folder, words):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def vocab_json(folder, words):
    write_json(folder / "vocab.json", {w: i for i, w in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")


def vocab_json_with_added_tokens(folder, words):
    vocab_json(folder, words[:-1])
    write_json(folder / "added_tokens.json", {words[-1]: len(words) - 1})


def vocab_json_with_decoder(folder, words):
    vocab_json(folder, words[:-1])
    decoder = {str(len(words) - 1): {"content": words[-1], "special": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})


def varint(value):
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number, content):
    """A field of a protocol buffer: bytes, or an integer."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece_bytes(words, special=()):
    pieces = b""
    for i, word in enumerate([*special, *words]):
        score = varint(2 << 3 | 5) + b"\0\0\x80\xbf"
        kind = field(3, 3) if i < len(special) else b""
        pieces += field(1, field(1, word.encode()) + score + kind)
    return pieces + field(2, field(3, b"a trainer's settings") + varint(9 << 3 | 1) + b"\0" * 8)


def sentencepiece(folder, words):
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(words))


def fairseq_model(folder, words):
    """The model inside a tokenizer that shifts it by one."""
    content = sentencepiece_bytes(words, special=["<unk>", "<s>", "</s>"])
    (folder / "sentencepiece.bpe.model").write_bytes(content)


def tiktoken(folder, words, name="qwen.tiktoken"):
    lines = [f"{base64.b64encode(w.encode()).decode()} {i}" for i, w in enumerate(words)]
    (folder / name).write_text("\n".join(lines) + "\n")


def tiktoken_model(folder, words):
    tiktoken(folder, words, "tokenizer.model")


FORMS = (
    bpe,
    unigram,
    vocab_txt,
    vocab_json,
    vocab_json_with_added_tokens,
    vocab_json_with_decoder,
    sentencepiece,
    tiktoken,
    tiktoken_model,
)
SHIFTED = (fairseq_json, fairseq_model)


def folder(tmp_path, name, write, words):
    place = tmp_path / name
    place.mkdir(exist_ok=True)
    write(place, words)
    return place


@pytest.mark.parametrize("forms", [FORMS, SHIFTED])
def test_a_tokenizer_in_any_form_is_compared_with_one_in_any_other(tmp_path, forms):
    for i, (one, other) in enumerate(product(forms, forms)):
        first = folder(tmp_path, f"{i}-first", one, WORDS)
        same = folder(tmp_path, f"{i}-same", other, WORDS)
        mixed = folder(tmp_path, f"{i}-mixed", other, OTHER_ORDER)
        assert tokens_apart(first, same) == [], (one, other)
        apart = tokens_apart(first, mixed)
        assert len(apart) == 4, (one, other, apart)  # of five reversed words the third stays
        assert {x for _, x, _ in apart} == {"sat", "on", "the", "tree"}


def test_bytes_that_are_no_text_are_compared_in_the_characters_of_byte_level_bpe(tmp_path):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [bytes([i]) for i in range(256)] + [b"\xc3\xa4 x", b" the"]
    place = tmp_path / "one"
    place.mkdir()
    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)]
    (place / "x.tiktoken").write_bytes(b"\n".join(lines))
    characters = bytes_to_unicode()
    words = ["".join(characters[byte] for byte in token) for token in tokens]
    other = folder(tmp_path, "other", bpe, words)
    assert len(read_tokens(place).tokens) == len(tokens)
    assert tokens_apart(place, other) == []


def test_a_file_that_lists_no_tokens_gives_way_to_the_next_form(tmp_path):
    for broken in ("{", "{}", '{"model": {}}', '{"model": {"vocab": {}}}', "[]"):
        place = folder(tmp_path, "one", vocab_txt, WORDS)
        (place / "tokenizer.json").write_text(broken)
        assert read_tokens(place).file.name == "vocab.txt"
    for content in (b"", b"\x0a", b"\x0a\xff\xff", b"\x0a\x05abc", b"no base64", b"PK\x03\x04"):
        place = tmp_path / "two"
        place.mkdir(exist_ok=True)
        (place / "tokenizer.model").write_bytes(content)
        assert read_tokens(place) is None
        assert tokens_apart(place, tmp_path / "one") == []
    write_json(place / "vocab.json", {"eng": {"a": 0}, "fra": {"a": 1}})
    assert read_tokens(place) is None
    assert read_tokens(tmp_path / "nowhere") is None


def test_damaged_files_list_some_tokens_or_none_and_raise_nothing(tmp_path):
    rng = random.Random(0)
    for form in (*FORMS, *SHIFTED):
        for trial in range(30):
            place = folder(tmp_path, f"{form.__name__}-{trial}", form, WORDS)
            for file in place.iterdir():
                content = bytearray(file.read_bytes())
                for _ in range(rng.randint(1, 4)):
                    content[rng.randrange(len(content))] = rng.choice(b'\n\x08\x12\xff{}[]",:09a')
                file.write_bytes(content[: rng.randint(1, len(content))])
            tokens_apart(place, tmp_path / f"{form.__name__}-0")
            special_token_ids(place)


def test_a_line_separator_inside_a_token_ends_no_line(tmp_path):
    place = folder(tmp_path, "one", vocab_txt, ["a", "\u2028", "b\x85c", "d"])
    assert read_tokens(place).tokens == {0: "a", 1: "\u2028", 2: "b\x85c", 3: "d"}


def test_the_numbers_of_special_tokens_follow_from_their_names(tmp_path):
    place = folder(tmp_path, "one", vocab_json, WORDS)
    config = {"eos_token": "cat", "pad_token": {"content": "mat"}, "bos_token": "not there"}
    write_json(place / "tokenizer_config.json", config | {"unk_token": None})
    assert special_token_ids(place) == {"eos_token_id": 2, "pad_token_id": 6}
    assert special_token_ids(tmp_path) == {}


@pytest.mark.parametrize("one", FORMS)
def test_a_merge_names_the_files_in_which_numbers_stand_for_other_tokens(tmp_path, one):
    for other in {one, vocab_txt}:
        for name, write, words in (("a", one, WORDS), ("b", other, OTHER_ORDER)):
            place = folder(tmp_path, f"{other.__name__}-{name}", write, words)
            tiny.write(place / "model.safetensors", tiny.arrays(1))
        models = tuple(str(tmp_path / f"{other.__name__}-{name}") for name in "ab")
        file = read_tokens(tmp_path / f"{other.__name__}-b").file.name
        with pytest.raises(MismatchError, match=rf"4 token numbers stand .*{file}\)"):
            run_merge(MergeConfig(models=models, out=str(tmp_path / "out")))


def test_a_model_without_a_tokenizer_and_files_in_one_folder_are_merged(tmp_path):
    place = folder(tmp_path, "a", vocab_txt, WORDS)
    tiny.write(place / "model.safetensors", tiny.arrays(0))
    tiny.write(tmp_path / "b/model.safetensors", tiny.arrays(1))
    models = (str(place), str(tmp_path / "b"))
    run_merge(MergeConfig(models=models, out=str(tmp_path / "out")))
    assert (tmp_path / "out/vocab.txt").read_text() == (place / "vocab.txt").read_text()


def test_an_embedding_without_rows_is_refused_by_name(tmp_path):
    for name, rows in (("a", 0), ("b", 7)):
        shapes = {**tiny.SHAPES, "wte.weight": (rows, 4)}
        tiny.write(tmp_path / f"{name}.safetensors", tiny.arrays(0, shapes))
    models = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for order in (models, models[::-1]):
        for vocab in ("error", "base", "common"):
            with pytest.raises(MismatchError, match=r"no rows in '.*a\.safetensors'"):
                run_merge(MergeConfig(models=tuple(order), vocab=vocab, out=str(tmp_path / "out")))


def test_a_tokenizer_that_is_too_large_or_a_folder_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read .*10,737,418,240"):
        tokenizer_identity(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(Is a directory"):
        tokenizer_identity(tmp_path)
