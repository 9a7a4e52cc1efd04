"""Models with their posteriors on the Hugging Face Hub: the card that says where one came from, and the push."""

from mergekit_bayes.hub.card import Card, License, Parent, make_card, model_card, parents
from mergekit_bayes.hub.push import PushFile, PushPlan, PushReport, check_login, plan_push, push_folder

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
