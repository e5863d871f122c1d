"""Models of the Hugging Face hub as folders here.

Does not read weights.
Called by: distill/teachers.py, registry/registry.py, cli/publish.py. Calls: huggingface_hub.
"""

import re
from collections.abc import Callable
from pathlib import Path

from swiftkv.errors import CheckpointError

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "LICENSE*", "NOTICE*")
_UNWANTED_FILES = ("consolidated*", "original/*")
"""The same weights once more, in a form of the maker's own."""


def find_model_folder(model: Path, revision: str | None = None) -> Path:
    """The model's folder here; one of the hub is downloaded first (safetensors, JSON and tokenizer files).

    Raises: CheckpointError if it is neither a folder nor a model of the hub, or if the hub gives nothing.
    """
    if model.is_dir():
        return model
    from huggingface_hub import snapshot_download

    def download() -> str:
        return snapshot_download(
            model.as_posix(),
            revision=revision,
            allow_patterns=list(_WANTED_FILES),
            ignore_patterns=list(_UNWANTED_FILES),
        )

    return Path(_ask_hub(model, download))


def download_config(model: Path, revision: str | None = None) -> Path:
    """The config.json of a model of the hub, alone. Raises: CheckpointError as `find_model_folder`."""
    from huggingface_hub import hf_hub_download

    return Path(_ask_hub(model, lambda: hf_hub_download(model.as_posix(), "config.json", revision=revision)))


def _ask_hub(model: Path, download: Callable[[], str]) -> str:
    """What the download gives, its errors in words of what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not _HUB_NAME.fullmatch(model.as_posix()):
        raise CheckpointError(
            f"{model}: no such folder. Give a Hugging Face model folder, or a model of the hub as OWNER/NAME."
        )
    try:
        return download()
    except GatedRepoError:
        problem = "its owner grants access on request. Ask for it on the model's page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        problem = "the hub has no model of this name, or not for everyone. Check it, or log in with `hf auth login`"
    except RevisionNotFoundError:
        problem = "the hub's model has no such revision. Check it"
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        problem = f"the hub gave nothing ({reason.rstrip('.')}). Check the network, or give a folder that is here"
    raise CheckpointError(f"{model}: no such folder, and {problem}.")
