"""The official OpenAI client against a running server.

    DISTKV_URL=http://127.0.0.1:8000 DISTKV_MODEL=name python3 tests/openai/test_openai.py [-v] [Test.name]

DISTKV_API_KEY is sent where it is set. The model may be any: nothing here
depends on what it says, only on how it is said.
"""

import asyncio
import json
import os
import re
import threading
import time
import unittest
import urllib.request
import uuid

import openai

URL = os.environ.get("DISTKV_URL", "http://127.0.0.1:8000").rstrip("/")
MODEL = os.environ.get("DISTKV_MODEL", "")
KEY = os.environ.get("DISTKV_API_KEY", "none")
OPTIONS = dict(base_url=URL + "/v1", api_key=KEY, max_retries=0, timeout=300)

client = openai.OpenAI(**OPTIONS)


def get(path):
    request = urllib.request.Request(URL + path, headers={"Authorization": "Bearer " + KEY})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def post(path, body):
    request = urllib.request.Request(
        URL + path,
        data=json.dumps(body).encode(),
        headers={"Authorization": "Bearer " + KEY, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def metric(name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", get("/metrics"), re.M)
    assert found, f"/metrics has no {name}"
    return float(found[1])


def user(text):
    return [{"role": "user", "content": text}]


def chat(text="Tell me about the sea.", **options):
    options.setdefault("max_tokens", 24)
    options.setdefault("temperature", 0)
    return client.chat.completions.create(model=MODEL, messages=user(text), **options)


def complete(prompt="The sea is", **options):
    options.setdefault("max_tokens", 24)
    options.setdefault("temperature", 0)
    return client.completions.create(model=MODEL, prompt=prompt, **options)


class Models(unittest.TestCase):
    def test_the_model_is_listed_and_found(self):
        listed = {model.id: model for model in client.models.list()}
        self.assertIn(MODEL, listed)
        self.assertEqual(listed[MODEL].object, "model")
        self.assertGreater(listed[MODEL].max_model_len, 0)
        self.assertEqual(client.models.retrieve(MODEL).id, MODEL)

    def test_another_model_is_not_found(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            client.completions.create(model="no-such-model", prompt="a")
        self.assertEqual(caught.exception.code, "model_not_found")
        self.assertIn("no-such-model", caught.exception.message)
        with self.assertRaises(openai.NotFoundError):
            client.models.retrieve("no-such-model")


class Chat(unittest.TestCase):
    def test_an_answer_and_its_usage(self):
        answer = chat()
        self.assertEqual(answer.object, "chat.completion")
        choice = answer.choices[0]
        self.assertEqual(choice.message.role, "assistant")
        self.assertTrue(choice.message.content)
        self.assertIn(choice.finish_reason, ("stop", "length"))
        usage = answer.usage
        self.assertGreater(usage.prompt_tokens, 0)
        self.assertTrue(0 < usage.completion_tokens <= 24)
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)

    def test_a_stream_says_the_same(self):
        # Once before: what is computed of a whole prompt and what is taken from the
        # prefix cache may round differently with --math fast, and a token may lead
        # by a hair.
        chat()
        whole = chat()
        stream = chat(stream=True, stream_options={"include_usage": True})
        text, finishes, usage, first = "", [], None, None
        for chunk in stream:
            self.assertEqual(chunk.object, "chat.completion.chunk")
            if chunk.usage:
                self.assertEqual(chunk.choices, [])
                usage = chunk.usage
                continue
            choice = chunk.choices[0]
            first = first or choice.delta
            text += choice.delta.content or ""
            finishes.append(choice.finish_reason)
        self.assertEqual(first.role, "assistant")
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(finishes[-1], whole.choices[0].finish_reason)
        self.assertTrue(all(finish is None for finish in finishes[:-1]))
        self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual(usage.prompt_tokens, whole.usage.prompt_tokens)

    def test_the_clients_stream_helper(self):
        with client.chat.completions.stream(model=MODEL, messages=user("Hello"), max_tokens=12, temperature=0) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
            final = stream.current_completion_snapshot
        self.assertEqual(text, final.choices[0].message.content)

    def test_max_completion_tokens_is_the_newer_name(self):
        answer = chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=3, extra_body={"ignore_eos": True})
        self.assertEqual(answer.usage.completion_tokens, 3)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_content_parts_and_roles(self):
        messages = [
            {"role": "developer", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "text", "text": "Hello,"}, {"type": "text", "text": "who are you?"}]},
            {"role": "assistant", "content": "A model."},
            {"role": "user", "content": "Go on."},
        ]
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
        self.assertTrue(answer.choices)

    def test_logprobs(self):
        answer = chat(max_tokens=6, logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        self.assertEqual(len(content), answer.usage.completion_tokens)
        for entry in content:
            self.assertEqual(len(entry.top_logprobs), 3)
            values = [top.logprob for top in entry.top_logprobs]
            self.assertEqual(values, sorted(values, reverse=True))
            self.assertLessEqual(values[0], 0)
            # Greedy: the likeliest is the one chosen.
            self.assertEqual(entry.logprob, values[0])
            self.assertEqual(entry.token, entry.top_logprobs[0].token)
        said = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
        self.assertIn(answer.choices[0].message.content.strip(), said)

    def test_a_streams_logprobs_are_the_same(self):
        whole = chat(max_tokens=6, logprobs=True, top_logprobs=1).choices[0].logprobs.content
        streamed = []
        for chunk in chat(max_tokens=6, logprobs=True, top_logprobs=1, stream=True):
            if chunk.choices and chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content
        self.assertEqual([entry.token for entry in streamed], [entry.token for entry in whole])


class Completions(unittest.TestCase):
    def test_a_completion_and_its_stream(self):
        whole = complete()
        self.assertEqual(whole.object, "text_completion")
        stream = list(complete(stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        self.assertEqual(text, whole.choices[0].text)
        self.assertEqual(stream[-1].usage.completion_tokens, whole.usage.completion_tokens)

    def test_several_prompts_and_n(self):
        answer = complete(["One", "Two"], n=2, max_tokens=4)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        # Greedy: both choices of a prompt are the same.
        texts = [choice.text for choice in answer.choices]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[2], texts[3])

    def test_token_ids_are_a_prompt(self):
        ids = post("/tokenize", {"model": MODEL, "prompt": "The sea is"})["tokens"]
        self.assertEqual(complete(ids).choices[0].text, complete("The sea is").choices[0].text)
        self.assertIn("The sea is", post("/detokenize", {"model": MODEL, "tokens": ids})["prompt"])

    def test_logprobs_and_echo(self):
        answer = complete(max_tokens=4, logprobs=2, echo=True)
        choice = answer.choices[0]
        self.assertTrue(choice.text.startswith("The sea is"))
        logprobs = choice.logprobs
        count = answer.usage.total_tokens
        for values in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
            self.assertEqual(len(values), count)
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertTrue(all(value <= 0 for value in logprobs.token_logprobs[1:]))
        self.assertEqual(logprobs.text_offset, sorted(logprobs.text_offset))

    def test_a_prompt_can_be_scored_alone(self):
        answer = complete(max_tokens=0, logprobs=1, echo=True)
        self.assertEqual(answer.choices[0].text, "The sea is")
        self.assertEqual(len(answer.choices[0].logprobs.tokens), answer.usage.prompt_tokens)
        self.assertEqual(answer.usage.completion_tokens, 0)

    def test_logit_bias_forces_a_token(self):
        free = complete(max_tokens=1, logprobs=2)
        top = free.choices[0].logprobs.top_logprobs[0]
        second = min(top, key=top.get)
        ids = post("/tokenize", {"model": MODEL, "prompt": second, "add_special_tokens": False})["tokens"]
        if len(ids) != 1:
            self.skipTest(f"{second!r} is not one token of its own")
        forced = complete(max_tokens=1, logit_bias={str(ids[0]): 100})
        self.assertEqual(forced.choices[0].text, second)
        self.assertNotEqual(forced.choices[0].text, free.choices[0].text)


class Choosing(unittest.TestCase):
    def test_a_seed_is_honoured(self):
        def say(seed):
            return chat(temperature=1, seed=seed, max_tokens=16).choices[0].message.content

        self.assertEqual(say(1), say(1))
        self.assertGreater(len({say(seed) for seed in range(5)}), 1)

    def test_n_choices_differ_and_repeat_with_the_seed(self):
        def say():
            answer = chat(temperature=1, seed=7, n=3, max_tokens=16)
            self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
            return [choice.message.content for choice in answer.choices]

        first = say()
        self.assertGreater(len(set(first)), 1)
        self.assertEqual(first, say())

    def test_n_streams_together(self):
        texts, finished = {}, set()
        for chunk in chat(temperature=1, seed=7, n=3, max_tokens=16, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                if choice.finish_reason:
                    finished.add(choice.index)
        self.assertEqual(finished, {0, 1, 2})
        whole = chat(temperature=1, seed=7, n=3, max_tokens=16)
        self.assertEqual([texts[i] for i in range(3)], [choice.message.content for choice in whole.choices])

    def test_stop_ends_the_text_before_it(self):
        free = complete(max_tokens=32).choices[0].text
        self.assertGreater(len(free), 8)
        stop = free[5:8]
        for stream in (False, True):
            answer = complete(max_tokens=32, stop=[stop, "\0never"], stream=stream)
            chunks = list(answer) if stream else [answer]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            self.assertEqual(text, free[: free.index(stop)])
            self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_vllms_fields_are_known(self):
        greedy = complete().choices[0].text
        extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "some_other_field": 3}
        self.assertEqual(complete(temperature=1, extra_body=extra).choices[0].text, greedy)
        long = complete(max_tokens=20, extra_body={"ignore_eos": True})
        self.assertEqual((long.usage.completion_tokens, long.choices[0].finish_reason), (20, "length"))


class Cache(unittest.TestCase):
    def test_the_second_identical_prompt_is_cached(self):
        # New to the cache from its first token on, and many blocks long.
        text = uuid.uuid4().hex + " once upon a time there was a sea" * 12
        first, second = chat(text, max_tokens=4), chat(text, max_tokens=4)
        self.assertGreater(second.usage.prompt_tokens_details.cached_tokens, 0)
        self.assertLess(first.usage.prompt_tokens_details.cached_tokens, second.usage.prompt_tokens_details.cached_tokens)
        self.assertLess(second.usage.prompt_tokens_details.cached_tokens, second.usage.prompt_tokens)
        self.assertEqual(first.choices[0].message.content, second.choices[0].message.content)


class Errors(unittest.TestCase):
    def refused(self, call, param, *words):
        with self.assertRaises(openai.BadRequestError) as caught:
            call()
        error = caught.exception
        self.assertEqual(error.type, "invalid_request_error")
        if param:
            self.assertEqual(error.param, param)
        for word in words:
            self.assertIn(word, error.message)
        return error

    def test_too_long_names_the_limit(self):
        limit = client.models.retrieve(MODEL).max_model_len
        error = self.refused(lambda: complete([1] * (limit + 10)), "prompt", str(limit))
        self.assertEqual(error.code, "context_length_exceeded")
        error = self.refused(lambda: chat("a " * (limit + 10)), "messages", str(limit))
        self.assertEqual(error.code, "context_length_exceeded")
        error = self.refused(lambda: chat(max_tokens=limit), "max_tokens", str(limit))
        self.assertEqual(error.code, "context_length_exceeded")

    def test_parameters_out_of_range(self):
        self.refused(lambda: chat(temperature=-1), "temperature", "at least 0")
        self.refused(lambda: chat(top_p=1.5), "top_p", "at most 1")
        self.refused(lambda: chat(n=0), "n", "from 1")
        self.refused(lambda: chat(max_tokens=0), "max_tokens", "at least 1")
        self.refused(lambda: chat(presence_penalty=5), "presence_penalty", "from -2 to 2")
        self.refused(lambda: chat(logprobs=True, top_logprobs=50), None, "from 0 to 20")
        self.refused(lambda: chat(stop=""), "stop", "empty")

    def test_wrong_types(self):
        self.refused(lambda: chat(temperature="hot"), "temperature", "a number")
        self.refused(lambda: complete({"a": 1}), "prompt", "a string")
        self.refused(lambda: client.chat.completions.create(model=MODEL, messages=[]), "messages", "empty")

    def test_what_is_not_done_is_said(self):
        self.refused(lambda: chat(response_format={"type": "json_object"}), "response_format", "unsupported")
        self.refused(lambda: complete(suffix="end"), "suffix", "unsupported")
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        self.refused(lambda: chat(tools=tools, tool_choice="required"), "tool_choice", "unsupported")
        image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        self.refused(lambda: chat(image), "messages[0].content", "text")

    def test_errors_come_before_a_stream(self):
        self.refused(lambda: chat(temperature=-1, stream=True), "temperature")


class Life(unittest.TestCase):
    def test_a_client_that_goes_is_cancelled(self):
        started = threading.Event()
        stream = chat("Tell me everything.", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        for count, _ in enumerate(stream):
            started.set()
            if count == 3:
                break
        stream.close()
        self.assertTrue(started.is_set())
        deadline = time.monotonic() + 60
        while metric("num_requests_running") + metric("num_requests_waiting") > 0:
            self.assertLess(time.monotonic(), deadline, "the request still runs")
            time.sleep(0.05)
        self.assertGreaterEqual(metric('request_success_total{finished_reason="abort"}'), 1)
        self.assertTrue(get("/health"))
        self.assertTrue(chat(max_tokens=4).choices)

    def test_eight_streams_at_once(self):
        async def one(async_client, index):
            stream = await async_client.chat.completions.create(
                model=MODEL,
                messages=user(f"Count from {index}."),
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            text, usage, finish = "", None, None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
            return text, usage, finish

        async def every():
            async with openai.AsyncOpenAI(**OPTIONS) as async_client:
                return await asyncio.gather(*(one(async_client, index) for index in range(8)))

        answers = asyncio.run(every())
        self.assertEqual(len(answers), 8)
        for text, usage, finish in answers:
            self.assertTrue(text)
            self.assertGreater(usage.completion_tokens, 0)
            self.assertIn(finish, ("stop", "length"))

    def test_the_nodes_condition(self):
        self.assertTrue(get("/ready"))
        self.assertIn("version", json.loads(get("/version")))
        cluster = json.loads(get("/cluster"))
        self.assertIsInstance(cluster["instances"], list)
        chat(max_tokens=2)
        self.assertGreater(metric("time_to_first_token_seconds_count"), 0)
        self.assertGreater(metric("generation_tokens_total"), 0)


if __name__ == "__main__":
    if not MODEL:
        MODEL = next(iter(client.models.list())).id
    unittest.main()
