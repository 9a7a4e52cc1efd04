"""Models with their posteriors on the Hugging Face Hub: the card and the push."""

from mergekit_bayes.hub.card import Card, make_card, model_card
from mergekit_bayes.hub.facts import License, Parent, parents
from mergekit_bayes.hub.files import PushFile
from mergekit_bayes.hub.push import PushPlan, PushReport, check_login, plan_push, push_folder

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
