"""What is copied or published lies in the model's folder: links out of it and pipes are refused."""

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import contained as room
from mergekit_bayes.checkpoint import side_files as listing
from mergekit_bayes.checkpoint.contained import contained, copy_contained, open_contained
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.side_files import side_files
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import copy_logs
from mergekit_bayes.hub import model_card, push_folder
from tests import pushing
from tests.pushing import RUN, folder

hub = pushing.hub
SECRET = "-----BEGIN PRIVATE KEY-----"
BLOB, SHARED = "0" * 40, "ab" + "1" * 62


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of a test, with a secret in a file and in a folder beside the models."""
    monkeypatch.chdir(tmp_path)
    Path("secret.json").write_text(SECRET)
    Path("keys").mkdir()
    for name in ("config.json", "tool.jinja"):
        Path("keys", name).write_text(SECRET)
    return tmp_path


def link(model, name, target):
    file = model / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def pipe(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)


def bind(model, name):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(model / name))


# What is in the model's folder, and the file that the message names.
REFUSED = {
    "file": ("LICENSE", lambda m: link(m, "LICENSE", "../secret.json")),
    "absolute": ("NOTICE", lambda m: link(m, "NOTICE", Path("secret.json").absolute())),
    "config": ("config.json", lambda m: link(m, "config.json", "../secret.json")),
    "folder": ("1_Pooling", lambda m: link(m, "1_Pooling", "../keys")),
    "templates": (
        "additional_chat_templates",
        lambda m: link(m, "additional_chat_templates", "../keys"),
    ),
    "below": (
        "1_Pooling/config.json",
        lambda m: link(m, "1_Pooling/config.json", "../../secret.json"),
    ),
    "chain": (
        "LICENSE",
        lambda m: (link(m, ".hidden", "../secret.json"), link(m, "LICENSE", ".hidden")),
    ),
    "dangling": ("tokenizer.json", lambda m: link(m, "tokenizer.json", "../nothing")),
    "loop": ("tokenizer.json", lambda m: link(m, "tokenizer.json", "tokenizer.json")),
    "device": ("vocab.txt", lambda m: link(m, "vocab.txt", "/dev/zero")),
    "pipe": ("tokenizer.json", lambda m: pipe(m, "tokenizer.json")),
    "pipe as config": ("config.json", lambda m: pipe(m, "config.json")),
    "socket": ("merges.txt", lambda m: bind(m, "merges.txt")),
}


def pickled(model):
    """Put the tensors of a model into a pickle."""
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(2)}, model / "pytorch_model.bin")


COMMANDS = {
    "merge": ("merge", "m", "other", "-o", "out"),
    "merge as the last": ("merge", "other", "m", "-o", "out"),
    "merge as the base": ("merge", "other", "--base", "m", "-o", "out"),
    "merge of adapters": ("merge", "m", "other", "-o", "out"),
    "convert": ("convert", "m", "-o", "out"),
    "plan of a push": ("push", "m", "org/m", "--dry-run"),
    "push": ("push", "m", "org/m"),
}


def prepared(command):
    """The models that a command needs; the first of them."""
    make = (
        (lambda place, seed: pushing.adapter(place, "org/base", seed))
        if (command == "merge of adapters")
        else folder
    )
    model, _ = (make(Path(name), seed) for seed, name in enumerate(("m", "other")))
    if command == "convert":
        pickled(model)
    return model


@pytest.mark.parametrize("command", COMMANDS)
def test_what_leads_out_of_a_model_or_is_no_file_is_refused_by_one_message(here, request, command):
    server = request.getfixturevalue("hub") if command == "push" else None
    model = prepared(command)
    model.rename("good")
    for kind, (name, make) in REFUSED.items():
        shutil.copytree("good", model)
        make(model)
        result = RUN.invoke(app, COMMANDS[command])
        # A push takes certain files of a folder, and does not look at the others.
        if "push" in command and kind in ("folder", "templates"):
            name += "/config.json" if kind == "folder" else "/tool.jinja"
        assert result.exit_code == 2, (kind, result.output, result.exception)
        assert f"{model / name}: " in result.stderr.splitlines()[0], kind
        assert len(result.stderr.splitlines()) == 1, (kind, result.stderr)
        assert SECRET not in result.output, kind
        assert not list(here.glob("out*")), kind
        assert server is None or "org/m" not in server.repos
        shutil.rmtree(model)


def snapshot(model):
    """Put the files of a model into a cache of the Hub, one of them into its shared store."""
    cache = Path("cache").absolute()
    repository = cache / "models--org--m"
    place = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    (cache / "blobs" / "ab").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        if number == 0:
            shared = cache / "blobs" / "ab" / SHARED
            file.rename(shared)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            file.rename(blob)
        inner = place / file.relative_to(model)
        inner.parent.mkdir(parents=True, exist_ok=True)
        inner.symlink_to(os.path.relpath(blob, inner.parent))
    shutil.rmtree(model)
    model.symlink_to(place)


def moved(model):
    """Let the model's folder be a link to another place."""
    model.rename("elsewhere")
    model.symlink_to("elsewhere")


