"""The small world that `scripts/fuzz.py` breaks: models, texts and settings, and lines over them.

Every line ends with exit code 0 on the unbroken world.
"""

import contextlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

CANARY = "canary-7f3a91c4-nothing-may-hold-this"
WORDS = ("the", "cat", "dog", "sat", "on", "good", "bad", "film", "was", "dull", "nice", "and")
CARD = """---
license: apache-2.0
base_model: org/base
tags: [merge, test]
model-index:
- name: a
  results: []
---
# A model

Some text.
"""


@dataclass(frozen=True)
class Line:
    """A command line and the files that a case may break.

    Attributes:
        name: Its name in tables; the first word is the command.
        words: Arguments of `bmerge`, relative to the folder of a case.
        needs: Entries of the world that are copied for it.
        out: What it writes; None if it writes nothing.
        weight: How often it is drawn, beside the others.
        weights: Whether the same tensors must come out if only side files differ.
        kept: Entries beside `out` that may be there after a refusal, as the documents say.
        broken: The only entries of `needs` that are broken; all of them by default.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    out: str | None = None
    weight: float = 1.0
    weights: bool = False
    kept: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


def _line(name: str, words: str, needs: str, out: str | None = None, **options: object) -> Line:
    command = name.split()[0]
    full = f"{command} {words}" + (f" -o {out}" if command in ("merge", "convert") and out else "")
    return Line(name, tuple(full.split()), tuple(needs.split()), out, **options)  # type: ignore[arg-type]


_MERGE = {"out": "out", "weight": 3.0, "weights": True, "kept": ("out.partial",)}
_MODEL = {"weight": 1.5}
_SAMPLED = "--continuations 2 --new-tokens 3 --bootstrap 20"
LINES = (
    _line("merge average", "a b", "a b", **_MERGE),
    _line("merge precision", "a b --weights precision", "a b", **_MERGE),
    _line(
        "merge removal",
        "a b --base base --weights precision --scale 1 --scale=-0.5",
        "base a b",
        **_MERGE,
    ),
    _line("merge ties", "a b --base base --method ties", "base a b", **_MERGE),
    _line(
        "merge files",
        "a.safetensors b.safetensors --weights precision",
        "a.safetensors a.precision.safetensors b.safetensors b.precision.safetensors",
        **(_MERGE | {"out": "out.safetensors", "kept": ("out.safetensors.partial",)}),
    ),
    _line("merge adapters", "adapter other-adapter", "adapter other-adapter", **_MERGE),
    _line("merge adapted", "base+adapter b --base base", "base adapter b", **_MERGE),
    _line("merge sharded", "sharded a --max-shard-size 8KB", "sharded a", **_MERGE),
    _line("merge recipe", "recipe.yaml", "recipe.yaml a b", **_MERGE),
    _line("merge recipe verified", "recipe.yaml --verify", "recipe.yaml a b", **_MERGE),
    _line(
        "merge resumed",
        "a b --weights precision",
        "a b out.partial",
        **(_MERGE | {"broken": ("out.partial",)}),
    ),
    _line("merge plan", "a b --base base --weights precision --dry-run", "base a b", weight=2.0),
    _line("inspect", "a", "a", weight=3.0),
    _line("inspect pair", "a sharded", "a sharded", weight=2.0),
    _line(
        "inspect file",
        "a.safetensors --precision a/posterior",
        "a a.safetensors a.precision.safetensors",
        weight=1.0,
    ),
    _line("inspect adapter", "adapter --json", "adapter", weight=1.0),
    _line("convert folder", "pickled", "pickled", "out", weight=4.0, weights=True),
    _line("convert shards", "pickled-shards", "pickled-shards", "out", weight=4.0, weights=True),
    _line(
        "convert file",
        "pickled/pytorch_model.bin",
        "pickled",
        "out.safetensors",
        weight=2.0,
        broken=("pickled/pytorch_model.bin",),
    ),
    _line("push", "merged org/x --dry-run", "merged", weight=4.0),
    _line("push json", "a org/x --dry-run --json", "a", weight=3.0),
    _line("push adapter", "adapter org/x --dry-run", "adapter", weight=2.0),
    _line("push posterior", "merged org/x --dry-run --posterior-only", "merged", weight=1.0),
    _line("precision", "a --data rows.jsonl --examples 4 -o out", "a rows.jsonl", "out"),
    _line(
        "precision beside", "b --data rows.csv --examples 4 --force", "b rows.csv", "b/posterior"
    ),
    _line("evaluate text", "a --perplexity rows.jsonl -o out.json", "a rows.jsonl", "out.json"),
    _line("evaluate parquet", "a --perplexity rows.parquet", "a rows.parquet", weight=0.5),
    _line("evaluate plain", "a --perplexity rows.txt --samples 2 --prior 1", "a rows.txt"),
    _line(
        "evaluate toxicity",
        f"a --toxicity rows.csv --scorer words:words.txt {_SAMPLED}",
        "a rows.csv words.txt",
    ),
    _line(
        "evaluate by a model",
        f"a --toxicity rows.jsonl --scorer model:classifier#LABEL_1 {_SAMPLED}",
        "a classifier rows.jsonl",
    ),
    _line("evaluate labels", "classifier --classify labelled.jsonl", "classifier labelled.jsonl"),
    _line(
        "finetune",
        "finetune.yaml",
        "finetune.yaml a rows.jsonl",
        "out",
        kept=("out.checkpoints",),
        weight=0.7,
    ),
    _line(
        "finetune resumed",
        "finetune.yaml --resume",
        "finetune.yaml a rows.jsonl out.checkpoints",
        "out",
        kept=("out.checkpoints",),
        broken=("out.checkpoints",),
        weight=0.7,
    ),
    _line(
        "detox",
        "detox.yaml",
        "detox.yaml base rows.jsonl words.txt",
        "out",
        kept=("out",),
        weight=0.1,
    ),
)


def make_world(root: Path) -> None:
    """Write all models, texts and settings below a folder."""
    root.mkdir(parents=True)
    with contextlib.chdir(root):
        (root.parent / "secrets").mkdir()
        (root.parent / "canary").write_text(CANARY)
        (root.parent / "secrets" / "id_rsa").write_text(CANARY)
        (root.parent / "secrets" / "config.json").write_text(json.dumps({"secret": CANARY}))
        _write_texts()
        _write_models()
        _write_pickles()
        _write_settings()
        _write_merges()


def _write_texts() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(12)]
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(texts)]
    for name in ("rows.jsonl", "labelled.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rows.csv").write_text(
        "text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(texts))
    )
    Path("rows.txt").write_text("\n".join(texts) + "\n")
    Path("words.txt").write_text("bad\ndull\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "rows.parquet")


def _write_models() -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import tiny_bert, tiny_gpt2

    tiny_gpt2("base", width=8, layers=1, context=16)
    tiny_bert("classifier")
    for seed, name in enumerate(("base", "a", "b")):
        folder = Path(name)
        if name != "base":
            shutil.copytree("base", name)
            model = transformers.AutoModelForCausalLM.from_pretrained("base")
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
            model.save_pretrained(name)
        _add_side_files(folder)
    for seed, name in enumerate(("base", "a", "b")):
        _add_posterior(Path(name), seed)
    for name in ("a", "b"):
        shutil.copy(f"{name}/model.safetensors", f"{name}.safetensors")
        _add_posterior(Path(f"{name}.safetensors"), 1)
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    model.save_pretrained("sharded", max_shard_size="4KB")
    _add_posterior(Path("sharded"), 3)
    for seed, name in enumerate(("adapter", "other-adapter")):
        base = transformers.AutoModelForCausalLM.from_pretrained("base")
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
        adapted = get_peft_model(base, lora)
        torch.manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        adapted.save_pretrained(name)
        _add_posterior(Path(name), seed)


def _add_side_files(folder: Path) -> None:
    folder.joinpath("README.md").write_text(CARD)
    folder.joinpath("LICENSE").write_text("Apache License\n")
    folder.joinpath("chat_template.jinja").write_text("{{ messages }}")
    folder.joinpath("special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    folder.joinpath("evaluation.json").write_text('{"model": "a"}')
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def _add_posterior(path: Path, seed: int) -> None:
    from mergekit_bayes.checkpoint.layout import checkpoint_files
    from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
    from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, save_posterior

    source = SafetensorsSource(checkpoint_files(path))
    rng = np.random.default_rng(seed)
    precision = {
        name: np.exp(rng.uniform(-2, 2, spec.shape)).astype(np.float32)
        for name, spec in source.specs.items()
    }
    prior = Prior(kind="isotropic", precision=0.05)
    info = PosteriorInfo(
        estimator="ggn",
        unit="token",
        observations=100.0,
        ess=100.0,
        prior=prior,
        mean=identify(source),
        training={"steps": 3},
        health={"precision_median": 1.0},
    )
    save_posterior(path, precision, info)
    source.close()


def _write_pickles() -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file("base/model.safetensors")
    for name in ("pickled", "pickled-shards"):
        shutil.copytree("base", name)
        (Path(name) / "model.safetensors").unlink()
        shutil.rmtree(Path(name) / "posterior")
    torch.save(tensors, "pickled/pytorch_model.bin")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, f"pickled-shards/{file}")
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    Path("pickled-shards/pytorch_model.bin.index.json").write_text(json.dumps(content))


def _write_settings() -> None:
    short = {"batch_size": 2, "max_steps": 1, "flush_batches": 1}
    finetune = {"model": "a", "data": "rows.jsonl", "output": "out", **short, "save_steps": 1}
    finetune |= {"max_length": 8, "keep_checkpoints": True}
    Path("finetune.yaml").write_text(yaml.safe_dump(finetune))
    detox = {
        "base": "base",
        "output": "out",
        "toxic": {"data": "rows.jsonl"},
        "finetune": short,
        "precision": {"data": "rows.jsonl", "examples": 4},
        "evaluate": {
            "perplexity": {"rows": "rows.jsonl"},
            "toxicity": "rows.jsonl",
            "scorer": ["words:words.txt"],
            "continuations": 2,
            "new_tokens": 3,
            "bootstrap": 20,
        },
        "scales": [0.5, 1.0],
        "extra_scales": 0,
    }
    Path("detox.yaml").write_text(yaml.safe_dump(detox))


def _write_merges() -> None:
    """A merged model with its report, its recipe, a merge that was stopped, and a checkpoint."""
    from mergekit_bayes.finetune.run import run_finetune
    from mergekit_bayes.finetune.settings import FinetuneConfig
    from mergekit_bayes.merge import MergeConfig, carry_out, plan_merge, run_merge

    config = MergeConfig(models=("a", "b"), weights="precision", out="merged")
    run_merge(config)
    _add_side_files(Path("merged"))
    shutil.copy("merged/merge_recipe.yaml", "recipe.yaml")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (
        contextlib.suppress(KeyboardInterrupt),
        plan_merge(config.model_copy(update={"out": "out"})) as plan,
    ):
        carry_out(plan, progress=stop, threads=1)
    run_finetune(FinetuneConfig(**yaml.safe_load(Path("finetune.yaml").read_text())), quiet=True)
    shutil.rmtree("out")


def fresh(world: Path, line: Line, folder: Path) -> None:
    """Copy what a line needs of the world into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in line.needs:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (world / name).is_dir():
            shutil.copytree(world / name, target, symlinks=True)
        else:
            shutil.copy2(world / name, target)


def files_of(line: Line, root: Path) -> list[str]:
    """The files and folders of a line that a case may break, relative to the world."""
    found = []
    for name in line.broken or line.needs:
        path = root / name
        found.append(name)
        if path.is_dir():
            found += [p.relative_to(root).as_posix() for p in sorted(path.rglob("*"))]
    return found


def side_file(name: str) -> bool:
    """Whether a merge or conversion copies a file and takes nothing from it."""
    parts = Path(name).parts
    known = ("README.md", "LICENSE", "chat_template.jinja", "special_tokens_map.json")
    return "1_Pooling" in parts or parts[-1] in (*known, "evaluation.json", "tokenizer_config.json")
