"""The order of a parallel run, in which each process takes file after file (`--dist loadfile`)."""

# Files that take long as a whole come first, so that the two processes end together.
LONG = ("test_ranks", "test_resume_training", "test_shards", "test_rank_noise", "test_push_to")


def pytest_collection_modifyitems(items):
    """Sort the long files to the front; within them and after them the order stays."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
