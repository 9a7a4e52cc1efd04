"""The processor of this machine, and the memory of this process, on Linux."""

import platform


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
