"""The base of all settings, and how they are read."""

from mergekit_bayes.configs.reading import (
    C,
    Config,
    field_named,
    load_config,
    parse_config,
    read_yaml,
    read_yaml_documents,
)

__all__ = [
    "C",
    "Config",
    "field_named",
    "load_config",
    "parse_config",
    "read_yaml",
    "read_yaml_documents",
]
