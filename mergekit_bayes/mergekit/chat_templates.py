"""The chat template that a recipe chooses, in place of the one that would be copied.

Source: mergekit's README, section "Chat Template Configuration" (version 0.1.5).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.side_files import CHAT_TEMPLATE, inline_template
from mergekit_bayes.documents import parse_json, read_mapping, read_text
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.mergekit.objects import Recipe
from mergekit_bayes.plan.side_files import SideFileChoice
from mergekit_bayes.posterior import Posterior

AUTO = "auto"
# Written from the public description of the format: a message is <|im_start|>ROLE, its text and
# <|im_end|>, each followed by a line break.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_NAMED = {"chatml": CHATML}
_LEGACY = "chat_template.json"
_SETTINGS = Path("tokenizer_config.json")


def files_of_template(
    recipe: Recipe,
    models: Sequence[Posterior],
    choice: SideFileChoice | None,
    made: Mapping[str, str | None],
    notes: list[str],
) -> dict[str, str | None]:
    """The files that give the output the chat template of a recipe.

    The template is the text in the recipe; the one that most of the models have, the first of
    equally many (`auto`); or `chatml`.

    Args:
        recipe: The recipe.
        models: Its models, the base first.
        choice: The side files that are copied; None for an output without any.
        made: The text of side files that are made already, by name.
        notes: Remarks for the report are appended here.

    Returns:
        `made`, with these files.

    Raises:
        ConfigError: The template's name is not known, or the output has no side files.
        CheckpointError: A template cannot be read.
    """
    files = dict(made)
    if recipe.chat_template is None:
        return files
    if choice is None:
        raise ConfigError(
            f"{recipe.label}: chat_template: expected an output with files beside its tensors, "
            "found one without. Name a folder by -o and folders as models, or leave it out."
        )
    template = _chosen(recipe, models, notes)
    if template is None:
        return files
    notes[:] = [note for note in notes if not note.startswith("the output has no chat template")]
    files[CHAT_TEMPLATE] = template
    if Path(_LEGACY) in choice.gathered.files:
        files[_LEGACY] = None
    if (settings := _without_inline(choice, made)) is not None:
        files[str(_SETTINGS)] = settings
    return files


def _chosen(recipe: Recipe, models: Sequence[Posterior], notes: list[str]) -> str | None:
    """The template; None where the models have none to choose among."""
    asked = recipe.chat_template
    assert asked is not None
    if asked == AUTO:
        return _most_common(models, notes)
    if asked in _NAMED:
        return _NAMED[asked]
    return asked


def _most_common(models: Sequence[Posterior], notes: list[str]) -> str | None:
    owners: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for model in models:
        template = _template_of(model)
        if template is not None:
            owners.setdefault(template, model.ref)
            counts[template] += 1
    if not counts:
        notes.append("chat_template: auto finds none, since no model has one")
        return None
    (template, count) = counts.most_common(1)[0]  # the first one of equally many
    notes.append(
        f"the chat template is that of '{owners[template]}', which {count} of {len(models)} "
        f"models {'have' if count > 1 else 'has'}"
    )
    return template


def _template_of(model: Posterior) -> str | None:
    """A model's template, of BASE+ADAPTER the adapter's before the base's."""
    folders = [part.path for part in reversed(model.parts)] or [model.path]
    for folder in folders:
        if (folder / CHAT_TEMPLATE).is_file():
            try:
                return read_text(folder / CHAT_TEMPLATE)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{folder / CHAT_TEMPLATE}: the chat template cannot be read ({error})."
                ) from None
        if folder.is_dir() and (template := inline_template(folder)) is not None:
            return template
    return None


def _without_inline(choice: SideFileChoice, made: Mapping[str, str | None]) -> str | None:
    """The text of `tokenizer_config.json` without its template; None where it holds none."""
    if (name := str(_SETTINGS)) in made:
        text = made[name]
        content = parse_json(text) if text is not None else None
    elif (file := choice.gathered.files.get(_SETTINGS)) is not None:
        content = read_mapping(file)
    else:
        return None
    if not isinstance(content, dict) or "chat_template" not in content:
        return None
    del content["chat_template"]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
