"""Carry out a merge plan."""

from mergekit_bayes.merge.parts import Part, parse_part, part_of_launcher
from mergekit_bayes.merge.pool import CHUNK
from mergekit_bayes.merge.predict import PredictionReport, predict_merges
from mergekit_bayes.merge.report import MergeReport
from mergekit_bayes.merge.run import carry_out, join, run_merge
from mergekit_bayes.plan.plan import MergePlan, plan_merge
from mergekit_bayes.plan.settings import MergeConfig

__all__ = [
    "CHUNK",
    "MergeConfig",
    "MergePlan",
    "MergeReport",
    "Part",
    "PredictionReport",
    "carry_out",
    "join",
    "parse_part",
    "part_of_launcher",
    "plan_merge",
    "predict_merges",
    "run_merge",
]