def inside(model):
    """Let side files be links to others in the same folder."""
    (model / "LICENSE").rename(model / "LICENSE.txt")
    (model / "LICENSE").symlink_to("LICENSE.txt")
    (model / "1_Pooling").rename(model / "pooling")
    (model / "1_Pooling").symlink_to("pooling")


def unrelated(model):
    """Let links lead out of the folder that no command copies or publishes."""
    for name in (".git", "runs", "checkpoint-7"):
        (model / name).symlink_to("../keys")
    (model / "training.log").symlink_to("../secret.json")


@pytest.mark.parametrize("arrange", [snapshot, moved, inside, unrelated])
@pytest.mark.parametrize(
    "command", ["merge", "merge of adapters", "convert", "plan of a push", "push"]
)
def test_caches_linked_models_and_links_within_a_folder_work(here, request, command, arrange):
    if command == "push":
        server = request.getfixturevalue("hub")
    model = prepared(command)
    (model / "LICENSE").write_text("Free.")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    arrange(model)
    result = RUN.invoke(app, COMMANDS[command])
    assert result.exit_code == 0, result.output
    if "-o" in COMMANDS[command]:
        for name, text in (("LICENSE", "Free."), ("1_Pooling/config.json", "{}")):
            file = Path("out", name)
            assert file.read_text() == text
            assert not file.is_symlink()
    elif command == "push":
        assert {"LICENSE", "1_Pooling/config.json"} <= set(server.repos["org/m"].files())
    elif command == "plan of a push":
        assert "LICENSE" in result.output
    assert not [
        p for p in here.glob("out/**/*") if p.is_file() and SECRET in p.read_text("latin-1")
    ]


def test_tensors_on_another_disk_are_merged_but_not_published(here):
    for seed, name in enumerate(("m", "other")):
        model = folder(Path(name), seed)
        for inner in ("model.safetensors", "posterior"):
            (model / inner).rename(f"{name}.{inner}")
            (model / inner).symlink_to(f"../{name}.{inner}")
    assert RUN.invoke(app, COMMANDS["merge"]).exit_code == 0
    assert Path("out", "model.safetensors").is_file()
    result = RUN.invoke(app, COMMANDS["plan of a push"])
    assert result.exit_code == 2
    assert "m/model.safetensors: leads out of its folder, to '" in result.stderr
    model = Path("other")
    (model / "model.safetensors").unlink()
    Path("other.model.safetensors").rename(model / "model.safetensors")
    arguments = ("push", "other", "org/m", "--dry-run")
    assert "other/posterior/p" in RUN.invoke(app, arguments).stderr
    assert RUN.invoke(app, (*arguments, "--no-posterior")).exit_code == 0


@pytest.mark.parametrize(
    "name", ["README.md", "report.json", "test/report.json", "merge_report.json", "finetune.yaml"]
)
def test_a_card_reads_nothing_from_outside_its_folder(here, name):
    model = folder(Path("m"))
    link(model, name, Path("secret.json").absolute())
    with pytest.raises(CheckpointError, match=f"m/{name}: leads out of its folder"):
        model_card(model)


def test_a_card_reads_a_folder_of_reports_only_inside(here):
    model = folder(Path("m"))
    Path("keys", "report.json").write_text('{"model_identity": "x"}')
    link(model, "evaluation", "../keys")
    with pytest.raises(CheckpointError, match=r"m/evaluation/report\.json: leads out"):
        model_card(model)


