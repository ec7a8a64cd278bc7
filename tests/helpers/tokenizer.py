"""A character-level tokenizer built in code: no download, 100 tokens, a chat template with `{% generation %}`."""

from __future__ import annotations

import functools
import string

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
PAD_ID = 0
EOS_ID = 2

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def _build() -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    core = Tokenizer(WordLevel(vocab=vocab, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


_shared = functools.cache(_build)


@functools.cache
def _intact() -> dict[str, object]:
    return _settings(_build())


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    names = ("chat_template", "padding_side", "truncation_side", "model_max_length", "special_tokens_map")
    return {name: getattr(tokenizer, name) for name in names} | {"tokens": len(tokenizer)}


def restore_shared() -> list[str]:
    """Make the shared tokenizer anew where a test has changed it, and return the settings that it changed."""
    if not _shared.cache_info().currsize:
        return []
    now, wanted = _settings(_shared()), _intact()
    changed = [name for name in wanted if now[name] != wanted[name]]
    if changed:
        _shared.cache_clear()
    return changed


def tiny_tokenizer(*, fresh: bool = False) -> PreTrainedTokenizerFast:
    """
    Return the tiny tokenizer: one token per character of printable ASCII and newline, anything else is `<unk>`.

    Args:
        fresh (`bool`, *optional*, defaults to `False`):
            Build a new one, for a test that changes it. By default one object is shared by the whole session.
    """
    return _build() if fresh else _shared()
