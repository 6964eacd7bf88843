"""Run benchmarks, keep their results in one file, write docs/BENCHMARKS.md's tables from it, say what became slower.

    python benchmarks/run.py --list
    python benchmarks/run.py --all                        # those of this machine's kind: CUDA GPU, or CPU
    python benchmarks/run.py cpu_steps cpu_latency        # into docs/results/benchmarks.json and docs/BENCHMARKS.md
    python benchmarks/run.py side_by_side --json OUT.json --set side_by_side.sizes='[224, 512]' root=CIFAR10
    python benchmarks/run.py --from OUT.json              # measure nothing, take these results into the page
    python benchmarks/run.py --from NEW.json --compare OLD.json --no-page
    python benchmarks/run.py --all --toy --json toy.json  # seconds: that it runs, not how fast it is

With --json the page is left alone, so that a machine elsewhere writes one file to take along. --compare exits with 1
where something is worse than in OLD beyond the noise of both; toys, other hardware and other settings are refused.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, wherever this is run from

from benchmarks import compare, page, results
from benchmarks.registry import BENCHMARKS, chosen, resolved
from mamba.errors import ConfigError, ForgeError
from mamba.runs.files import write_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--all", action="store_true", help="every benchmark of this machine's kind; a toy: every one")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--toy", action="store_true", help="at a size that takes seconds; never goes into the page")
    parser.add_argument("--set", nargs="+", default=[], metavar="[NAME.]KEY=JSON", help="settings, of one or of all")
    parser.add_argument("--json", type=Path, help="write there, and leave the page alone")
    parser.add_argument("--from", dest="sources", nargs="+", type=Path, default=[], help="results to take in")
    parser.add_argument("--commit", help="of the code that runs, where it lies in no checkout")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what is worse than there")
    parser.add_argument("--no-page", action="store_true", help="write no file but --json's")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    try:
        return work(args, " ".join(["python benchmarks/run.py", *map(shlex.quote, words)]))
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def work(args: argparse.Namespace, command: str) -> int:
    if args.list:
        for name, b in BENCHMARKS.items():
            print(f"{name:>18}  {b.device:>4}  {b.title}")
        return 0
    if args.toy and not args.json and not args.no_page:
        raise ConfigError("--toy needs --json FILE: its numbers do not go into the page")
    if not (args.names or args.all or args.sources):
        raise ConfigError("name the benchmarks to run, or say --all; --list shows them")
    found = [results.read(path) for path in args.sources]
    if args.names or args.all:
        found.append(measured(args, command))
    for result in (r for one in found for r in one.values()):
        if args.commit and result["about"]["code_revision"] == "unknown":
            result["about"]["code_revision"] = args.commit
    new = {name: result for one in found for name, result in one.items()}
    if args.json:
        results.write(args.json, new)
    elif not args.no_page and not args.toy:
        kept = results.merged(results.read(page.RESULTS) if page.RESULTS.exists() else {}, *found)
        text = page.written(page.PAGE.read_text(), kept)
        page.draw(new)
        results.write(page.RESULTS, kept)
        write_text(page.PAGE, text)
    return said(results.read(args.compare), new) if args.compare else 0


def measured(args: argparse.Namespace, command: str) -> results.Results:
    import torch  # not before: --list and --compare need none of it

    from mamba.runs.environment import environment
    from mamba.train.distributed import own_device

    device = own_device()
    torch.backends.cuda.matmul.allow_tf32 = False
    threads = torch.get_num_threads()
    names = chosen(args.names, None if args.toy else device.type)
    changed = settings(args.set, names)
    found: results.Results = {}
    for name in names:
        b = BENCHMARKS[name]
        if b.device == "cuda" and device.type != "cuda" and not args.toy:
            raise ConfigError(f"'{name}' needs a CUDA GPU; --toy shows that it runs")
        used = {**b.settings, **(b.toy if args.toy else {}), **changed[name]}
        print(f"{name}: {json.dumps(used, default=str)}", flush=True)
        load, rows, began = os.getloadavg()[0], [], time.perf_counter()
        about: dict[str, Any] = {**environment(device), "command": command, "date": str(datetime.date.today())}
        found[name] = {"about": about, "settings": used, "toy": args.toy, "rows": rows}
        for row in b.run(used):
            rows.append(row)
            if args.json:  # a machine that goes away in the middle leaves what it has measured
                results.write(args.json, found)
            print("  " + "  ".join(f"{k}={page.number(v) if isinstance(v, int | float) else v}" for k, v in row.items()
                                   if v is not None), flush=True)  # fmt: skip
        torch.set_num_threads(threads)  # the next is measured as if it were alone
        results.check_rows(name, rows)
        about["seconds"] = round(time.perf_counter() - began, 1)
        if device.type == "cpu":
            about["load"] = [load, os.getloadavg()[0]]
    return found


def settings(words: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Benchmark -> what --set says of it; a key without a name is everyone's who has it."""
    changed: dict[str, dict[str, Any]] = {name: {} for name in names}
    for word in words:
        key, equals, text = word.partition("=")
        name, dot, own = key.rpartition(".")
        if not equals or (dot and name not in changed):
            raise ConfigError(f"--set {word}: say [NAME.]KEY=JSON, with a NAME that is run")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        takers = [name] if dot else [one for one in names if takes(one, own)]
        if not takers or not takes(takers[0], own):
            raise ConfigError(f"--set {word}: none of {', '.join(takers or names)} has a setting '{own}'")
        for one in takers:
            changed[one][own] = value
    return changed


def takes(name: str, key: str) -> bool:
    """Whether a benchmark has a setting of this name."""
    parameters = inspect.signature(resolved(BENCHMARKS[name].rows)).parameters
    return key in parameters and parameters[key].kind is not inspect.Parameter.VAR_KEYWORD


def said(old: results.Results, new: results.Results) -> int:
    """Print the changes; 1 where one is for the worse."""
    found = list(compare.changes(old, new))
    for c in found:
        if c.verdict != "same":
            print(
                f"{c.verdict:>7}  {c.benchmark}: {c.row}: {c.value} {page.number(c.before)} -> {page.number(c.after)}"
            )
    gone = compare.missing(old, new)
    for line in gone:
        print(f"missing  {line}")
    worse = sum(c.verdict == "worse" for c in found)
    print(f"{len(found)} values compared, {worse} worse beyond the noise, {len(gone)} missing")
    return 1 if worse or gone else 0


if __name__ == "__main__":
    sys.exit(main())
