"""Conversations and pairs are read whole, and what the assistant wrote is scored, in every form."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as models_of_tokenizers

from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models.chat import encode_chat
from mergekit_bayes.models.columns import Columns
from mergekit_bayes.models.encode import IGNORED, Collate, observations
from mergekit_bayes.models.examples import Weights, drawn_rows, read_examples
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.turns import conversation
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests.chats import turns, words, write
from tests.tiny_models import CHAT, MARKED_CHAT, tiny_bert, tiny_llama

TWO = turns("the cat", "sat on", "a dog", "ran")
SCORED = (
    "<|user|> the cat </s> <|assistant|> SAT ON </S> <|user|> a dog </s> <|assistant|> RAN </S>"
)
# What strips the reasoning of a turn once another question follows, as templates of reasoners do.
STRIPPING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'very ' }}{% endif %}"
    "{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The question to the model says what its answer in the history does not.
OTHERWISE = CHAT.replace("'<|assistant|>' }}", "'<|assistant|>very' }}")
# White space at the end of a marked turn is in no token.
SPACED = MARKED_CHAT.replace(
    "{{ m['content'] + '</s>' }}{% endg", "{{ m['content'] + '  ' }}{% endg"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama = load_model(str(tiny_llama(folder / "llama")))
    return {"llama": llama, "bert": load_model(str(tiny_bert(folder / "bert")))}


@pytest.fixture
def llama(models):
    models["llama"].tokenizer.chat_template = CHAT
    return models["llama"]


def read(tmp_path, loaded, *rows, **options):
    path = write(tmp_path / "rows.jsonl", rows)
    return read_examples(path, loaded, **options)


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_the_assistants_turns_are_scored_and_no_other_token(tmp_path, llama, template):
    llama.tokenizer.chat_template = template
    rows = [{"messages": TWO}, {"messages": turns("a", "fun", "the", system="nice")}]
    read_rows = read(tmp_path, llama, *rows)
    first, second = read_rows.examples
    assert words(llama, first) == SCORED
    assert words(llama, second) == (
        "<|system|> nice </s> <|user|> a </s> <|assistant|> FUN </S> <|user|> the </s>"
    )
    assert observations(read_rows.examples, "causal-lm") == 5 + 2
    (greeting,) = read(tmp_path, llama, {"messages": TWO[1:3]}).examples
    assert words(llama, greeting) == "<|assistant|> SAT ON </S> <|user|> a dog </s>"
    batch = Collate(llama.pad)(read_rows.examples)
    assert int((batch["labels"] != IGNORED).sum()) == 7


def test_white_space_at_the_end_of_a_turn_scores_nothing_behind_it(tmp_path, llama):
    llama.tokenizer.chat_template = SPACED
    (example,) = read(tmp_path, llama, {"messages": TWO}).examples
    assert words(llama, example) == (
        "<|user|> the cat </s> <|assistant|> SAT ON <|user|> a dog </s> <|assistant|> RAN"
    )


@pytest.mark.parametrize("is_trimmed", [False, True])
def test_white_space_and_parts_of_letters_are_scored_where_they_stand(llama, is_trimmed):
    """A token for each byte; as RoBERTa's, the tokenizer may count white space to no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models_of_tokenizers.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=is_trimmed)
    inner.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    fast.chat_template = CHAT.replace("'|>' +", "'|>\n' +").replace(
        "|assistant|>'", "|assistant|>\n'"
    )
    loaded = replace(llama, tokenizer=fast, model=SimpleNamespace(config=llama.model.config))
    chat = conversation(turns(" ok ", "a  naïve \n friend 日 "), "messages", "row 1")
    (example,) = encode_chat([chat], loaded, "rows", 200).examples
    scored = [token for token in example["labels"] if token != IGNORED]
    assert fast.decode(scored) == "a  naïve \n friend 日 </s>"


def test_a_template_that_strips_the_history_gives_an_example_for_each_turn(tmp_path, llama):
    """Each is what the model sees when it writes the turn."""
    llama.tokenizer.chat_template = STRIPPING
    found = read(tmp_path, llama, {"messages": TWO})
    assert [words(llama, e) for e in found.examples] == [
        "<|user|> the cat </s> <|assistant|> VERY SAT ON </S>",
        "<|user|> the cat </s> <|assistant|> sat on </s> <|user|> a dog </s>"
        " <|assistant|> VERY RAN </S>",
    ]
    assert found.rows == 1
    assert any("1 conversations are 2 examples" in note for note in found.notes)


def test_a_template_that_does_not_say_what_is_the_assistants_is_refused_by_its_row(tmp_path, llama):
    llama.tokenizer.chat_template = OTHERWISE
    rows = [{"messages": turns("the", "cat"), "kept": i} for i in range(3)]
    with pytest.raises(
        MismatchError, match=r"rows\.jsonl', row 3: the chat template renders .*{% g"
    ):
        read(tmp_path, llama, *rows, where={"kept": 2})
    llama.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CheckpointError, match=r"row 1: the chat template fails .*alternate"):
        read(tmp_path, llama, *rows)
    llama.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match=r"no chat template.*chat_template: FILE"):
        read(tmp_path, llama, *rows)


