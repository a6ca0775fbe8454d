"""Other programs on the shapes of `scripts/gpu-check`, in the same call: decode
attention (cuDNN and PyTorch's flash kernels on contiguous KV, FlashInfer on
pages of 16 tokens), prefill and decode of whole models (transformers).

    python3 scripts/gpu-peers.py FOLDER

FOLDER holds the results of `distkv bench` (attention-*.json, model-*.json) and the
models; a table with the ratios is printed. A peer that is not installed is named
as missing.
"""
import glob
import json
import os
import statistics
import sys
import time

import torch

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "."
HEADS, KV_HEADS, DIM = 32, 8, 128


def figure(path, name):
    with open(path) as file:
        return next((f["value"] for f in json.load(file)["figures"] if f["name"] == name), None)


def timed(run, copies, seconds=0.6, graph=True):
    """Median seconds of run(i), i going round over `copies` sets of inputs; at least
    eight in a graph, as `distkv bench attention` has them, so that neither Python's
    time to launch is counted nor a launch by itself."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            run(i)
    stream.synchronize()
    launches = copies * -(-8 // copies) if graph else copies
    rounds = lambda: [run(i % copies) for i in range(launches)]
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=stream):
            rounds()
        rounds = recorded.replay
    times, end = [], time.time() + seconds
    while time.time() < end or len(times) < 10:
        begin, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        rounds()
        done.record()
        done.synchronize()
        times.append(begin.elapsed_time(done) / 1e3 / launches)
    return statistics.median(times)


def attention(batch, depth):
    """TB/s of KV that each peer reads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    total = 2 * batch * depth * KV_HEADS * DIM * 2
    copies = max(1, (1 << 30) // total)
    q = [torch.randn(batch, HEADS, 1, DIM, device="cuda").bfloat16() for _ in range(copies)]
    kv = [torch.randn(2, batch, KV_HEADS, depth, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    found = {}
    for name, backend in [("cuDNN", SDPBackend.CUDNN_ATTENTION), ("torch flash", SDPBackend.FLASH_ATTENTION)]:
        def run(i):
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q[i], kv[i][0], kv[i][1], enable_gqa=True)
        try:
            found[name] = total / timed(run, copies) / 1e12
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:60]
    del kv
    try:
        import flashinfer

        pages = batch * depth // 16
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True)
        each = torch.arange(0, pages + 1, depth // 16, dtype=torch.int32, device="cuda")
        wrapper.plan(each, torch.randperm(pages, dtype=torch.int32, device="cuda"),
                     torch.full((batch,), 16, dtype=torch.int32, device="cuda"), HEADS, KV_HEADS, DIM, 16,
                     q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        pool = [torch.randn(pages, 2, KV_HEADS, 16, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        run = lambda i: wrapper.run(q[i][:, :, 0], pool[i], return_lse=True)
        found["FlashInfer"] = total / timed(run, copies) / 1e12
        del pool
    except ImportError:
        found["FlashInfer"] = "not installed"
    torch.cuda.empty_cache()
    return found


def model(path):
    """transformers: seconds of a prefill by tokens, and of a decode step by batch."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    net = net.cuda().eval()
    vocab = net.config.vocab_size
    prefill = {}
    with torch.inference_mode():
        for tokens in (2048, 8192, 32768):
            ids = [torch.randint(vocab, (1, tokens), device="cuda") for _ in range(2)]
            run = lambda i: net(ids[i], use_cache=False, logits_to_keep=1)
            prefill[tokens] = timed(run, 2, 0.5, graph=False)
    del net
    torch.cuda.empty_cache()
    return prefill


def rounding():
    """How far bf16 takes transformers from f32 on the golden models: the measure for
    what `gpu_check goldens` allows."""
    import subprocess
    import tempfile

    import transformers

    binary = os.environ.get("DISTKV_BIN", "distkv")
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden", "models")
    for path in sorted(glob.glob(os.path.join(root, "*.json"))):
        with open(path) as file:
            golden = json.load(file)
        with tempfile.TemporaryDirectory() as folder:
            config = os.path.join(folder, "config.json")
            with open(config, "w") as file:
                json.dump(golden["config"], file)
            subprocess.run([binary, "model", "synth", "--config", config, "--seed", str(golden["seed"]), "--dtype", "bf16",
                            "--out", os.path.join(folder, "model")], check=True, capture_output=True)
            logits = []
            for dtype in (torch.float32, torch.bfloat16):
                net = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "model"), dtype=dtype).cuda().eval()
                with torch.inference_mode():
                    logits.append(net(torch.tensor([golden["prompt"]], device="cuda")).logits[0].double())
        exact, rounded = logits
        apart = ((rounded - exact).norm(dim=1) / exact.norm(dim=1))
        print(f"{os.path.basename(path)[:-5]:24} mean {apart.mean():.4f} worst {apart.max():.4f}", flush=True)


print("transformers in bf16 beside f32, distance of logits as a share of their length:")
try:
    rounding()
except Exception as error:  # a table that is missing must not cost the others
    print(f"    not measured: {type(error).__name__}: {str(error)[:200]}")
print(f"{'decode attention, TB/s of KV':30} {'ours':>6} " + " ".join(f"{n:>14}" for n in ("cuDNN", "FlashInfer", "torch flash")))
for path in sorted(glob.glob(os.path.join(FOLDER, "attention-*.json"))):
    batch, depth = (int(x) for x in os.path.basename(path)[:-5].split("-")[1:])
    ours = figure(path, "kv read") / 1e3
    peers = attention(batch, depth)
    cells = [f"{p:6.3f} ({ours / p:.3f})" if isinstance(p, float) else str(p)
             for p in (peers[n] for n in ("cuDNN", "FlashInfer", "torch flash"))]
    print(f"B{batch} S{depth:<26} {ours:6.3f} " + " ".join(f"{c:>14}" for c in cells), flush=True)
for path in sorted(glob.glob(os.path.join(FOLDER, "model-*.json"))):
    name = os.path.basename(path)[len("model-"):-5]
    try:
        peers = model(os.path.join(FOLDER, name))
    except ImportError as error:
        print(f"{name}: transformers is not installed: {error}")
        continue
    for tokens, seconds in peers.items():
        ours = figure(path, f"prefill {tokens}")
        rate = figure(path, f"prefill {tokens} median")
        theirs = tokens / seconds
        print(f"{name} prefill {tokens}: {rate:,.0f} tokens/s ({ours:.0f} TFLOP/s), transformers {theirs:,.0f}: {rate / theirs:.2f} x", flush=True)
