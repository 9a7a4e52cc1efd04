"""Records, configs and cards from anybody: one message or a card, and nothing breaks out of it."""

import json
import re
import shlex
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_bayes.errors import BmergeError, CheckpointError
from mergekit_bayes.extract import ExtractConfig
from mergekit_bayes.hub import make_card, markdown, model_card, parents, plan_push
from mergekit_bayes.hub.card import is_generated
from mergekit_bayes.hub.front_matter import join_card, split_card
from mergekit_bayes.hub.licenses import read_license
from tests import pushing

EVIL = [
    "``` <script>alert(1)</script>",
    "````\n# x\n````",
    "--> <!-- bmerge: end --> <!-- bmerge: begin -->",
    "a\n\n# heading\n\n- list",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "` `` <img src=x onerror=alert(1)> | | |",
    "\\| \\` |",
    "{{ x }} {% y %}",
    "a'; rm -rf ~; '",
    "$(rm -rf ~)",
    "\"); import os; os.system('x'); (\"",
    "--push-to=evil/x",
    "\x1b[2J\x1b]0;x\x07",
    "\u202e\u2028\x85\x0b",
    "/a\0b/c",
    "~nobody-here/x",
    "/proc/self/fd/0",
    "<a href='x'>",
    "&lt;b&gt; &#60;script&#62;",
    "x" * 30_000,
]
ODD = [
    None,
    True,
    -1,
    10**30,
    1.5,
    float("nan"),
    float("-inf"),
    "",
    [],
    {},
    ["x"],
    [None],
    {"x": 1},
]
REPORT = {
    "version": "1",
    "summary": "s",
    "method": "gradient_matching",
    "formula": "S = S0",
    "weights": "precision",
    "notes": ["n"],
    "models": [
        {"ref": "org/base", "role": "base", "scale": None, "commit": "0" * 40},
        {"ref": "/x/a", "role": "task", "scale": 1.0, "commit": None, "observations": 3.0},
    ],
    "merged_tensors": 1,
    "copied": {},
    "left_out": {},
    "guard": 0.2,
    "guarded_share": 0.0,
    "largest_multiplier": 0.0,
    "changed_share": 0.5,
    "lost_share": 0.0,
}
ADAPTERS = {k: REPORT[k] for k in ("version", "summary", "formula", "weights", "notes")} | {
    "adapters": ["/x/a", "/x/b"],
    "scales": [1.0],
    "rank": 2,
    "largest_error": 0.1,
}
RECIPE = {
    "models": ["/x/a"],
    "base": "org/base",
    "weights": "precision",
    "scale": [1.0],
    "precision": {"/x/a": "/x/p"},
    "observations": {"/x/a": "2x"},
    "only": "^h",
}
EVALUATION = {
    "model_identity": None,
    "perplexity": {"d": {"token": 2.5}},
    "classification": {"d": {"accuracy": {"value": 0.5}, "ece": 0.1}},
    "toxicity": {"words:x/list.txt": {"share": {"value": 0.1}}},
}
ADAPTED = {
    "steps": 20,
    "kept_step": 10,
    "reached": True,
    "checks": [
        {"step": 10, "toxic_share": 0.25, "held_out_rise": 0.5, "memory_kl": "Infinity"},
        {"step": 20, "toxic_share": 0.1},
    ],
    "unit": "token",
    "removed": 1234,
    "added": 56,
    "memory": 789,
    "base": 6450.0,
    "kappa": 8.17,
    "tau": 1.0,
    "prior": "stored",
    "refused_steps": 2,
    "reconstruction_error": 0.125,
    "without_precision": "an adapter",
}
EXTRACTED = {
    "model": "/x/tuned",
    "base": "org/base",
    "rank": 4,
    "weights": "uniform",
    "precision": "/x/y.posterior",
    "rest": True,
}
EXTRACT_FLAGS = {"--base", *(f"--{name}" for name in ExtractConfig.model_fields)}
RECORDS = {
    "merge_report.json": REPORT,
    "merge_recipe.yaml": RECIPE,
    "finetune.yaml": {"model": "org/base", "optimizer": "ivon"},
    "adapt.yaml": {
        "model": "org/base",
        "remove": {"data": ["org/rows", "/x/toxic.jsonl"]},
        "contrast": {"data": "kept.jsonl"},
        "memory": {"data": "rows.csv"},
        "memory_self_generated": 9,
        "removal": "contrast",
        "optimizer": "adamw",
        "pool": "row",
    },
    "adapt_report.json": ADAPTED,
    "extract.yaml": EXTRACTED,
    "extract_report.json": {
        "version": "0",
        "summary": ["in nats: of '/x/tuned'"],
        "layers": {"h.0.attn": {"rank": 4}},
        "notes": ["a note on '/x/tuned'"],
    },
    "adapter_config.json": {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"},
    "config.json": {"architectures": ["GPT2LMHeadModel"], "auto_map": {"AutoModel": "m.M"}},
    "report.json": EVALUATION,
    "modules.json": {"0": {"path": "0_Pooling"}},
}
LOAD = {"json": json.loads, "yaml": yaml.safe_load}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with a posterior and records of its making."""
    where = pushing.folder(tmp_path_factory.mktemp("records") / "a")
    (where / "config.json").write_text(json.dumps(RECORDS["config.json"]))
    return where


@pytest.fixture
def write(model):
    """Write records into the folder; they are removed afterwards."""
    written = []

    def put(name, content):
        file = model / name
        written.append((file, file.read_bytes() if file.exists() else None))
        dump = json.dumps if name.endswith("json") else yaml.safe_dump
        file.write_text(content if isinstance(content, str) else dump(content))

    yield put
    for file, before in reversed(written):
        file.unlink(missing_ok=True) if before is None else file.write_bytes(before)


def card_or_message(folder, **options):
    """The card, or None where one message of ours says why there is none."""
    try:
        parents(folder)
        plan = plan_push(folder, "org/x")
        card = make_card(folder, **options)
    except BmergeError:
        return None
    assert plan.card
    return check_card(card.text)


def check_card(card):
    """Check that a card is a card: its fields, one section, and no markup that is not ours."""
    ours = card[card.index("<!-- bmerge: begin") :]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", ours)
    assert card.count("<!-- bmerge: begin") == card.count("<!-- bmerge: end -->") == 1
    assert card.count("<!--") == 2
    fields, text = split_card(card)
    assert isinstance(fields, dict)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    raw = [t.content for t in (*tokens, *inline) if t.type in ("html_block", "html_inline")]
    assert all(re.match(r"<!-- bmerge: (begin|end)", content) for content in raw), raw
    links = [t.attrs.get("href") or t.attrs.get("src") for t in inline if t.attrs]
    assert all(link.startswith("https://huggingface.co/") for link in links), links
    titles = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert set(titles[1:]) <= {
        "How it was made",
        "Recipe",
        "Use",
        "Posterior",
        "Merge it further",
        "Merge it further, or undo it",
    }
    for token in tokens:
        if token.type == "fence" and token.info == "bash":
            for line in token.content.splitlines():
                check_command(line)
        if token.type == "fence" and token.info == "python":
            compile(token.content, "card", "exec")
    return card


def check_command(line):
    """Check that a line is one command of ours, whose words are the flags that we write."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)
    assert words[:2] in (["bmerge", "merge"], ["bmerge", "extract"])
    assert not [word for word in words if word and set(word) <= set("();<>|&")]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[1] == "extract":
        assert flags <= EXTRACT_FLAGS
        return
    assert flags <= {
        "--base",
        "--weights",
        "--scale",
        "--precision",
        "--isotropic",
        "--observations",
        "--counts",
        "--shrink",
        "--pool",
        "--anchor",
        "--only",
        "--on-missing",
        "--vocab",
        "--on-bad",
    }


def places(value, path=()):
    """The places of all values in a record."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    """A record with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


CASES = [
    (name, path, content)
    for name, content in [*RECORDS.items(), ("merge_report.json", ADAPTERS)]
    for path in places(content)
]


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_any_value_at_any_place_of_any_record_gives_a_card_or_one_message(model, write, step):
    identity = json.loads(make_identity(model))
    cases = [(case, value) for case in CASES for value in [*EVIL, *ODD]]
    for (name, path, content), value in cases[::step]:
        record = content | {"model_identity": identity} if name == "report.json" else content
        write(name, replaced(record, path, value))
        write("merge_recipe.yaml", RECIPE) if name == "merge_report.json" else None
        write("extract.yaml", EXTRACTED) if name == "extract_report.json" else None
        card_or_message(model)
        if name == "merge_report.json":
            (model / "merge_recipe.yaml").unlink()
        if name == "extract_report.json":
            (model / "extract.yaml").unlink()
        (model / name).unlink()


def test_a_card_tells_what_an_adaptation_did(model, write):
    write("adapt.yaml", RECORDS["adapt.yaml"])
    write("adapt_report.json", ADAPTED)
    card = card_or_message(model)
    for line in (
        "adapted with AdamW",
        "- removed: 1,234 tokens of `org/rows`, `toxic.jsonl` by negative preference optimisation",
        "- added to match them: rows of `kept.jsonl`",
        "- added: 56 tokens\n",
        "- held by a memory of 789 tokens of `rows.csv` and of the model's own text, each counted "
        "8.17 times (kappa) and the stored precision of its start, one number a row; tau 1",
        "- the start counts as 6,450 tokens",
        "- 20 steps, 2 of them undone, of which step 10 was kept; a goal was reached",
        "- the check at that step: 25.0% of the continuations toxic, held-out loss +0.5 nats an "
        "observation, KL on the memory Infinity nats an observation",
        "gradient on the held-out memory: 0.125",
        "- no precision is stored: an adapter",
        "`adapt.yaml` without what was left out",
    ):
        assert line in card
    assert "/x/" not in card
    write("adapt_report.json", ADAPTED | {"reconstruction_error": -0.01})
    assert "gradient on the held-out memory: below its noise" in card_or_message(model)


def make_identity(model):
    """The identity of the model's weights, as JSON."""
    from mergekit_bayes.checkpoint.identity import checkpoint_identity

    return json.dumps(checkpoint_identity(model))


@pytest.mark.parametrize("value", EVIL, ids=range(len(EVIL)))
def test_no_text_of_a_record_leaves_its_place(model, write, value):
    models = [m | {"ref": value, "role": m["role"]} for m in REPORT["models"]]
    texts = dict.fromkeys(("version", "summary", "formula"), value)
    write("merge_report.json", REPORT | texts | {"notes": [value], "models": models})
    write("merge_recipe.yaml", RECIPE | {"models": [value], "base": value, "only": value})
    assert card_or_message(model)
    assert card_or_message(model, repo=f"org/{value}")


def test_a_posterior_of_anybody_is_shown_as_text(model):
    from mergekit_bayes.hub.sections import _info_rows
    from mergekit_bayes.posterior import PosteriorInfo
    from mergekit_bayes.posterior.info import Identity

    for value in EVIL:
        info = PosteriorInfo(
            estimator=value,
            mean=Identity(blocks=value),
            health={value: 1.0, "x": float("inf")},
        )
        rows = markdown.table(["", ""], _info_rows(info))
        html = MarkdownIt("commonmark").enable("table").render(rows)
        assert len(re.findall("<tr>", html)) == len(rows.splitlines()) - 1
        assert not re.search("<(script|a|img)", html)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(EVIL[:-1])
    | st.dates()
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(st.text(max_size=8) | st.sampled_from(["license", "tags"]), values))
def test_any_front_matter_is_kept_or_refused(model, fields):
    try:
        card = f"---\n{yaml.safe_dump(fields, allow_unicode=True)}---\n# Mine\n"
    except (yaml.YAMLError, TypeError, ValueError):
        return
    read_license(card)
    is_generated(card)
    try:
        again = model_card(model, existing=card)
        assert model_card(model, existing=again) == again
    except BmergeError:
        pass