def test_a_pair_is_scored_where_its_completion_is(tmp_path, llama):
    """Also the token that is partly of both, and EOS."""
    rows = [
        {"prompt": "the cat", "completion": " sat on"},
        {"prompt": "the c", "completion": "at sat"},
    ]
    examples = read(tmp_path, llama, *rows).examples
    assert [words(llama, e) for e in examples] == [
        "<s> the cat SAT ON </S>",
        "<s> the CAT SAT </S>",
    ]
    rows = [{"prompt": TWO[:3], "completion": TWO[3:]}]
    for template in (CHAT, MARKED_CHAT):
        llama.tokenizer.chat_template = template
        (example,) = read(tmp_path, llama, *rows).examples
        assert words(llama, example) == SCORED.replace("SAT ON </S>", "sat on </s>")


def test_messages_come_without_what_a_reader_has_made_up(tmp_path, llama):
    """Readers give all objects the same keys, and a template may ask whether one is there."""
    llama.tokenizer.chat_template = CHAT.replace(
        "{{ '<|' + m", "{% if 'name' in m %}{{ 'nice' }}{% endif %}{{ '<|' + m"
    )
    other = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]
    first, second = read(tmp_path, llama, {"messages": TWO}, {"messages": other}).examples
    assert words(llama, first) == SCORED
    assert words(llama, second).startswith("nice <|user|>")
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TWO]
    assert words(llama, read(tmp_path, llama, {"messages": parts}).examples[0]) == SCORED
    shared = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in TWO
    ]
    (example,) = read(tmp_path, llama, {"conversations": shared}).examples
    assert words(llama, example) == SCORED


def test_tools_reach_the_template_as_objects_or_as_json(tmp_path, llama):
    llama.tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['function']['name'] + ' ' }}{% endif %}" + CHAT
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tools = [{"type": "function", "function": {"name": "bird"}}]
    for given in (tools, json.dumps(tools)):
        row = {"messages": [TWO[0], call, *TWO[2:]], "tools": given}
        (example,) = read(tmp_path, llama, row).examples
        assert words(llama, example).startswith("bird <|user|> the cat </s> <|assistant|> </S>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "the cat"}, "row 1: 'messages' is text, expected a list of messages"),
        ({"messages": []}, "'messages' is an empty list, expected a list of messages"),
        ({"messages": ["a"]}, "message 1 of 'messages' is .* expected an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "message 1 of 'messages' has a list of parts as its content",
        ),
        (
            {"messages": [{"role": "user", "content": {f"{i}" * 90: 1 for i in range(300)}}]},
            r"has an object with 0{40}\.\.\., .{300,350}, \.\.\. as its content",
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, r"a number \(3\) as its role"),
        ({"messages": [{"role": "user", "content": None}]}, "null .* as its content"),
        (
            {"messages": turns("the", " "), "n": 1},
            "no row of .* has a turn of the assistant with a word",
        ),
        (
            {"messages": [TWO[0], {"role": "bot", "content": "a"}], "n": 1},
            "no conversation of .* the assistant.*the roles are bot, user. Write role: assistant",
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "text": "a"}], "n": 1},
            "row 1: message 2 of 'messages' has no content, but text. Write its text as content",
        ),
        ({"messages": TWO, "tools": "{"}, "'tools' is not JSON"),
        ({"messages": TWO, "tools": "3"}, r"'tools' is a number \(3\), expected a list of"),
        ({"prompt": TWO[:1], "completion": []}, "'completion' is an empty list"),
        ({"prompt": "a", "completion": TWO}, "'prompt' is .*two texts or two lists of messages"),
        ({"prompt": "a", "completion": ""}, "no row of .* has a word in its column 'completion'"),
        ({"prompt": "the"}, "prompts without completions.*GRPOTrainer.*text_column: prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences .*DPOTrainer"),
        ({"prompt": "a", "completion": "b", "label": True}, "judged completions .*KTOTrainer"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "judged steps .*PRMTrainer"),
        (
            {"text": "a", "messages": TWO},
            "its columns text, messages. Name one: text_column: text or messages_column: messages",
        ),
        ({"text": "a", "prompt": "b", "completion": "c"}, "Name one: .*prompt_column: prompt"),
    ],
)
def test_rows_that_are_no_training_data_are_one_message(tmp_path, llama, row, message):
    for skip_blank in (False, True):
        with pytest.raises(MismatchError, match=message):
            read(tmp_path, llama, row, skip_blank=skip_blank)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (Columns(text="body"), {"body": "the cat", "messages": TWO}, "<s> THE CAT </S>"),
        (Columns(messages="chat"), {"chat": TWO, "text": "a"}, SCORED),
        (Columns(messages="inner.chat"), {"inner": {"chat": TWO}}, SCORED),
        (
            Columns(prompt="q", completion="a"),
            {"q": "the", "a": " cat", "text": "x"},
            "<s> the CAT",
        ),
        (Columns(completion="a"), {"prompt": "the", "a": " cat"}, "<s> the CAT"),
        (
            Columns(completion="chosen"),
            {"prompt": "the", "chosen": " cat", "rejected": "x"},
            "<s> the",
        ),
    ],
)
def test_named_columns_are_taken_whatever_else_is_there(tmp_path, llama, columns, row, expected):
    found = read(tmp_path, llama, row, columns=columns)
    assert words(llama, found.examples[0]).startswith(expected)
    assert found.notes == ()  # nothing was guessed


