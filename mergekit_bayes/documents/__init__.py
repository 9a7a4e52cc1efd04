"""Text, JSON and YAML from outside, read within limits of size, depth and memory.

A file may come from anybody: what it costs to read is bounded before it is parsed, and whatever is
wrong with it is a `DocumentError`, whose text is a reason in a few words. All such files are read
here; `tests/test_documents.py` refuses a bare `json.loads`, `yaml.safe_load` or `read_text`.
"""

from mergekit_bayes.documents.files import (
    CONFIG,
    SETTINGS,
    SIDE_FILE,
    DocumentError,
    decode_text,
    open_regular,
    read_bytes,
    read_text,
)
from mergekit_bayes.documents.json_text import MEMORY, check_memory, parse_json, parse_lines
from mergekit_bayes.documents.records import as_record, read_mapping, read_object, read_record
from mergekit_bayes.documents.yaml_text import parse_yaml, parse_yaml_documents

__all__ = [
    "CONFIG",
    "MEMORY",
    "SETTINGS",
    "SIDE_FILE",
    "DocumentError",
    "as_record",
    "check_memory",
    "decode_text",
    "open_regular",
    "parse_json",
    "parse_lines",
    "parse_yaml",
    "parse_yaml_documents",
    "read_bytes",
    "read_mapping",
    "read_object",
    "read_record",
    "read_text",
]
