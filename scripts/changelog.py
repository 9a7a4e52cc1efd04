"""Make CHANGELOG.md from the fragments in docs/changes, newest first.

    python scripts/changelog.py            # write it
    python scripts/changelog.py --check    # exit with 1 if it is out of date

A fragment is one Markdown file for one change, `NNNN-short-title.md`, so that changes made in
parallel do not touch the same lines. Its number orders it and its name is its heading.
"""

import argparse
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Changelog

Made by `python scripts/changelog.py` from the files in `docs/changes`; edit those. The newest
change comes first.
"""


def changelog(root: Path) -> str:
    """Text of the changelog.

    Args:
        root: Root of the repository.

    Raises:
        ValueError: If the name of a fragment does not begin with a number, or it is empty.
    """
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    sections = [HEAD, f"## {version} (unreleased)\n"]
    for path in sorted((root / "docs/changes").glob("*.md"), reverse=True):
        number, _, title = path.stem.partition("-")
        text = path.read_text().strip()
        if not number.isdigit() or not title or not text:
            raise ValueError(f"{path}: a fragment is NNNN-short-title.md, and not empty")
        sections.append(f"### {title.replace('-', ' ').capitalize()}\n\n{text}\n")
    return "\n".join(sections)


def main() -> int:
    """Write or check CHANGELOG.md.

    Returns:
        1 if `--check` finds another text, else 0.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    path = ROOT / "CHANGELOG.md"
    text = changelog(ROOT)
    if not parser.parse_args().check:
        path.write_text(text)
        return 0
    if path.exists() and path.read_text() == text:
        return 0
    print("CHANGELOG.md is out of date: run python scripts/changelog.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
