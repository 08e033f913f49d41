"""Every benchmark that ends within minutes, one after the other: what `make bench` calls.

benchmarks/results.py, lgtm_results.py, lgtm_search.py and cold_start.py take hours or tens of minutes and are called by themselves.
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = [
    "benchmarks.epoch_cost",
    "benchmarks.labeling",
    "benchmarks.labeling_workers --rows 240 --rounds 1",
    "benchmarks.upload_memory",
    "benchmarks.lgtm_step --small",
]


def main() -> None:
    failed = []
    for name in BENCHMARKS:
        print(f"\n=== {name} ===", flush=True)
        if subprocess.run([sys.executable, "-W", "ignore", "-m", *name.split()], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
