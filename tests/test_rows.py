"""Text is what is text: no verb trains on, measures or continues Python's words for a value."""

import datetime
import decimal
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from mergekit_bayes.errors import BmergeError, CheckpointError, MismatchError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests.tiny_models import tiny_bert, tiny_gpt2

MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
NOT_TEXT = {  # with the words by which each is told
    "an object": ({"body": "the cat", "score": 0.5}, "an object with body, score.*'text.body'"),
    "a list": (["the", "cat"], "a list, expected text"),
    "messages": (MESSAGES, "a list of messages, .* in the column that messages_column names"),
    "a whole number": (5, r"a number \(5\)"),
    "a number": (0.5, r"a number \(0\.5\)"),
    "a truth value": (True, r"a truth value \(true\)"),
    "null": (None, "null .*Remove such rows"),
}
# CSV has no lists and objects.
IN_CSV = ("a whole number", "a number", "a truth value", "null")


def write(path, values):
    """The values as the column `text` of a file of any format, with good labels beside them."""
    rows = [{"text": value, "label": i % 2} for i, value in enumerate(values)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        lines = [f"{'' if r['text'] is None else r['text']},{r['label']}\n" for r in rows]
        path.write_text("text,label\n" + "".join(lines))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet"])
def test_an_object_stands_for_the_text_that_it_holds(tmp_path, name):
    """As in RealToxicityPrompts, in every verb; what it holds must be text, too."""
    good = [{"text": text, "score": score} for text, score in (("the cat", None), ("sat", 0.5))]
    rows = load_rows(str(write(tmp_path / name, good)), text="text")
    assert list(rows["text"]) == ["the cat", "sat"]
    bad = [*good, {"text": None, "score": 0.1}]
    with pytest.raises(MismatchError, match="row 3: 'text' is null"):
        load_rows(str(write(tmp_path / f"bad-{name}", bad)), text="text")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "words.txt").write_text("bad\n")
    return {
        "gpt2": str(tiny_gpt2(folder / "gpt2")),
        "bert": str(tiny_bert(folder / "bert")),
        "words": f"words:{folder / 'words.txt'}",
    }


