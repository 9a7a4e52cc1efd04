"""The recipe that is written beside a merged model."""

from collections.abc import Mapping
from typing import Any

from mergekit_bayes import recipes
from mergekit_bayes.checkpoint import sources
from mergekit_bayes.plan import MergePlan


def recipe_text(plan: MergePlan) -> str:
    """The resolved recipe: every setting as it was used, Hub ids by their commit."""
    if plan.recipe is not None:
        return plan.recipe
    content = plan.config.model_dump(mode="json", exclude={"out", "force", "space", "rank"})
    models = list(plan.inputs)
    posteriors = [model.posterior for model in models]
    pinned = {model.ref: model.pinned for model in posteriors if model.pinned != model.ref}
    if plan.side_files is not None:
        content["side_files"] = plan.side_files.ref
    content = _renamed(content, pinned)
    content["precision"] = {
        model: sources.pinned(place) for model, place in content["precision"].items()
    }
    content["param"] = dict(plan.settings)
    content["identities"] = {model.pinned: model.posterior.identity for model in models}
    content["precision_identities"] = {
        model.pinned: model.posterior.precision_identity
        for model in models
        if plan.method.needs_precision and model.posterior.precision is not None
    }
    if not plan.config.verify:
        del content["full_identities"], content["full_precision_identities"]
        return recipes.recipe_text(content)
    content["full_identities"] = {model.pinned: model.posterior.full_identity for model in models}
    content["full_precision_identities"] = {
        model.pinned: model.posterior.full_precision_identity
        for model in models
        if model.pinned in content["precision_identities"]
    }
    return recipes.recipe_text(content)


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    """A JSON value with models renamed wherever they are named, as a key or before a colon too."""
    if isinstance(content, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [_renamed(value, names) for value in content]
    if isinstance(content, str):
        model, colon, rest = content.partition(":")
        return names.get(content) or (names[model] + colon + rest if model in names else content)
    return content
