"""Models with their posteriors on the Hugging Face Hub: the card of a folder, and its push."""

from mergekit_bayes.hub.card import Card, make_card, model_card
from mergekit_bayes.hub.files import PushFile
from mergekit_bayes.hub.licenses import License
from mergekit_bayes.hub.login import check_login
from mergekit_bayes.hub.parents import Parent, parents
from mergekit_bayes.hub.push import plan_push, push_folder
from mergekit_bayes.hub.report import PushPlan, PushReport

__all__ = [
    "Card",
    "License",
    "Parent",
    "PushFile",
    "PushPlan",
    "PushReport",
    "check_login",
    "make_card",
    "model_card",
    "parents",
    "plan_push",
    "push_folder",
]