@pytest.mark.parametrize(
    "front",
    [
        "license: [mit]",
        "license: {a: b}",
        "license: 2020-01-01",
        "license: other\nlicense_name: [x]\nlicense_link: 5",
        "model-index: 7",
        "model-index: [{results: [{metrics: x}]}]",
        "? [a, b]\n: c",
        "2020-01-01: x\ntrue: y\nnull: z",
        "a: &a [*a]",
        "a: " + "1" * 5000,
        "a: " + "[" * 3000,
        "- a",
        "a: !!python/object:os.system x",
        "a: \x07",
    ],
)
def test_odd_front_matter_is_kept_or_one_message(model, write, front):
    write("README.md", f"---\n{front}\n---\n# Mine\n")
    said = "# Mine"
    try:
        card = model_card(model)
    except BmergeError as error:
        card, said = said, str(error)
    assert "# Mine" in card
    assert said.isprintable()


def test_a_card_is_searched_in_linear_time(model):
    start = time.perf_counter()
    for text in ("<!-- bmerge: begin -->\n", "<!-- bmerge: begin", "---\n", "--- \t", "\n---"):
        split_card("---\n" + text * 20_000)
        model_card(model, existing=text * 20_000)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", [*RECORDS, "README.md", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe{", b"", b"\0", b"[" * 10**4, b"null", b"--- [", b"{"]
)
def test_any_bytes_in_a_record_give_a_card_or_one_message(model, name, content):
    file = model / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        card_or_message(model)
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def test_a_file_with_a_token_is_not_pushed(model, write):
    token = "hf_" + "aBcDeFgHiJ3456789" * 2
    write("tokenizer_config.json", {"token": token})
    with pytest.raises(CheckpointError, match="holds what looks like a token") as caught:
        plan_push(model, "org/x")
    assert token not in str(caught.value)
    write("tokenizer_config.json", {"token": "hf_hub_download", "x": "hf_" + "aB3dE" * 8})
    plan_push(model, "org/x")
    card = model / "README.md"
    card.write_text(f"# Mine\nset HF_TOKEN=hf_{'x' * 34}\n")
    plan_push(model, "org/x")
    token = "hf_" + "aBcDeFgHiJ3456789" * 2
    card.write_text(f"# Mine\nset HF_TOKEN={token}\n")
    with pytest.raises(CheckpointError, match=r"README\.md: holds what looks like a token"):
        plan_push(model, "org/x")


