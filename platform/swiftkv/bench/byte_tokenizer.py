"""A tokenizer without training: every byte is a token. For random models, whose tokens mean nothing.

Called by: bench/models.py, tests. Calls: tokenizers.
"""

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
"""Their ids follow those of the 256 bytes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path | str, vocab_size: int = 300, max_length: int = 2048) -> Path:
    """A tokenizer that turns any text into its bytes (id = byte), readable by AutoTokenizer.

    Ids beyond the special tokens are never encoded but decode to `[id]`, so that whatever a random model
    generates has a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first_filler = 256 + len(SPECIAL_TOKENS)
    assert vocab_size >= first_filler, f"the byte tokenizer needs a vocabulary of {first_filler} or more"
    vocab = {character: byte for byte, character in _byte_characters().items()}
    vocab |= {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}
    vocab |= {f"[{token}]": token for token in range(first_filler, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
