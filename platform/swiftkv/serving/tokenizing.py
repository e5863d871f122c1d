"""Lets a replica answer `tokenize`: Ray Serve LLM 2.60 looks for vLLM's service under a name that 0.29 has changed.

Can go when Ray reads vLLM's `serving_tokenization`; until then Ray answers that the model cannot tokenize.
Called by: Ray Serve, through the servers in serving/server.py and serving/decode.py.
"""

from typing import Any


class Tokenizing:
    """Mixed into one of Ray Serve LLM's servers."""

    engine: Any

    async def start(self) -> None:
        """Starts the engine, then hands Ray the service that it did not find."""
        await super().start()  # type: ignore[misc]  # of the class that this is mixed into
        self.engine._oai_serving_tokenization = self.engine._app_state.serving_tokenization
