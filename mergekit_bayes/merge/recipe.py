"""The recipe that lies beside a merged model."""

from collections.abc import Mapping
from typing import Any

from mergekit_bayes import recipes
from mergekit_bayes.checkpoint import sources
from mergekit_bayes.plan import MergePlan


def recipe_text(plan: MergePlan) -> str:
    """The resolved recipe: every setting as it was used, Hub ids by their commit."""
    content = plan.config.model_dump(mode="json", exclude={"out", "force", "space", "rank"})
    pinned = {m.ref: m.pinned for m in plan.models if m.pinned != m.ref}
    content = _renamed(content, pinned)
    content["precision"] = {
        model: sources.pinned(place) for model, place in content["precision"].items()
    }
    content["param"] = dict(plan.settings)
    content["identities"] = {m.pinned: m.identity for m in plan.models}
    weighed = [m for m in plan.models if plan.method.needs_precision and m.precision is not None]
    content["precision_identities"] = {m.pinned: m.precision_identity for m in weighed}
    return recipes.recipe_text(content)


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    if isinstance(content, dict):
        return {names.get(k, k): _renamed(v, names) for k, v in content.items()}
    if isinstance(content, list):
        return [_renamed(v, names) for v in content]
    if isinstance(content, str):
        model, colon, rest = content.partition(":")
        return names.get(content) or (names[model] + colon + rest if model in names else content)
    return content
