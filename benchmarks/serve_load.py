"""`anatomaly serve` under 2,000 mixed good and hostile requests from 8 clients.

    python benchmarks/serve_load.py

It starts the command with the built-in model and sends requests of ten kinds in a fixed random order: good single
images and batches, pictures, sessions made and left behind, damaged and foreign files, bombs, forged requests, and
clients that go away in the middle.  Every good answer is compared with the one to the same images before the load.  It
prints what was sent and answered, and the resident memory of the server and of its decoders; it ends with 1 where an
answer was lost or wrong, the server ended, or its memory grew by more than a tenth from the first quarter to the end.
"""

import argparse
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from anatomaly.data.manifest import load_manifest
from anatomaly.synthetic.phantom import write_benchmark

GOOD = ("one", "batch", "mixed", "picture", "session")
HOSTILE = ("damaged", "bomb", "many", "forged", "gone")
GROWTH = 1.1


class Load:
    """One running service, the images to send, and what came back."""

    def __init__(self, url, pid, folder, seed):
        self.url, self.pid, self.seed = url, pid, seed
        self.port = int(url.rsplit(":", 1)[1].strip("/"))
        rows = load_manifest(write_benchmark(folder, train=8, test_normal=8, test_anomalous=8, tasks=("head_ct",)))
        self.normals = [
            ("normals", (f"{k}.png", r.path.read_bytes())) for k, r in enumerate(rows) if r.split == "train"
        ]
        self.images = [r.path.read_bytes() for r in rows if r.split == "test"]
        packed = io.BytesIO()
        Image.new("L", (20_000, 15_000)).save(packed, "PNG")
        self.bomb = packed.getvalue()
        self.lock, self.counts, self.wrong, self.memory = threading.Lock(), Counter(), [], []

    def open(self, client, count=8):
        """Make a session of the first normals and return its id."""
        answer = self.send(client, "/sessions", self.normals[:count])
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def send(self, client, path, files, **options):
        """Post files; a full queue is asked again when it says."""
        while True:
            answer = client.post(self.url + path.lstrip("/"), files=files, **options)
            if answer.status_code != 429:
                return answer
            self.counts["429, asked again"] += 1
            time.sleep(min(2.0, float(answer.headers["retry-after"])))

    def query(self, client, names, extra=()):
        """Ask for images by number."""
        files = [("images", (f"{name}.png", self.images[name])) for name in names] + list(extra)
        return self.send(client, f"/sessions/{self.key}/queries", files)

    def good(self, client, kind, draw):
        """Send a request that deserves an answer; whether it got the right one."""
        names = draw.sample(range(len(self.images)), 4 if kind == "batch" else 1)
        if kind == "picture":
            files = [("images", ("x", self.images[names[0]]))]
            answer = self.send(client, f"/sessions/{self.key}/pictures/overlay", files)
            return answer.status_code == 200 and answer.content == self.overlays[names[0]]
        if kind == "session":  # nobody deletes it: it has to give way
            made = self.open(client, draw.randint(2, 8))
            return client.get(f"{self.url}sessions/{made}").status_code in (200, 410)
        extra = [("images", ("bad", b"nonsense"))] if kind == "mixed" else []
        answer = self.query(client, names, extra)
        rows = answer.json().get("results", [])
        fits = [abs(row["score"] - self.scores[name]) < 1e-5 for row, name in zip(rows, names, strict=False)]
        return answer.status_code == 200 and len(rows) == len(names) + len(extra) and all(fits)

    def hostile(self, client, kind, draw):
        """Send a request that deserves none; whether it was refused as it should be."""
        path = f"/sessions/{self.key}/queries"
        if kind == "damaged":
            content = bytearray(draw.choice(self.images))
            for _ in range(20):
                content[draw.randrange(len(content))] = draw.randrange(256)
            content = content[: draw.randrange(len(content))]
            return self.send(client, path, [("images", ("../x", bytes(content)))]).status_code in (200, 422)
        if kind == "bomb":
            return self.send(client, path, [("images", ("x", self.bomb))]).status_code == 422
        if kind == "many":
            return self.send(client, path, [("images", ("x", b"x"))] * 1000).status_code == 413
        if kind == "forged":
            headers = draw.choice(({"Host": "evil.org"}, {"Origin": "http://evil.org"}))
            answer = client.post(self.url + path[1:], files=[("images", ("x", self.images[0]))], headers=headers)
            return answer.status_code in (403, 421)
        with socket.create_connection(("127.0.0.1", self.port)) as raw:  # goes away
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            raw.sendall(head.encode() + b"Content-Length: 500000\r\n\r\n--b\r\n" + bytes(draw.randrange(1000)))
        return True

    def work(self, kinds):
        """Send requests of the kinds that are left, until there are none."""
        with httpx.Client(timeout=600) as client:
            while True:
                with self.lock:
                    if not kinds:
                        return
                    number, kind = kinds.pop()
                draw = random.Random(f"{self.seed} {number}")
                try:
                    fine = (self.good if kind in GOOD else self.hostile)(client, kind, draw)
                    why = "unexpected answer"
                except Exception as err:
                    fine, why = False, f"{type(err).__name__}: {err}"
                with self.lock:
                    self.counts[kind] += 1
                    if not fine:
                        self.wrong.append(f"{kind} {number}: {why}")
                        print(self.wrong[-1])
                    if sum(self.counts[each] for each in (*GOOD, *HOSTILE)) % self.step == 0:
                        self.memory.append(resident(self.pid))

    def run(self, requests, clients):
        """Ask everything once, then send the load."""
        draw = random.Random(self.seed)
        shares = {"one": 8, "batch": 2, "mixed": 2, "picture": 2, "session": 1}
        shares |= {"damaged": 6, "bomb": 1, "many": 2, "forged": 4, "gone": 2}
        kinds = list(enumerate(draw.choices(list(shares), list(shares.values()), k=requests)))
        with httpx.Client(timeout=600) as client:
            self.key = self.open(client)
            answer = self.query(client, range(len(self.images))).json()
            self.scores = [row["score"] for row in answer["results"]]
            path = f"/sessions/{self.key}/pictures/overlay"
            self.overlays = [self.send(client, path, [("images", ("x", each))]).content for each in self.images]
        self.step = max(1, requests // 8)
        self.memory.append(resident(self.pid))
        threads = [threading.Thread(target=self.work, args=(kinds,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def resident(pid):
    """MiB of a process, and of those it started."""

    def of(which):
        pages = Path(f"/proc/{which}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    children = {c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()}
    return of(pid), sum(map(of, children))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "anatomaly.cli", "serve", "--port", "0", "--max_sessions", "8"]
    command += ["--max_queue", str(max(1, options.clients // 2)), "--max_decoded_gib", "0.25"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+/", line)))
        load = Load(url, process.pid, Path(folder) / "phantom", options.seed)
        started = time.perf_counter()
        load.run(options.requests, options.clients)
        seconds = time.perf_counter() - started
        alive = process.poll() is None and httpx.get(f"{url}health").status_code == 200
        broken = Path(log.name).read_text().count(" 500 ")
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    for kind in (*GOOD, *HOSTILE):
        print(f"{kind:>8}: {load.counts[kind]}")
    print(f"{load.counts['429, asked again']} times the queue was full; the request was sent again.")
    print(f"{len(load.wrong)} answers lost or wrong, {broken} defects (500), server alive: {alive}, exit code {code}.")
    print("MiB of the server (and its decoders): " + ", ".join(f"{a:.0f} ({b:.0f})" for a, b in load.memory))
    print(f"{options.requests} requests from {options.clients} clients in {seconds:.0f} s.")
    grew = load.memory[-1][0] > GROWTH * load.memory[min(2, len(load.memory) - 1)][0]
    return int(bool(load.wrong) or bool(broken) or not alive or code != 0 or grew)


if __name__ == "__main__":
    sys.exit(main())
