"""Write the tables of all settings, made from the configs' fields, into the pages that hold them.

    python scripts/settings_table.py

A page holds its table between two markers; a test compares them.
"""

from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.configs import Config
from mergekit_bayes.finetune.settings import FinetuneConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
PAGES: dict[str, type[Config]] = {
    "docs/finetuning.md": FinetuneConfig,
    "docs/removal.md": AdaptConfig,
}


def settings_table(config: type[Config]) -> str:
    """The table: one row a field. Those of an inner config follow the first setting of its kind."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    seen: set[type[Config]] = set()
    for name, field in config.model_fields.items():
        rows.append(_row(name, field))
        inner = inner_config(field)
        if inner is not None and inner not in seen:
            seen.add(inner)
            rows += [_row(f"{name}.{key}", f) for key, f in inner.model_fields.items()]
    return "\n".join(rows)


def inner_config(field: FieldInfo) -> type[Config] | None:
    """The config that a setting holds; None for any other."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Config)), None)


def with_table(page: str, config: type[Config]) -> str:
    """A page's text with the table between its markers."""
    before, _, rest = page.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"\n{END}")
    return f"{before}{BEGIN}\n{settings_table(config)}\n{END}{after}"


def _row(name: str, field: FieldInfo) -> str:
    return f"| `{name}` | {_default(field)} | {field.description} |"


def _default(field: FieldInfo) -> str:
    """A default as YAML has it; nothing where the setting is left out."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == () or isinstance(value, Config):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for name, config in PAGES.items():
        path = ROOT / name
        path.write_text(with_table(path.read_text(), config))