def test_a_store_that_only_looks_like_a_cache_is_outside(here):
    model = Path("a", "models--org--m", "snapshots", "c")
    model.mkdir(parents=True)
    for place in (model.parents[1] / "blobs", model.parents[2] / "blobs"):
        place.symlink_to(here / "keys")
    for target in (
        "../../blobs/config.json",
        "../../../blobs/config.json",
        "../../../../secret.json",
    ):
        link(model, "LICENSE", target)
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            contained(model, "LICENSE")
    other = model.parents[2] / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / BLOB).write_text(SECRET)
    link(model, "LICENSE", f"../../../models--org--other/blobs/{BLOB}")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        contained(model, "LICENSE")


@pytest.mark.parametrize("name", ["LICENSE", "1_Pooling/config.json"])
def test_a_link_that_is_put_in_place_after_the_check_is_not_followed(here, monkeypatch, name):
    model = Path("m")
    (model / "1_Pooling").mkdir(parents=True)
    (model / name).write_text("Free.")
    check = room._place

    def swap(*arguments):
        place = check(*arguments)
        if "/" in name:
            (model / "1_Pooling").rename(model / "old")
            (model / "1_Pooling").symlink_to("../keys")
        else:
            link(model, name, "../secret.json")
        return place

    monkeypatch.setattr(room, "_place", swap)
    with pytest.raises((OSError, CheckpointError)):
        os.close(open_contained(model, name))


@pytest.mark.parametrize(
    ("mode", "umask", "copied"),
    [
        (0o600, 0o022, 0o600),
        (0o644, 0o022, 0o644),
        (0o664, 0o002, 0o664),
        (0o644, 0o077, 0o600),
        (0o440, 0o022, 0o640),
        (0o6755, 0o022, 0o755),
    ],
)
def test_a_copy_has_the_permissions_of_its_original(here, mode, umask, copied):
    file = Path("m", "LICENSE")
    file.parent.mkdir()
    file.write_text("Free.")
    file.chmod(mode)
    before = os.umask(umask)
    try:
        for _ in range(2):  # the second replaces a copy, as a resumed merge does
            copy_contained(file.parent, file.name, Path("copy"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("copy").stat().st_mode) == copied
    assert Path("copy").read_text() == "Free."


def test_a_private_config_stays_private_where_a_merge_changes_it(here):
    for seed, name in enumerate(("m", "other")):
        config = folder(Path(name), seed) / "config.json"
        config.write_text('{"dtype": "float32"}')
        config.chmod(0o400)
    assert RUN.invoke(app, (*COMMANDS["merge"], "--dtype", "BF16")).exit_code == 0
    written = Path("out", "config.json")
    assert "bfloat16" in written.read_text()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_folders_of_many_files_are_not_walked_through(here, monkeypatch):
    monkeypatch.setattr(listing, "_MOST_INNER", 10)
    monkeypatch.setattr(listing, "_MOST", 20)
    model = folder(Path("m"))
    for name in ("1_Pooling", "data"):
        (model / name).mkdir()
    for number in range(11):
        (model / "data" / f"{number}.txt").write_text("x")
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / "all").symlink_to(".")
    (model / "1_Pooling" / "all").symlink_to("..")
    assert side_files(model) == [Path("1_Pooling/config.json"), Path("config.json")]
    for number in range(20):
        (model / f"{number}.txt").write_text("x")
    with pytest.raises(CheckpointError, match="more than 20 files beside its tensors"):
        side_files(model)


def test_logs_of_a_training_that_are_links_out_of_its_folder_stay_behind(here, caplog):
    logs = Path("out.checkpoints", "runs")
    logs.mkdir(parents=True)
    (logs / "1.log").write_text("loss 1")
    (logs / "last.log").symlink_to("1.log")
    (logs / "stolen.log").symlink_to("../../secret.json")
    copy_logs(logs.parent, Path("out"))
    assert sorted(p.name for p in Path("out", "runs").iterdir()) == ["1.log", "last.log"]
    assert "stolen.log: leads out" in caplog.text


