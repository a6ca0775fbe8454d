"""What the scripts ask of a running node, with Python's own library only.

    cluster.py URL members N            exit 0 when N instances are known with their figures
    cluster.py URL free INSTANCE        rBlocks free / of, as that instance says
    cluster.py URL settled              exit 0 when nothing runs and no loan is left
    cluster.py URL loans                one line a loan: creditor, blocks
    cluster.py URL tokens FILE          tokens of a text
    cluster.py URL chat FILE QUESTION [MAX_TOKENS [USAGE_FILE]]
                                        streams the answer about the document
    cluster.py URL ramble PROMPT N [TEXT_FILE]
                                        streams a completion of N tokens; prints how it ended, with the
                                        longest wait between two pieces of text, and leaves the text
"""

import json
import sys
import time
import urllib.error
import urllib.request


def request(url, body=None, timeout=600):
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=timeout
    )


def get(url):
    with request(url, timeout=10) as answer:
        return json.load(answer)


def events(url, body):
    """The JSON objects of a server-sent event stream."""
    body = dict(body, stream=True, stream_options={"include_usage": True})
    with request(url, body) as answer:
        for line in answer:
            line = line.decode().strip()
            if not line.startswith("data:"):
                continue
            line = line[5:].strip()
            if line == "[DONE]":
                return
            event = json.loads(line)
            if "error" in event:
                raise RuntimeError(event["error"].get("message", event["error"]))
            yield event
    raise RuntimeError("the stream broke off before its end")


def members(url, count):
    cluster = get(url + "/cluster")
    return sum(i["state"] is not None for i in cluster["instances"]) >= int(count)


def free(url, instance):
    for i in get(url + "/cluster")["instances"]:
        if i["id"] == instance:
            return f"{i['blocks_free']} {i['blocks_total']}"
    raise RuntimeError(f"{url} does not know an instance {instance}")


def settled(url):
    cluster = get(url + "/cluster")
    me = next(i for i in cluster["instances"] if i["id"] == cluster["self"])
    return not cluster["loans"] and not me["running"] and not me["waiting"] and not me["blocks_borrowed"]


def chat(url, path, question, max_tokens=96, usage_path=None):
    with open(path, encoding="utf-8") as file:
        text = file.read().rstrip() + "\n\n\n" + question
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": int(max_tokens)}
    usage, started, first = None, time.monotonic(), None
    for event in events(url + "/v1/chat/completions", body):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            if piece and first is None:
                first = time.monotonic() - started
            print(piece, end="", flush=True)
    print(flush=True)
    if usage is None or not usage["completion_tokens"]:
        raise RuntimeError("the server gave no answer")
    usage["first_token_s"] = round(first or 0.0, 2)
    usage["total_s"] = round(time.monotonic() - started, 2)
    if usage_path:
        with open(usage_path, "w", encoding="utf-8") as file:
            json.dump(usage, file)


def ramble(url, prompt, count, text_path=None):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": int(count), "ignore_eos": True}
    usage, text, last, stall = None, [], None, 0.0
    for event in events(url + "/v1/completions", body):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice["text"]:
                now = time.monotonic()
                stall = max(stall, now - (last or now))
                last = now
                text.append(choice["text"])
                print("+", end="", file=sys.stderr, flush=True)
    if text_path:
        with open(text_path, "w", encoding="utf-8") as file:
            file.write("".join(text))
    generated = usage["completion_tokens"]
    print(f"finished: {usage['prompt_tokens']} prompt tokens, {generated} generated, longest stall {stall:.2f} s")


def main(url, command, *arguments):
    if command in ("members", "settled"):
        return 0 if globals()[command](url, *arguments) else 1
    if command == "free":
        print(free(url, *arguments))
    elif command == "loans":
        for loan in get(url + "/cluster")["loans"]:
            print(loan["creditor"], loan["blocks"])
    elif command == "tokens":
        with open(arguments[0], encoding="utf-8") as file, request(url + "/tokenize", {"prompt": file.read()}) as answer:
            print(len(json.load(answer)["tokens"]))
    elif command in ("chat", "ramble"):
        globals()[command](url, *arguments)
    else:
        sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1].rstrip("/"), *sys.argv[2:]))
    except urllib.error.HTTPError as error:
        sys.exit(f"failed: {error.code}: {error.read().decode(errors='replace')}")
    except (OSError, RuntimeError, json.JSONDecodeError) as error:
        sys.exit(f"failed: {error}")
