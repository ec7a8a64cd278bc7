"""What is taken for a secret, and what is not: a table of both."""

from __future__ import annotations

import random
import re

import pytest

from hf_effi import _secrets
from hf_effi._run_record import redact
from hf_effi._secrets import REDACTED, hide_in_text, is_secret_name

SECRET_NAMES = """
token hub_token HF_TOKEN tokens access_tokens token_secret pwd db_pwd passphrase pat github_pat cookie session_cookie
key api_key apiKey api-key X-Api-Key WANDB_API_KEY private_key ssh_key secret_access_key bearer auth authorization
Proxy-Authorization dsn SENTRY_DSN password passwd credentials clientSecret
""".split()
INNOCENT_NAMES = """
eos_token pad_tokens num_tokens max_new_tokens tokens_forward path pattern author authors keyboard sort_key text_key
keys secretary passes passport monkey authority cookies_per_batch tokenizer token_budget pats bearing special_tokens
""".split()
KEY = "Zx81Qw72Er63Ty54"
SECRET_TEXTS = {
    "a token of the Hub": f"hf_{KEY}{KEY}",
    "basic": "Authorization: Basic dXNlcjpwYXNz",
    "basic without its header": "Basic dXNlcjpwYXNzd29yZA==",
    "bearer": f"Bearer {KEY}",
    "password in an address": "postgres://me:open-sesame@db/x",
    "user information without a password": f"https://{KEY}@host/x",
    "query": f"https://host/x?token={KEY}&page=2",
    "signature": f"https://host/x?X-Amz-Signature={KEY}&page=2",
    "shared signature": f"https://host/x?sv=2024&sig={KEY}",
    "temporary key": "ASIAABCDEFGHIJKLMNOP",
    "chat": "xoxb-123456789012-abcdef",
    "cloud": "AIzaSyA-1234567890abcdefghijklmnopqrstu",
    "registry": "npm_abcdefghijklmnopqrstuvwxyz0123456789",
    "PEM": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----",
    "half a PEM": "-----BEGIN PRIVATE KEY-----\nMIIEow",
    "a dict as text": "{'api_key': 'open-sesame', 'x': 1}",
    "JSON as text": '{"password": "open-sesame"}',
    "an assignment": "OPENAI_API_KEY=open-sesame python train.py",
    "an option": "train.py --hub-token open-sesame --lr 1",
    "a header": "curl -H 'X-Api-Key: open-sesame' host",
    "a cookie": "curl -H 'Cookie: session=open-sesame; b=2' host",
    "weak name, strong value": f"token: {KEY}",
}
INNOCENT_TEXTS = [
    "eos_token=<|im_end|>",
    "{'pad_token': '<pad>', 'num_tokens': 128}",
    "Basic training of a model",
    "the bearer of this letter",
    "tokens forwarded per real token: 1.07",
    "max_tokens=4096, token_budget=8192",
    "https://huggingface.co/papers/2503.22342?page=2",
    "mail me@example.org",
    "token: a, secret: none",
    "key=value, sort_key=length",
    "lr=0.0003 author=Kaddour",
    "password: none",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert redact({name: "open-sesame"}) == {name: REDACTED}
    assert redact({name: {"value": "open-sesame", "n": 1, "deep": ["open-sesame"]}}) == {
        name: {"value": REDACTED, "n": 1, "deep": [REDACTED]}
    }


@pytest.mark.parametrize("name", INNOCENT_NAMES)
def test_names_that_only_look_alike(name):
    assert not is_secret_name(name)
    assert redact({name: "open-sesame"}) == {name: "open-sesame"}


@pytest.mark.parametrize("what", SECRET_TEXTS)
def test_secrets_in_text(what):
    text = SECRET_TEXTS[what]
    hidden = hide_in_text(f"before {text} after")
    assert REDACTED in hidden and hidden.startswith("before ")
    for secret in ("open-sesame", KEY, "dXNl", "ASIA", "xoxb", "AIza", "npm_", "MIIEow", "hf_"):
        assert secret not in hidden, hidden
    assert hide_in_text(hidden) == hidden


@pytest.mark.parametrize("text", INNOCENT_TEXTS)
def test_text_that_only_looks_alike(text):
    assert hide_in_text(text) == text


def test_an_environment_variable_with_a_secret_is_hidden_and_the_working_folder_is_not(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "open-sesame")
    monkeypatch.setenv("PWD", "/a/project")
    assert redact("open-sesame in /a/project") == f"{REDACTED} in /a/project"


@pytest.mark.parametrize(
    "piece", ["token=", "-----BEGIN PRIVATE KEY-----", "://a", "Basic ", "'api_key': '", "?sig=", "a_"]
)
def test_a_long_text_without_an_end_is_searched(piece):
    """A pattern that looks ahead without a limit would be at work for hours."""
    assert len(hide_in_text(piece * (2**18 // len(piece)))) > 0


def test_a_text_that_is_searched_once_has_no_secret_that_ten_patterns_would_find(monkeypatch):
    """The quick look at a text must let through everything that a pattern could match."""
    draw = random.Random(0)
    pieces = [piece for text in [*SECRET_TEXTS.values(), *INNOCENT_TEXTS] for piece in re.split(r"(\W)", text)]
    texts = ["".join(draw.choices([*pieces, KEY, "=", ": ", "\n"], k=draw.randint(1, 9))) for _ in range(6_000)]
    texts += [text.upper() for text in texts[:1_000]]
    quick = [hide_in_text(text) for text in texts]
    monkeypatch.setattr(_secrets, "_ANY", re.compile(""))
    assert quick == [hide_in_text(text) for text in texts]
    assert 100 < sum(map(str.__ne__, quick, texts)) < 6_000
