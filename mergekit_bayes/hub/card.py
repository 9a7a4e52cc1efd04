"""The card of a model folder (README.md), from what its own files record: pure, deterministic and without a date.

What we write stands between two HTML comments; a person's text around them stays. The first comment remembers a digest
of each value that we put into the front matter, so that later a value of ours is renewed and a person's kept.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.posterior import PosteriorInfo, checkpoint_files, precision_files, read_info
from mergekit_bayes.tensors import SafetensorsSource, identity

License = Mapping[str, str]  # `license`, and for the licence `other` its name and link

_END = "<!-- bmerge: end -->"
_SECTION = re.compile(r"<!-- bmerge: begin(?P<ours>[^>]*) -->\n.*?" + re.escape(_END), re.S)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.S)
_PEFT = re.compile(r"^- PEFT \S+$", re.M)  # in the last section of a card that PEFT made
_PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}  # of its front matter
_PEFT_LINE = re.compile(
    r"### Framework versions|- PEFT \S+|## Training procedure"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (?:quant_method|_?load_in_[48]bit|llm_int8_\w+|bnb_4bit_\w+): .*"
)
_RECORDS = ("merge_report.json", "merge_recipe.yaml", "finetune.yaml")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_FRAME = {"counts": "equal", "shrink": None, "pool": None, "anchor": "h0", "only": None, "on_missing": "error",
          "vocab": "error", "on_bad": "error"}  # fmt: skip


class Parent(NamedTuple):
    """A model that this one was made from.

    `path` is a local folder or file, `repo` and `commit` say where on the Hub it lies; one of the two is None.
    """

    role: str  # base, task or adapter
    scale: float | None
    path: str | None
    repo: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """For people: the repository, or the last part of a path, since other parts are nobody's business."""
        return self.repo or Path(self.path or "?").name


class Card(NamedTuple):
    text: str
    notes: tuple[str, ...]  # what a person should know before publishing it


def model_card(folder: Path, **options: Any) -> str:
    """The text of `make_card`."""
    return make_card(folder, **options).text


def make_card(
    folder: Path,
    *,
    repo: str | None = None,
    existing: str | None = None,
    licenses: Mapping[Parent, License | None] | None = None,
    posterior: bool = True,
    posterior_only: bool = False,
) -> Card:
    """The card of a model folder, of an adapter's, or of a folder that holds only a posterior.

    Args:
        folder: Nothing outside of it is read.
        repo: `org/name`, for the lines that say how to load it; by default the folder's name.
        existing: The card to keep a person's text of; by default the folder's README.md.
        licenses: Of the parents, as far as they are known.
        posterior: False for a card of the model without its posterior.
        posterior_only: For a card of the posterior without its model.

    Raises:
        CheckpointError: The folder holds neither a model nor a precision, or a file of it cannot be read.
        ConfigError: An existing front matter that is not YAML.
    """
    facts = _Facts(folder, repo or folder.resolve().name, posterior=posterior, only=posterior_only)
    if existing is None and (folder / "README.md").exists():
        existing = (folder / "README.md").read_text()
    if existing is not None and is_generated(existing):
        existing = None
    theirs, body = _split(existing or "", folder)
    if found := _SECTION.search(body):
        theirs = {k: v for k, v in theirs.items() if f"{k}={_digest(v)}" not in found["ours"].split()}
    notes = list(facts.notes)
    ours = _front_matter(facts, licenses or {}, notes, has_license="license" in theirs)
    kept = {k: v for k, v in ours.items() if k not in theirs}
    marks = "".join(f" {k}={_digest(v)}" for k, v in kept.items())
    section = f"<!-- bmerge: begin{marks} -->\n{_section(facts)}\n{_END}"
    if found:
        body = body[: found.start()] + section + body[found.end() :]
    elif body.strip():
        body = f"{body.rstrip()}\n\n{section}\n"
    else:
        body = f"# {facts.repo.rpartition('/')[2]}\n\n{section}\n"
    front = yaml.safe_dump(theirs | kept, sort_keys=False, allow_unicode=True, width=10**6)
    return Card(f"---\n{front}---\n\n{body.lstrip()}", tuple(notes))


