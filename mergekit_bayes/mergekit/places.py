"""A place in a recipe: the file, the path of the key, and the value, for checks and messages."""

import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from mergekit_bayes.configs.explain import described
from mergekit_bayes.errors import ConfigError, nearest, shown

# Settings of merging rules, which belong under `parameters`.
SETTINGS = frozenset(
    {"density", "epsilon", "gamma", "int8_mask", "lambda", "max_iter", "normalize"}
    | {"normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "rescale", "scale"}
    | {"select_topk", "t", "tol", "weight", "embed_slerp", "eps", "filter_wise"}
)
_ADVICE = {  # for keys that recipes of other versions have, or that are easily mistaken
    "lora": "write `model: MODEL+ADAPTER`.",
    "adapter": "write `model: MODEL+ADAPTER`.",
    "revision": "write `model: MODEL@REVISION`.",
    "out_path": "`name` names a merge for later documents, and `-o` says where the last one goes.",
    "input_model_parameters": "write 'parameters' beside each 'model'.",
    "pattern": "did you mean 'filter'?",
    "override_architecture": "tensors are paired by their names here; remove it.",
    "random_seed": "the seed is `parameters: {seed: N}`, or `--param seed=N`.",
    "trust_remote_code": "no code of a model runs in a merge; remove it.",
}
_PLAIN_KEY = re.compile(r"[A-Za-z_]\w{0,99}")


class Place(NamedTuple):
    """A value in a recipe.

    Attributes:
        label: The file, and the number of the document in it.
        path: The path of the key, `slices[0].sources[1].model`; empty for the whole document.
        value: What YAML holds there.
    """

    label: str
    path: str
    value: object

    def error(self, text: str) -> ConfigError:
        """What is wrong here, with the file and the key."""
        return ConfigError(
            f"{self.label}: {self.path}: {text}" if self.path else self.refusal(text)
        )

    def refusal(self, text: str) -> str:
        """A message about the whole document."""
        return f"{self.label}: {text}"

    def expected(self, what: str) -> ConfigError:
        """The error of a value that is something else than expected."""
        return self.error(f"expected {what}, found {described(self.value)}.")

    def entries(self) -> "dict[str, Place]":
        """The values of a mapping, by key.

        Raises:
            ConfigError: It is no mapping, or a key is no text.
        """
        if not isinstance(self.value, dict):
            raise self.expected("keys and values")
        for key in self.value:
            if not isinstance(key, str):
                raise self.error(
                    f"expected text as a key, found {shown(key)}. YAML takes numbers, dates and "
                    "words like on, no and null for other values, unless they are in quotes."
                )
        return {key: self._inside(key, value) for key, value in self.value.items()}

    def fields(self, known: Collection[str], required: Iterable[str] = ()) -> "dict[str, Place]":
        """The values of a mapping, by key, without those that are null.

        Args:
            known: All keys that it may have.
            required: Those that it must have.

        Raises:
            ConfigError: It is no mapping, has an unknown key, or lacks a required one.
        """
        entries = self.entries()
        for key, place in entries.items():
            if key not in known:
                raise place.error(_unknown(key, known))
        for key in required:
            if key not in entries:
                raise self._inside(key, None).error("is required, and was not given.")
            if entries[key].value is None:
                raise entries[key].expected("a value")
        return {key: place for key, place in entries.items() if place.value is not None}

    def items(self) -> "list[Place]":
        """The values of a list that is not empty.

        Raises:
            ConfigError: It is no list, or an empty one.
        """
        if not isinstance(self.value, list):
            raise self.expected("a list")
        if not self.value:
            raise self.error("expected at least one value, found none.")
        return [Place(self.label, f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """Text that is not empty.

        Raises:
            ConfigError: It is none.
        """
        if not isinstance(self.value, str):
            raise self.expected("text")
        if not self.value.strip():
            raise self.error("expected text, found none.")
        return self.value

    def truth(self) -> bool:
        """True or false.

        Raises:
            ConfigError: It is neither.
        """
        if not isinstance(self.value, bool):
            raise self.expected("true or false")
        return self.value

    def whole_number(self, least: int) -> int:
        """A whole number, which may be written as 2.0 or as text.

        Raises:
            ConfigError: It is none, or less than `least`.
        """
        number = self.value
        if isinstance(number, str) and re.fullmatch(r"[-+]?\d{1,18}", number):
            number = int(number)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise self.expected(f"a whole number of at least {least}")
        return number

    def scalar(self) -> bool | int | float | str:
        """One value of a setting: a finite number, true or false, or text.

        Raises:
            ConfigError: It is something else.
        """
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise self.expected("a finite number")
        if not isinstance(self.value, (bool, int, float, str)):
            raise self.expected("a number")
        return self.value

    def _inside(self, key: str, value: object) -> "Place":
        if not _PLAIN_KEY.fullmatch(key):
            return Place(self.label, f"{self.path}[{shown(key)}]", value)
        return Place(self.label, f"{self.path}.{key}" if self.path else key, value)


def _unknown(key: str, known: Collection[str]) -> str:
    """What is wrong with an unknown key, and what may be meant."""
    if key in _ADVICE:
        return f"unknown key; {_ADVICE[key]}"
    if key in SETTINGS and "parameters" in known:
        return "unknown key here; it belongs under 'parameters'."
    if near := nearest(key, known):
        return f"unknown key; did you mean '{near}'?"
    return f"unknown key; possible are {', '.join(sorted(known))}."
