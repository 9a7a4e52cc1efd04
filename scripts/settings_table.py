"""Print the Markdown table of the settings of `bmerge finetune`, made from the config's fields.

    python scripts/settings_table.py

docs/finetuning.md holds this table between two markers; a test compares them.
"""

from pydantic.fields import FieldInfo

from mergekit_bayes.finetune.settings import FinetuneConfig, LoraSettings

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def settings_table() -> str:
    """The table: one row a field, with those of the adapter after `lora`."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in FinetuneConfig.model_fields.items():
        rows.append(_row(name, field))
        if name == "lora":
            rows += [_row(f"lora.{inner}", f) for inner, f in LoraSettings.model_fields.items()]
    return "\n".join(rows)


def _row(name: str, field: FieldInfo) -> str:
    return f"| `{name}` | {_default(field)} | {field.description} |"


def _default(field: FieldInfo) -> str:
    """A default as YAML has it; nothing where the setting is left out."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(settings_table())