def is_generated(card: str) -> bool:
    """Whether a card is PEFT's with nobody's word in it: each line is of its template, each field of its making."""
    if not _PEFT.search(card):
        return False
    match = _FRONT.match(card)
    try:
        front = yaml.safe_load(match["yaml"]) if match else {}
    except yaml.YAMLError:
        return False
    if front and not (isinstance(front, dict) and set(front) <= _PEFT_KEYS):
        return False
    known = _template_lines()
    lines = (line.strip() for line in card[match.end() if match else 0 :].splitlines())
    return all(not line or line in known or _PEFT_LINE.fullmatch(line) for line in lines)


def parents(folder: Path, *, posterior_only: bool = False) -> tuple[Parent, ...]:
    """What a folder's own records say it was made from, or its posterior was; empty if they say nothing."""
    if posterior_only or _bare(folder):
        info = _info(_bare(folder) or precision_files(folder))
        of = str(info.training.get("model", "")) if info is not None else ""
        return tuple(_named(of, "model", None, None)) if of else ()
    recipe, report = _read(folder / "merge_recipe.yaml"), _read(folder / "merge_report.json")
    if "models" in report:  # whole models
        found = []
        for model in report["models"]:
            found += _named(str(model["ref"]), model["role"], model["scale"], model.get("commit"))
        return tuple(found)
    if "adapters" in report:
        scales = report["scales"] * (len(report["adapters"]) if len(report["scales"]) == 1 else 1)
        refs = recipe.get("models") or report["adapters"]
        pairs = zip(refs, scales, strict=False)
        return tuple(p for ref, scale in pairs for p in _named(str(ref), "task", scale, None))
    if model := _read(folder / "finetune.yaml").get("model"):
        return tuple(_named(str(model), "base", None, None))
    if (folder / "adapter_config.json").exists():
        config = _read(folder / "adapter_config.json")
        return (_adapter_base(config),) if config.get("base_model_name_or_path") else ()
    return ()


def read_license(card: str) -> License | None:
    """The licence that a card's front matter names."""
    match = _FRONT.match(card)
    try:
        front = yaml.safe_load(match["yaml"]) if match else None
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict) or not isinstance(front.get("license"), str):
        return None
    keys = ("license", "license_name", "license_link") if front["license"] == "other" else ("license",)
    return {k: str(front[k]) for k in keys if front.get(k)}


class _Facts:
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
        self.pipeline = _pipeline(config.get("architectures") or (), str(self.adapter.get("task_type")))
        self.evaluations = () if self.only_posterior else tuple(self._evaluations())

    def _evaluations(self) -> Any:
        """Reports of `bmerge evaluate` in this folder that are of these weights."""
        for file in sorted([*self.folder.glob("report.json"), *self.folder.glob("*/report.json")]):
            report = _read(file)
            if "model_identity" not in report:
                continue
            if report["model_identity"] != self.identity:
                name = file.relative_to(self.folder)
                self.notes.append(f"{name} evaluates other weights than these, so the card leaves its results out")
                continue
            yield report