def test_columns_of_two_forms_are_refused(tmp_path, llama, models):
    row = {"text": "a", "label": 1}
    with pytest.raises(ConfigError, match="text_column, messages_column: rows have one form"):
        read(tmp_path, llama, row, columns=Columns(text="text", messages="m"))
    with pytest.raises(ConfigError, match="for language models"):
        read(tmp_path, models["bert"], row, columns=Columns(messages="m"), label="label")


def test_what_is_guessed_cut_or_left_out_is_counted(tmp_path, llama, models):
    """A row that is cut before its first scored token has none."""
    rows = [{"messages": TWO}, {"messages": turns("the cat sat on a mat", "ran")}]
    found = read(tmp_path, llama, *rows, max_length=7)
    assert [words(llama, e) for e in found.examples] == [SCORED[:44].rsplit(" ", 1)[0]]
    guessed, cut, left_out = found.notes
    assert "conversations in the column 'messages'" in guessed
    assert "2 of 2 rows are cut at 7 tokens, which loses 12 of 26 tokens" in cut
    assert "1 of 2 rows have no token that is scored" in left_out
    with pytest.raises(MismatchError, match=r"among its first 5 tokens, .* Raise max_length"):
        read(tmp_path, llama, *rows, max_length=5)
    texts = [{"text": "the cat sat on", "label": 1}, {"text": "a", "label": 0}]
    (note,) = read(tmp_path, llama, *texts, max_length=4).notes
    assert "1 of 2 rows are cut at 4 tokens, which loses 2 of 9 tokens" in note
    (note,) = read(tmp_path, models["bert"], *texts, max_length=4, label="label").notes
    assert "1 of 2 rows are cut at 4 tokens, which loses 2 of 9 tokens" in note
    assert read(tmp_path, llama, *texts).notes == ()


@pytest.mark.parametrize(
    ("weight", "count"), [(1.0, 10), (2.0, 20), (0.5, 5), (2.3, 23), (0.01, 1)]
)
def test_a_weight_says_how_often_rows_are_drawn(weight, count):
    drawn = drawn_rows(10, weight, seed=3)
    assert len(drawn) == count
    assert drawn == drawn_rows(10, weight, seed=3) == sorted(drawn)
    times = [drawn.count(i) for i in range(10)]
    assert set(times) <= {int(weight), int(weight) + 1}
    if weight % 1 and count > 1:
        assert any(drawn != drawn_rows(10, weight, seed=s) for s in range(4, 8))


def test_weighted_sets_of_several_forms_are_one_set_of_observations(tmp_path, llama):
    paths = [
        write(tmp_path / "a.jsonl", [{"messages": TWO}] * 4),
        write(tmp_path / "b.jsonl", [{"text": "the cat"}] * 3),
    ]
    found = read_examples(paths, llama, weights=Weights([0.5, 2.0], seed=0))
    assert found.rows == len(found.examples) == 2 + 6
    assert observations(found.examples, "causal-lm") == 2 * 5 + 6 * 3
    assert [n for n in found.notes if "by its weight" in n] == [
        f"'{paths[0]}': by its weight a pass draws 2 rows of 4",
        f"'{paths[1]}': by its weight a pass draws 6 rows of 3",
    ]


def test_a_precision_of_conversations_counts_their_scored_tokens(tmp_path, llama):
    rows = [{"messages": TWO}] * 4 + [{"messages": turns("a", " ")}]
    settings = {
        "model": str(llama.path),
        "data": write(tmp_path / "rows.jsonl", rows),
        "output": str(tmp_path / "p"),
    }
    report = run_precision(PrecisionConfig(**settings), quiet=True)
    assert (report.observations, report.unit, report.rows) == (20, "token", 4)
    assert any("1 of 5 rows hold no word that is scored" in note for note in report.notes)
    assert any("assistant's turns are scored" in note for note in report.notes)
    with pytest.raises(BmergeError, match="no column 'chat'"):
        run_precision(PrecisionConfig(**settings, messages_column="chat", force=True), quiet=True)
