"""No reader of models takes a posterior for weights, or fetches one, in any layout that we write.

Each reader's rule is restated here from its public behaviour, as of November 2026: which files of a
repository it fetches, and of which files in the folder it loads the tensors. Where a layout of
earlier versions was mistaken by a reader, the same rule must find that, so that no rule is empty.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.numpy import save_file

from mergekit_bayes.checkpoint.layout import write_index
from mergekit_bayes.hub.files import choose_files
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import save_posterior
from tests import tiny
from tests.pushing import adapter, folder

Paths = set[str]
Opened = Callable[[str], str]  # the text of a file


class Reader(NamedTuple):
    """What a library does with a model.

    Attributes:
        patterns: The patterns of files that it fetches; `*` matches a slash, too.
        loaded: The files whose tensors it loads, of those in a folder.
        mistaken: Whether it fetched or loaded a precision of the earlier layouts.
    """

    patterns: tuple[str, ...]
    loaded: Callable[[Paths, Opened], Paths]
    mistaken: bool


def top(*patterns):
    """The first of some patterns that files at the top of the folder match."""

    def loaded(paths, opened):
        at_top = [path for path in paths if "/" not in path]
        for pattern in patterns:
            if found := {path for path in at_top if fnmatchcase(path, pattern)}:
                return found
        return set()

    return loaded


def indexed(stem, otherwise):
    """The files that the index of a stem names, or what another rule finds without one."""

    def loaded(paths, opened):
        index = f"{stem}.index.json"
        if index in paths:
            return set(json.loads(opened(index))["weight_map"].values())
        return otherwise(paths, opened)

    return loaded


def below(*endings):
    """Every file with one of these endings, in subfolders too."""
    return lambda paths, opened: {p for p in paths if PurePosixPath(p).suffix in endings}


def without_index(rule):
    """vLLM: what matches, without the files that the model's index does not name."""

    def loaded(paths, opened):
        found, index = rule(paths, opened), "model.safetensors.index.json"
        if index not in paths:
            return found
        return found & set(json.loads(opened(index))["weight_map"].values())

    return loaded


def both(*rules):
    return lambda paths, opened: set().union(*(rule(paths, opened) for rule in rules))


def any_index(paths, opened):
    """accelerate's `load_checkpoint_in_model`: the one index at the top, whatever its name."""
    found = [p for p in paths if "/" not in p and p.endswith(".index.json")]
    if len(found) == 1:
        return set(json.loads(opened(found[0])).get("weight_map", {}).values())
    return top("model.safetensors", "pytorch_model.bin")(paths, opened)


WEIGHTS = "model.safetensors"
EXACT = indexed(WEIGHTS, top(WEIGHTS, "pytorch_model.bin"))
ENDINGS = (".safetensors", ".bin", ".pt")
READERS = {
    "transformers": Reader((WEIGHTS, "*.json"), EXACT, False),
    "peft": Reader(
        ("adapter_model.*", "adapter_config.json"), top("adapter_model.safetensors"), False
    ),
    "accelerate": Reader(("*.json", "*.safetensors"), any_index, True),
    "diffusers": Reader(
        ("*/*.safetensors", "*/*.bin", "*/*.json", "model_index.json"), below(*ENDINGS), True
    ),
    "vllm": Reader(
        ("*.safetensors", "*.bin", "*.pt"),
        without_index(top("*.safetensors", "*.bin", "*.pt")),
        True,
    ),
    "vllm, mistral": Reader(("consolidated*.safetensors",), top("consolidated*"), False),
    "mlx-lm": Reader(
        ("*.json", "model*.safetensors", "*.py", "*.txt", "*.jinja", "tokenizer.model"),
        top("model*.safetensors"),
        True,  # a.precision.safetensors of a model that is called model.safetensors
    ),
    "mlx-vlm": Reader(("*.json", "*.safetensors"), indexed(WEIGHTS, top("*.safetensors")), True),
    # Up to 3.31.4 all files below the folder, where later names win; then those of the index; then
    # these and `model*.safetensors`.
    "mlx-swift-lm 3.31.4": Reader(("*.safetensors", "*.json"), below(".safetensors"), True),
    "mlx-swift-lm, by index": Reader(
        ("*.safetensors", "*.json"), indexed(WEIGHTS, below(".safetensors")), True
    ),
    "mlx-swift-lm, by name": Reader(
        ("*.safetensors", "*.json"),
        both(indexed(WEIGHTS, top("model*.safetensors")), top("model*.safetensors")),
        True,
    ),
    "llama.cpp": Reader(("*.safetensors", "*.json", "*.model"), top("model*.safetensors"), True),
    "mergekit 0.1.5": Reader(("tokenizer.model", "*.json", "*.safetensors"), EXACT, True),
    "snapshot_download, safetensors": Reader(("*.safetensors",), EXACT, True),
    "snapshot_download, folders": Reader(("**/*.safetensors", "**/*.bin"), below(*ENDINGS), True),
    "snapshot_download, pickles": Reader(("*.bin", "*.pt", "*.pth", "*.ckpt"), EXACT, False),
    "snapshot_download, others": Reader(
        ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz", "*.tflite"), EXACT, False
    ),
}


