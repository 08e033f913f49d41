"""The whole way in one command: start the service, upload, distill, download, classify, stop.

    make demo

Leaves the classifier in demo-output/checkpoint and everything the service kept in demo-output/data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.cli import upload_files
from app.client import Client, unpack
from app.embedded import free_port
from app.progress import JobProgress, scores_table, transfer_progress

TICKETS = Path(__file__).parent / "tickets"
OUTPUT = Path("demo-output").resolve()
SENTENCES = [
    "The app says delivered, but there is nothing at my door.",
    "You took the money from my card two times.",
    "Since yesterday my brakes make a terrible noise.",
]

console = Console(highlight=False)


def main() -> int:
    """Run the demo; the exit status."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    console.rule("Understudy: from unlabeled text to a small classifier", align="left")
    with service() as url, Client(url, (OUTPUT / "data" / "api-key").read_text().strip()) as client:
        console.print(f"[bold]1[/] The service runs at {url}; open it to look on.")
        spec = json.loads((TICKETS / "spec.json").read_text())
        console.print(
            "[bold]2[/] Uploading 1,500 unlabeled support tickets, and labeled ones to validate and test with."
        )
        upload_files(client, spec, TICKETS)
        console.print(
            f"[bold]3[/] A job: a teacher that has seen {len(spec['teacher']['examples'])} examples of "
            f"{len(spec['labels'])} classes labels the tickets, and a student learns from those that "
            f"{spec['method']['kind']} selects."
        )
        job_id = client.submit(spec)["id"]
        with JobProgress(console) as progress:
            job = client.wait(job_id, progress.update, every=0.5)
        if job["status"] != "succeeded":
            reason = f": {job['error']['message']}" if job["error"] else ""
            console.print(f"[red]The job has {job['status']}{reason}[/]\nLogs are in {OUTPUT}/data/logs")
            return 1
        console.print("[bold]4[/] Downloading the checkpoint.")
        with transfer_progress(console, "download") as update:
            archive = client.download(job_id, OUTPUT / "checkpoint.tar", update)
        unpack(archive, OUTPUT / "checkpoint")
    console.print("[bold]5[/] Stopped the service. The checkpoint works without it:")
    console.print(classified(OUTPUT / "checkpoint", SENTENCES))
    if table := scores_table(job):
        console.print(table)
    console.print(where_next())
    return 0


@contextmanager
def service() -> Iterator[str]:
    """`understudy up` on a directory of its own, for as long as the block runs; gives its URL."""
    data, url = OUTPUT / "data", f"http://127.0.0.1:{free_port()}"
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "app.cli", "up", "--port", port, "--data-dir", str(data), "--workers", "1"]
    log = OUTPUT / "up.log"
    # A session of its own: Ctrl-C reaches this script alone, which then stops the service in order.
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        with console.status("Starting PostgreSQL, Redis, the API, a worker and the scheduler …"):
            line = process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"the service did not start:\n{log.read_text()}")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def classified(checkpoint: Path, sentences: list[str]) -> Table:
    """What transformers' own pipeline makes of the sentences, with nothing of Understudy in between."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging, pipeline

    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    table = Table("sentence", "class", "probability")
    for sentence, answer in zip(sentences, classify(sentences), strict=True):
        table.add_row(sentence, answer["label"], f"{answer['score']:.2f}")
    return table


def where_next() -> str:
    """What to try after the demo."""
    return (
        "\nWhere to go from here:\n"
        f"  the model            {OUTPUT}/checkpoint (README.md is its card)\n"
        "  your own data        understudy up, then: understudy submit --dataset texts.jsonl \\\n"
        '                       --label "billing=questions about invoices" --label "other=anything else" --wait\n'
        "  the HTTP API         docs/quickstart.md, docs/api.md\n"
        "  other methods        docs/methods.md"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
        sys.exit(130)
    except Exception as error:
        console.print(f"[red]The demo could not go on:[/] {error}")
        sys.exit(1)
