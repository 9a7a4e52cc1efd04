"""Files beside the tensors of a model folder: config, tokenizer, code, licence.

Three lists say what happens to them, because the three risks differ:

- `FETCHED`: what is downloaded from the Hub, by broad patterns: one file too many costs seconds.
- `PUBLISHED`: what is pushed to the Hub, name by name: what is published cannot be taken back.
- `side_files`: what a merge copies into its output, which is all but tensors, records and logs: a
  model without a custom file of its architecture does not load.

`gather_side_files` takes them from several folders: what belongs together from one folder each.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.contained import (
    contained,
    copy_contained,
    open_contained,
    refuse_leaving,
)
from mergekit_bayes.checkpoint.foreign import HEAD, explain_pointer
from mergekit_bayes.documents import read_object
from mergekit_bayes.errors import CheckpointError

# Tokenizers in formats of their own (sentencepiece, tiktoken, byte-pair merges, vocabularies).
_TOKENIZERS = (
    "*.model",
    "tokenizer.model.*",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.vocab",
)
_LICENSES = ("LICENSE*", "NOTICE*")
# Files that belong together. The first ones of a tokenizer give its tokens; the others are of no
# use without them, unless the tokenizer has no vocabulary at all.
_VOCABULARIES = ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt", *_TOKENIZERS)
CHAT, CHAT_TEMPLATE = "chat template", "chat_template.jinja"
GROUPS = {
    "tokenizer": (
        *_VOCABULARIES,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "tokenization_*.py",
    ),
    CHAT: (CHAT_TEMPLATE, "chat_template.json", "additional_chat_templates/*"),
    "generation config": ("generation_config.json",),
    "processor": ("*processor_config.json", "processing_*.py", "*_processing_*.py"),
    "sentence embedding": (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "[0-9]_*/*",
    ),
}

# What a merge, a fine-tuning run, an adaptation or an extraction records of itself.
MERGE_REPORT, MERGE_RECIPE, FINETUNE = "merge_report.json", "merge_recipe.yaml", "finetune.yaml"
ADAPT, ADAPT_REPORT = "adapt.yaml", "adapt_report.json"
EXTRACT, EXTRACT_REPORT = "extract.yaml", "extract_report.json"
RECORDS = (
    MERGE_REPORT,
    MERGE_RECIPE,
    FINETUNE,
    ADAPT,
    ADAPT_REPORT,
    EXTRACT,
    EXTRACT_REPORT,
)
MIXTURE = "posterior_mixture.json"  # makes a folder a mixture of posteriors (`posterior/mixture`)
MEMORY = "memory.jsonl"  # what a model wrote for an adaptation; never published unasked

FETCHED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.py",
    *_TOKENIZERS,
    *_LICENSES,
)

PUBLISHED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    *_TOKENIZERS,
    *RECORDS,
    *_LICENSES,
)

_NOT_COPIED = (
    # tensors and their indexes
    "*.safetensors",
    "*.posterior",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pyc",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.keras",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.tflite",
    "*.npy",
    "*.npz",
    "*.distcp",
    # what describes the input and would be wrong of the output
    "README.md",
    *RECORDS,
    MIXTURE,
    "mergekit_config.yml",
    "report.json",
    "trainer_state.json",
    "*_results.json",
    "optimizer.*",
    "scheduler.*",
    "zero_to_fp32.py",
    "events.out.*",
    "*.log",
    "*.jsonl",
)
# Folders that hold no side files: hidden ones, a posterior, logs and checkpoints of a training.
_CHECKPOINT = "checkpoint-*"
_NOT_ENTERED = (".*", "posterior", "runs", _CHECKPOINT)
_MORE_THAN_A_STAR = frozenset("*?[/")
_FILE_LIMIT, _FOLDER_LIMIT = 100 << 20, 1 << 20  # bytes
_MOST, _MOST_INNER = 10_000, 1_000  # files of a model, and of a subfolder that is copied


def side_files(folder: Path) -> list[Path]:
    """The files that accompany a model's tensors, relative to its folder.

    Left out are tensors of any format and their indexes; what a merge, a training or an evaluation
    says of this model, `runs/` and `checkpoint-*/` of a training included; its card; hidden files;
    and files over 100 MiB. A subfolder such as `1_Pooling/` is taken if it holds none of these, at
    most 1,000 files and at most 1 MiB. Links to a folder are not followed inside a subfolder.

    Raises:
        CheckpointError: The folder cannot be listed, or one of these is a link that leads out of
            the folder or nowhere, or a pipe, socket or device.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}).") from None
    accepted: list[Path] = []
    for name in map(Path, names):
        if any(_fits(name, pattern) for pattern in _NOT_ENTERED) or _was_checkpoint(folder / name):
            continue
        limit, files = _FILE_LIMIT, [] if _is_left_out(name) else [name]
        if os.path.isdir(folder / name):
            refuse_leaving(folder, name)
            limit, files = _FOLDER_LIMIT, _files_below(folder, name)
        if sum(contained(folder, file).stat().st_size for file in files) <= limit:
            accepted += files
        if len(accepted) > _MOST:
            raise CheckpointError(
                f"{folder}: holds more than {_MOST:,} files beside its tensors, where a model has "
                "a few dozen. Move what is not of the model to another folder."
            )
    return accepted


def check_side_files(folder: Path) -> None:
    """Find what of a model's side files cannot be copied, or would be of no use.

    Raises:
        CheckpointError: As `side_files` and `check_readable`.
    """
    check_readable({name: folder / name for name in side_files(folder)})