def _front_matter(
    facts: _Facts, licenses: Mapping[Parent, License | None], notes: list[str], *, has_license: bool
) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(p.repo for p in facts.parents if p.repo is not None))
    if facts.is_adapter and facts.report:
        base = _adapter_base(facts.adapter)
        bases = [*([base.repo] if base.repo and base.repo not in bases else []), *bases]
    local = list(dict.fromkeys(p.name for p in facts.parents if p.repo is None))
    if local:
        what = "is a local folder" if len(local) == 1 else "are local folders"
        notes.append(f"{', '.join(local)} {what}, which base_model cannot name; merge by Hub ids to have them linked")
    relation: str | None = None  # the Hub has no word for a posterior's
    if facts.report:
        relation = "merge"
    elif facts.only_posterior:
        pass
    elif facts.is_adapter:
        relation = "adapter"
    else:
        relation = "finetune"
    tags = ["mergekit-bayes", *(["merge"] if facts.report else []), *(["posterior"] if facts.has_posterior else [])]
    options: dict[str, Any] = {}
    if results := [r for report in facts.evaluations for r in _results(report)]:
        options = {"model_name": facts.repo.rpartition("/")[2], "eval_results": results}
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=relation if bases else None,
        library_name=None if facts.only_posterior else "peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.pipeline,
        tags=tags,
        **options,
    )
    written: Any = data  # the client's method has no types
    found = json.loads(json.dumps(written.to_dict())) | (
        dict(_license(facts.parents, licenses, notes)) if not has_license else {}
    )
    return {k: v for k, v in found.items() if v is not None}


def _license(found: Sequence[Parent], licenses: Mapping[Parent, License | None], notes: list[str]) -> License:
    """The licence of all parents, if they agree."""
    if not found:
        notes.append("no licence: nothing in the folder says what it was made from; name one in the front matter")
        return {}
    known = {p: licenses.get(p) for p in found}
    if missing := list(dict.fromkeys(p.name for p, value in known.items() if not value)):
        notes.append(f"no licence: the cards of {', '.join(missing)} name none, or are not known here")
        return {}
    values = [value for value in known.values() if value]
    if any(value != values[0] for value in values):
        said = ", ".join(f"{p.name}: {value['license']}" for p, value in known.items() if value)
        notes.append(f"no licence: the parents disagree ({said}); name one in the front matter yourself")
        return {}
    return values[0]