def mistakes(reader: Reader, repository: Path, model: Paths) -> Paths:
    """The files of tensors that a reader fetches or loads and that are not the model's."""
    paths = {p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()}
    fetched = set(filter_repo_objects(paths, allow_patterns=list(reader.patterns)))
    loaded = reader.loaded(paths, lambda path: (repository / path).read_text())
    documents = {path for path in fetched if path.endswith((".json", ".yaml"))}
    assert sum((repository / path).stat().st_size for path in documents) < 20_000
    return (fetched - documents | loaded) - model


def write(layout: str, place: Path) -> tuple[Path, Paths]:
    """A repository in one of the layouts that we write, and the files of the model in it."""
    mean, precision = tiny.arrays(0), tiny.precisions(0)
    names = list(mean)
    if layout == "shards":
        shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, part in shards.items():
            tiny.write(place / file, {n: mean[n] for n in part})
        write_index(place, "model", shards, 0)
        save_posterior(place, precision, tiny.info(place))
        return place, {*shards, "model.safetensors.index.json"}
    if layout == "merge":
        for seed, name in enumerate(("base", "a")):
            folder(place.with_name(name), seed)
        base, a = (str(place.with_name(n)) for n in ("base", "a"))
        run_merge(MergeConfig(models=(a,), base=base, weights="precision", out=str(place)))
    elif layout == "merged file":  # in a folder with a config, where it is a model for loaders
        inputs = [str(place.with_name(f"{n}.safetensors")) for n in ("b", "c")]
        for seed, path in enumerate(inputs):
            tiny.posterior(path, tiny.arrays(seed), tiny.precisions(seed))
        place.mkdir()
        run_merge(
            MergeConfig(
                models=tuple(inputs), weights="precision", out=str(place / "model.safetensors")
            )
        )
    elif layout == "file":
        tiny.posterior(place / "model.safetensors", mean, precision)
    elif layout == "adapter":
        adapter(place, "org/base")
        return place, {"adapter_model.safetensors", "adapter_config.json"}
    elif layout == "alone":
        model = tiny.write(place.with_name("model.safetensors"), mean)
        save_posterior(model, precision, tiny.info(model), out=place)
        return place, set()
    elif layout.startswith("push"):
        form = layout.removeprefix("push by ")
        local = folder(place.with_name("local"))
        options = {"posterior": True, "only_posterior": False, "form": form}
        with ExitStack() as scratch:
            for file in choose_files(local, **options, scratch=scratch).files:
                (place / file.path).parent.mkdir(parents=True, exist_ok=True)
                (place / file.path).write_bytes(file.source.read_bytes())
    (place / "config.json").write_text("{}")
    return place, {"model.safetensors"}


LAYOUTS = (
    "shards",
    "merge",
    "merged file",
    "file",
    "adapter",
    "alone",
    "push by row",
    "push by row-column",
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Each layout, and what of it is the model's."""
    root = tmp_path_factory.mktemp("layouts")
    return {layout: write(layout, root / str(i) / "m") for i, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_fetches_or_loads_a_posterior(repositories, name):
    for layout, (repository, model) in repositories.items():
        assert any(repository.rglob("*.posterior")), layout
        assert mistakes(READERS[name], repository, model) == set(), layout


@pytest.mark.parametrize("name", READERS)
def test_the_rules_find_what_was_mistaken_in_earlier_layouts(tmp_path, name):
    """As of format 1: a folder's, and a file's, which is one of the model's by its name."""
    tensors = tiny.precisions(0)
    for repository, precision in (
        (tmp_path / "folder", "posterior/precision.safetensors"),
        (tmp_path / "file", "model.precision.safetensors"),
    ):
        tiny.write(repository / "model.safetensors", tiny.arrays(0))
        (repository / precision).parent.mkdir(exist_ok=True)
        save_file(tensors, repository / precision)
    found = [mistakes(READERS[name], tmp_path / r, {WEIGHTS}) for r in ("folder", "file")]
    assert any(found) == READERS[name].mistaken


def test_no_name_in_a_posterior_is_one_of_the_model(repositories):
    """Were a posterior loaded nevertheless, no weight would be replaced by a precision."""
    for layout, (repository, model) in repositories.items():
        paths = [repository / path for path in model if path.endswith(".safetensors")]
        weights = {name for path in paths for name in names_in(path)}
        stored = {n for path in repository.rglob("*.posterior") for n in names_in(path)}
        assert stored, layout
        roles = ("precision:", "rows:", "columns:")
        assert all(name.startswith(roles) for name in stored), layout
        assert any(n.startswith("rows:") for n in stored) == (layout == "push by row-column")
        assert not weights & stored, layout


def test_every_folder_of_a_posterior_has_an_index_of_its_own_kind(repositories):
    for layout, (repository, _) in repositories.items():
        places = {p.parent for p in repository.rglob("precision*.posterior")}
        assert len(places) == ("file" not in layout), layout
        for place in places:
            index = json.loads((place / "precision.index.json").read_text())
            assert "weight_map" not in index
            in_files = {p.name: names_in(p) for p in place.glob("*.posterior")}
            assert index["tensors"] == {n: f for f, names in in_files.items() for n in names}


def names_in(path):
    with safe_open(path, "np") as opened:
        return list(opened.keys())
