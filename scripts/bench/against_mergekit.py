"""Whether mergekit's recipes give with bmerge what they give with mergekit.

    python scripts/bench/against_mergekit.py -o WORK --with-mergekit VENV/bin/python

Makes tiny models of many families (mergekit_models.py), runs each recipe of `mergekit_recipes/`
through both programs, each in its own process, and compares their outputs with each other and with
a restatement in float64 (mergekit_expected.py, mergekit_rules.py). Prints a table of the largest
difference a tensor, of the distances from float64, and of CPU seconds and peak memory, start-up
included. What has run is kept in WORK and not run again unless the recipe or the program's version
has changed, or `--fresh` is given. Without `--with-mergekit`, bmerge alone is compared with the
restatement. Exits with 1 if a recipe gives something else. See mergekit_compare.py for what counts
as the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from machine import commit, cpu
from mergekit_compare import COARSE, FLOAT32, OTHER_NUMBERS, compare, verdict
from mergekit_draws import compare_draws, draws_table
from mergekit_models import make
from mergekit_recipes import Recipe, recipes

SIDES = ("ours", "mergekit")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Runs a command and prints what it cost. The memory of a process counts what it was forked from,
# which here is small.
LAUNCHER = """
import resource, subprocess, sys
log = open(sys.argv[1], "wb")
code = subprocess.run(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


class Run(NamedTuple):
    """How one program ran.

    Attributes:
        cpu: CPU seconds, user and system, of the process and its children.
        mib: Largest resident memory.
        error: The last lines that it wrote, if it failed.
    """

    cpu: float
    mib: float
    error: str = ""


def run(command: list[str], folder: Path, log: Path) -> Run:
    """Run a program in a folder."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, str(log), *command],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    code, cpu_seconds, mib = done.stdout.split()
    if code == "0":
        return Run(float(cpu_seconds), float(mib))
    lines = log.read_text(errors="replace").strip().splitlines()
    return Run(float(cpu_seconds), float(mib), "\n".join(lines[-3:]) or f"exit code {code}")


def our_command(recipe: Recipe, out: Path) -> list[str]:
    """The command of bmerge."""
    program = str(Path(sys.executable).with_name("bmerge"))
    return [program, "merge", str(recipe.file), "-o", str(out), "-q"]


def mergekit_command(recipe: Recipe, out: Path, python: Path) -> list[str]:
    """The command of mergekit."""
    flags = ["--random-seed", "0", "--quiet"]
    if "\n---\n" in recipe.file.read_text():
        stages = ["--out-path", str(out), "--intermediate-dir", f"{out}.stages"]
        return [str(python.with_name("mergekit-multi")), str(recipe.file), *stages, *flags]
    flags += ["--lora-merge-cache", f"{out}.lora"]
    return [str(python.with_name("mergekit-yaml")), str(recipe.file), str(out), *flags]


def measure(
    recipe: Recipe, work: Path, python: Path | None, versions: dict[str, str], fresh: bool
) -> dict[str, Any]:
    """Run one recipe through both programs and compare what they wrote."""
    folder = work / "models" / recipe.models
    programs = {"ours": our_command(recipe, work / "ours" / recipe.name)}
    if python is not None:
        programs["mergekit"] = mergekit_command(recipe, work / "mergekit" / recipe.name, python)
    record: dict[str, Any] = {**recipe._asdict(), "recipe": recipe.name, "runs": {}}
    del record["file"]
    outputs = []
    for side in SIDES:
        out = work / side / recipe.name
        if side in programs:
            key = f"{versions[side]}\n{recipe.file.read_text()}"
            # A plus after bmerge's commit says that its files have changed since.
            known = not fresh and not versions[side].endswith("+")
            ran = _run_once(programs[side], folder, out, key, known)
            record["runs"][side] = ran._asdict()
        outputs.append(out if side in programs and not ran.error else None)
    if any(outputs):
        record["compared"] = compare(recipe, folder, *outputs)
    return record


def _run_once(command: list[str], folder: Path, out: Path, key: str, reuse: bool) -> Run:
    """Run a program, unless it has run with the same key and what it wrote may be reused."""
    record = out.with_name(f"{out.name}.json")
    if reuse and record.exists():
        known = json.loads(record.read_text())
        if known["key"] == key:
            return Run(**known["run"])
    out.parent.mkdir(exist_ok=True)
    for old in (out, out.with_name(f"{out.name}.stages"), out.with_name(f"{out.name}.lora")):
        shutil.rmtree(old, ignore_errors=True)
    ran = run(command, folder, out.with_name(f"{out.name}.log"))
    record.write_text(json.dumps({"key": key, "run": ran._asdict()}, indent=2))
    return ran


def judge(record: dict[str, Any]) -> str:
    """The verdict on one recipe; starts with "differs" if something is wrong."""
    failed = [side for side, r in record["runs"].items() if r["error"]]
    if "ours" in failed:
        is_refusal = record["refused"] and "ConfigError" in record["runs"]["ours"]["error"]
        return f"refused: {record['refused']}" if is_refusal else "differs: bmerge fails"
    text = verdict(record["compared"])
    for difference in record["compared"].get("files", []):
        if OTHER_NUMBERS not in difference:
            return f"differs: {difference}"
    if record["experts"]:
        text += f", experts {record['experts']}"
    return f"{text}; mergekit fails" if failed else text


def table(records: list[dict[str, Any]]) -> str:
    """The records as a table in Markdown."""
    lines = [
        "| recipe | models | bmerge - mergekit | roundings | bmerge from float64 "
        "| mergekit from float64 | chosen otherwise | verdict | CPU s | MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for record in records:
        found = record.get("compared") or {"far": {}, "rms": {}, "between": {}, "shares": {}}
        far = [_far(found, side) for side in SIDES]
        between = found["between"] if found["between"].get("tensor") else {}
        chosen = f"{found['otherwise']} of {found['unsure']}" if found.get("unsure") else ""
        costs = [
            [f"{r[k]:.{d}f}" for r in record["runs"].values()] for k, d in (("cpu", 1), ("mib", 0))
        ]
        cells = [
            record["recipe"],
            record["models"],
            f"{between['absolute']:.1e}" if between else "",
            f"{between['roundings']:.2f}" if between else "",
            *far,
            chosen,
            judge(record),
            *(" / ".join(cost) for cost in costs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _far(found: dict[str, Any], side: str) -> str:
    """The largest distance from float64 and the root of the mean square, in roundings."""
    if side not in found["far"]:
        return ""
    return f"{found['far'][side]:.2f} ({found['rms'][side]:.3f})"


def notes(records: list[dict[str, Any]]) -> list[str]:
    """What else was seen: failures, other files, and shares of kept entries."""
    result = []
    for record in records:
        name = record["recipe"]
        for side, its in record["runs"].items():
            if its["error"]:
                result.append(f"{name}: {side} fails: {its['error'].splitlines()[-1][:300]}")
        found = record.get("compared", {})
        result += [f"{name}: {text}" for text in found.get("files", []) + found.get("wrong", [])]
        for side, (kept, chances, _, entries, deviations) in found.get("shares", {}).items():
            result.append(
                f"{name}: {side} keeps {kept / entries:.4f} of {entries:,} entries, expected "
                f"{chances / entries:.4f} ({deviations:+.1f} standard deviations)"
            )
    return result


def main() -> int:
    """Make the models, run the recipes, print the table; 1 if a recipe gives something else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--work", type=Path, required=True, help="models, outputs, records")
    parser.add_argument(
        "--with-mergekit", type=Path, metavar="PYTHON", help="the interpreter of its environment"
    )
    parser.add_argument("--only", default="", help="names of recipes, comma-separated")
    parser.add_argument("--seeds", type=int, default=100, help="of methods that draw; 0: none")
    parser.add_argument("--fresh", action="store_true", help="run what was run before again")
    parser.add_argument("--json", type=Path, help="the records are also written here")
    options = parser.parse_args()
    chosen = recipes()
    if options.only:
        wanted = options.only.split(",")
        if unknown := set(wanted) - {r.name for r in chosen}:
            parser.error(f"--only: unknown recipes {', '.join(sorted(unknown))}.")
        chosen = [r for r in chosen if r.name in wanted]
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = options.with_mergekit and options.with_mergekit.absolute()
    versions = {"ours": commit(), "mergekit": _mergekit_version(python) if python else "not run"}
    make(work / "models", {recipe.models for recipe in chosen})
    records = []
    for number, recipe in enumerate(chosen, 1):
        records.append(measure(recipe, work, python, versions, options.fresh))
        print(f"{number}/{len(chosen)} {recipe.name}: {judge(records[-1])}", file=sys.stderr)
    if python is None:
        print("mergekit was not run (--with-mergekit); bmerge is judged alone.", file=sys.stderr)
    print(table(records))
    print(
        f"\nbmerge {versions['ours']}, mergekit {versions['mergekit']}, {cpu()}. "
        "Distances from float64: largest (root mean square), in "
        f"roundings of the tensor's largest entry; up to {FLOAT32} count as the same in float32, "
        f"up to {COARSE} in 16 bits. CPU and memory: bmerge / mergekit."
    )
    print("\n".join(["", *(f"- {line}" for line in notes(records))]))
    draws = compare_draws(python, options.seeds) if python and options.seeds else []
    if draws:
        print("\n" + draws_table(draws))
    if options.json is not None:
        document = {"recipes": records, "draws": [d._asdict() for d in draws]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    is_same = [not judge(r).startswith("differs") for r in records] + [d.is_same for d in draws]
    return 0 if all(is_same) else 1


def _mergekit_version(python: Path) -> str:
    """The version of mergekit and of what it stands on."""
    code = (
        "from importlib.metadata import version as v\n"
        "print(f\"{v('mergekit')} (torch {v('torch')}, transformers {v('transformers')})\")"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
