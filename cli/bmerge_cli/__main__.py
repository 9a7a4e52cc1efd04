"""`python -m bmerge_cli`, for launchers that start modules."""

from bmerge_cli.entry import main

main()
