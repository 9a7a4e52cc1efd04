"""The recipe by which mergekit makes a merge of ours, where it has the method.

What it means by a method is what `RECIPE_METHODS` says. Where its numbers are not ours, up to
rounding, a remark says how they differ; what it cannot say is refused by the name of its flag.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit.objects import Filter, Recipe, Reference, Setting, Source
from mergekit_bayes.mergekit.written import recipe_yaml
from mergekit_bayes.plan import MergeConfig, MergePlan
from mergekit_bayes.plan.inputs import Input
from mergekit_bayes.plan.options import ScaleRule, parse_scales
from mergekit_bayes.posterior import Posterior

_OTHER_MASKS = "its random numbers are others: --random-seed is not our seed"
_OTHER_SIZE = (
    "what is kept gets the L1 norm of each task vector, where ours is divided by its share"
)
_HALF = "its epsilon is half the range of the probabilities, and ranks count from 0 to n - 1"

_ESCAPE = re.compile(r"\\([^\w\s])")


class _Form(NamedTuple):
    """How mergekit says a method.

    Attributes:
        name: Its `merge_method`.
        scales: What becomes of our scales: the models' weights; one `lambda`, since mergekit would
            elect signs by weights; or nothing, since its models have none.
        settings: Our settings, and what they are called there.
        remarks: How its numbers differ.
    """

    name: str
    scales: Literal["weights", "lambda", "none"] = "none"
    settings: Mapping[str, str] = {}
    remarks: tuple[str, ...] = ()


_SAME = {name: name for name in ("density", "gamma", "epsilon")}
_FORMS = {
    "average": _Form("linear", "weights"),
    "task_arithmetic": _Form("task_arithmetic", "weights"),
    "ties": _Form(
        "ties",
        "lambda",
        _SAME,
        ("ours also keeps entries of up to 1/2048 below the threshold of a tensor's density",),
    ),
    "dare_linear": _Form("dare_linear", "weights", _SAME, (_OTHER_MASKS, _OTHER_SIZE)),
    "dare_ties": _Form("dare_ties", "lambda", _SAME, (_OTHER_MASKS, _OTHER_SIZE)),
    "della": _Form("della", "lambda", _SAME, (_OTHER_MASKS, _OTHER_SIZE, _HALF)),
    "della_linear": _Form("della_linear", "weights", _SAME, (_OTHER_MASKS, _OTHER_SIZE, _HALF)),
    "breadcrumbs": _Form("breadcrumbs", "weights", _SAME),
    "breadcrumbs_ties": _Form("breadcrumbs_ties", "lambda", _SAME),
    "sce": _Form("sce", "none", {"select_topk": "select_topk"}),
    "arcee_fusion": _Form("arcee_fusion"),
    "slerp": _Form("slerp", "none", {"t": "t"}),
    "nuslerp": _Form(
        "nuslerp",
        "weights",
        {name: name for name in ("nuslerp_flatten", "nuslerp_row_wise")},
    ),
    "multislerp": _Form(
        "multislerp", "weights", {name: name for name in ("normalize_weights", "eps")}
    ),
    "karcher": _Form("karcher", "none", {name: name for name in ("max_iter", "tol")}),
    "model_stock": _Form("model_stock", "none", {"filter_wise": "filter_wise"}),
    "nearswap": _Form("nearswap", "none", {"t": "t"}),
}
_TRUTHS = ("nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "filter_wise")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# What its YAML has no word for, and what to do.
_UNSAID = {
    "trajectory": "checkpoints are ordered and weighed here. Name them, with a --scale each",
    "only": "it merges all tensors",
    "on_missing": "its models have the same tensors",
    "vocab": "rows of several vocabularies are paired by tokens there. Write `tokenizer_source` "
    "into the recipe",
    "on_bad": "it looks for no bad entries",
    "on_config": "it compares no configs",
    "on_base": "it reads no record of an adapter's base",
    "max_shard_size": "that is its --out-shard-size",
}


class Exported(NamedTuple):
    """A merge as mergekit's recipe.

    Attributes:
        recipe: The recipe.
        remarks: What differs there, and what its command line needs, in whole sentences or halves.
    """

    recipe: Recipe
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """The YAML, with the remarks as comments above it."""
        return "".join(f"# {remark}\n" for remark in self.remarks) + recipe_yaml(self.recipe)


def refuse_unsaid(config: MergeConfig) -> None:
    """Refuse settings that mergekit's recipes cannot say, before any model is opened.

    Raises:
        ConfigError: There is one; the message has its flag.
    """
    if config.weights == "precision":
        raise _unsaid("--weights precision", "mergekit reads no precisions. Drop it")
    for name, reason in _UNSAID.items():
        if getattr(config, name) != MergeConfig.model_fields[name].default:
            raise _unsaid(f"--{name.replace('_', '-')}", f"{reason}; drop it")


def exported(plan: MergePlan) -> Exported:
    """A planned merge as a recipe of mergekit.

    The arithmetic is in float32, as ours is, unless weights are stored in more digits.

    Args:
        plan: By our settings, not by a recipe of mergekit.

    Raises:
        ConfigError: mergekit does not have the method, or its recipes cannot say a setting.
    """
    refuse_unsaid(plan.config)
    name = plan.method.name
    if plan.recipe is not None or name not in _FORMS:
        which = "that is one already" if plan.recipe is not None else "mergekit has no such method"
        raise _unsaid(f"--method {name}", f"{which}. It has {', '.join(_FORMS)}")
    form = _FORMS[name]
    parameters: dict[str, Setting] = {
        theirs: bool(plan.settings[ours]) if ours in _TRUTHS else plan.settings[ours]
        for ours, theirs in form.settings.items()
        if ours in plan.settings
    }
    remarks = list(form.remarks)
    if name == "ties":
        remarks = _checked_ties(plan, remarks)
    if name.startswith("della"):
        parameters["epsilon"] = float(plan.settings["epsilon"]) / 2
    if plan.settings.get("scope") == "model" and name != "ties":
        raise _unsaid("--param scope=model", "mergekit measures each tensor by itself. Drop it")
    tasks, weights = _weighed(plan, form)
    if form.scales == "lambda":
        parameters |= {"normalize": True, "lambda": weights[0]}
        weights = [1.0] * len(tasks)
    base = plan.base
    if name == "slerp":
        base, tasks = tasks[0], tasks[1:]
    _refuse_repeated([*([] if base is None else [base]), *tasks])
    sources = tuple(
        Source(
            model=_reference(task.posterior),
            parameters={} if form.scales == "none" else {"weight": weight},
        )
        for task, weight in zip(tasks, weights, strict=False)
    )
    dtype, out_dtype = _dtypes(plan, remarks)
    if any(task.posterior.parts for task in plan.inputs):
        remarks.append("mergekit-yaml needs --lora-merge-cache FOLDER for adapters")
    if plan.side_files is not None and any("--side-files chooses" in n for n in plan.notes):
        whose = "the base" if base is not None else "one of the models, not always the same"
        remarks.append(
            f"tokenizer and the like are those of {whose}; ours of '{plan.side_files.ref}'"
        )
    recipe = Recipe(
        merge_method=form.name,
        models=sources,
        base_model=None if base is None else _reference(base.posterior),
        parameters=parameters,
        dtype=dtype,
        out_dtype=out_dtype,
    )
    return Exported(recipe, tuple(remarks))


def _checked_ties(plan: MergePlan, remarks: Sequence[str]) -> list[str]:
    """What differs of TIES; nothing if all is kept."""
    if plan.settings["density"] == 1:
        return []
    if plan.settings["scope"] == "model":
        raise _unsaid(
            "--method ties",
            "mergekit trims each tensor by itself, and this trims the model as a whole. Merge by "
            "--param scope=tensor, too",
        )
    return list(remarks)


def _weighed(plan: MergePlan, form: _Form) -> tuple[list[Input], list[Setting]]:
    """The tasks that take part, and what their scales become."""
    scales, rules = parse_scales(plan.config)
    tasks = list(plan.tasks)
    if form.scales == "weights":
        names = [step.source for step in plan.steps]
        return tasks, [_weight(scale, i, rules, names) for i, scale in enumerate(scales)]
    name = plan.method.name
    if rules:
        raise _unsaid(f"--scale {rules[0].text}", f"{name} has no weight in each tensor there")
    if not plan.method.takes_scales:
        return tasks, [1.0] * len(tasks)
    # One of scale zero has no vote, and there is no weight that says so.
    kept = [(task, scale) for task, scale in zip(tasks, scales, strict=True) if scale != 0]
    used = {scale for _, scale in kept}
    if len(used) != 1 or (form.scales == "none" and used != {1.0}):
        meaning = (
            "models have no weights there. Take a scale of 1"
            if form.scales == "none"
            else "models with other weights have more or fewer votes there, and equal ones here. "
            "Take one --scale for all"
        )
        raise _unsaid(f"--scale {', '.join(f'{scale:g}' for scale in scales)}", meaning)
    return [task for task, _ in kept], [scale for _, scale in kept]


def _weight(scale: float, task: int, rules: Sequence[ScaleRule], names: Sequence[str]) -> Setting:
    """A task's weight: its scale, or filters where rules change it; the first that matches counts.

    Of our rules the last one counts.
    """
    filters = [
        Filter(filter=_substring(rule, names), value=rule.scale)
        for rule in reversed(rules)
        if task in rule.tasks
    ]
    return (*filters, Filter(filter=None, value=scale)) if filters else scale


def _substring(rule: ScaleRule, names: Sequence[str]) -> str:
    """The text that a name must contain for a rule to match, where that is all it asks.

    Raises:
        ConfigError: The rule matches other names.
    """
    text = _ESCAPE.sub(r"\1", rule.pattern.pattern)
    if not text or any((text in name) != bool(rule.pattern.search(name)) for name in names):
        raise _unsaid(
            f"--scale {rule.text}",
            "its filters are parts of names, no regular expressions. Write one as mlp or layers.3.",
        )
    return text


def _refuse_repeated(models: Sequence[Input]) -> None:
    counts = Counter(str(_reference(model.posterior)) for model in models)
    ref, count = counts.most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"--print-recipe mergekit: '{ref}' is named {count} times, which mergekit refuses. "
            "Name it once, with the sum of its scales."
        )


def _reference(model: Posterior) -> Reference:
    """A model as a recipe refers to it, one of the Hub by its commit."""
    if model.parts:
        base, adapter = (_reference(part) for part in model.parts)
        return base.model_copy(
            update={"adapter": adapter.path, "adapter_revision": adapter.revision}
        )
    path = os.path.expanduser(model.ref)
    if not os.path.exists(path) and is_hub_id(model.ref):
        name, _, revision = model.pinned.partition("@")
        return Reference(path=name, revision=revision or None)
    if model.is_file or any(mark in path for mark in "+@"):
        found = "a file" if model.is_file else "a path with '+' or '@'"
        raise ConfigError(
            f"--print-recipe mergekit: '{model.ref}' is {found}, and mergekit reads folders and "
            "Hub ids, without these signs. Put its tensors into a folder with its config.json."
        )
    # mergekit asks the Hub for a path that looks like a name there.
    is_plain = not os.path.isabs(path) and not path.startswith(".")
    return Reference(path=f"./{path}" if is_plain else path)


def _dtypes(plan: MergePlan, remarks: list[str]) -> tuple[str, str | None]:
    """The dtypes of the arithmetic and of the output, where that is another one."""
    counts: Counter[str] = Counter()
    for step in plan.steps:
        if step.copied is None:
            counts[step.spec.dtype] += step.spec.size
    stored = counts.most_common(1)[0][0] if counts else "F32"
    if stored not in _DTYPES:
        raise _unsaid(f"--dtype {stored}", f"it writes {', '.join(_DTYPES.values())}")
    if len(counts) > 1:
        remarks.append(f"all tensors become {_DTYPES[stored]}, also those stored in another dtype")
    out = _DTYPES[stored]
    return (out, None) if stored in ("F32", "F64") else ("float32", out)


def _unsaid(flag: str, reason: str) -> ConfigError:
    return ConfigError(f"--print-recipe mergekit: {flag} cannot be said: {reason}.")
