"""Decide a merge before any tensor is read."""

from mergekit_bayes.plan.inputs import Input, Inputs, Weighing, precision_info
from mergekit_bayes.plan.options import Shrink
from mergekit_bayes.plan.outputs import partial_path, recipe_path, report_path
from mergekit_bayes.plan.plan import MergePlan, plan_merge
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Operand, Step

__all__ = [
    "Input",
    "Inputs",
    "MergeConfig",
    "MergePlan",
    "Operand",
    "Shrink",
    "Step",
    "Weighing",
    "partial_path",
    "plan_merge",
    "precision_info",
    "recipe_path",
    "report_path",
]
