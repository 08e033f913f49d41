"""How many job polls a second the API answers beside a bare handler, and whether it stays up: 200 pollers, 20 event streams.

    python -m benchmarks.load [--pollers 200] [--streams 20] [--seconds 10]

starts the whole service, lets a job train, and asks, in turns, `GET /jobs/{id}` of the API and `GET /` of a FastAPI
application that answers a constant of the same size, each one process of uvicorn. Medians over the rounds; the ratio is
what an answer costs beside the framework. Exit status 1 on any 5xx.
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

from app.embedded import free_port
from app.supervisor import Child, stop
from tests.faults.service import Service
from tests.support import sentences, wait_until

ROUNDS = 3
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
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="understudy-load-"))
    try:
        with Service(directory, workers=1) as service:
            failed = asyncio.run(measure(service, directory, arguments.pollers, arguments.streams, arguments.seconds))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(1 if failed else 0)


async def measure(service: Service, directory: Path, pollers: int, streams: int, seconds: float) -> int:
    """Load both in turns and print the table; how many answers were a 5xx."""
    spec = {
        "dataset_id": service.upload(sentences(400, 1)), "teacher": {"kind": "dataset"}, "method": {"kind": "no_selection"},
        "student": {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24},
        "training": {"epochs": 1000, "batch_size": 8},
    }  # fmt: skip
    job_id = service.submit(spec, "load")
    service.wait(job_id, until=lambda job: job["phase"] == "training")
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
        statuses: Counter[int] = Counter()
        for _ in range(ROUNDS):
            for name, url in zip(rates, (job_url, f"http://127.0.0.1:{port}/"), strict=True):
                waits, seen = await load(url, headers, pollers, seconds)
                rates[name].append(len(waits) / seconds)
                slowest[name].append(statistics.quantiles(waits, n=100)[98])
                statuses.update(seen)
        heard = [listener.done() for listener in listeners]
        for listener in listeners:
            listener.cancel()
    finally:
        stop([bare], 2)
    service.call("POST", f"/jobs/{job_id}/cancel")
    print(f"{pollers} pollers, {streams} event streams, a job of {body} bytes in training, {ROUNDS} rounds, medians\n")
    print("| | answers/s | p99, ms |\n|---|---|---|")
    for name in rates:
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {1000 * statistics.median(slowest[name]):.0f} |")
    ours, plain = rates.values()
    ours_slow, plain_slow = slowest.values()
    rate_ratio = statistics.median(ours) / statistics.median(plain)
    slow_ratio = statistics.median(ours_slow) / statistics.median(plain_slow)
    print(f"| ratio | {rate_ratio:.2f} | {slow_ratio:.2f} |")
    failures = sum(count for status, count in statuses.items() if status >= 500)
    print(f"\nanswers by status: {dict(statuses)}; event streams that broke: {sum(heard)}")
    return failures + sum(heard)


def answers(url: str) -> bool:
    """Whether anything listens there."""
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def load(url: str, headers: dict[str, str], pollers: int, seconds: float) -> tuple[list[float], Counter[int]]:
    """Seconds of each answer, and how often each status came, when `pollers` ask again as soon as they are answered."""
    waits: list[float] = []
    statuses: Counter[int] = Counter()
    host, _, path = url.removeprefix("http://").partition("/")
    address, _, port = host.partition(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode()

    async def poll(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
    await asyncio.gather(*(poll(*connection) for connection in connections))
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
