"""The rows that models with different tokenizers get: against a twin in float64, and as read."""

import threading
import tracemalloc

import numpy as np
import pytest

from mergekit_bayes.checkpoint.codec import decode, read_tensor
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import MemorySource, TensorSpec
from mergekit_bayes.checkpoint.token_maps import ZERO, TokenRule, token_maps
from mergekit_bayes.checkpoint.token_rows import TokenSource, token_rows
from mergekit_bayes.checkpoint.tokenizer_parts import read_parts
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.plan.unions import RowChoice, TokenChoice, plan_tokens
from tests import tiny, tokenized
from tests.test_tokenizers import FORMS, OTHER_ORDER, SHIFTED
from tests.test_tokenizers import WORDS as FORM_WORDS
from tests.tokenized import EMBEDDING, HEAD, OTHER, bpe, read_in_pieces, word_level

WORDS = ["a", "b", "c"]


def twin(tables, base, rules, order, padding):
    """The rows of every model, token by token in float64; a table is rows by token."""
    rows = []
    for own in tables:
        of_model = []
        for token in order:
            others = [table[token] for table in tables if token in table]
            rule, forced = rules.get(token, (None, False))
            if token in own and not forced:
                row = own[token]
            elif rule is not None:
                row = rule
            elif base is not None and token in tables[base]:
                row = tables[base][token]
            else:
                row = np.mean(others, 0) if others else np.zeros(len(next(iter(own.values()))))
            of_model.append(row)
        rows.append([*of_model, *[np.mean(of_model, 0)] * padding])
    return np.array(rows)


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_a_twin_in_float64(tmp_path, seed):
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(14)]
    folders = []
    for i in range(3):
        chosen = list(rng.permutation(words)[: rng.integers(4, 12)])
        tokenizer = word_level(chosen, [f"<x{j}>" for j in rng.permutation(4)[: rng.integers(4)]])
        dtype = str(rng.choice(["F32", "BF16", "F16", "F64"])) if seed % 2 else "BF16"
        rows = tokenizer.get_vocab_size() + int(rng.integers(0, 5))  # some without a token
        settings = {"rows": rows, "dtype": dtype}
        folders.append(tokenized.model(tmp_path / str(i), tokenizer, 10 * seed + i, **settings))
    models = tokenized.opened(*folders)
    base = None if seed % 3 == 0 else int(rng.integers(3))
    source = ["union", "base", str(folders[2])][seed % 3]
    tables = []
    for folder, model in zip(folders, models, strict=True):
        listed = read_parts(folder).numbers
        embedding = read_tensor(model.mean, EMBEDDING).astype(np.float64)
        tables.append({token: embedding[number] for token, number in listed.items()})
    choices, rules = {}, {}
    some = str(rng.choice(sorted(tables[1])))
    for token, forced in (("w3", False), ("<x1>", True), ("<new>", False), ("w5", True)):
        if rng.random() < 0.5:
            choices[token] = RowChoice(None, is_forced=forced)
            rules[token] = (np.zeros(tokenized.WIDTH), forced)
        else:
            choices[token] = RowChoice(str(folders[1]), some, is_forced=forced)
            rules[token] = (tables[1][some], forced)
    multiple = int(rng.integers(1, 9))
    plan = plan_tokens(models, base, TokenChoice(source, choices, multiple))
    order = sorted(plan.tokens.numbers, key=plan.tokens.numbers.get)
    total = -(-len(order) // multiple) * multiple
    expected = twin(tables, base, rules, order, total - len(order))
    for model, rows in zip(plan.models, expected, strict=True):
        found = read_tensor(model.mean, EMBEDDING)
        assert found.shape == (total, tokenized.WIDTH)
        np.testing.assert_allclose(found, rows, rtol=2e-7, atol=1e-7)
        # Rows that are copied are the same bits.
        copied = [i for i, t in enumerate(order) if rows[i] in found[i : i + 1].astype(np.float64)]
        assert len(copied) > 3
        size = model.mean.specs[EMBEDDING].nbytes
        whole = read_in_pieces(model.mean, EMBEDDING, [size])
        np.testing.assert_array_equal(whole, read_in_pieces(model.mean, EMBEDDING, [1, 7, 2, 64]))
        head = read_tensor(model.mean, HEAD)
        assert head.shape == found.shape
        assert (head != found).any()
        stored = model.stored_mean or model.mean
        np.testing.assert_array_equal(read_tensor(model.mean, OTHER), read_tensor(stored, OTHER))


def test_rows_are_those_that_mergekit_gives(tmp_path):
    """The numbers that mergekit 0.1.5 wrote for these models, as it was observed."""
    folders = [
        tokenized.model(tmp_path / name, word_level(WORDS, added))
        for name, added in (
            ("base", []),
            ("a", ["<|im_start|>", "<|im_end|>"]),
            ("b", ["<pad>", "<|im_end|>", "<b>"]),
        )
    ]
    for folder, scale in zip(folders, (1, 100, 10000), strict=True):
        rows = read_parts(folder).count
        values = scale * np.repeat(np.arange(1, rows + 1)[:, None], 4, 1)
        (folder / "model.safetensors").unlink()
        tiny.write(folder / "model.safetensors", {EMBEDDING: values.astype(np.float32)})
    a, b = str(folders[1]), str(folders[2])
    rows = {
        "<|im_start|>": RowChoice(a),
        "<|im_end|>": RowChoice(a),
        "<new>": RowChoice(None),
        "<pad>": RowChoice(a, "a"),
        "<b>": RowChoice(b, token_id=4, is_forced=True),
        "c": RowChoice(a, is_forced=True),
        "<n2>": RowChoice(b, token_id=5),
    }
    cases = [
        (
            TokenChoice("union", multiple=8),
            (
                [1, 2, 3, 4, 5, 6, 700, 40400, 70000, 90000, *[20112.1] * 6],
                [100, 200, 300, 400, 500, 600, 700, 800, 70000, 90000, *[16360] * 6],
                [10000, 20000, 30000, 40000, 50000, 60000, 700, 80000, 70000, 90000, *[45070] * 6],
            ),
        ),
        (
            TokenChoice("union", rows, 7),
            (
                [1, 2, 3, 4, 5, 600, 700, 800, 400, 50000, 0, 60000, 9376.25, 9376.25],
                [100, 200, 300, 400, 500, 600, 700, 800, 400, 50000, 0, 60000, 9500, 9500],
                [1e4, 2e4, 3e4, 4e4, 5e4, 600, 700, 8e4, 7e4, 5e4, 0, 6e4, 34275, 34275],
            ),
        ),
        (
            TokenChoice("base"),
            (
                [1, 2, 3, 4, 5, 6],
                [100, 200, 300, 400, 500, 600],
                [10000, 20000, 30000, 40000, 50000, 60000],
            ),
        ),
        (
            TokenChoice(a),
            (
                [1, 2, 3, 4, 5, 6, 700, 40400],
                [100, 200, 300, 400, 500, 600, 700, 800],
                [10000, 20000, 30000, 40000, 50000, 60000, 700, 80000],
            ),
        ),
    ]
    for choice, expected in cases:
        plan = plan_tokens(tokenized.opened(*folders), 0, choice)
        for model, column in zip(plan.models, expected, strict=True):
            found = read_tensor(model.mean, EMBEDDING)[:, 0]
            np.testing.assert_allclose(found, column, rtol=1e-7)
    # The tokenizer of a model that is not merged: tokens of nobody are zeros, which is told.
    plan = plan_tokens(tokenized.opened(*folders[:2]), 0, TokenChoice(b))
    found = read_tensor(plan.models[0].mean, EMBEDDING)[:, 0]
    np.testing.assert_array_equal(found, [1, 2, 3, 4, 5, 6, 0, 800, 0])
    assert any("2 zeros" in note for note in plan.notes)


def test_a_padded_vocabulary_stays_in_range(tmp_path):
    """As Qwen2's, whose embedding has 152,064 rows and whose tokenizer 151,665 tokens."""
    one = tokenized.model(tmp_path / "one", word_level(WORDS, ["<x>"]), 1, rows=10)
    other = tokenized.model(tmp_path / "other", word_level(WORDS, ["<y>", "<z>"]), 2, rows=12)
    models = tokenized.opened(one, other)
    plan = plan_tokens(models, 0)
    assert plan.config_changes == {"vocab_size": 9}
    first, second = (read_tensor(m.mean, EMBEDDING) for m in models)
    np.testing.assert_array_equal(
        read_tensor(plan.models[0].mean, EMBEDDING), [*first[:7], *second[6:8]]
    )
    np.testing.assert_array_equal(
        read_tensor(plan.models[1].mean, EMBEDDING), [*second[:6], first[6], *second[6:8]]
    )
    # A row of padding may be asked for by its number, and none behind it.
    by_number = {"<n>": RowChoice(str(other), token_id=11)}
    plan = plan_tokens(models, 0, TokenChoice("union", by_number))
    np.testing.assert_array_equal(read_tensor(plan.models[0].mean, EMBEDDING)[9], second[11])
    with pytest.raises(ConfigError, match=r"'<n>'.* row 12 of '.*other', .* 12 rows"):
        plan_tokens(models, 0, TokenChoice("union", {"<n>": RowChoice(str(other), token_id=12)}))


@pytest.mark.parametrize("forms", [FORMS, SHIFTED])
def test_rows_are_found_by_the_token_in_every_form_of_a_list(tmp_path, forms):
    pairs = [(one, forms[(i + k) % len(forms)]) for i, one in enumerate(forms) for k in (0, 1, 4)]
    for i, (one, other) in enumerate(pairs):
        folders = tmp_path / f"{i}-one", tmp_path / f"{i}-other"
        for seed, (folder, write, words) in enumerate(
            zip(folders, (one, other), (FORM_WORDS, OTHER_ORDER), strict=True)
        ):
            folder.mkdir()
            write(folder, words)
            tokenized.tensors(folder, 20, seed)
        plan = plan_tokens(tokenized.opened(*folders), 0)
        shift = 4 if forms == SHIFTED and {one, other} != {SHIFTED[1]} else 0
        shift = 3 if {one, other} == {SHIFTED[1]} else shift
        for token in FORM_WORDS:
            number = plan.tokens.numbers[token]
            assert number == FORM_WORDS.index(token) + shift, (one, other)
            own = [int(rows[number]) for rows in plan.maps.own]
            assert own == [number, OTHER_ORDER.index(token) + shift], (one, other, token)


def test_tokens_without_a_row_take_that_of_another_model(tmp_path):
    short = tokenized.model(tmp_path / "short", bpe([], ["<x>", "<y>"]), 1, rows=8)
    other = tokenized.model(tmp_path / "other", bpe([], ["<y>"]), 2)
    far = tokenized.model(tmp_path / "far", bpe([], ["<z>"]), 3, rows=7)
    models = tokenized.opened(short, other, far)
    plan = plan_tokens(models, 0)
    assert plan.tokens.count == 9  # <z> has no row anywhere
    assert any(
        "1 token of" in n and "without a row there is left out: '<z>'" in n for n in plan.notes
    )
    row = read_tensor(models[1].mean, EMBEDDING)[7]
    np.testing.assert_array_equal(read_tensor(plan.models[0].mean, EMBEDDING)[8], row)


def test_a_model_that_is_listed_twice_counts_once_in_a_mean(tmp_path):
    folders = [
        tokenized.model(tmp_path / str(i), word_level(WORDS, added), i)
        for i, added in enumerate(([], ["<x>"], ["<x>"]))
    ]
    models = tokenized.opened(folders[0], folders[1], folders[1], folders[2])
    rows = [read_tensor(models[i].mean, EMBEDDING)[6].astype(np.float64) for i in (1, 3)]
    found = read_tensor(plan_tokens(models, 0).models[0].mean, EMBEDDING)[6]
    np.testing.assert_array_equal(found, np.mean(rows, 0).astype(np.float32))


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path):
    tied = tokenized.model(tmp_path / "tied", word_level(WORDS, ["<x>"]), 1, head=False)
    whole = tokenized.model(tmp_path / "whole", word_level(WORDS, ["<y>"]), 2)
    plan = plan_tokens(tokenized.opened(tied, whole), 0)
    head = read_tensor(plan.models[1].mean, HEAD)
    np.testing.assert_array_equal(head[6], read_tensor(plan.models[0].mean, EMBEDDING)[6])
    assert HEAD not in plan.models[0].mean.specs


