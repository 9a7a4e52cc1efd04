"""Whose tokenizer, chat template and generation config a merge takes, and that the plan tells."""

import json
from pathlib import Path

import pytest
import yaml

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny
from tests.adapters import adapter, factors

ROWS = 7  # of the embedding in tiny.SHAPES
WORDS = [f"w{i}" for i in range(6)]
SHAPES = {**tiny.SHAPES, "m.q.weight": (6, 4)}


def write(folder, files, seed=0, shapes=SHAPES):
    """A model folder with these files; a dict is written as JSON."""
    tiny.write(folder / "model.safetensors", tiny.arrays(seed, shapes))
    return add(folder, files)


def add(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def chat_files(name, eos, words=WORDS):
    """Side files that all say whose they are."""
    return {
        "config.json": {"model_type": "own", "name": name, "eos_token_id": eos, "pad_token_id": 0},
        "tokenizer.json": {"model": {"vocab": {w: i for i, w in enumerate(words)}}},
        "tokenizer_config.json": {"eos_token": words[eos], "pad_token": "w0", "name": name},
        "chat_template.jinja": f"template of {name}",
        "additional_chat_templates/tool.jinja": f"tools of {name}",
        "generation_config.json": {"eos_token_id": eos, "name": name},
        "preprocessor_config.json": {"name": name},
        "modeling_own.py": f"# {name}",
        "LICENSE": f"licence of {name}",
    }


OF_CONFIG = {"config.json", "modeling_own.py", "LICENSE"}


def merge(out, *models, **settings):
    return run_merge(MergeConfig(models=models, out=str(out), force=True, **settings))


def owner_of(file):
    """The model that a written side file says it is of."""
    text = file.read_text()
    return next(name for name in ("base", "one", "two") if name in text)


@pytest.fixture
def chats(tmp_path):
    """A base and two tasks, each with all side files."""
    return {
        name: write(tmp_path / name, chat_files(name, eos), eos)
        for eos, name in enumerate(("base", "one", "two"), start=1)
    }


EOS = {"base": 1, "one": 2, "two": 3}


@pytest.mark.parametrize(
    ("settings", "owner"),
    [
        ({}, "one"),
        ({"scale": (0.0, 1.0)}, "two"),
        ({"scale": (-1.0, 0.5)}, "two"),
        ({"scale": (-1.0, -0.5)}, "base"),
        ({"scale": (0.0, -1.0)}, "base"),
        ({"side_files": "two"}, "two"),
        ({"side_files": "BASE"}, "base"),
        ({"side_files": "base path"}, "base"),
        ({"side_files": "two", "scale": (-1.0,)}, "two"),
        ({"base": None}, "one"),
        ({"base": None, "side_files": "two"}, "two"),
    ],
)
def test_the_owner_gives_all_that_belongs_together(chats, tmp_path, settings, owner):
    donor = "one" if settings.get("base", "") is None else "base"
    settings = {"base": chats["base"]} | settings
    named = settings.get("side_files")
    if named in ("two", "base path"):
        settings["side_files"] = chats[named.split()[0]]
    out = tmp_path / "out"
    report = merge(out, chats["one"], chats["two"], **settings)
    for name in chat_files("x", 1):
        if name != "tokenizer.json":
            assert owner_of(out / name) == (donor if name in OF_CONFIG else owner), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == EOS[owner]
    (note,) = [note for note in report.notes if "taken from" in note]
    assert f"taken from '{chats[owner]}'" in note
    assert "tokenizer, chat template, generation config and processor are" in note
    recipe = yaml.safe_load((out / "merge_recipe.yaml").read_text())
    assert recipe["side_files"] == report.settings["side_files"] == chats[owner]
    again = tmp_path / "again"
    run_merge(MergeConfig(**recipe, out=str(again)))
    for file in out.rglob("*"):
        if file.is_file() and not file.name.startswith("merge_"):
            assert (again / file.relative_to(out)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("group", ["tokenizer", "chat_template", "generation", "preprocessor"])
def test_what_the_owner_lacks_comes_from_the_base(tmp_path, group):
    base = write(tmp_path / "base", chat_files("base", 1))
    files = {name: c for name, c in chat_files("one", 2).items() if not name.startswith(group)}
    files = {n: c for n, c in files.items() if group != "chat_template" or "chat_templ" not in n}
    out = tmp_path / "out"
    report = merge(out, write(tmp_path / "one", files, 1), base=base)
    lacking = [name for name in chat_files("one", 2) if name not in files]
    for name in chat_files("x", 1):
        if name not in ("tokenizer.json", *OF_CONFIG):
            assert owner_of(out / name) == ("base" if name in lacking else "one"), name
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == (1 if group == "tokenizer" else 2)  # as the tokenizer's
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert any(
        "has no" in note and "are taken" in note and str(base) in note for note in report.notes
    )


def test_a_template_inside_the_tokenizer_config_is_one(tmp_path):
    base, one = chat_files("base", 1), chat_files("one", 2)
    for files in (base, one):
        del files["chat_template.jinja"], files["additional_chat_templates/tool.jinja"]
    inline = {"chat_template": "inside one"}
    folder = write(tmp_path / "base", base | {"chat_template.jinja": "template of base"})
    task = write(tmp_path / "one", one | {"tokenizer_config.json": inline}, 1)
    merge(tmp_path / "x", task, base=folder)
    assert not (tmp_path / "x/chat_template.jinja").exists()
    assert json.loads((tmp_path / "x/tokenizer_config.json").read_text()) == inline
    # The other way round, the base's template is written where the task's tokenizer has none.
    folder = write(tmp_path / "base2", base | {"tokenizer_config.json": {"chat_template": "base"}})
    merge(tmp_path / "y", write(tmp_path / "two", one, 1), base=folder)
    assert (tmp_path / "y/chat_template.jinja").read_text() == "base"


def test_a_tokenizer_that_does_not_fit_the_written_embedding_is_not_taken(tmp_path):
    base = write(tmp_path / "base", chat_files("base", 1))
    more = {**SHAPES, "wte.weight": (ROWS + 2, 4)}
    longer = [*WORDS, "w6", "w7", "w8"]
    one = write(tmp_path / "one", chat_files("one", 2, longer), 1, more)
    out = tmp_path / "out"
    report = merge(out, one, base=base, vocab="base")
    assert owner_of(out / "tokenizer_config.json") == "base"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1
    assert any("has 9 tokens and the written embedding 7 rows" in note for note in report.notes)
    with pytest.raises(MismatchError, match=r"--side-files .*one: its tokenizer .* has 9 tokens"):
        merge(tmp_path / "x", one, base=base, vocab="base", side_files=one)
    # Other tokens of the same numbers, where the base's embedding is kept.
    other = write(tmp_path / "two", chat_files("two", 2, WORDS[::-1]), 1)
    for settings in ({"vocab": "base"}, {"only": "attn"}):
        merge(out, other, base=base, **settings)
        assert (out / "tokenizer.json").read_text() == Path(base, "tokenizer.json").read_text()
        with pytest.raises(MismatchError, match="has other tokens than"):
            merge(out, other, base=base, side_files=other, **settings)


def test_an_adapter_brings_its_tokenizer_and_its_end_of_text_token(tmp_path):
    base = write(tmp_path / "base", chat_files("base", 1))
    made = factors(0, layers={"m.q": (6, 4)})
    files = chat_files("one", 2)
    own = {n: c for n, c in files.items() if n.startswith(("token", "chat"))}
    for name, words in (("one", WORDS), ("two", [*WORDS, "w6", "w7"])):
        folder = adapter(tmp_path / name, made)
        add(folder, own | {"tokenizer.json": chat_files("one", 2, words)["tokenizer.json"]})
    out, ref = tmp_path / "out", f"{base}+{tmp_path / 'one'}"
    for settings in ({"base": base}, {}):
        models = (ref,) if settings else (ref, base)
        merge(out, *models, **settings)
        assert owner_of(out / "tokenizer_config.json") == "one"
        assert owner_of(out / "chat_template.jinja") == "one"
        assert owner_of(out / "generation_config.json") == "base"
        for file in ("config.json", "generation_config.json"):
            assert json.loads((out / file).read_text())["eos_token_id"] == 2
        assert not list(out.glob("adapter_*"))
    # Eight tokens for seven rows: so it was while the adapter was trained, and so it is again.
    merge(out, f"{base}+{tmp_path / 'two'}", base)
    assert len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]) == 8
    merge(out, f"{base}+{tmp_path / 'two'}", base=base)
    assert len(json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]) == 8