VERBS = {
    "finetune": lambda m, data, out: run_finetune(
        FinetuneConfig(model=m["gpt2"], data=data, output=out, max_steps=1), quiet=True
    ),
    "finetune, classifier": lambda m, data, out: run_finetune(
        FinetuneConfig(model=m["bert"], data=data, output=out, max_steps=1), quiet=True
    ),
    "precision": lambda m, data, out: run_precision(
        PrecisionConfig(model=m["gpt2"], data=data, output=out), quiet=True
    ),
    "precision, classifier": lambda m, data, out: run_precision(
        PrecisionConfig(model=m["bert"], data=data, output=out), quiet=True
    ),
    "perplexity": lambda m, data, out: run_evaluate(
        EvaluateConfig(model=m["gpt2"], perplexity={"texts": data}, output=out)
    ),
    "classify": lambda m, data, out: run_evaluate(
        EvaluateConfig(model=m["bert"], classify={"texts": data}, output=out)
    ),
    "toxicity": lambda m, data, out: run_evaluate(
        EvaluateConfig(model=m["gpt2"], toxicity=data, scorer=(m["words"],), output=out)
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_text_only(tmp_path, models, verb):
    for value, message in NOT_TEXT.values():
        data = write(tmp_path / "t.jsonl", ["the cat", "None", value, "a dog"])
        with pytest.raises(MismatchError, match=rf"t\.jsonl', row 3: 'text' is {message}"):
            VERBS[verb](models, str(data), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


PLACES = ("t.jsonl", "t.json", "t.parquet", "t.csv", "folder/t.jsonl")


@pytest.mark.parametrize(
    ("place", "kind"),
    [(p, k) for p in PLACES for k in NOT_TEXT if k in IN_CSV or not p.endswith("csv")],
)
def test_a_format_does_not_turn_values_into_text(tmp_path, place, kind):
    value, message = NOT_TEXT[kind]
    path = tmp_path / place
    values = [value] * 2
    if value is None:  # after a text, so that the column has a type; and so has its row number
        values = ["the cat", value]
    write(path, values)
    source = path.parent if place.startswith("folder") else path
    row = len(values) if value is None else 1
    with pytest.raises(MismatchError, match=f"row {row}: 'text' is {message}"):
        load_rows(str(source), text="text")


def test_words_that_mean_null_elsewhere_are_text_in_a_csv_file(tmp_path):
    words = ["NA", "None", "null", "nan", "1.50", "the cat"]
    assert load_rows(str(write(tmp_path / "t.csv", words)), text="text")["text"][:] == words
    (tmp_path / "t.txt").write_text("".join(f"{word}\n" for word in words))
    assert load_rows(str(tmp_path / "t.txt"), text="text")["text"][:] == words


def test_only_rows_that_are_used_are_checked_and_are_numbered_as_in_their_file(tmp_path):
    first = str(write(tmp_path / "a.jsonl", ["a", "b", "c"]))
    second = str(write(tmp_path / "b.jsonl", ["d", "e", "f", 5, "g"]))
    rows = load_rows([first, second], text="text", max_rows=6)
    assert rows["text"][:] == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(MismatchError, match=r"b\.jsonl', row 4: 'text' is a number"):
        load_rows([first, second], text="text", where={"label": 1})
    assert len(load_rows([first, second], text="text", where={"label": 0})) == 5


def test_a_column_inside_objects_is_named_with_a_dot(tmp_path):
    objects = [{"text": "the cat", "score": 0.5}, {"text": "a dog", "score": None}]
    path = str(write(tmp_path / "t.jsonl", objects))
    assert load_rows(path, text="text.text")["text.text"][:] == ["the cat", "a dog"]
    assert len(load_rows(path, text="text.text", where={"text.score": 0.5})) == 1
    with pytest.raises(MismatchError, match=r"row 1: 'text\.score' is a number"):
        load_rows(path, text="text.score")
    with pytest.raises(MismatchError, match=r"no column 'text\.body'"):
        load_rows(path, text="text.body")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ALIKE = [{"text": "a", "k": 1}, {"text": "b", "k": 2}]
OTHERWISE = [{"text": "a", "k": 1}, {"text": "b", "z": "q"}]  # datasets gives them the type JSON


@pytest.mark.parametrize("objects", [ALIKE, OTHERWISE, ["a", {"text": "b"}]], ids=str)
def test_objects_stand_for_their_text_also_where_they_differ_from_row_to_row(tmp_path, objects):
    path = lines(tmp_path / "t.jsonl", *({"prompt": o, "n": i} for i, o in enumerate(objects)))
    rows = load_rows(path, text="prompt", label="n")
    assert (rows["prompt"][:], rows["n"][:]) == (["a", "b"], [0, 1])
    if objects[0] != "a":
        # What `where` names is looked up in the file, whatever becomes of the column of texts.
        for text in ("prompt", "prompt.text"):
            assert load_rows(path, text=text, where={"prompt.text": "b"})[text][:] == ["b"]
            assert load_rows(path, text=text, where={"prompt.k": [1]})[text][:] == ["a"]
        assert load_rows(path, text="prompt", label="prompt.text")["prompt.text"][:] == ["a", "b"]
    with pytest.raises(MismatchError, match=r"no column 'prompt\.body'"):
        load_rows(path, text="prompt.body")


def test_every_name_that_a_message_gives_to_a_text_inside_objects_reads_it(tmp_path):
    """At any depth, and where keys or columns have dots in their own names."""
    for value in ({"text": {"en": "x"}, "s": 1}, {"a.b": "x"}, {"c": {"d": {"e": "x"}}}):
        for other in ({}, {"more": "y"}):  # of one type, and of another in each row
            path = lines(tmp_path / "t.jsonl", {"t": value}, {"t": value | other})
            with pytest.raises(
                MismatchError, match=r"row 1: 't' is an object.*dot: '(t\..*)'"
            ) as e:
                load_rows(path, text="t")
            name = str(e.value).split("named by a dot: '")[1].split("'")[0]
            assert load_rows(path, text=name)[name][:] == ["x", "x"]
    path = lines(tmp_path / "t.jsonl", {"text": {"text": "x"}, "text.text": "y"})
    assert load_rows(path, text="text")["text"][:] == ["x"]
    assert load_rows(path, text="text.text")["text.text"][:] == ["y"]


DATES = ["2020-01-01", "2020-01-02T00:00:00", "2020-01-03 10:11:12"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "folder/t.jsonl", "t.csv", "t.txt"])
def test_a_string_that_looks_like_a_date_is_the_text_that_it_is(tmp_path, name):
    path = tmp_path / name
    if name == "t.txt":
        path.write_text("\n".join(DATES))
    else:
        write(path, DATES)
    source = str(path.parent if name.startswith("folder") else path)
    assert load_rows(source, text="text")["text"][:] == DATES
    if name.endswith("jsonl"):
        write(path, [{"text": date, "day": date} for date in DATES])
        assert load_rows(source, text="text", where={"text.day": DATES[1]})["text"][:] == [DATES[1]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([b"the"], "binary data, expected"),
        ([datetime.datetime(2020, 1, 1)], r"a date or a time \(2020-01-01 00:00:00\), expected"),
        ([datetime.date(2020, 1, 1)], r"a date or a time \(2020-01-01\), expected"),
        ([decimal.Decimal("1.5")], "a value of type Decimal, expected"),
    ],
)
def test_other_types_of_parquet_are_named(tmp_path, values, words):
    table = pyarrow.table({"text": pyarrow.array(values)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(MismatchError, match=f"row 1: 'text' is {words} text"):
        load_rows(str(tmp_path / "t.parquet"), text="text")


@pytest.mark.parametrize("place", PLACES)
def test_the_advice_for_null_can_be_followed(tmp_path, place):
    """The empty string is one in every format but CSV, where it is null again."""
    path = write(tmp_path / place, ["the cat", None])
    source = str(path.parent if place.startswith("folder") else path)
    with pytest.raises(MismatchError) as e:
        load_rows(source, text="text")
    advised = "write the empty string" in str(e.value)
    assert str(e.value).endswith(", or write the empty string there." if advised else "such rows.")
    write(path, ["the cat", ""])
    if advised:
        assert load_rows(source, text="text")["text"][:] == ["the cat", ""]
    else:
        assert place.endswith("csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": MESSAGES}, "Conversations are read by .* messages_column .*column 'text'"),
        (
            {"prompt": "the", "completion": "cat"},
            "Columns of text: prompt, completion; name one .* or two: prompt_column",
        ),
        ({"body": "the cat", "n": 1}, "Columns of text: body; name one as the text column"),
    ],
)
def test_a_missing_column_is_answered_with_what_would_do(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(MismatchError, match=message):
        load_rows(str(tmp_path / "t.jsonl"), text="text")


@pytest.mark.parametrize("task", ["auto", "classification"])
def test_a_label_is_a_whole_number_or_a_name(tmp_path, models, task):
    """Also where the labels make a new head: no class is called None, 0.5 or ['a']."""
    model = models["bert" if task == "auto" else "gpt2"]
    for label, message in ((None, "null"), (0.5, "a number"), (["a"], "a list"), ({"a": 1}, "an")):
        rows = [{"text": "the cat", "label": value} for value in (0, 1, label)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = FinetuneConfig(
            model=model, data=str(tmp_path / "t.jsonl"), output=str(tmp_path / "out"), task=task
        )
        # A null makes a column of whole numbers fractional, and is what is named.
        row = 1 if label == 0.5 else 3
        with pytest.raises(MismatchError, match=f"row {row}: 'label' is {message}.*a label"):
            run_finetune(settings, quiet=True)


def test_no_wrong_row_is_named_where_rows_were_filtered_before(tmp_path, models):
    """The fifth row of the file is the second of those that are left."""
    folder = tmp_path / "bert"
    strip_specials(models["bert"], folder)
    texts = ["the cat", "a dog", "sat", "ran", " "]
    path = write(tmp_path / "t.jsonl", texts)
    rows = load_rows(str(path), text="text", where={"text": ["the cat", " "]})
    with pytest.raises(
        MismatchError, match=r"'text' holds ' ', .*Remove such rows \(1 of 2\)"
    ) as e:
        encode_rows(rows, load_model(str(folder)))
    assert not re.search(r"row \d", str(e.value))


@pytest.mark.parametrize("verb", VERBS)
def test_a_set_without_usable_rows_is_one_message(tmp_path, models, verb):
    """Here no text gives a token: the tokenizers have no EOS or end token to add."""
    bare = {}
    for name in ("gpt2", "bert"):
        bare[name] = str(tmp_path / name)
        strip_specials(models[name], tmp_path / name)
    data = write(tmp_path / "t.jsonl", ["", " "])
    if verb == "toxicity":  # an empty prompt is continued from the start token
        VERBS[verb](models | bare, str(data), str(tmp_path / "out"))
        return
    with pytest.raises(BmergeError, match="token"):
        VERBS[verb](models | bare, str(data), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"toxicity"}))
