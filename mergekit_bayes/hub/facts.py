"""What a model folder says about itself: parents, licence, base, pipeline."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import PosteriorInfo, read_info

License = Mapping[str, str]  # `license`, and for the licence `other` its name and link
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.S)
_RECORDS = ("merge_report.json", "merge_recipe.yaml", "finetune.yaml")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Parent(NamedTuple):
    """A model that this one was made from.

    `path` is a local folder or file, `repo` and `commit` say where on the Hub it lies; one of the
    two is None.
    """

    role: str  # base, task or adapter
    scale: float | None
    path: str | None
    repo: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """For people: the repository, or the last part of a path, since other parts are nobody's
        business.
        """
        return self.repo or Path(self.path or "?").name


def parents(folder: Path, *, posterior_only: bool = False) -> tuple[Parent, ...]:
    """What a folder's own records say it was made from, or its posterior was; empty if they say
    nothing.
    """
    if posterior_only or _bare(folder):
        info = _info(_bare(folder) or precision_files(folder))
        of = str(info.training.get("model", "")) if info is not None else ""
        return tuple(named_parents(of, "model", None, None)) if of else ()
    recipe, report = _read(folder / "merge_recipe.yaml"), _read(folder / "merge_report.json")
    if "models" in report:  # whole models
        found = []
        for model in report["models"]:
            found += named_parents(
                str(model["ref"]), model["role"], model["scale"], model.get("commit")
            )
        return tuple(found)
    if "adapters" in report:
        scales = report["scales"] * (len(report["adapters"]) if len(report["scales"]) == 1 else 1)
        refs = recipe.get("models") or report["adapters"]
        pairs = zip(refs, scales, strict=False)
        return tuple(
            p for ref, scale in pairs for p in named_parents(str(ref), "task", scale, None)
        )
    if model := _read(folder / "finetune.yaml").get("model"):
        return tuple(named_parents(str(model), "base", None, None))
    if (folder / "adapter_config.json").exists():
        config = _read(folder / "adapter_config.json")
        return (adapter_base(config),) if config.get("base_model_name_or_path") else ()
    return ()


def read_license(card: str) -> License | None:
    """The licence that a card's front matter names."""
    match = FRONT_MATTER.match(card)
    try:
        front = yaml.safe_load(match["yaml"]) if match else None
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict) or not isinstance(front.get("license"), str):
        return None
    keys = (
        ("license", "license_name", "license_link") if front["license"] == "other" else ("license",)
    )
    return {k: str(front[k]) for k in keys if front.get(k)}


class Facts:
    """What the folder's files say."""

    def __init__(self, folder: Path, repo: str, *, posterior: bool, only: bool) -> None:
        self.folder, self.repo = folder, repo
        self.notes: list[str] = []
        bare = _bare(folder)
        self.only_posterior = only or bool(bare)
        records = {} if self.only_posterior else {n: _read(folder / n) for n in _RECORDS}
        self.report, self.recipe, self.finetune = (records.get(n, {}) for n in _RECORDS)
        self.parents = parents(folder, posterior_only=only)
        self.adapter = _read(folder / "adapter_config.json")
        self.is_adapter = bool(self.adapter) and not (folder / "model.safetensors").exists()
        self.identity: str | None = None
        if not bare:
            mean = SafetensorsSource(checkpoint_files(folder))
            self.identity = identity(mean)
            mean.close()
        files = bare or (precision_files(folder) if posterior else [])
        self.has_posterior = bool(files)
        self.info = _info(files)
        config = _read(folder / "config.json")
        self.pipeline = _pipeline(
            config.get("architectures") or (), str(self.adapter.get("task_type"))
        )
        self.evaluations = () if self.only_posterior else tuple(self._evaluations())

    def _evaluations(self) -> Any:
        """Reports of `bmerge evaluate` in this folder that are of these weights."""
        for file in sorted([*self.folder.glob("report.json"), *self.folder.glob("*/report.json")]):
            report = _read(file)
            if "model_identity" not in report:
                continue
            if report["model_identity"] != self.identity:
                name = file.relative_to(self.folder)
                self.notes.append(
                    f"{name} evaluates other weights than these, so the card leaves its results out"
                )
                continue
            yield report


def named_parents(ref: str, role: str, scale: float | None, commits: str | None) -> list[Parent]:
    """One parent, or the two of BASE+ADAPTER; on the Hub are those of which a commit is known."""
    names = ref.split("+") if commits is None or "+" in commits else [ref]
    known = (commits or "").split("+") if commits else [""] * len(names)
    if len(known) != len(names):  # a local path with a plus in it
        names, known = [ref], [commits or ""]
    found = []
    for i, (name, commit) in enumerate(zip(names, known, strict=True)):
        repo, _, revision = name.partition("@")
        commit = commit or (revision if _COMMIT.fullmatch(revision) else "")
        kind = "adapter" if len(names) > 1 and i > 0 else role
        where = (None, repo, commit) if commit else (name, None, None)
        found.append(Parent(kind, scale, *where))
    if commits is None and not any(p.repo for p in found):
        return [Parent(role, scale, ref)]
    return found


def adapter_base(config: Mapping[str, Any]) -> Parent:
    """PEFT names a base by Hub id or path; what has the form of a Hub id is taken for one."""
    name, revision = str(config.get("base_model_name_or_path")), str(config.get("revision") or "")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return Parent("base", None, None, name, revision if _COMMIT.fullmatch(revision) else None)
    return Parent("base", None, name)


def _pipeline(architectures: Sequence[str], task: str) -> str | None:
    ends = {
        "ForCausalLM": "text-generation",
        "LMHeadModel": "text-generation",
        "ForMaskedLM": "fill-mask",
        "ForSequenceClassification": "text-classification",
    }
    for name in architectures:
        for end, tag in ends.items():
            if name.endswith(end):
                return tag
    return {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(task)


def _bare(folder: Path) -> list[Path]:
    """The files of a precision that lies alone in a folder."""
    return sorted(folder.glob("precision*.safetensors"))


def _info(files: Sequence[Path]) -> PosteriorInfo | None:
    if not files:
        return None
    source = SafetensorsSource(files)
    try:
        return read_info(source)
    finally:
        source.close()


def _read(file: Path) -> dict[str, Any]:
    """A file of JSON or YAML; nothing if it is not there."""
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    if not file.exists():
        return {}
    try:
        found = parse(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
        return found
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: cannot be read ({reason}). Make it anew, or remove it."
        ) from None