def _results(report: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    rows: list[tuple[str, str, str, str, float]] = []  # task, data, metric, its name, value
    for name, found in (report.get("perplexity") or {}).items():
        rows.append(("text-generation", name, "perplexity", "perplexity per token", _value(found["token"])))
    for name, found in (report.get("classification") or {}).items():
        rows.append(("text-classification", name, "accuracy", "accuracy", _value(found["accuracy"])))
        rows.append(("text-classification", name, "ece", "expected calibration error", _value(found["ece"])))
    for scorer, found in (report.get("toxicity") or {}).items():
        name = Path(scorer.partition(":")[2] or scorer).name
        rows.append(("text-generation", "prompts", "toxicity", f"toxic share by {name}", _value(found["share"])))
    return [
        EvalResult(
            task_type=task, dataset_type=data, dataset_name=data, metric_type=metric, metric_name=title,
            metric_value=value,
        )
        for task, data, metric, title, value in rows
    ]  # fmt: skip


def _value(interval: Any) -> float:
    return float(f"{interval['value'] if isinstance(interval, dict) else interval:.6g}")


def _section(facts: _Facts) -> str:
    parts = [_opening(facts)]
    if facts.parents:
        parts.append(_table_of_parents(facts))
    if facts.report.get("models"):
        parts.append(_merge_numbers(facts.report))
    elif facts.report:
        parts.append(f"Rank {facts.report['rank']}; the largest relative error of a layer is "
                     f"{facts.report['largest_error']:.3g}.")  # fmt: skip
    if notes := [_published(n, facts) for n in facts.report.get("notes", ())]:
        parts.append("Notes of the merge:\n\n" + "\n".join(f"- {n}" for n in notes))
    if recipe := facts.recipe or facts.finetune:
        name = "merge_recipe.yaml" if facts.recipe else "finetune.yaml"
        text = yaml.safe_dump(_shortened(recipe), sort_keys=False, allow_unicode=True, width=10**6).rstrip()
        parts.append(f"## Recipe\n\n`{name}`, local paths by their last part:\n\n````yaml\n{text}\n````")
    parts.append(_loading(facts))
    if facts.has_posterior:
        parts.append(_posterior(facts))
    if further := _further(facts):
        parts.append(further)
    return "\n\n".join(parts).replace("<!--", "&lt;!--")  # the two comments around it are the only ones


def _opening(facts: _Facts) -> str:
    title = "## How it was made\n\n"
    tool = "`bmerge` (mergekit-bayes)"
    if facts.report.get("models"):
        count = sum(m["role"] != "base" for m in facts.report["models"])
        what = f"{count} model{'s' * (count > 1)}" + (" on a base" if count < len(facts.report["models"]) else "")
        text = f"{tool} {facts.report.get('version', '')} merged {what} by `{facts.report['method']}`:"
        return f"{title}{text}\n\n```\n{facts.report['formula']}\n```"
    if facts.report:
        text = f"{tool} {facts.report.get('version', '')} merged {len(facts.report['adapters'])} adapters:"
        return f"{title}{text}\n\n```\n{facts.report['formula']}\n```"
    if facts.finetune:
        lora = "an adapter (LoRA) " if facts.is_adapter else ""
        how = {"ivon": "IVON", "adamw": "AdamW"}.get(str(facts.finetune.get("optimizer", "ivon")), "?")
        return f"{title}{tool} fine-tuned {lora}with {how}."
    if facts.only_posterior:
        return f"{title}A precision for a model that lies elsewhere, made with {tool}; there are no weights here."
    return f"{title}Nothing in the folder says how these weights were made; {tool} pushed them."


def _table_of_parents(facts: _Facts) -> str:
    merged = facts.report.get("models") or []
    numbers = {m["ref"]: m for m in merged}
    rows = []
    for i, p in enumerate(facts.parents):
        where = f"[{p.repo}](https://huggingface.co/{p.repo}/tree/{p.commit})" if p.repo and p.commit else f"`{p.name}`"
        number = merged[i] if len(merged) == len(facts.parents) else numbers.get(p.repo, {})
        rows.append([
            where, p.role, "" if p.scale is None else f"{p.scale:g}", f"`{p.commit}`" if p.commit else "",
            _number(number.get("observations")), _number(number.get("ratio")),
        ])  # fmt: skip
    columns = ["model", "role", "scale", "commit", "observations", "sum H / sum H of the base"]
    keep = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    lines = [[columns[i] for i in keep], ["---"] * len(keep), *([row[i] for i in keep] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _merge_numbers(report: Mapping[str, Any]) -> str:
    lines = [f"- {report['merged_tensors']} tensors merged, {len(report['copied'])} copied, "
             f"{len(report['left_out'])} left out"]  # fmt: skip
    if any((m["scale"] or 0) < 0 for m in report["models"]):
        lines.append(
            f"- guard {report['guard']:g}: it acted on {report['guarded_share']:.2%} of the entries; the largest "
            f"multiplier of what was removed is {report['largest_multiplier']:.3g}"
        )
    if report.get("changed_share") is not None:
        lines.append(f"- {report['changed_share']:.2%} of the merged entries differ from the base in some model")
    if report.get("lost_share") is not None:
        lines.append(f"- {report['lost_share']:.2%} of those were rounded back to the base's value")
    return "\n".join(lines)


def _loading(facts: _Facts) -> str:
    if facts.only_posterior:
        model = facts.parents[0].name if facts.parents else "MODEL"
        return (
            "## Use\n\nWith the model that it belongs to, whose weights are checked:\n\n```bash\n"
            f"bmerge merge {model} OTHER --weights precision --precision {model}={facts.repo} -o merged\n```"
        )
    if facts.is_adapter:
        kind = "SequenceClassification" if facts.pipeline == "text-classification" else "CausalLM"
        code = f"from peft import AutoPeftModelFor{kind}\n\n"
        code += f'model = AutoPeftModelFor{kind}.from_pretrained("{facts.repo}")'
    else:
        kind = {"text-classification": "AutoModelForSequenceClassification", "fill-mask": "AutoModelForMaskedLM",
                "text-generation": "AutoModelForCausalLM"}.get(facts.pipeline or "", "AutoModel")  # fmt: skip
        code = f'from transformers import {kind}, AutoTokenizer\n\nmodel = {kind}.from_pretrained("{facts.repo}")\n'
        code += f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")'
    return f"## Use\n\n```python\n{code}\n```"


def _posterior(facts: _Facts) -> str:
    text = [
        "## Posterior",
        "`posterior/precision.safetensors` holds the inverse variance of each entry, 1/weight^2, under the names "
        "of the weights' tensors. It belongs to these weights only, and readers check that.",
    ]
    if (info := facts.info) is not None:
        prior = "none" if info.prior.kind == "none" else f"{info.prior.kind}, {info.prior.precision:.4g}"
        pull: str = info.anchor.kind
        if info.anchor.precision is not None and pull != "none":
            pull += f", {info.anchor.precision:.4g}"
        rows = [
            ("estimator", info.estimator),
            ("observations", f"{_number(info.observations) or 'unknown'} (unit: {info.unit or 'unknown'})"),
            ("scale (ess)", _number(info.ess)),
            ("prior inside it", prior),
            ("trained towards", pull),
            ("weights, by sampled blocks", f"`{info.mean.blocks}`"),
            *((str(k), _number(v)) for k, v in info.health.items()),
        ]
        text.append("| | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in rows if v))
    if not facts.only_posterior:
        name = "open_adapter" if facts.is_adapter else "open_posterior"
        room = "lora" if facts.is_adapter else "posterior"
        opened = f'{name}("{facts.repo}")' + (".posterior" if facts.is_adapter else "")
        code = f"from mergekit_bayes.{room} import {name}\n\nposterior = {opened}"
        code += "  # posterior.mean, .precision, .info"
        text.append(f"```python\n{code}\n```")
    return "\n\n".join(text)


def _further(facts: _Facts) -> str | None:
    if facts.only_posterior:
        return None
    report, lines = facts.report, []
    merged = report.get("models") or []
    if report:
        base = next((_pinned(m["ref"], m.get("commit")) for m in merged if m["role"] == "base"), None)
    else:
        base = next((_pinned(p.name, p.commit) for p in facts.parents if p.role == "base"), None)
    weights = "precision" if facts.has_posterior else "uniform"
    on = f" --base {shlex.quote(base)}" if base and not facts.is_adapter else ""
    frame = _frame(facts.recipe, [base]) if merged and weights == facts.recipe.get("weights") else ""
    if merged or not on or weights == "uniform":
        lines.append(
            f"bmerge merge {facts.repo} OTHER{on} --weights {weights}{frame} -o merged       # merge it further"
        )
    else:  # a fine-tune's base has no posterior as a rule
        lines.append(
            f"bmerge merge {facts.repo} OTHER --weights precision -o merged       # the surer entry counts more"
        )
        lines.append(f"bmerge merge {facts.repo} OTHER{on} -o merged       # add what both learnt")
    for undo in _undoable(facts) if on else ():
        task = _pinned(undo["ref"], undo.get("commit"))
        lines.append(
            f"bmerge merge {facts.repo} {shlex.quote(task)}{on} --weights {report['weights']} --scale 1 "
            f"--scale {str(-undo['scale']).removesuffix('.0')}{_frame(facts.recipe, [base, task])} -o without       "
            f"# take {re.sub(r'@[0-9a-f]{40}', '', task)} out again"
        )
    if facts.recipe:
        lines.append("bmerge merge merge_recipe.yaml -o again       # make it anew, with the same bytes")
    width = max(line.index("       #") for line in lines)
    aligned = [f"{line.partition('       #')[0]:<{width}}   #{line.partition('       #')[2]}" for line in lines]
    title = "Merge it further, or undo it" if any("-o without" in line for line in lines) else "Merge it further"
    return f"## {title}\n\n```bash\n" + "\n".join(aligned) + "\n```"


def _undoable(facts: _Facts) -> list[Mapping[str, Any]]:
    """Up to three tasks that one scale takes out again; none where the precision to do it with is missing."""
    report = facts.report
    if report.get("method") not in ("task_arithmetic", "gradient_matching"):
        return []
    if report["weights"] == "precision" and not facts.has_posterior:
        return []
    if any(isinstance(scale, str) for scale in facts.recipe.get("scale", ())):  # other scales in some tensors
        return []
    return [m for m in report["models"] if m["role"] == "task" and m["scale"]][:3]


def _frame(recipe: Mapping[str, Any], refs: Sequence[str | None]) -> str:
    """The settings of a merge that one with its result must repeat, those of single models only for `refs`."""
    words = []
    for key in ("precision", "isotropic", "observations"):
        named = {_pinned(ref, None): value for ref, value in (recipe.get(key) or {}).items()}
        words += [f"--{key}={ref}={_shortened(named[ref])}" for ref in refs if ref in named]
    for key, usual in _FRAME.items():
        if (value := recipe.get(key, usual)) != usual:
            words.append(f"--{key.replace('_', '-')}={value}")
    return "".join(f" {shlex.quote(word)}" for word in words)


def _pinned(ref: str, commits: str | None) -> str:
    """What to type for a model: each Hub id at its commit, a local path by its last part; BASE+ADAPTER as a whole."""
    parts = []
    for p in _named(ref, "", None, commits):
        places = (p.path or "").split("+")
        parts += [f"{p.repo}@{p.commit}"] if p.repo and p.commit else [Path(place).name for place in places]
    return "+".join(parts)


def _named(ref: str, role: str, scale: float | None, commits: str | None) -> list[Parent]:
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


def _adapter_base(config: Mapping[str, Any]) -> Parent:
    """PEFT names a base by Hub id or path; what has the form of a Hub id is taken for one."""
    name, revision = str(config.get("base_model_name_or_path")), str(config.get("revision") or "")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return Parent("base", None, None, name, revision if _COMMIT.fullmatch(revision) else None)
    return Parent("base", None, name)


def _shortened(value: Any) -> Any:
    """Local paths by their last part: where files lie on somebody's machine is no news."""
    if isinstance(value, dict):
        return {_shortened(k): _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return "+".join(_last(p) for p in value.split("+")) if isinstance(value, str) else value


def _last(text: str) -> str:
    return Path(text).name if text.startswith(("/", "~", ".")) and len(text) > 2 and " " not in text else text


def _published(note: str, facts: _Facts) -> str:
    for p in facts.parents:
        if p.path and "/" in p.path:
            note = note.replace(p.path, p.name)
    return note


def _pipeline(architectures: Sequence[str], task: str) -> str | None:
    ends = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
            "ForSequenceClassification": "text-classification"}  # fmt: skip
    for name in architectures:
        for end, tag in ends.items():
            if name.endswith(end):
                return tag
    return {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(task)


def _number(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _template_lines() -> set[str]:
    """The lines of the Hub client's empty model card, with which PEFT begins."""
    from huggingface_hub import ModelCard

    text = Path(ModelCard.default_template_path).read_text(encoding="utf-8")
    filled = re.sub(r'\{\{ \w+ \| default\("([^"]*)", true\) ?\}\}', r"\1", text)
    return {line.strip() for line in filled.splitlines()}


def _split(text: str, folder: Path) -> tuple[dict[str, Any], str]:
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        front = yaml.safe_load(match["yaml"]) or {}
        if not isinstance(front, dict):
            raise ValueError("it is not a mapping")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder / 'README.md'}: its front matter is not YAML ({reason}). Mend it between the two '---'."
        ) from None
    return front, text[match.end() :]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


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
        raise CheckpointError(f"{file}: cannot be read ({reason}). Make it anew, or remove it.") from None
