"""scripts/house.py and scripts/floors.py find what they look for, on a tiny package."""

import json
from pathlib import Path

import pytest

from scripts.floors import (
    circles,
    import_graph,
    list_errors,
    parse_floors,
    suggest_steps,
    upward_imports,
)
from scripts.house import (
    any_in_annotations,
    figures,
    lines_with_any,
    main,
    public_names,
    reach,
    skipped_formats,
)

HOUSE = """# x

## The house

A sentence.

```
3  cli/        the command
   : main > render
2  shop/       sells
   : till shelf > price
   stock       counts
1  methods/    rules
   : average sum > base
0  errors      every exception
```

## After
"""
FILES = {
    "mergekit_bayes/__init__.py": '"""Root."""\n__version__ = "1"\n',
    "mergekit_bayes/errors.py": '"""Errors."""\n',
    "mergekit_bayes/methods/__init__.py": (
        '"""Table."""\nfrom mergekit_bayes.methods.sum import add\n'
    ),
    "mergekit_bayes/methods/base.py": '"""Base."""\n',
    "mergekit_bayes/methods/average.py": (
        '"""Average."""\nfrom mergekit_bayes.methods.base import x\nimport mergekit_bayes.errors\n'
        "AVERAGE = Method()\n"
    ),
    "mergekit_bayes/methods/sum.py": '"""Sum."""\n\n\ndef add():\n    """Add."""\n',
    "mergekit_bayes/shop/__init__.py": '"""Shop."""\nfrom mergekit_bayes.shop import till\n',
    "mergekit_bayes/shop/till.py": '"""Till."""\nfrom mergekit_bayes import errors, __version__\n',
    "mergekit_bayes/shop/shelf.py": '"""Shelf."""\nfrom .price import Price\n',
    "mergekit_bayes/shop/price.py": '"""Price."""\n\n\nclass Price:\n    """A price."""\n',
    "mergekit_bayes/stock.py": '"""Stock."""\nfrom mergekit_bayes.methods import add\n',
    "cli/bmerge_cli/__init__.py": '"""Command line."""\n',
    "cli/bmerge_cli/main.py": '"""Main."""\nfrom bmerge_cli import render\n',
    "cli/bmerge_cli/render.py": '"""Render."""\nimport mergekit_bayes.shop.till\n',
    "tests/test_a.py": "x = 1\n",
    "scripts/b.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path):
    write(tmp_path / "README.md", HOUSE)
    for name, text in FILES.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def broken(tree: Path) -> list[str]:
    return upward_imports(import_graph(tree), parse_floors(tree / "README.md"))


def test_a_sound_house_has_no_errors(tree, capsys):
    numbers = figures(tree)
    assert numbers.hard_errors() == []
    assert not numbers.undocumented
    assert len(numbers.lines) == 11
    assert len(numbers.command_lines) == 3
    assert main(["--root", str(tree)]) == 0
    missed = [line for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert [line[:32] for line in missed] == ["reach of a merge method, modules"]


def test_the_floors_are_read_from_the_readme(tree):
    rooms = parse_floors(tree / "README.md")
    assert {name: room.floor for name, room in rooms.items()} == {
        "cli": 3,
        "shop": 2,
        "stock": 2,
        "methods": 1,
        "errors": 0,
    }
    assert rooms["shop"].steps == {"till": 0, "shelf": 0, "price": 1}
    assert rooms["shop"].is_package
    assert not rooms["stock"].is_package
    assert rooms["stock"].text == "counts"


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("## The house", "## A house", "no section"),
        ("2  shop/", "4  shop/", "floor 4 stands below floor 3"),
        ("   stock ", "   shop ", "shop is listed twice"),
        ("till shelf >", "till price >", "price is listed twice"),
        ("0  errors      every exception", "0  errors\n   : a > b", "without a package"),
        ("0  errors      every exception", "0  two words here", "cannot read"),
        ("3  cli/", "   cli/", "no floor"),
        ("shelf > price", "shelf > > price", "an empty step"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(tree, was, becomes, message):
    write(tree / "README.md", HOUSE.replace(was, becomes))
    with pytest.raises(ValueError, match=message):
        parse_floors(tree / "README.md")


def test_a_second_line_of_modules_continues_the_first(tree):
    write(tree / "README.md", HOUSE.replace("till shelf > price", "till\n   : shelf\n   : > price"))
    steps = parse_floors(tree / "README.md")["shop"].steps
    assert steps == {"till": 0, "shelf": 0, "price": 1}


def test_a_readme_without_a_house_is_one_message(tree, capsys):
    write(tree / "README.md", "# x\n")
    assert main(["--root", str(tree)]) == 1
    assert "no section '## The house'" in capsys.readouterr().err


def test_imports_are_followed_to_the_module_that_they_name(tree):
    edges = {(edge.source, edge.target) for edge in import_graph(tree)}
    assert ("mergekit_bayes.shop.till", "mergekit_bayes.errors") in edges
    assert ("mergekit_bayes.shop.till", "mergekit_bayes") in edges
    assert ("mergekit_bayes.shop.shelf", "mergekit_bayes.shop.price") in edges
    assert ("mergekit_bayes.stock", "mergekit_bayes.methods") in edges
    assert ("bmerge_cli.main", "bmerge_cli.render") in edges


def test_an_upward_import_is_found_even_inside_a_function(tree):
    append(tree / "mergekit_bayes/errors.py", "\n\ndef f():\n    import mergekit_bayes.stock\n")
    (error,) = broken(tree)
    assert "mergekit_bayes.errors (line 5) imports mergekit_bayes.stock" in error
    assert "floor 0 imports floor 2" in error
    assert main(["--root", str(tree)]) == 1


def test_rooms_of_one_floor_do_not_import_each_other(tree):
    append(tree / "mergekit_bayes/stock.py", "import mergekit_bayes.shop.price\n")
    assert "floor 2 imports floor 2" in broken(tree)[0]


def test_the_package_does_not_import_the_command_line(tree):
    append(tree / "mergekit_bayes/stock.py", "import bmerge_cli.main\n")
    assert "floor 2 imports floor 3" in broken(tree)[0]


def test_the_root_of_the_package_imports_nothing_of_it(tree):
    append(tree / "mergekit_bayes/__init__.py", "from mergekit_bayes.errors import x\n")
    assert "the root of the package" in broken(tree)[0]


@pytest.mark.parametrize(
    ("module", "imported", "reason"),
    [
        ("shop/price.py", "mergekit_bayes.shop.till", "till is listed before price"),
        ("shop/till.py", "mergekit_bayes.shop.shelf", "both are of one step"),
        ("methods/sum.py", "mergekit_bayes.methods.average", "both are of one step"),
        ("methods/base.py", "mergekit_bayes.methods", "the __init__ of its own package"),
    ],
)
def test_an_import_against_the_order_of_a_package_is_found(tree, module, imported, reason):
    append(tree / "mergekit_bayes" / module, f"import {imported}\n")
    assert reason in broken(tree)[0]


def test_a_circle_is_found(tree):
    append(tree / "mergekit_bayes/shop/price.py", "from mergekit_bayes.shop import shelf\n")
    assert circles(import_graph(tree)) == [
        ["mergekit_bayes.shop.price", "mergekit_bayes.shop.shelf"]
    ]
    assert any(error.startswith("circle: ") for error in figures(tree).hard_errors())


def test_a_circle_through_type_checking_alone_is_none_but_keeps_to_the_floors(tree):
    append(
        tree / "mergekit_bayes/shop/price.py",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from mergekit_bayes.shop import shelf\n",
    )
    assert circles(import_graph(tree)) == []
    assert "shelf is listed before price" in broken(tree)[0]


def test_what_is_not_listed_and_what_does_not_exist_are_found(tree):
    write(tree / "mergekit_bayes/shop/door.py", '"""Door."""\n')
    write(tree / "mergekit_bayes/roof.py", '"""Roof."""\n')
    (tree / "mergekit_bayes/errors.py").unlink()
    (tree / "mergekit_bayes/methods/average.py").unlink()
    errors = list_errors(tree, parse_floors(tree / "README.md"))
    assert errors == [
        "roof is not in the README's list",
        "errors is in the README's list and does not exist",
        "methods/average is in the README's list and does not exist",
        "shop/door is not in the README's list",
    ]
    assert set(errors) <= set(figures(tree).hard_errors())


def test_a_file_that_is_too_long_is_found(tree):
    append(tree / "mergekit_bayes/stock.py", "x = 1\n" * 497)
    assert figures(tree).files_from(400) == {"mergekit_bayes/stock.py": 499}
    assert figures(tree).hard_errors() == []
    append(tree / "mergekit_bayes/stock.py", "x = 1\n")
    assert figures(tree).hard_errors() == ["mergekit_bayes/stock.py has 500 lines"]


def test_missing_docstrings_are_found(tree):
    path = tree / "mergekit_bayes/stock.py"
    write(
        path,
        "class Stock:\n"
        '    """Has one."""\n'
        "    def count(self): ...\n"
        "    def _private(self): ...\n"
        "    @property\n"
        "    def size(self):\n"
        '        """Size."""\n'
        "    @size.setter\n"
        "    def size(self, value): ...\n"
        "class _Private:\n"
        "    def run(self): ...\n"
        "async def fetch():\n"
        "    def nested(): ...\n"
        "if True:\n"
        "    def late(): ...\n",
    )
    assert dict(public_names(path)) == {
        "stock": False,
        "Stock": True,
        "Stock.count": False,
        "Stock.size": True,
        "fetch": False,
        "late": False,
    }
    assert "mergekit_bayes/stock.py: Stock.count" in figures(tree).undocumented


def test_any_is_counted_in_annotations(tree):
    path = tree / "mergekit_bayes/stock.py"
    write(
        path,
        "import typing\nfrom typing import Any\n"
        "Row = dict[str, Any]\n"
        "x: list[typing.Any] = []\n"
        "def f(a: Any, *b: 'list[Any]', **c: int) -> tuple[Any, Any]:\n    return Any\n",
    )
    assert any_in_annotations(path) == 6
    assert lines_with_any(path) == 5


def test_only_comments_count_as_skipped_formats(tmp_path):
    write(tmp_path / "a.py", 'x = 1  # fmt: skip\ny = "# fmt: skip"\n')
    assert skipped_formats(tmp_path / "a.py") == 1


def test_the_reach_of_a_method_is_what_it_imports(tree):
    names, lines = reach(tree, "mergekit_bayes.methods.average", import_graph(tree))
    assert names == [
        "mergekit_bayes.errors",
        "mergekit_bayes.methods.average",
        "mergekit_bayes.methods.base",
    ]
    assert lines == 6


def test_the_suggested_lists_fit_the_imports(tree, capsys):
    assert suggest_steps(tree)["shop"] == [["shelf", "till"], ["price"]]
    assert main(["--root", str(tree), "--suggest"]) == 0
    assert "methods/\n   : average sum > base" in capsys.readouterr().out


def test_json_is_one_document(tree, capsys):
    append(tree / "mergekit_bayes/errors.py", "import mergekit_bayes.stock\n")
    assert main(["--root", str(tree), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert len(document["upward_imports"]) == 1
    assert document["hard_errors"]
