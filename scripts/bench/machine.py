"""The processor of this machine, the memory of this process, and the source's commit; Linux."""

import platform
import subprocess
from pathlib import Path


def cpu() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def reset_peak() -> None:
    """Let `VmHWM`, the peak of memory, start again from what is in use."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status(name: str) -> int:
    """Bytes of one number of /proc/self/status, such as `VmHWM` or `RssAnon`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def commit() -> str:
    """The commit of the source tree, with a plus where files of the package differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    )
    if head.returncode:
        return "unknown"
    top = [":/mergekit_bayes", ":/cli"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *top], check=False, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
