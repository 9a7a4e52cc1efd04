"""Which examples a curvature is estimated on."""

from mergekit_bayes.models.estimate import random_examples


def test_an_example_comes_again_only_after_all_others_have_come():
    examples = [{"number": i} for i in range(5)]
    numbers = [example["number"] for example in random_examples(examples, 12, seed=1)]
    assert len(numbers) == 12
    assert sorted(numbers[:5]) == sorted(numbers[5:10]) == list(range(5))
    assert len(set(numbers[10:])) == 2
    assert numbers[:5] != numbers[5:10]


def test_a_smaller_choice_is_the_start_of_a_larger_one():
    examples = [{"number": i} for i in range(5)]
    assert random_examples(examples, 3, seed=1) == random_examples(examples, 7, seed=1)[:3]
