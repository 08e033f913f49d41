"""How much the server's memory grows while it takes an upload, as a share of the upload's size.

    python -m benchmarks.upload_memory [--megabytes 1 200 1024]

A fresh `understudy up` for each size; the memory is the API process's resident set, sampled while the upload runs. The
growth must not follow the size: the target is under 64 MB for 1 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from app.client import Client

WORDS = "the of parcel invoice late refund account password broken size shop order battery helmet charge email"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 100, 300])
    sizes = parser.parse_args().megabytes
    print("| upload, MB of JSONL | seconds | growth of the server, MB | growth / size |")
    print("|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "rows.jsonl"
            write_rows(file, size * 1_000_000)
            seconds, growth = measure(Path(directory), file)
        print(f"| {size} | {seconds:.1f} | {growth / 1e6:.0f} | {growth / 1e6 / size:.3f} |", flush=True)


def write_rows(file: Path, size: int) -> None:
    """At least `size` bytes of JSONL with made-up texts of about 200 characters."""
    rng = random.Random(0)
    written = number = 0
    with file.open("w") as stream:
        while written < size:
            text = " ".join(rng.choices(WORDS.split(), k=30))
            written += stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            number += 1


def measure(directory: Path, file: Path) -> tuple[float, float]:
    """Seconds of the upload, and bytes by which the API process grew at most."""
    command = [str(Path(sys.executable).parent / "understudy"), "up", "--port", "0", "--workers", "1"]
    data = directory / "data"
    server = subprocess.Popen(
        [*command, "--data-dir", str(data)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[1]
        api = next(child for child in psutil.Process(server.pid).children() if "api" in child.cmdline())
        with Client(url, (data / "api-key").read_text().strip()) as client:
            list(client.jobs())
            before = api.memory_info().rss
            peak = [before]
            ended = threading.Event()

            def watch() -> None:
                while not ended.wait(0.02):
                    peak[0] = max(peak[0], api.memory_info().rss)

            watcher = threading.Thread(target=watch)
            watcher.start()
            began = time.perf_counter()
            client.upload(file)
            seconds = time.perf_counter() - began
            ended.set()
            watcher.join()
        return seconds, float(peak[0] - before)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
