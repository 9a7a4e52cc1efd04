"""The pages list every setting with its default and meaning, as the fields have them."""

import re

import pytest

from mergekit_bayes.finetune import FinetuneConfig, LoraSettings
from scripts.settings_table import BEGIN, END, PAGES, ROOT, inner_config, settings_table, with_table


@pytest.mark.parametrize("page", PAGES)
def test_a_page_lists_every_setting_with_its_default_and_meaning(page):
    """The table is the one that the fields make: a changed field needs the new table there."""
    listed = (ROOT / page).read_text().partition("## All settings")[2].partition("\n## ")[0]
    table = listed.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    assert table == settings_table(PAGES[page]), "run scripts/settings_table.py"
    fields = PAGES[page].model_fields
    inner = [config for field in fields.values() if (config := inner_config(field))]
    assert LoraSettings in inner
    for name, field in dict(
        fields, **{k: f for c in inner for k, f in c.model_fields.items()}
    ).items():
        rows = re.findall(rf"^\| `(?:\w+\.)?{name}` \| (.*?) \| (.+) \|$", listed, re.M)
        (row,) = (row for row in rows if row[1] == field.description)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert float(row[0]) == field.default, name


def test_a_table_replaces_what_is_between_the_markers():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    table = settings_table(FinetuneConfig)
    assert with_table(page, FinetuneConfig) == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    assert "| `lora.r` | 8 | Rank of the factors. |" in table