def test_biases_and_tensors_by_layer(tmp_path):
    """A head's bias has one row a token; embeddings by layer have numbers of their own."""
    rng, bias, layers = (
        np.random.default_rng(0),
        "lm_head.bias",
        "model.embed_tokens_per_layer.weight",
    )
    arrays = [{EMBEDDING: rng.normal(size=(n, 2)), bias: rng.normal(size=n)} for n in (3, 4)]
    arrays[0][layers] = rng.normal(size=(2, 5))
    sources = [MemorySource({n: t.astype(np.float32) for n, t in a.items()}) for a in arrays]
    for source in sources:
        source.is_computed = False
    maps = token_maps(
        dict(zip("abcd", range(4), strict=True)), [{"a": 0, "b": 1, "c": 2}] * 2, [3, 4]
    )
    mapped = TokenSource(sources, 0, maps, ["one", "other"])
    np.testing.assert_array_equal(read_tensor(mapped, bias), [*arrays[0][bias].astype("f"), 0])
    np.testing.assert_array_equal(read_tensor(mapped, layers), arrays[0][layers].astype("f"))
    moved = token_maps({"a": 1, "b": 0, "c": 2}, [{"a": 0, "b": 1, "c": 2}] * 2, [3, 4])
    with pytest.raises(MismatchError, match=r"per_layer.*other numbers"):
        TokenSource(sources, 0, moved, ["one", "other"])


