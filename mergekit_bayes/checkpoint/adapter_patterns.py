"""The regular expressions in an adapter's config, which PEFT and `lora/` match modules with."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.patterns import MOST_WAYS, PatternError, count_ways

# The keys whose values are regular expressions: what PEFT makes of one before it matches, and
# whether the entries of a list are plain names.
_PATTERNS: dict[str, tuple[Callable[[str], str], bool]] = {
    "target_modules": (str, True),
    "exclude_modules": (str, True),
    "modules_to_save": (r"(^|.*\.){}($|\..*)".format, False),
    "layers_pattern": (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.".format, False),
    "rank_pattern": (lambda pattern: module_pattern(pattern), False),
    "alpha_pattern": (lambda pattern: module_pattern(pattern), False),
}
_NAME = re.compile(r"[\w.-]{0,256}")
MOST_PATTERNS = 20_000  # a rank for each layer of the largest models


def check_adapter_patterns(config: Mapping[str, object], file: Path) -> None:
    """Check the regular expressions that PEFT, or this package, makes of an adapter's config.

    Args:
        config: The content of the file; values of other forms than PEFT gives them are skipped.
        file: The `adapter_config.json`, for messages.

    Raises:
        ConfigError: One is no regular expression, or a match may take long.
    """
    ways = 0.0
    for key, (in_full, is_plain) in _PATTERNS.items():
        value = config.get(key)
        is_text = isinstance(value, str)
        patterns = [value] if is_text else value if isinstance(value, list | dict) else []
        if len(patterns) > MOST_PATTERNS:
            raise ConfigError(
                f"{file}: {key} has {len(patterns):,} entries, where at most {MOST_PATTERNS:,} "
                "are read. Save the adapter again."
            )
        for pattern in patterns:
            if not isinstance(pattern, str) or (is_plain and not is_text):
                continue
            try:
                ways += 0 if _NAME.fullmatch(pattern) else count_ways(in_full(pattern))
                if ways > MOST_WAYS:
                    raise PatternError("with those before it, it may take hours to match")
            except PatternError as error:
                has = "has the key" if isinstance(value, dict) else "has"
                raise ConfigError(
                    f"{file}: {key} {has} {shown(pattern)}, which is not used as a regular "
                    f"expression: {error}. Correct it there, or save the adapter again."
                ) from None


def module_pattern(pattern: str) -> str:
    """The regular expression by which a key of `rank_pattern` and the like matches modules.

    It matches the end of a module's name, from a dot or the start on, as in PEFT.
    """
    return rf"(.*\.)?({pattern})$"