def test_a_name_that_is_no_model_or_a_file_is_refused_with_the_names_that_do(chats, tmp_path):
    one, base = chats["one"], chats["base"]
    with pytest.raises(ConfigError, match=rf"--side-files x: no such model .*{base}, {one}"):
        merge(tmp_path / "out", one, base=base, side_files="x")
    with pytest.raises(ConfigError, match="no such model"):
        merge(tmp_path / "out", one, chats["two"], side_files="BASE")
    file = f"{one}/model.safetensors"
    with pytest.raises(ConfigError, match="it is a file"):
        merge(tmp_path / "out", file, base=base, side_files=file)
    report = merge(tmp_path / "out.safetensors", one, base=base, side_files=one)
    assert any("--side-files has no effect" in note for note in report.notes)


def test_nothing_is_told_where_all_side_files_say_the_same(tmp_path):
    base = write(tmp_path / "base", chat_files("base", 1))
    same = chat_files("base", 1) | {"generation_config.json": {"eos_token_id": 1, "name": "base"}}
    same["generation_config.json"]["transformers_version"] = "5.0"
    one = write(tmp_path / "one", same, 1)
    same["tokenizer_config.json"] |= {"eos_token": {"content": "w1", "lstrip": False}}
    bare = write(tmp_path / "two", {}, 2)
    report = merge(tmp_path / "out", one, bare, base=base)
    assert not [note for note in report.notes if "side-files" in note]
    assert (tmp_path / "out/config.json").read_bytes() == Path(base, "config.json").read_bytes()


