"""The benchmarks that need nothing but minutes, one after the other: what `make bench` calls.

The others take longer, or a service or data of their own, and are called by themselves; each says how.
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
