"""How many job polls a second the API answers beside a bare handler, and whether it stays up: 200 pollers, 20 event streams.

    python -m benchmarks.load [--pollers 200] [--streams 20] [--jobs 20] [--seconds 10]

starts the whole service, lets a job train while others wait, and asks, in turns, `GET /jobs/{id}` of the API, each client
for one of the jobs, and `GET /` of a FastAPI application that answers a constant of the same size, each one process of
uvicorn. Medians over the rounds; the ratio is what an answer costs beside the framework. Rates and waits are those of a
machine that PostgreSQL, the job and the clients share; the processor's time is the server process's alone. Exit status 1
on any 5xx, broken stream or lost answer.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from sqlalchemy import text

from app.embedded import free_port
from app.supervisor import Child, stop
from tests.faults.service import Service
from tests.support import sentences, wait_until

ROUNDS = 3
LONGEST_WAIT = 30.0
"""Seconds for the last answers of a round; one that takes longer ends the benchmark with an error."""
BARE = """
import sys
import uvicorn
from fastapi import FastAPI

app, answer = FastAPI(), {"padding": "x" * int(sys.argv[2])}

@app.get("/")
def read() -> dict[str, str]:
    return answer

uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pollers", type=int, default=200)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="understudy-load-"))
    try:
        with Service(directory, workers=1) as service:
            failed = asyncio.run(measure(service, directory, arguments))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(1 if failed else 0)


async def measure(service: Service, directory: Path, arguments: argparse.Namespace) -> int:
    """Load both in turns and print the table; how many answers were a 5xx, and streams that broke."""
    pollers, streams, seconds = arguments.pollers, arguments.streams, arguments.seconds
    spec = {
        "dataset_id": service.upload(sentences(400, 1)), "teacher": {"kind": "dataset"}, "method": {"kind": "no_selection"},
        "student": {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24},
        "training": {"epochs": 1000, "batch_size": 8},
    }  # fmt: skip
    job_id = service.submit(spec, "load")
    service.wait(job_id, until=lambda job: job["phase"] == "training")
    jobs = [job_id, *(service.submit(spec, f"load-{number}") for number in range(1, arguments.jobs))]
    body = len(service.http.get(f"/jobs/{job_id}").content)
    port = free_port()
    bare = Child("bare", [sys.executable, "-c", BARE, str(port), str(body)], directory / "logs" / "bare.log")
    bare.start()
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), 60)
        headers = {"Authorization": f"Bearer {service.key}"}
        job_url = f"http://127.0.0.1:{service.port}/jobs/{job_id}"
        client = httpx.AsyncClient(timeout=None, trust_env=False, headers=headers, limits=httpx.Limits())
        listening = asyncio.Semaphore(0)
        listeners = [asyncio.create_task(listen(client, f"{job_url}/events", listening)) for _ in range(streams)]
        for _ in listeners:
            await asyncio.wait_for(listening.acquire(), 60)
        rates: dict[str, list[float]] = {"GET /jobs/{id}": [], "a bare handler": []}
        slowest: dict[str, list[float]] = {name: [] for name in rates}
        busy: dict[str, list[float]] = {name: [] for name in rates}
        job_urls = [f"http://127.0.0.1:{service.port}/jobs/{each}" for each in jobs]
        servers = [(service.api, job_urls), (bare, [f"http://127.0.0.1:{port}/"])]
        statuses: Counter[int] = Counter()
        for _ in range(ROUNDS):
            for name, (server, urls) in zip(rates, servers, strict=True):
                process = psutil.Process(server.pid)
                before = process.cpu_times()
                waits, seen = await load(urls, headers, pollers, seconds)
                after = process.cpu_times()
                rates[name].append(len(waits) / seconds)
                slowest[name].append(statistics.quantiles(waits, n=100)[98])
                busy[name].append((after.user + after.system - before.user - before.system) / len(waits))
                statuses.update(seen)
        heard = [listener.done() for listener in listeners]
        held = psutil.Process(service.api.pid)
        with service.session() as session:
            connections = session.scalar(
                text("SELECT count(*) FROM pg_stat_activity WHERE client_addr IS NULL AND pid <> pg_backend_pid()"
                     " AND backend_type = 'client backend'")
            )  # fmt: skip
        holds = f"{held.memory_info().rss / 1e6:.0f} MB, {held.num_threads()} threads"
        for listener in listeners:
            listener.cancel()
    finally:
        stop([bare], 2)
    for each in jobs:
        service.call("POST", f"/jobs/{each}/cancel")
    print(
        f"{pollers} pollers of {len(jobs)} jobs, {body} bytes each, one in training; {streams} event streams; "
        f"{ROUNDS} rounds, medians\n"
    )
    print("| | answers/s | p99, ms | processor of the server, ms an answer |\n|---|---|---|---|")
    for name in rates:
        figures = [statistics.median(found[name]) for found in (rates, slowest, busy)]
        print(f"| {name} | {figures[0]:.0f} | {1000 * figures[1]:.0f} | {1000 * figures[2]:.2f} |")
    ratios = []
    for found in (rates, slowest, busy):
        ours, plain = found.values()
        ratios.append(statistics.median(ours) / statistics.median(plain))
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |")
    print(f"\nthe API then holds {holds}; it and the scheduler {connections} connections to PostgreSQL")
    failures = sum(count for status, count in statuses.items() if status >= 500)
    print(f"\nanswers by status: {dict(statuses)}; event streams that broke: {sum(heard)}")
    return failures + sum(heard)


def answers(url: str) -> bool:
    """Whether anything listens there."""
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def load(
    urls: list[str], headers: dict[str, str], pollers: int, seconds: float
) -> tuple[list[float], Counter[int]]:
    """Seconds of each answer, and how often each status came, when `pollers` ask again as soon as they are answered.

    The URLs, of one server, are taken in turn.
    """
    waits: list[float] = []
    statuses: Counter[int] = Counter()
    host = urls[0].removeprefix("http://").partition("/")[0]
    address, _, port = host.partition(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = [f"GET /{url.split('/', 3)[3]} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode() for url in urls]

    async def poll(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A hand-made client: httpx would take more of the processor than the server.
        while time.monotonic() < until:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            waits.append(time.perf_counter() - began)
            statuses[int(head[9:12])] += 1
        writer.close()

    connections = [await asyncio.open_connection(address, int(port)) for _ in range(pollers)]
    until = time.monotonic() + seconds
    async with asyncio.timeout(seconds + LONGEST_WAIT):
        await asyncio.gather(
            *(poll(requests[number % len(requests)], *connection) for number, connection in enumerate(connections))
        )
    return waits, statuses


async def listen(client: httpx.AsyncClient, url: str, listening: asyncio.Semaphore) -> None:
    """Follow a job's events until the stream ends."""
    async with client.stream("GET", url, headers={"Accept": "text/event-stream"}) as answer:
        answer.raise_for_status()
        listening.release()
        async for _ in answer.aiter_lines():
            pass


if __name__ == "__main__":
    main()
