"""A Ray cluster that somebody else starts and stops, by the address of its dashboard.

Called by: cli/distill.py, cli/deploy.py, serving/deploy.py.
"""

import os
from pathlib import Path

from swiftkv.config import StrictModel


class RemoteCluster(StrictModel):
    """Somebody else's cluster, whose logs lie on machines of its own."""

    dashboard_url: str
    """http://host:port, 8265 by default."""

    def headers(self) -> dict[str, str]:
        """Ray's own token variables, where they are set."""
        token = os.environ.get("RAY_AUTH_TOKEN")
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if token is None and path is not None and Path(path).is_file():
            token = Path(path).read_text(encoding="utf-8").strip()
        return {"Authorization": f"Bearer {token}"} if token else {}