def test_rows_without_a_word_are_refused_whatever_a_tokenizer_adds(tmp_path, models, verb):
    """EOS, or the tokens around a text, would be examples: a model would learn to say nothing."""
    data = write(tmp_path / "t.jsonl", ["", " "] * 4)
    with pytest.raises(MismatchError, match=r"no row of .* has a word in its column"):
        VERBS[verb](models, str(data), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def strip_specials(model, folder):
    """The same model with a tokenizer that adds nothing to a text."""
    loaded = load_model(model)
    loaded.model.save_pretrained(folder)
    tokenizer = loaded.tokenizer
    tokenizer.eos_token = tokenizer.sep_token = None
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("pack", [False, True])
def test_rows_without_a_token_to_predict_are_left_out_until_none_is_left(models, pack):
    loaded = load_model(models["gpt2"])
    loaded.tokenizer.eos_token = None
    assert len(encode_rows({"text": ["", "the cat", " "]}, loaded, pack=pack)) == 1
    with pytest.raises(MismatchError, match="'a', 'b': no row has a token to predict"):
        encode_rows({"text": ["", " "]}, loaded, pack=pack, source=("a", "b"))
    with pytest.raises(MismatchError, match="row 2: 'text' is null"):
        encode_rows({"text": ["the cat", None]}, loaded, pack=pack)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_an_empty_file_is_told_as_empty(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(BmergeError) as error:
        load_rows(str(tmp_path / name), text="text")
    assert "StopIteration" not in str(error.value)
    assert name in str(error.value)


def test_a_home_of_an_unknown_user_is_no_file():
    with pytest.raises(CheckpointError, match=r"~no-such-user/rows\.jsonl"):
        load_rows("~no-such-user/rows.jsonl")