@pytest.mark.parametrize(
    ("own", "others"),
    [
        (EMBEDDING, "language_model.model.embed_tokens.weight"),
        ("transformer.wte.weight", "wte.weight"),
        (HEAD, "language_model.lm_head.weight"),
        (HEAD, "model.language_model.embed_tokens.weight"),  # which is its head, too
    ],
)
def test_rows_are_taken_from_the_tensor_of_the_same_role(own, others):
    arrays = [{own: np.ones((2, 3), "f")}, {others: np.full((3, 3), 2, "f")}]
    sources = [MemorySource(a) for a in arrays]
    for source in sources:
        source.is_computed = False
    lists = [{"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}]
    maps = token_maps(lists[1], lists, [2, 3], base=0)
    mapped = TokenSource(sources, 0, maps, ["one", "other"])
    np.testing.assert_array_equal(read_tensor(mapped, own)[:, 0], [1, 1, 2])


def test_rows_of_other_lengths_or_of_no_tensor_are_refused(tmp_path):
    one = tokenized.model(tmp_path / "one", word_level(WORDS), 1)
    wide = tokenized.model(tmp_path / "wide", word_level(WORDS, ["<x>"]), 2, width=8)
    with pytest.raises(MismatchError, match=r"\[6, 6\].*\[7, 8\].*differ in length"):
        plan_tokens(tokenized.opened(one, wide), 0)
    assert plan_tokens(tokenized.opened(one, wide), 0, TokenChoice("base")).tokens.rows == 6
    coded = tokenized.model(tmp_path / "coded", word_level(WORDS, ["<x>"]), 2)
    codes = {EMBEDDING: np.zeros((7, 6), np.int8)}
    source = MemorySource(codes)
    maps = token_maps({"a": 0, "b": 1}, [{"a": 0}, {"b": 1}], [6, 7])
    first = tokenized.opened(coded)[0].mean
    with pytest.raises(MismatchError, match=r"I8.*rows are taken from"):
        TokenSource([first, source], 0, maps, ["one", "coded"])
    with pytest.raises(MismatchError, match="needs rows of tokens of 'none'"):
        TokenSource([first, MemorySource({})], 0, maps, ["one", "none"])


class Counted:
    """A table of rows that is made as it is read, and counts the bytes."""

    notes, metadata, files, inputs, is_computed = (), {}, (), {}, False

    def __init__(self, rows, width, dtype="BF16"):
        self.specs = {EMBEDDING: TensorSpec(dtype, (rows, width))}
        self.read, self.largest = 0, 0

    def where(self, name):
        return "memory"

    def file_of(self, name):
        return 0

    def close(self):
        pass

    def read_bytes(self, name, offset, out):
        self.read += len(out)
        self.largest = max(self.largest, len(out))
        np.frombuffer(out, np.uint8)[:] = (np.arange(offset, offset + len(out)) * 37 % 64).astype(
            "u1"
        )


def test_large_tables_are_read_where_asked_for_and_in_bounded_memory():
    """40,000 rows of 64 entries are 5 MB a model; a reading of 64 kB holds next to nothing."""
    count, width = 40_000, 64
    rng = np.random.default_rng(0)
    numbers = {i: int(n) for i, n in enumerate(rng.permutation(count))}
    lists = [{i: i for i in range(0, count, step)} for step in (2, 3, 1)]
    sources = [Counted(count, width) for _ in lists]
    maps = token_maps(numbers, lists[:2], [count] * 2, total=count + 100)
    mapped = TokenSource(sources[:2], 0, maps, ["one", "other"])
    size, chunk = mapped.specs[EMBEDDING].nbytes, 1 << 16
    buffer = np.zeros(chunk, np.uint8)
    mapped.read_bytes(EMBEDDING, 0, buffer.data)
    assert sum(source.read for source in sources) < 3 * chunk  # half a chunk as BF16
    tracemalloc.start()
    for start in range(0, size // 16, chunk):
        mapped.read_bytes(EMBEDDING, start, buffer[: size - start].data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    # Rows that follow each other are read in one go, as bytes.
    plain = TokenSource(sources, 2, token_maps(lists[2], lists, [count] * 3, base=2), "abc")
    before = sources[2].read
    plain.read_bytes(EMBEDDING, 1000, buffer.data)
    assert sources[2].read - before == chunk == sources[2].largest


def test_a_row_of_padding_is_made_once_though_threads_ask_for_it_together():
    source = Counted(1000, 16, "F32")
    mapped = TokenSource(
        [source],
        0,
        token_maps({i: i for i in range(1000)}, [{i: i for i in range(1000)}], [1000], total=1008),
        ["one"],
    )
    found = []

    def read():
        raw = np.zeros(64, np.uint8)
        mapped.read_bytes(EMBEDDING, 1003 * 64, raw.data)
        found.append(raw)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.read == 1000 * 64
    rows = np.zeros(64_000, np.uint8)
    source.read_bytes(EMBEDDING, 0, rows.data)
    expected = decode(rows, "F32").reshape(1000, 16).mean(0, dtype=np.float64)
    for raw in found:
        np.testing.assert_array_equal(decode(raw, "F32"), expected.astype(np.float32))


def test_identity_is_that_of_the_stored_weights(tmp_path):
    one = tokenized.model(tmp_path / "one", word_level(WORDS, ["<x>"]), 1)
    other = tokenized.model(tmp_path / "other", word_level(WORDS, ["<y>"]), 2)
    models = tokenized.opened(one, other)
    plan = plan_tokens(models, 0)
    for before, after in zip(models, plan.models, strict=True):
        assert before.identity == after.identity
        assert before.full_identity == after.full_identity
        assert set(after.inputs) >= set(before.inputs)
    assert set(plan.models[0].inputs) == set(models[0].inputs) | set(models[1].inputs)


def test_rules_name_what_is_there():
    maps = token_maps({"a": 0, "b": 1}, [{"a": 0}], [1], rules={1: TokenRule(ZERO, is_forced=True)})
    assert maps.of(0).owner.tolist() == [0, ZERO]
    assert maps.forced.tolist() == [False, True]
    assert is_vocabulary(EMBEDDING)
    assert token_rows({}) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RowChoice("nobody"), r"'<n>' is to be that of 'nobody', which is none of the merged"),
        (RowChoice("ONE", "<y>"), r"'<n>' is to be that of '<y>' in .*no such token.*'<x>'"),
        (RowChoice("ONE"), r"that of '<n>' in .*, which has no such token"),
    ],
)
def test_choices_of_rows_that_are_not_there_are_refused(tmp_path, row, message):
    one = tokenized.model(tmp_path / "one", word_level(WORDS, ["<x>"]), 1)
    row = row._replace(model=str(one)) if row.model == "ONE" else row
    with pytest.raises(ConfigError, match=message):
        plan_tokens(tokenized.opened(one), 0, TokenChoice("union", {"<n>": row}))
    with pytest.raises(ConfigError, match="lists none"):
        plan_tokens(tokenized.opened(one), 0, TokenChoice(str(tmp_path)))
