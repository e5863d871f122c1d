"""What the gateway answers when it does not answer: status, headers and OpenAI's error body, in one place.

Decides nothing. The statuses of errors that are not the gateway's own come from serving/ingress.py.
Called by: every file of the gateway that refuses, gateway/edge.py.
"""

import json
import math
from typing import Any


class Refusal(Exception):
    """An answer to the client instead of the one it asked for. Never leaves its process."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The error as OpenAI writes it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def refuse(status: int, message: str, code: str | None = None, param: Any = None) -> Refusal:
    """A refusal of the kind that goes with its status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Refusal(status, message, kind=kind, code=code, param=None if param is None else str(param))


def say_when(retry_after_s: float | None) -> dict[str, str]:
    """The header that says when to try again, in whole seconds; none if that is never."""
    if retry_after_s is None or not math.isfinite(retry_after_s):
        return {}
    return {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
