"""An HTTP client that notes when each part of a streamed answer comes.

Does not retry and hides nothing: what a client would see is what is noted.
Called by: loadgen/replay.py. Calls: aiohttp.
"""

import json
import time
from types import TracebackType
from typing import Any

import aiohttp

from swiftkv.loadgen.answers import Answer, Request

_EVENT = b"data: "
_DONE = b"[DONE]"
_LONGEST_LINE = 1 << 20


class Client:
    """Connections to one endpoint, as many as there are requests at once."""

    def __init__(self, base_url: str, timeout_s: float = 600.0) -> None:
        """`base_url` ends in `/v1`. A request that takes longer than `timeout_s` counts as silent."""
        self._base_url = base_url
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.began_s = time.perf_counter()

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            read_bufsize=_LONGEST_LINE,
        )
        self.began_s = time.perf_counter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self.began_s

    async def send(self, request: Request) -> Answer:
        """The answer, whatever becomes of it."""
        assert self._session is not None, "use `async with`"
        answer = Answer(request, self.now_s())
        body = {"stream": True, **request.body}
        if body["stream"]:
            body = {"stream_options": {"include_usage": True}, **body}
        headers = {"Authorization": f"Bearer {request.key}"}
        url = f"{self._base_url}/{request.path}"
        try:
            async with self._session.post(url, json=body, headers=headers) as response:
                if response.status != 200:
                    answer.outcome, answer.reason = "told", f"{response.status}: {await response.text()}"
                elif body["stream"]:
                    await self._read(response, answer)
                else:
                    _take_whole(await response.json(), answer)
        except TimeoutError:
            answer.reason = answer.reason or f"nothing more for {self._timeout_s:.0f} s"
        except (aiohttp.ClientError, ConnectionError) as error:
            if answer.outcome == "silent":
                answer.outcome, answer.reason = "broken", repr(error)
        answer.finished_s = self.now_s()
        return answer

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        finish_reason, is_done = "", False
        async for line in response.content:  # to its very end: otherwise the connection could not be used again
            if is_done or not line.startswith(_EVENT):
                continue
            data = line[len(_EVENT) :].strip()
            if data == _DONE:
                is_done = True
                if finish_reason:
                    answer.outcome, answer.reason = "complete", finish_reason
                continue
            event = json.loads(data)
            if "error" in event:
                answer.outcome, answer.reason = "told", str(event["error"].get("message"))
                is_done = True
                continue
            if usage := event.get("usage"):
                answer.completion_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                answer.chunk_s.append(self.now_s())
                answer.token_ids += choice.get("token_ids") or []
                finish_reason = choice.get("finish_reason") or finish_reason


def _take_whole(values: dict[str, Any], answer: Answer) -> None:
    choice = values["choices"][0]
    answer.token_ids = choice.get("token_ids") or []
    answer.completion_tokens = values["usage"]["completion_tokens"]
    if choice["finish_reason"]:
        answer.outcome, answer.reason = "complete", choice["finish_reason"]
