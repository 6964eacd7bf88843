"""Many inputs for every target of tests/fuzz/: python tests/fuzz.py [--examples 5000] [--seed 0] [target ...]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.remove(str(Path(__file__).parent))  # this file, which is no package, would be found first

from tests.fuzz.targets import TARGETS


def main() -> int:
    """Returns 1 where an input was not handled, after its smallest form and the traceback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.targets or TARGETS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name].run(args.examples, Path(folder), args.seed)
        print(f"{name}: {args.examples} inputs in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
