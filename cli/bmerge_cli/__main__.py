"""`python -m bmerge_cli`, for launchers that start modules."""

from bmerge_cli.main import main

main()
