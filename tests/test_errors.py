"""Hints for misspelled words."""

from mergekit_bayes.errors import did_you_mean, nearest


def test_a_misspelled_word_is_answered_with_the_nearest_one():
    words = {"weights": 1, "scale": 2, "base": 3}
    assert nearest("wieghts", words) == "weights"
    assert did_you_mean("wieghts", words) == "did you mean 'weights'?"


def test_a_word_that_is_like_none_gets_no_hint():
    assert nearest("xyzzy", ["weights", "scale"]) is None
    assert did_you_mean("xyzzy", ["weights", "scale"]) == ""
    assert did_you_mean("x", []) == ""
