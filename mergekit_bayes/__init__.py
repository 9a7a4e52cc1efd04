"""Merge and edit language models with uncertainty."""

__version__ = "0.1.0"
