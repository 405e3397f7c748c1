"""`python -m chaos.run --faults 200 [--seed N]`: copy under faults until so many have struck; a failure says how to go
through the same choices again."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from chaos.chaos import Broken, run

SEEDS = 1_000_000


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every copy came to its end, identical."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, help="of the choice of faults (one at random)")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.randrange(SEEDS)
    print(f"seed {seed}; the same faults again: make chaos SEED={seed} FAULTS={options.faults}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nbdshard-chaos-", dir="/var/tmp") as folder:
        try:
            tally = run(seed, options.faults, Path(folder), lambda line: print(line, flush=True))
        except Broken as error:
            print(f"failed: {error}", file=sys.stderr)
            print(f"the same faults again: make chaos SEED={seed} FAULTS={options.faults}", file=sys.stderr)
            return 1
    for name, number in sorted(tally.faults.items()):
        print(f"{number:6} {name}")
    ends = ", ".join(f"{end}: {number}" for end, number in sorted(tally.ends.items()))
    seconds = time.monotonic() - began
    print(f"{sum(tally.faults.values())} faults, {tally.copies} copies identical, {seconds:.0f} s; {ends}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
