"""When a prompt is worth sending to the prefill pool: what the hop costs, and what prefilling here costs everyone.

Pure bookkeeping of measured seconds; calls nobody and knows neither Ray nor vLLM.
Called by: serving/decode.py.

All of it is measured by the replica that decides: the answer's time of remote prefills (their queue and their compute
together), the time from there to the first token (the transfer), and the time to the first token of prompts that were
prefilled here. Each is a line in the number of uncached prompt tokens, fitted with old points fading.
"""

import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swiftkv.serving.config import HopSettings

_FADING = 0.9
"""What a point weighs after the next one. About the last twenty count."""
TOGETHER = 4
"""Prompts of one decode replica that one prefill replica is asked for at once because they begin alike."""

_PREFIX_CHARACTERS = 256
_BEGINNING_PIECES = 4
_LONGEST_TOKENS = 1 << 20


@dataclass
class FadingLine:
    """Seconds as `base + per_token * tokens`, least squares over points that fade; never falling in the tokens."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """One measured point."""
        sums = (self.weight, self.tokens, self.seconds, self.squares, self.products)
        point = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self.weight, self.tokens, self.seconds, self.squares, self.products = (
            _FADING * old + new for old, new in zip(sums, point, strict=True)
        )

    @property
    def is_measured(self) -> bool:
        """Whether there is any point."""
        return self.weight > 0

    def predict(self, tokens: float) -> float:
        """Seconds for so many tokens. Raises: ZeroDivisionError before the first point."""
        mean_tokens, mean_seconds = self.tokens / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean_tokens**2
        if spread < 1.0:  # all points at one length: in proportion
            return mean_seconds * tokens / max(mean_tokens, 1.0)
        slope = max(0.0, (self.products / self.weight - mean_tokens * mean_seconds) / spread)
        slope = min(slope, mean_seconds / max(mean_tokens, 1.0))  # no negative base
        return mean_seconds + slope * (tokens - mean_tokens)


@dataclass
class HopCosts:
    """What the replica knows of both ways."""

    settings: HopSettings
    remote: FadingLine = field(default_factory=FadingLine)
    transfer: FadingLine = field(default_factory=FadingLine)
    local: FadingLine = field(default_factory=FadingLine)
    unqueued: FadingLine = field(default_factory=FadingLine)
    """Of `remote`, the answers that were no slower than those before: what the pool does without a queue."""

    def add_remote(self, tokens: float, seconds: float) -> None:
        """The prefill pool answered."""
        if not self.unqueued.is_measured or seconds <= self.remote.predict(tokens):
            self.unqueued.add(tokens, seconds)
        self.remote.add(tokens, seconds)

    def is_for_prefill_pool(self, tokens: float, running: int, waiting_tokens: float) -> bool:
        """Whether the prompt would be prefilled in the other pool if that were well and had no queue.

        What a pool is sized for: one that has a queue, or does not answer, is asked less, and is not needed less.
        """
        return self._choose(self.unqueued, tokens, running, waiting_tokens)

    def choose_remote(self, tokens: float, running: int, waiting_tokens: float) -> bool:
        """Whether a prompt of so many uncached tokens is prefilled in the other pool.

        `running`: sequences that decode here, each of which waits while a prompt is prefilled here.
        `waiting_tokens`: prompt tokens that this engine has to prefill before.
        """
        return self._choose(self.remote, tokens, running, waiting_tokens)

    def find_break_even(self, running: int, waiting_tokens: float) -> float:
        """Fewest tokens for which the hop pays, by bisection; infinity if it never does."""
        if not self.choose_remote(_LONGEST_TOKENS, running, waiting_tokens):
            return float("inf")
        low, high = 0, _LONGEST_TOKENS
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.choose_remote(middle, running, waiting_tokens) else (middle + 1, high)
        return float(low)

    def _choose(self, remote: FadingLine, tokens: float, running: int, waiting_tokens: float) -> bool:
        if self.settings.min_tokens is not None:
            return tokens >= self.settings.min_tokens
        if not (remote.is_measured and self.transfer.is_measured and self.local.is_measured):
            return tokens >= self.settings.min_tokens_unmeasured
        here = self.local.predict(tokens) * (1 + running) + self.local.predict(waiting_tokens) * (waiting_tokens > 0)
        return remote.predict(tokens) + self.transfer.predict(tokens) < here


class SeenPrefixes:
    """Beginnings of texts that this replica's engine has held, as far as its KV cache reaches."""

    def __init__(self, capacity_characters: int) -> None:
        self._pieces: OrderedDict[int, None] = OrderedDict()
        self._capacity = max(1, capacity_characters // _PREFIX_CHARACTERS)

    def count_seen(self, text: str, salt: str = "") -> int:
        """Characters from the start of the text that were seen with the same salt, in whole pieces."""
        seen = 0
        for key in _hash_pieces(text, salt):
            if key not in self._pieces:
                break
            seen += _PREFIX_CHARACTERS
        return seen

    def add(self, text: str, salt: str = "") -> None:
        """Take a text as seen; the least recent pieces go. The engine shares KV only among equal salts."""
        for key in _hash_pieces(text, salt):
            self._pieces[key] = None
            self._pieces.move_to_end(key)
        while len(self._pieces) > self._capacity:
            self._pieces.popitem(last=False)


class Beginnings:
    """Names by which prompts that begin alike come to the same prefill replica, which has their KV."""

    def __init__(self) -> None:
        self._asked: Counter[int] = Counter()

    @contextmanager
    def hold(self, text: str, salt: str = "") -> Iterator[str | None]:
        """The name, while the prompt is being prefilled; None for a text too short to gain by it.

        Of many at once each `TOGETHER` have another name: a beginning that all share, such as a system prompt, must
        not keep to one replica of many.
        """
        pieces = _hash_pieces(text[: _BEGINNING_PIECES * _PREFIX_CHARACTERS], salt)
        if len(pieces) < _BEGINNING_PIECES:
            yield None
            return
        key = pieces[-1]
        name = f"{key:x}-{self._asked[key] // TOGETHER}"
        self._asked[key] += 1
        try:
            yield name
        finally:
            self._asked[key] -= 1
            if not self._asked[key]:
                del self._asked[key]


def _hash_pieces(text: str, salt: str) -> list[int]:
    """One number per whole piece, which depends on everything before it."""
    keys, before = [], zlib.crc32(salt.encode(errors="surrogatepass"))
    for start in range(0, len(text) - _PREFIX_CHARACTERS + 1, _PREFIX_CHARACTERS):
        # Not hash(): replicas must agree.
        before = zlib.crc32(text[start : start + _PREFIX_CHARACTERS].encode(errors="surrogatepass"), before)
        keys.append(before)
    return keys
