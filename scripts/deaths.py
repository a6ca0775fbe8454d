"""Every way in which a node can be lost, while clients' streams go on; see `deaths`."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

TOKEN_BYTES = 46080  # KV of a token of the demo's model in f32
LENDERS = 4


class Namespaces:
    """A host a node: network namespaces on one bridge. Undone by `close`."""

    def __init__(self, count):
        self.tag = f"dk{os.getpid() % 10000}"
        self.bridge = f"{self.tag}b"
        self.names = []
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", "10.77.0.254/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for i in range(count):
            name, outer, inner = f"{self.tag}n{i}", f"{self.tag}o{i}", f"{self.tag}i{i}"
            ip("netns", "add", name)
            self.names.append(name)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", inner, "netns", name)
            ip("link", "set", outer, "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", inner)
            ip("-n", name, "link", "set", inner, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def address(self, i):
        return f"10.77.0.{i + 1}"

    def command(self, i):
        return ["ip", "netns", "exec", self.names[i]]

    def wire(self, i, up):
        ip("link", "set", f"{self.tag}o{i}", "up" if up else "down")

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", self.bridge], check=False)


class Loopback:
    """All nodes on 127.0.0.1."""

    def address(self, i):
        return "127.0.0.1"

    def command(self, i):
        return []

    def close(self):
        pass


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: ip {' '.join(arguments)}: {done.stderr.strip()}")


class Node:
    def __init__(self, hosts, i, folder, binary, arguments):
        self.hosts, self.i, self.binary, self.arguments = hosts, i, binary, arguments
        self.log = os.path.join(folder, f"node-{i}.log")
        self.start()

    def start(self):
        address = self.hosts.address(self.i)
        command = [*self.hosts.command(self.i), self.binary, "serve", "--listen", f"{address}:0",
                   "--fabric-listen", f"{address}:0", "--log", "info", *self.arguments]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.said("ready")
        line = self.said("instance")
        self.instance = re.search(r"instance (\w+)", line)[1]
        self.url = re.search(r"http://[\d.:]+", line)[0]
        self.fabric = re.search(r"tcp://([\d.:]+)", line)[1]

    def said(self, word):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for line in open(self.log):
                if line.startswith(f"distkv: {word}"):
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        sys.exit(f"error: node {self.i} did not become ready:\n{open(self.log).read()[-2000:]}")

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def cluster(self):
        with urllib.request.urlopen(self.url + "/cluster", timeout=10) as answer:
            return json.load(answer)


class Stream(threading.Thread):
    """One client: the greedy completion of a prompt, and when its pieces came."""

    def __init__(self, url, prompt, tokens):
        super().__init__(daemon=True)
        self.url, self.prompt, self.tokens = url, prompt, tokens
        self.text, self.pieces, self.stall, self.error = "", 0, 0.0, None
        self.start()

    def run(self):
        body = {"prompt": self.prompt, "temperature": 0, "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                last = None
                for line in answer:
                    line = line.decode().strip()
                    if not line.startswith("data:"):
                        continue
                    if line == "data: [DONE]":
                        return
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    now = time.monotonic()
                    if last is not None:
                        self.stall = max(self.stall, now - last)
                    last = now
                    self.pieces += 1
                    self.text += event["choices"][0]["text"]
            raise RuntimeError("the stream broke off")
        except Exception as error:
            self.error = repr(error)


def until(what, condition, seconds=60):
    deadline, why = time.monotonic() + seconds, ""
    while True:
        try:
            if condition():
                return
        except OSError as error:
            # A new wire carries nothing for a moment.
            why = f" ({error})"
        if time.monotonic() > deadline:
            sys.exit(f"error: waited {seconds} s for {what}{why}")
        time.sleep(0.05)


def finish(streams, reference, name):
    """Waits for all; the longest stall. Ends the script where one is not as it must be."""
    for stream in streams:
        stream.join(300)
    bad = [f"stream {i}: {s.error or 'still running'}" for i, s in enumerate(streams) if s.error or s.is_alive()]
    if not bad and reference:
        bad = [f"stream {i}: {s.text!r}\n   undisturbed: {r!r}"
               for i, (s, r) in enumerate(zip(streams, reference)) if s.text != r]
    if bad:
        sys.exit(f"error: {name}: {len(bad)} of {len(streams)} streams went wrong:\n" + "\n".join(bad[:4]))
    return max(s.stall for s in streams)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--bin", "--model", "--document"):
        parser.add_argument(name, required=True)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--victims", type=int, default=LENDERS)
    parser.add_argument("--faults", default=None)
    parser.add_argument("--netns", action="store_true")
    parser.add_argument("--replicas", default="1")
    parser.add_argument("--ingress", action="store_true")
    args = parser.parse_args()
    faults = (args.faults or ("kill,stop,cut" if args.netns else "kill,stop")).split(",")
    if "cut" in faults and not args.netns:
        sys.exit("error: a wire can be cut only with --netns")
    hosts = Namespaces(LENDERS + 1) if args.netns else Loopback()
    folder = tempfile.mkdtemp(prefix="distkv.")
    nodes = []
    try:
        run(args, faults, hosts, folder, nodes)
        shutil.rmtree(folder)
    except SystemExit:
        print(f"the nodes' logs are in {folder}", file=sys.stderr)
        raise
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.signal(signal.SIGKILL)
            node.process.wait()
        hosts.close()


class Lenders:
    """What lies with a lender: rBlocks of the loans that have been there for a
    while, and so hold something."""

    least = 4

    def __init__(self, engine, victim):
        self.engine, self.victim, self.seen = engine, victim, {}

    def holds(self):
        loans = [l for l in self.engine.cluster()["loans"] if l["creditor"] == self.victim.instance]
        now = time.monotonic()
        return sum(l["blocks"] for l in loans if now - self.seen.setdefault(l["id"], now) >= 1.0)

    @staticmethod
    def figures(engine):
        recovery = engine.cluster()["recovery"]
        return recovery["recoveries"], recovery["recomputed_tokens"]

    said = "{held} rBlocks lay there", "{} recovered, {} tokens computed again"


class Runners:
    """What runs on an instance: requests, by its own word in the ledger."""

    least = 1

    def __init__(self, engine, victim):
        self.engine, self.victim = engine, victim

    def holds(self):
        mine = lambda i: i["id"] == self.victim.instance
        return sum(i["running"] or 0 for i in self.engine.cluster()["instances"] if mine(i))

    @staticmethod
    def figures(engine):
        requests = engine.cluster()["requests"]
        if requests["lost"]:
            sys.exit(f"error: {requests['lost']} requests were given up")
        return requests["placed_elsewhere"], requests["continued"]

    said = "{held} of them there", "placed {} times, continued {} times"


def run(args, faults, hosts, folder, nodes):
    # In exact arithmetic, so that what is computed again is what was there
    # before, to 1e-6: rounded to bf16 it may fall on the other side, and with it
    # a token that leads by a hair.
    model = lambda tokens: ["--model", args.model, "--kv-memory", str(tokens * TOKEN_BYTES), "--max-sequences", "32",
                            "--threads", "1", "--math", "exact", "--kv-dtype", "f32"]
    if args.ingress:
        # Too small for any of the requests, so that all run elsewhere; and where
        # their keys and values lie is the other script's matter.
        engine = Node(hosts, 0, folder, args.bin, [*model(256), "--lend", "0"])
        other, kind = [*model(4096), "--lend", "0"], Runners
    else:
        engine = Node(hosts, 0, folder, args.bin, [*model(1024), "--kv-replicas", args.replicas])
        other, kind = ["--no-model", "--kv-memory", str(3072 * TOKEN_BYTES)], Lenders
    nodes.append(engine)
    for i in range(1, LENDERS + 1):
        nodes.append(Node(hosts, i, folder, args.bin, [*other, "--join", engine.fabric]))
    known = lambda: sum(i["state"] is not None for i in engine.cluster()["instances"])
    until("all nodes to be known", lambda: known() == LENDERS + 1)

    text = open(args.document).read()
    size = 1500
    prompts = [text[i * 613 % (len(text) - size):][:size] for i in range(args.streams)]
    start = lambda: [Stream(engine.url, prompt, args.tokens) for prompt in prompts]
    settled = lambda: not engine.cluster()["loans"] and all(
        i["blocks_lent"] in (0, None) and not (args.ingress and i["running"]) for i in engine.cluster()["instances"])

    started = time.monotonic()
    streams = start()
    stall = finish(streams, None, "undisturbed")
    reference = [s.text for s in streams]
    until("all loans to be repaid", settled)
    print(f"undisturbed: {len(streams)} streams of {args.tokens} tokens in {time.monotonic() - started:.1f} s, "
          f"longest stall {stall:.2f} s", flush=True)
    again = finish(streams := start(), reference, "undisturbed, once more")
    print(f"once more, the same text, longest stall {again:.2f} s", flush=True)

    for fault in faults:
        for victim in nodes[1:1 + args.victims]:
            until("all loans to be repaid", settled)
            before = kind.figures(engine)
            streams = start()
            watched = kind(engine, victim)
            until("the victim to be needed, and streams to flow",
                  lambda: watched.holds() >= kind.least and any(s.pieces > 2 for s in streams)
                  or not any(s.is_alive() for s in streams), 180)
            held, running = watched.holds(), sum(s.is_alive() for s in streams)
            if fault == "kill":
                victim.signal(signal.SIGKILL)
                victim.process.wait()
            elif fault == "stop":
                victim.signal(signal.SIGSTOP)
                threading.Timer(5, victim.signal, [signal.SIGCONT]).start()
            else:
                hosts.wire(victim.i, False)
                threading.Timer(5, hosts.wire, [victim.i, True]).start()
            name = f"{fault} of node {victim.i}"
            stall = finish(streams, reference, name)
            change = [b - a for a, b in zip(before, kind.figures(engine))]
            print(f"{name}: {running} streams were running, {kind.said[0].format(held=held)}; all completed, the same "
                  f"text; {kind.said[1].format(*change)}; longest stall {stall:.2f} s", flush=True)
            if fault == "kill":
                until("the dead to be known as such", lambda: known() == LENDERS)
                victim.start()
            else:
                time.sleep(6)
            until(f"node {victim.i} to be back", lambda: known() == LENDERS + 1)
            if not running:
                sys.exit("error: nothing was running any more when the fault came: use more streams or tokens")
    until("all loans to be repaid", settled)
    print("all memory is back", flush=True)


main()
