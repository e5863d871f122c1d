"""Gives an empty S3 store a bucket and a model, so that the stack answers: run by the service `seed` of compose.yaml.

    python seed.py s3://BUCKET/FOLDER

The model `demo` is small and random, with a token for each byte: it shows that everything works, and says nothing.
Where the registry has any model, nothing is published; `demo` goes with `swiftkv models gc` once no alias means it.
Calls: pyarrow (for the bucket, which obstore cannot make), registry/registry.py, bench/models.py.
"""

import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from swiftkv.registry.registry import Registry

NAME = "demo"
MAX_TOKENS = 2048
WHY = "a random model, so that a new stack has one; docker/seed.py"


def main(store: str) -> int:
    """Does both where needed, and says what it did. Returns the exit status."""
    bucket = urlsplit(store).netloc
    print(f"bucket {bucket}: {'made' if create_bucket(bucket) else 'is there'}", flush=True)
    registry = Registry(store)
    if models := registry.list_models():
        print(f"models: {', '.join(models)}; none added")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        manifest = registry.publish(write_model(Path(folder)), NAME)
    registry.promote(f"{NAME}@{manifest.version}", "production", forced=WHY)
    print(f"published {NAME}@{manifest.version} as {NAME}@production")
    return 0


def create_bucket(name: str) -> bool:
    """Whether the bucket had to be made."""
    from pyarrow.fs import FileType, S3FileSystem

    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    store = S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        scheme=address.scheme,
        endpoint_override=address.netloc,
        allow_bucket_creation=True,
    )
    if store.get_file_info(name).type != FileType.NotFound:
        return False
    store.create_dir(name)
    return True


def write_model(folder: Path) -> Path:
    """A checkpoint folder of a random model with half of its layers skipped."""
    from swiftkv.bench.byte_tokenizer import write_tokenizer
    from swiftkv.bench.models import write_random_models
    from swiftkv.spec import ModelShape

    shape = ModelShape(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=512,
    )
    write_random_models(folder, shape, max_tokens=MAX_TOKENS)
    write_tokenizer(folder / "student", shape.vocab_size, MAX_TOKENS)
    return folder / "student"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
