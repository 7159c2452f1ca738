"""Reads one file of requests in a process of its own, with a bound on memory and time, and says what came of it."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 20
MEMORY = 3 << 30
ROOT = Path(__file__).parents[2]


def read_apart(path: Path) -> dict[str, Any]:
    """What the package makes of a file: ``{"refused": [...], "read": n}``, or ``{"fault": ...}``."""
    command = [sys.executable, "-m", "tests.campaign.reader", str(path)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, timeout=6 * SECONDS, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return {"fault": f"no end within {6 * SECONDS} s"}
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {"fault": f"exit code {done.returncode} after {time.monotonic() - started:.1f} s: {tail}"[:400]}
    return json.loads(done.stdout)


def main(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    from rome_pl.errors import RomeError
    from rome_pl.requests.record_forms import parse_records, read_records

    try:
        requests, invalid = parse_records(read_records(name), name)
        for request in requests:
            json.dumps(request.content())
        answer = {"refused": [record.message for record in invalid], "read": len(requests)}
    except RomeError as error:
        answer = {"refused": [str(error)], "read": 0}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
