"""Files beside the tensors of a model folder: config, tokenizer, code, licence.

Three lists say what happens to them, because the three risks differ:

- `FETCHED`: what is downloaded from the Hub, by broad patterns: one file too many costs seconds.
- `PUBLISHED`: what is pushed to the Hub, name by name: what is published cannot be taken back.
- `side_files`: what a merge copies into its output, which is all but tensors, records and logs: a
  model without a custom file of its architecture does not load.

`gather_side_files` takes them from several folders: what belongs together from one folder each.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

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

# What a merge or a fine-tuning run records of itself.
MERGE_REPORT, MERGE_RECIPE, FINETUNE = "merge_report.json", "merge_recipe.yaml", "finetune.yaml"
RECORDS = (MERGE_REPORT, MERGE_RECIPE, FINETUNE)

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
_FILE_LIMIT, _FOLDER_LIMIT = 100 << 20, 1 << 20  # bytes


def side_files(folder: Path) -> list[Path]:
    """The files that accompany a model's tensors, relative to its folder.

    Left out are tensors of any format and their indexes; what a merge, a training or an evaluation
    says of this model, `runs/` of a training included; its card; hidden files; and files over 100
    MiB. A subfolder such as
    `1_Pooling/` is taken if it holds none of these and at most 1 MiB.
    """
    accepted: list[Path] = []
    for path in sorted(folder.iterdir()):
        inner = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]
        sizes = [f.stat().st_size for f in inner if _is_side_file(f)]
        limit = _FOLDER_LIMIT if path.is_dir() else _FILE_LIMIT
        is_accepted = len(sizes) == len(inner) and sum(sizes) <= limit
        if is_accepted and not path.match(".*") and path.name not in ("posterior", "runs"):
            accepted += [f.relative_to(folder) for f in inner]
    return accepted


def check_side_files(folder: Path) -> None:
    """Find what of a model's side files cannot be copied, or would be of no use.

    Raises:
        CheckpointError: A file cannot be read, or is a pointer to the file itself.
    """
    check_readable(folder / name for name in side_files(folder))


def check_readable(files: Iterable[Path]) -> None:
    """Find files that cannot be read, or that stand in the place of what they should hold.

    Raises:
        CheckpointError: A file cannot be read, or is a pointer to the file itself.
    """
    for file in files:
        try:
            with file.open("rb") as content:
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
        OSError: A file cannot be read or written.
    """
    for name in side_files(source):
        if but is None or not name.match(but):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


class GatheredFiles(NamedTuple):
    """Where each side file of a merge comes from.

    Attributes:
        files: The file to copy, by its name relative to the output.
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
            if is_in_folder == (len(name.parts) > 1) and name.match(pattern):
                return group
    return None


def _is_usable(group: str, members: Sequence[Path]) -> bool:
    """Whether the files of a group are complete: those of a tokenizer hold a vocabulary."""
    if group != "tokenizer":
        return True
    return any(name.match(pattern) for name in members for pattern in _VOCABULARIES)


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED)
