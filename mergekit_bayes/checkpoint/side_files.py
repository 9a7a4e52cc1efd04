"""Files that accompany the tensors of a model folder: config, tokenizer, licence."""

import shutil
from pathlib import Path

_SIDE_FILE, _SIDE_FOLDER = 100 << 20, 1 << 20  # bytes
_NO_SIDE_FILES = (
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
    "README.md",
    "merge_report.json",
    "merge_recipe.yaml",
    "mergekit_config.yml",
    "finetune.yaml",
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


def side_files(folder: Path) -> list[Path]:
    """What lies in a model's folder beside its tensors, relative to it: config, tokenizer, code,
    licence and the like.

    Not tensors in any format and their indices, nor what a merge, a training or an evaluation says
    of this model, its card, hidden files and files over 100 MiB. Of folders only those without any
    of these, and up to 1 MiB, such as `1_Pooling/`.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        inner = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]
        sizes = [f.stat().st_size for f in inner if _is_side_file(f)]
        whole = len(sizes) == len(inner) and sum(sizes) <= (
            _SIDE_FOLDER if path.is_dir() else _SIDE_FILE
        )
        if whole and not path.match(".*") and path.name != "posterior":
            found += [f.relative_to(folder) for f in inner]
    return found


def copy_side_files(source: Path, target: Path, *, but: str | None = None) -> None:
    """Copy a model's side files, but for those that match a pattern. Raises `OSError`."""
    for name in side_files(source):
        if but is None or not name.match(but):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not any(file.match(pattern) for pattern in _NO_SIDE_FILES)