TEXTS = [
    "# head",
    "- item",
    "+ item",
    "1. first",
    "12) twelfth",
    "    code",
    "---",
    "| a | b |",
    "*x* _y_ __z__ ~~s~~ `c` [a](b) ![i](j) <b>x</b> &amp; \\",
    "https://a.b/c_d",
    "see HTTP://a.b",
    "www.a.b",
    "model@v1.0",
    "a@b.c: mail",
    "x https://a.b y www.c.d z",
]


@pytest.mark.parametrize("value", TEXTS)
def test_a_text_is_a_text_wherever_it_stands(value):
    """It begins no block and holds no markup; an address, which would be a link, is code."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (paragraph,) = (
        token for token in parser.parse(f"- {markdown.text(value)}") if token.type == "inline"
    )
    kinds = {token.type for token in paragraph.children}
    assert kinds <= {"text", "text_special", "code_inline"}
    is_address = [token.type == "code_inline" for token in paragraph.children]
    assert any(is_address) == any(sign in value for sign in ("://", "@", "www."))
    shown = "".join(token.content for token in paragraph.children)
    assert shown == value.strip()
    plain = "".join(t.content for t in paragraph.children if t.type != "code_inline")
    assert not any(sign in plain for sign in ("://", "@", "www."))


def test_honest_texts_look_as_they_did():
    assert markdown.text("نمی\u200cدانم 👩\u200d💻 模型") == "نمی\u200cدانم 👩\u200d💻 模型"
    assert markdown.text("1.5 % of 3") == "1\\.5 % of 3"  # shown without the backslash
    assert markdown.text("S = S0 + sum_t scale_t (S_t - S0)") == "S = S0 + sum_t scale_t (S_t - S0)"
    assert markdown.text("h.0.attn.c_attn.weight: 3 of 5") == "h.0.attn.c_attn.weight: 3 of 5"
    assert markdown.code("org/a-b.c") == "`org/a-b.c`"
    assert markdown.word("org/a") == "org/a"
    assert markdown.word("-o") == "./-o"
    assert markdown.block("a\nb") == "```\na\nb\n```"
    assert join_card({"a": 1}, "x") == "---\na: 1\n---\n\nx"
