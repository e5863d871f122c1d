"""A steady load of small greedy completions during a fault, every answer of which is accounted for.

Called by: tests/integration/test_faults.py. Calls: swiftkv.loadgen, the reference.
"""

import asyncio
import random
import threading
from collections import Counter

from fakes import random_prompt_ids
from reference import generate_greedy

from swiftkv.loadgen.answers import Request
from swiftkv.loadgen.client import Client

NUM_CLIENTS = 3
OUTCOMES = ("complete", "told", "broken", "silent")


class Load:
    """Requests at a steady rate, from a thread of its own, until the block ends; every second one is streamed.

    `prompts` and `answers`: ranges of tokens. A request that has not ended after `deadline_s` counts as silent.
    """

    def __init__(self, base_url, rate_per_s=2.0, prompts=(24, 400), answers=(4, 24), deadline_s=90.0, seed=0):
        self._base_url, self._interval_s, self._deadline_s = base_url, 1 / rate_per_s, deadline_s
        self._prompts, self._answers, self._rng = prompts, answers, random.Random(seed)
        self._stopping, self._thread = threading.Event(), threading.Thread(target=self._run)
        self.answers, self.sent = [], 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        self._thread.join()

    def _run(self):
        asyncio.run(self._send())

    async def _send(self):
        clients = [await Client(self._base_url, self._deadline_s).__aenter__() for _ in range(NUM_CLIENTS)]
        running = []
        while not self._stopping.is_set():
            running.append(asyncio.create_task(self._send_one(clients[self.sent % NUM_CLIENTS])))
            self.sent += 1
            await asyncio.sleep(self._interval_s)
        await asyncio.gather(*running)
        for client in clients:
            await client.__aexit__(None, None, None)

    async def _send_one(self, client):
        index, rng = self.sent, self._rng
        body = build_body(random_prompt_ids(rng, rng.randint(*self._prompts)), rng.randint(*self._answers))
        answer = await client.send(Request(body | {"stream": index % 2 == 0}, label=str(index)))
        self.answers.append(answer)


def build_body(prompt, num_tokens):
    """A greedy completion of exactly so many tokens, with their ids."""
    tokens = {"max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True}
    return {"model": "tiny", "prompt": prompt, "temperature": 0, **tokens}


def count_outcomes(answers, since=0):
    """How many answers of requests from number `since` on ended in each way."""
    counts = Counter(answer.outcome for answer in answers if int(answer.request.label) >= since)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def find_wrong(answers, weights, most=40):
    """Complete answers, of the first `most`, that are not the reference's tokens."""
    wrong = []
    for answer in [answer for answer in answers if answer.outcome == "complete"][:most]:
        body = answer.request.body
        if answer.token_ids != generate_greedy(*weights, body["prompt"], body["max_tokens"]):
            wrong.append(answer)
    return wrong
