"""The hash that says whether two merges write the same bytes."""

import hashlib
import json

from mergekit_bayes import __version__
from mergekit_bayes.plan import MergePlan


def plan_hash(plan: MergePlan) -> str:
    """SHA-256 of all that decides the output's bytes: settings, content of the inputs, version."""
    models = [model.posterior for model in plan.inputs]
    content = {
        "version": __version__,
        "config": plan.config.model_dump(mode="json", exclude={"out", "force"}),
        "settings": plan.settings,
        "models": [[m.identity, m.precision_identity if m.has_precision else None] for m in models],
        "steps": [[step.name, *step.spec, step.copied] for step in plan.steps],
        "shards": plan.shards,
        "info": plan.info.model_dump(mode="json") if plan.info else None,
        "target": plan.target.name,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