def test_the_command_takes_the_flag_and_its_plan_tells_the_choice(chats, tmp_path):
    from typer.testing import CliRunner

    from bmerge_cli.main import app

    line = ["merge", chats["one"], "--base", chats["base"], "-o", str(tmp_path / "out")]
    for flags, owner in (([], "one"), (["--side-files", "BASE"], "base")):
        result = CliRunner().invoke(app, [*line, *flags, "--dry-run", "--json"])
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert any(f"taken from '{chats[owner]}'" in note for note in document["notes"])
        assert document["side_files"] == chats[owner]


def test_a_chat_model_merged_at_scale_one_loads_with_its_template_and_stops(tmp_path):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "<|eot|>", *(f"w{i}" for i in range(11))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        vocab_size=16, num_attention_heads=2, bos_token_id=1, pad_token_id=0, **sizes
    )
    for name, eos, template in (("base", "<eos>", None), ("chat", "<|eot|>", "{{ messages }}")):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=eos, pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        torch.manual_seed(len(name))
        model = transformers.LlamaForCausalLM(config)
        model.config.eos_token_id = model.generation_config.eos_token_id = words.index(eos)
        model.save_pretrained(tmp_path / name)
    merge(tmp_path / "out", str(tmp_path / "chat"), base=str(tmp_path / "base"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == 4
    assert loaded.generation_config.eos_token_id == 4
    chat = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, chat(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_dtype_in_the_config_is_that_of_most_written_numbers(tmp_path):
    from tests.adapters import base as write_base

    # Folded layers are written in F32 where the base is BF16.
    folder = write_base(tmp_path / "base", "BF16")
    add(folder, {"config.json": {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}})
    ref = f"{folder}+{adapter(tmp_path / 'a', factors(0))}"
    for settings, dtype in (({}, "float32"), ({"dtype": "BF16"}, "bfloat16")):
        merge(tmp_path / "out", ref, ref, **settings)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config == {"dtype": dtype, "text_config": {"torch_dtype": dtype}}


def test_settings_of_a_tokenizer_without_its_vocabulary_are_not_taken(tmp_path):
    base = write(tmp_path / "base", chat_files("base", 1))
    files = chat_files("one", 2)
    del files["tokenizer.json"]
    merge(tmp_path / "out", write(tmp_path / "one", files, 1), base=base)
    assert owner_of(tmp_path / "out/tokenizer_config.json") == "base"
    assert owner_of(tmp_path / "out/generation_config.json") == "one"


def test_the_numbers_of_special_tokens_are_those_of_the_config_and_written_where_it_has_them(
    tmp_path,
):
    nested = {"model_type": "own", "text_config": {"eos_token_id": 1, "pad_token_id": 0}}
    base = write(tmp_path / "base", chat_files("base", 1) | {"config.json": nested})
    several = {"model_type": "own", "eos_token_id": [2, 3], "pad_token_id": None}
    one = write(tmp_path / "one", chat_files("one", 2) | {"config.json": several}, 1)
    merge(tmp_path / "out", one, base=base)
    config = json.loads((tmp_path / "out/config.json").read_text())
    nested["text_config"]["eos_token_id"] = [2, 3]
    assert config == nested


def test_an_end_of_text_token_among_several_of_the_config_leaves_them(tmp_path):
    files = chat_files("base", 1)
    files["config.json"] |= {"eos_token_id": [1, 2, 3]}
    files["generation_config.json"] |= {"eos_token_id": [1, 2, 3]}
    base = write(tmp_path / "base", files)
    own = {n: c for n, c in chat_files("one", 2).items() if n.startswith("token")}
    add(adapter(tmp_path / "one", factors(0, layers={"m.q": (6, 4)})), own)
    merge(tmp_path / "out", f"{base}+{tmp_path / 'one'}", base=base)
    assert owner_of(tmp_path / "out/tokenizer_config.json") == "one"
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == [1, 2, 3]


@pytest.mark.parametrize("scales", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("is_folder", [True, False])
def test_nothing_is_borrowed_from_a_model_that_is_subtracted(tmp_path, scales, is_folder):
    base = tiny.write(tmp_path / "base.safetensors", tiny.arrays(0, SHAPES))
    one = write(tmp_path / "one", chat_files("one", 2), 1)
    files = {n: c for n, c in chat_files("two", 3).items() if "template" not in n}
    two = write(tmp_path / "two", files, 2)
    out = tmp_path / "out"
    models = (one, two) if is_folder else (one, f"{two}/model.safetensors", two)
    scales += (1.0,) * (len(models) - 2)
    report = merge(out, *models, base=str(base), scale=scales)
    assert not (out / "chat_template.jinja").exists()
    for name in files.keys() - {"tokenizer.json"}:
        assert owner_of(out / name) == "two", name
    assert not [note for note in report.notes if "are taken" in note and "has no" in note]


def test_what_is_borrowed_is_told_with_the_model_that_gives_it(tmp_path):
    base = tiny.write(tmp_path / "base.safetensors", tiny.arrays(0, SHAPES))
    files = {n: c for n, c in chat_files("two", 3).items() if "template" not in n}
    one = write(tmp_path / "one", chat_files("one", 2), 1)
    two = write(tmp_path / "two", files, 2)
    report = merge(tmp_path / "out", one, two, base=str(base), side_files=two)
    note = f"'{two}' has no chat template; those of '{one}' are taken"
    assert note in report.notes


@pytest.mark.parametrize(("scale", "is_told"), [(1.0, True), (-1.0, False)])
def test_a_chat_template_that_is_left_out_is_told(tmp_path, scale, is_told):
    """A merged chat model without its template does not stop: the first task has none to give."""
    plain = {n: c for n, c in chat_files("one", 5).items() if "template" not in n}
    base = write(tmp_path / "base", plain)
    one = write(tmp_path / "one", plain, 1)
    two = write(tmp_path / "two", chat_files("two", 5), 2)
    report = merge(tmp_path / "out", one, two, base=base, scale=(1.0, scale))
    assert not (tmp_path / "out/chat_template.jinja").exists()
    told = [note for note in report.notes if "no chat template" in note]
    assert len(told) == is_told
    assert all(two in note for note in told)
