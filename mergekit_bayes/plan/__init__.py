"""Decide a merge before any tensor is read."""

from mergekit_bayes.plan.options import Shrink
from mergekit_bayes.plan.outputs import partial_path, recipe_path, report_path
from mergekit_bayes.plan.plan import MergePlan, plan_merge
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.plan.weigh import Weighing, known_info

__all__ = [
    "MergeConfig",
    "MergePlan",
    "Shrink",
    "Step",
    "Weighing",
    "known_info",
    "partial_path",
    "plan_merge",
    "recipe_path",
    "report_path",
]