def test_a_fine_tune_and_a_removal_refuse_a_template_from_outside(here):
    from mergekit_bayes.detox.journey import run_detox
    from mergekit_bayes.detox.settings import DetoxConfig
    from mergekit_bayes.finetune import run_finetune
    from tests.finetuning import config, texts

    data = texts(here / "t.jsonl", rows=4)
    settings = config(here, data, max_steps=1)
    link(here / "base", "chat_template.jinja", "../secret.json")
    removal = DetoxConfig(
        base="base",
        output="out",
        toxic={"data": data},
        held_out_toxic={"data": data},
        scales=(1.0,),
        evaluate={"toxicity": data, "perplexity": {"held out": data}, "scorer": ["words:t.jsonl"]},
    )
    message = r"base/chat_template\.jinja: leads out of its folder"
    with pytest.raises(CheckpointError, match=message):
        run_finetune(settings, quiet=True)
    with pytest.raises(CheckpointError, match=message):
        run_detox(removal, quiet=True)
    assert not list(here.glob("out*"))


ODD = (b"caf\xe9.txt", b"a\nb", b"-lead", b"\x1b[2J.txt", "ü.txt".encode(), b"n" * 255)


def test_side_files_of_any_name_are_copied_and_reported(here):
    model = prepared("merge")
    for name in (*ODD, b"1_Pooling"):
        place = os.path.join(os.fsencode(model), name)
        if name == b"1_Pooling":
            os.mkdir(place)
            place = os.path.join(place, b"\xff")
        with open(place, "wb") as file:
            file.write(name)
    for arguments in (COMMANDS["merge"], COMMANDS["plan of a push"]):
        for flag in ((), ("--json",)):
            result = RUN.invoke(
                app, (*arguments, *flag, *(["--force"] if "merge" in arguments else []))
            )
            assert result.exit_code == 0, (arguments, result.output, result.exception)
    assert set(ODD) <= set(os.listdir(b"out"))
    assert os.listdir(b"out/1_Pooling") == [b"\xff"]


def test_a_file_whose_name_cannot_be_printed_is_not_published(here):
    model = folder(Path("m"))
    (model / "LICENSE\n").write_text("Free.")
    with pytest.raises(
        CheckpointError, match=r"the name 'LICENSE\\n' holds what cannot be printed"
    ):
        push_folder(model, "org/m")


LONG = ("x" * 300, "x" * 250, "\u00fc" * 125, "x" * 244 + ".safetensors", "x" * 300 + "/out")
OTHERS = ("caf\udce9", "~nobody-of-this-name/x")


@pytest.mark.parametrize("command", ["merge", "convert", "evaluate", "precision"])
def test_an_output_whose_name_cannot_be_used_is_refused_by_one_message(here, command):
    prepared(command)
    Path("t.txt").write_text("text")
    arguments = {
        "merge": ("merge", "m", "other"),
        "convert": ("convert", "m"),
        "evaluate": ("evaluate", "m", "--perplexity", "t=t.txt"),
        "precision": ("precision", "m", "--data", "t.txt"),
    }[command]
    before = set(here.iterdir())
    for name in (*LONG, *OTHERS):
        result = RUN.invoke(app, (*arguments, "-o", name))
        assert result.exit_code == 2, (result.output, result.exception)
        assert len(result.stderr.splitlines()) == 1
        assert "output '" in result.stderr or "not UTF-8" in result.stderr
    assert set(here.iterdir()) == before


def test_an_output_with_a_long_name_is_written(here):
    prepared("merge")
    name = "x" * 243
    assert RUN.invoke(app, ("merge", "m", "other", "-o", name)).exit_code == 0
    pickled(Path("m"))
    assert RUN.invoke(app, ("convert", "m", "-o", name[:-1])).exit_code == 0


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "+" + "y" * 300, "~nobody-of-this-name/x"])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(here, name):
    folder(Path("m"))
    Path("t.txt").write_text("text")
    for arguments in (
        ("push", name, "org/m", "--dry-run"),
        ("merge", "m", name, "-o", "out"),
        ("inspect", name),
        ("convert", name, "-o", "out"),
        ("precision", name, "--data", "t.txt"),
        ("evaluate", "m", "--toxicity", "t.txt", "--scorer", f"words:{name}"),
    ):
        result = RUN.invoke(app, arguments)
        assert result.exit_code == 2, (arguments, result.output, result.exception)
        assert len(result.stderr.splitlines()) == 1, arguments


def test_a_download_is_not_looked_for_behind_a_link(here):
    model = Path("m", ".cache", "huggingface")
    model.mkdir(parents=True)
    Path("keys", "x.incomplete").write_text("")
    (model / "download").symlink_to("../../../keys")
    with pytest.raises(CheckpointError, match=r"'m' holds neither model\.safetensors"):
        checkpoint_files(Path("m"))
