"""Print the folder of the task, which lm-eval takes as --include_path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdout.write(f"{Path(__file__).parent}\n")
