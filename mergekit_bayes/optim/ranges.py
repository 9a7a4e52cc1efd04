"""The check that the settings of an optimizer are in range."""

from collections.abc import Iterable


def check_settings(optimizer: str, rules: Iterable[tuple[str, float, bool]]) -> None:
    """Check the settings of an optimizer.

    Args:
        optimizer: Its name, for the message.
        rules: Name and value of each setting, and whether the value is in range.

    Raises:
        ValueError: A setting is out of range.
    """
    for name, value, is_in_range in rules:
        if not is_in_range:
            raise ValueError(f"{optimizer}: {name}={value} is out of range")