def check_readable(files: Mapping[Path, Path]) -> None:
    """Find files that cannot be read, or that stand in the place of what they should hold.

    Args:
        files: The files, by their names relative to their models.

    Raises:
        CheckpointError: A file cannot be read, lies outside of its model's folder, or is a pointer
            to the file itself.
    """
    for name, file in files.items():
        try:
            with open(open_contained(_model_of(file, name), name), "rb") as content:
                head = content.read(HEAD)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error.strerror}); the output needs it."
            ) from None
        if reason := explain_pointer(head):
            raise CheckpointError(f"{file}: {reason}")


def copy_side_files(source: Path, target: Path, *, but: str | None = None) -> None:
    """Copy a model's side files to another folder.

    Args:
        source: The model's folder.
        target: The folder to copy to.
        but: A pattern of names that are not copied.

    Raises:
        CheckpointError: As `side_files`.
        OSError: A file cannot be read or written.
    """
    for name in side_files(source):
        if but is None or not name.match(but):
            copy_side_file(source / name, name, target)


def copy_side_file(file: Path, name: Path, target: Path) -> None:
    """Copy one side file to the same place in another folder.

    Args:
        file: The file.
        name: Its name relative to its model.
        target: The folder to copy to.

    Raises:
        CheckpointError: The file lies outside of its model's folder.
        OSError: The file cannot be read or written.
    """
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    copy_contained(_model_of(file, name), name, target / name)


class GatheredFiles(NamedTuple):
    """Where each side file of a merge comes from.

    Attributes:
        files: The file to copy, by its name relative to its model and to the output.
        folders: For each group of `GROUPS` that some folder has, the folder that gives it.
        template: The chat template, where it is written inside a `tokenizer_config.json` that is
            not copied; None otherwise.
    """

    files: dict[Path, Path]
    folders: dict[str, Path]
    template: str | None


def gather_side_files(config_folder: Path, folders: Sequence[Path]) -> GatheredFiles:
    """Choose the side files of a merge.

    Each group comes as a whole from the first of `folders` that has it, since a vocabulary of one
    model and the settings of another do not fit. All else comes from the folder of the config,
    whose code and licence it may be, and then from the others.

    Args:
        config_folder: The folder whose `config.json` is taken.
        folders: The folders to look in, the chosen one first.

    Raises:
        CheckpointError: As `side_files`.
    """
    listings = {folder: side_files(folder) for folder in (config_folder, *folders)}
    files: dict[Path, Path] = {}
    chosen: dict[str, Path] = {}
    template = None
    for group in GROUPS:
        members = {f: [n for n in listings[f] if group_of(n) == group] for f in folders}
        for folder in sorted(folders, key=lambda f: not _is_usable(group, members[f])):
            inline = inline_template(folder) if group == CHAT else None
            if members[folder] or inline is not None:
                chosen[group] = folder
                files |= {name: folder / name for name in members[folder]}
                if not members[folder] and chosen.get("tokenizer") != folder:
                    template = inline
                break
    for folder, names in listings.items():
        for name in names:
            is_config = name == Path("config.json") and folder != config_folder
            if group_of(name) is None and not is_config and not name.match("adapter_*"):
                files.setdefault(name, folder / name)
    return GatheredFiles(dict(sorted(files.items())), chosen, template)


def inline_template(folder: Path) -> str | None:
    """The chat template inside a folder's `tokenizer_config.json`; None if it has none."""
    template = read_object(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def group_of(name: Path) -> str | None:
    """The group of `GROUPS` to which a side file belongs, by its name relative to its model."""
    for group, patterns in GROUPS.items():
        for pattern in patterns:
            is_in_folder = "/" in pattern
            if is_in_folder == (len(name.parts) > 1) and _fits(name, pattern):
                return group
    return None


def _is_usable(group: str, members: Sequence[Path]) -> bool:
    """Whether the files of a group are complete: those of a tokenizer hold a vocabulary."""
    if group != "tokenizer":
        return True
    return any(_fits(name, pattern) for name in members for pattern in _VOCABULARIES)


def _model_of(file: Path, name: Path) -> Path:
    """The folder of the model that has this file under this name."""
    return file.parents[len(name.parts) - 1]


def _is_left_out(name: Path) -> bool:
    return any(_fits(name, pattern) for pattern in _NOT_COPIED)


def _fits(name: Path, pattern: str) -> bool:
    """What `name.match(pattern)` says, without a regular expression where one `*` or none is in it.

    Making one for each pattern is most of what a plan spends on side files.
    """
    start, star, end = pattern.partition("*")
    if _MORE_THAN_A_STAR.intersection(start + end):
        return name.match(pattern)
    last = name.name
    if not star:
        return last == pattern
    return len(last) >= len(start + end) and last.startswith(start) and last.endswith(end)


def _was_checkpoint(path: Path) -> bool:
    """Whether a link, such as `latest`, led to a checkpoint that a training has removed."""
    is_broken = os.path.islink(path) and not os.path.exists(path)
    return is_broken and Path(os.readlink(path)).match(_CHECKPOINT)


def _files_below(folder: Path, name: Path) -> list[Path]:
    """The files of a subfolder, relative to the folder; empty if it holds other than side files."""
    files, links, waiting = list[Path](), list[Path](), [name]
    while waiting:
        place = waiting.pop()
        # A folder that the user may not list, such as another one's logs, has nothing to copy.
        with suppress(PermissionError), os.scandir(folder / place) as entries:
            for entry in entries:
                path = place / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_symlink() and os.path.isdir(folder / path):
                    links.append(path)
                elif _is_left_out(path):
                    return []
                else:
                    files.append(path)
                if len(files) + len(links) + len(waiting) > _MOST_INNER:
                    return []
    for path in links:
        refuse_leaving(folder, path)
    return sorted(files)
