"""`hf-effi tokens write | info | verify`: one flat file of tokens from a corpus."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._untrusted import one_line
from .token_files import TokenFile

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="{write,info,verify}", required=True)
    text = "tokenise a corpus into a folder"
    write = commands.add_parser("write", help=text, description=f"{text[0].upper()}{text[1:]}.")
    write.add_argument(
        "rows", type=Path, metavar="ROWS", help=f"{', '.join(_KINDS)}, or a folder that `Dataset.save_to_disk` wrote"
    )
    write.add_argument("--tokenizer", required=True, metavar="NAME", help="a folder, or a name on the Hub")
    write.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the token file goes")
    write.add_argument("--column", default="text", help="of the texts, or of lists of tokens; default: text")
    write.add_argument("--bos", action="store_true", help="begin each document with the BOS token")
    write.add_argument(
        "--no-eos", dest="eos", action="store_false", help="do not end each document with the EOS token"
    )
    write.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise; default: 1")
    write.add_argument("--overwrite", action="store_true", help="replace what is at FOLDER")
    for name, text in (
        ("info", "what is in a token file, from its meta.json and sizes (milliseconds)"),
        ("verify", "read every byte of a token file and compare it with its sums; ends with 1 where it is damaged"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("folder", type=Path, metavar="FOLDER", help="what `write` made")
        command.add_argument("--tokenizer", metavar="NAME", help="compare this tokenizer with the one that wrote it")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run one sub-command and return its exit code."""
    try:
        tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
        if args.action == "write":
            file = _write(args, tokenizer)
        else:
            file = TokenFile(args.folder, tokenizer)
            if args.action == "verify":
                file.verify()
    except (ValueError, OSError) as error:
        print(f"hf-effi tokens {args.action}: {one_line(error, 2000)}", file=sys.stderr)
        return 1
    found = {"folder": str(file.folder), **file.meta, "mean_document_tokens": file.num_tokens / file.num_documents}
    if args.json:
        print(json.dumps({**found, **({"whole": True} if args.action == "verify" else {})}, indent=1))
    else:
        print(_table(found) + ("\nEvery byte is as it was written." if args.action == "verify" else ""))
    return 0


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _write(args: argparse.Namespace, tokenizer: Any) -> TokenFile:
    from .token_writer import write_token_file

    return write_token_file(
        _read(args.rows),
        tokenizer,
        args.output,
        column=args.column,
        bos=args.bos,
        eos=args.eos,
        workers=args.workers,
        overwrite=args.overwrite,
    )


def _read(rows: Path) -> Iterable[Any]:
    """Return the rows of a file as a stream, or of a folder as a mapped dataset."""
    from datasets import Dataset, load_dataset, load_from_disk

    if not rows.exists():
        raise ValueError(f"{rows}: there is no such file or folder.")
    if rows.is_dir():
        found = load_from_disk(str(rows))
        if not isinstance(found, Dataset):
            raise ValueError(f"{rows} has the splits {', '.join(found)}. Give the folder of one split.")
        return found
    if rows.suffix not in _KINDS:
        raise ValueError(f"{rows.name}: {rows.suffix or 'no suffix'} is not known. Use one of {', '.join(_KINDS)}.")
    return load_dataset(_KINDS[rows.suffix], data_files=str(rows), split="train", streaming=True)


def _table(found: dict[str, Any]) -> str:
    lines = {
        "folder": found["folder"],
        "tokens": f"{found['tokens']:,}",
        "documents": f"{found['documents']:,}, of {found['mean_document_tokens']:,.1f} tokens on average",
        "numbers": f"{found['dtype']}, vocabulary of {found['vocab']:,}",
        "tokenizer": f"{found['tokenizer']['name'] or 'without a name'} ({found['tokenizer']['sha256'][:12]})",
        "bos, eos": ", ".join("none" if found[name] is None else str(found[name]) for name in ("bos", "eos")),
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())
