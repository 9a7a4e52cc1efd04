"""Files beside the tensors of a model folder: config, tokenizer, code, licence.

Three lists say what happens to them, because the three risks differ:

- `FETCHED`: what is downloaded from the Hub, by broad patterns: one file too many costs seconds.
- `PUBLISHED`: what is pushed to the Hub, name by name: what is published cannot be taken back.
- `side_files`: what a merge copies into its output, which is all but tensors, records and logs: a
  model without a custom file of its architecture does not load.
"""

import shutil
from pathlib import Path

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


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED)
