"""Recipes of mergekit, read as they are."""
