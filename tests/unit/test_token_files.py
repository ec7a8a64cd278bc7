"""A token file holds what the tokenizer says; blocks are a bijection of it; what is damaged is named."""

from __future__ import annotations

import json
import mmap
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from hf_effi import cli
from hf_effi._files import save_aside
from hf_effi.data import (
    MegatronTokenFile,
    NanotronTokenFile,
    TokenBlocks,
    TokenFile,
    token_command,
    token_writer,
    write_token_file,
)
from hf_effi.data.token_files import tokenizer_hash
from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.data import shuffled_index
from tests.helpers import sft_dataset, tiny_tokenizer

#: documents of 3, 0, 5, 1 and 9 tokens
TEXTS = ["abc", "", "defgh", "i", "jklmnopqr"]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """21 tokens with EOS: documents end at 4, 5, 11, 13 and 23."""
    path = tmp_path_factory.mktemp("tokens") / "corpus"
    write_token_file(TEXTS, tiny_tokenizer(), path)
    return path


@pytest.fixture(scope="module")
def file(folder) -> TokenFile:
    return TokenFile(folder, tiny_tokenizer())


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- the shuffle ----


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_the_shuffle_is_a_bijection(count):
    for seed, epoch in ((0, 0), (0, 1), (2**64 - 1, 7)):
        assert sorted(shuffled_index(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_the_shuffle_is_a_bijection_beyond_a_power_of_two():
    count = 2**13 + 1
    assert {shuffled_index(i, count, 1) for i in range(count)} == set(range(count))


def test_the_shuffle_does_not_keep_neighbours_and_depends_on_seed_and_epoch():
    orders = [[shuffled_index(i, 1000, *key) for i in range(1000)] for key in ((0, 0), (0, 1), (1, 0))]
    values = torch.tensor(orders, dtype=torch.float64)
    assert torch.corrcoef(torch.cat([values, torch.arange(1000.0)[None]])).fill_diagonal_(0).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([values[0, 1:], values[0, :-1]]))[0, 1].abs() < 0.1


def test_every_order_of_three_is_drawn_about_equally_often():
    orders = [tuple(shuffled_index(i, 3, seed) for i in range(3)) for seed in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 150


@pytest.mark.parametrize("call", [(3, 3, 0), (-1, 3, 0), (0, 0, 0), (0, 3, -1), (0, 3, 0, -1), (True, 3, 0)])
def test_the_shuffle_refuses_what_is_out_of_range(call):
    with pytest.raises(ValueError, match="must be an integer"):
        shuffled_index(*call)


# ---- what is written ----


def test_the_tokens_are_those_of_the_tokenizer(file):
    eos = tiny_tokenizer().eos_token_id
    assert [file.document(i).tolist() for i in range(5)] == [[*ids(text), eos] for text in TEXTS]
    assert file.starts.tolist() == [0, 4, 5, 11, 13, 23]
    assert (file.num_tokens, file.num_documents, file.meta["dtype"]) == (23, 5, "uint16")
    assert (file.meta["bos"], file.meta["eos"]) == (None, eos)
    file.verify()
    with pytest.raises(IndexError, match="document 5"):
        file.document(5)


def test_bos_and_eos_are_asked_for(tmp_path):
    tokenizer = tiny_tokenizer(fresh=True)
    tokenizer.bos_token = "<|im_start|>"
    made = write_token_file(TEXTS, tokenizer, tmp_path / "both", bos=True, eos=False)
    assert made.document(0).tolist() == [tokenizer.bos_token_id, *ids("abc")]
    assert made.document(1).tolist() == [tokenizer.bos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        write_token_file(TEXTS, tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    made = [
        write_token_file(sft_dataset(20), tiny_tokenizer(), tmp_path / str(workers), workers=workers, batch_rows=3)
        for workers in (1, 2)
    ]
    streamed = write_token_file(sft_dataset(20).to_iterable_dataset(), tiny_tokenizer(), tmp_path / "stream")
    assert made[0].meta == made[1].meta == streamed.meta


def test_rows_of_tokens_are_taken_as_they_are(tmp_path):
    rows = [{"ids": [5, 6]}, {"ids": [7]}]
    made = write_token_file(rows, tiny_tokenizer(), tmp_path / "a", column="ids", eos=False)
    assert made.tokens(0, 3).tolist() == [5, 6, 7]


def test_a_large_vocabulary_has_four_bytes(tmp_path):
    tokenizer = tiny_tokenizer(fresh=True)
    tokenizer.add_tokens([f"<{i}>" for i in range(65_537 - len(tokenizer))])
    made = write_token_file([{"text": [65_536, 1]}], tokenizer, tmp_path / "a")
    assert (made.meta["dtype"], made.tokens(0, 2).tolist()) == ("uint32", [65_536, 1])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no tokens to write: 0 rows"),
        ("abc", "one text"),
        ([{"words": "a"}], "Row 0 has no column 'text'. It has words"),
        ([{"text": "a"}, {"text": None}], "Row 1 has a NoneType"),
        ([[5, 100]], r"integers in \[0, 100\)"),
        ([[5, -1]], r"integers in \[0, 100\)"),
        ([[5.5]], "no integers"),
        ([[5], "a"], "Row 1 is a text"),
    ],
)
def test_rows_that_cannot_be_written_are_named_and_leave_nothing(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        write_token_file(rows, tiny_tokenizer(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_worker_is_raised(tmp_path):
    with pytest.raises(ValueError, match="Row 7 has a NoneType"):
        write_token_file(["a"] * 7 + [None], tiny_tokenizer(), tmp_path / "a", workers=2, batch_rows=2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_until_the_new_one_is_whole(tmp_path, folder):
    there = copied(folder, tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_token_file(["x"], tiny_tokenizer(), there)

    def fails():
        yield "x"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_token_file(fails(), tiny_tokenizer(), there, overwrite=True)
    TokenFile(there).verify()
    assert TokenFile(there).num_tokens == 23
    assert write_token_file(["x"], tiny_tokenizer(), there, overwrite=True).num_tokens == 2


def test_a_killed_call_leaves_no_folder_and_the_next_one_names_what_is_left(tmp_path, monkeypatch, caplog):
    class Killed(BaseException):
        """Ends a process where it stands, as SIGKILL does."""

    def killed(path, write):
        part = Path(path).with_name(f"_12345678_{Path(path).name}")
        write(part)
        raise Killed

    monkeypatch.setattr(token_writer, "save_aside", killed)
    with pytest.raises(Killed):
        write_token_file(TEXTS, tiny_tokenizer(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(token_writer, "save_aside", save_aside)
    write_token_file(TEXTS, tiny_tokenizer(), tmp_path / "a").verify()
    assert "_12345678_a" in caplog.text


def test_a_tokenizer_does_what_the_writer_asks_it_to(caplog):
    """It adds nothing by itself, and does not say that a document is longer than the model."""
    tokenizer = tiny_tokenizer(fresh=True)
    tokenizer.model_max_length = 2
    ends = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer._tokenizer.post_processor = ends
    plain, added = (tokenizer(["abc"], add_special_tokens=adds, verbose=False)["input_ids"] for adds in (False, True))
    assert plain == [ids("abc")] and added == [[1, *ids("abc")]]
    assert "longer than" not in caplog.text


def test_a_file_of_rows_is_read_as_a_stream(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    rows = token_command._read(tmp_path / "rows.jsonl")
    assert isinstance(rows, IterableDataset) and [row["text"] for row in rows] == ["a", "b"]
    rows = Dataset.from_dict({"text": ["c"]})
    rows.save_to_disk(tmp_path / "folder")
    assert list(token_command._read(tmp_path / "folder")["text"]) == ["c"]
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has the splits train"):
        token_command._read(tmp_path / "splits")


# ---- what is damaged ----


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokens.bin", lambda content: content[:-2], "was cut off"),
        ("tokens.bin", lambda content: content + b"\0", "was cut off"),
        ("docs.idx", lambda content: content[:-8], "was cut off"),
        ("docs.idx", lambda content: struct.pack("<q", 1) + content[8:], "documents of .* go from"),
        ("meta.json", lambda content: content[:-9], "is damaged"),
        ("meta.json", lambda content: b"[]", "lacks dtype"),
        ("meta.json", lambda content: content.replace(b'"schema": 1', b'"schema": 9'), "schema 9"),
        ("meta.json", lambda content: content.replace(b"uint16", b"uint64"), "lacks dtype"),
        ("meta.json", lambda content: content.replace(b'"tokens": 23', b'"tokens": 22'), "tells of 22"),
    ],
)
def test_opening_finds_wrong_sizes_and_a_wrong_meta(tmp_path, folder, name, change, words):
    broken = copied(folder, tmp_path)
    content = (broken / name).read_bytes()
    assert change(content) != content
    (broken / name).write_bytes(change(content))
    with pytest.raises(BrokenFileError, match=words):
        TokenFile(broken)


@pytest.mark.parametrize("name", ["tokens.bin", "docs.idx", "meta.json"])
def test_a_missing_file_is_named(tmp_path, folder, name):
    broken = copied(folder, tmp_path)
    (broken / name).unlink()
    with pytest.raises(BrokenFileError, match=name):
        TokenFile(broken)


def test_verify_finds_a_flipped_bit_that_opening_does_not(tmp_path, folder):
    broken = copied(folder, tmp_path)
    content = bytearray((broken / "tokens.bin").read_bytes())
    content[7] ^= 1
    (broken / "tokens.bin").write_bytes(content)
    with pytest.raises(BrokenFileError, match=r"tokens.bin is damaged: its SHA-256"):
        TokenFile(broken).verify()


def test_another_tokenizer_is_refused(folder):
    other = tiny_tokenizer(fresh=True)
    other.add_tokens(["<new>"])
    with pytest.raises(MismatchError, match="other tokens"):
        TokenFile(folder, other)


def test_padding_and_truncation_of_a_call_do_not_change_the_hash():
    tokenizer = tiny_tokenizer(fresh=True)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before


def test_a_file_that_changed_under_a_reader_in_another_process_is_refused(tmp_path, folder):
    sent = pickle.dumps(TokenFile(copied(folder, tmp_path)))
    (tmp_path / "copy" / "tokens.bin").write_bytes(b"\0" * 46)
    with pytest.raises(MismatchError, match="has changed since"):
        pickle.loads(sent).tokens(0, 1)


# ---- files of other projects ----


def test_megatron(tmp_path):
    # Three sequences, the second document has two of them.
    tokens, lengths = [[1, 2], [3, 4, 5], [6]], [2, 3, 1]
    flat = np.array(sum(tokens, []), "<i4")
    (tmp_path / "c.bin").write_bytes(flat.tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    body = struct.pack("<3i", *lengths) + struct.pack("<3q", 0, 8, 20) + struct.pack("<3q", 0, 1, 3)
    (tmp_path / "c.idx").write_bytes(head + body)
    made = pickle.loads(pickle.dumps(MegatronTokenFile(tmp_path / "c")))
    assert [made.document(i).tolist() for i in range(2)] == [[1, 2], [3, 4, 5, 6]]
    assert TokenBlocks(made, 3, documents="reset")[0]["position_ids"].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="which tokenizer"):
        made.check_tokenizer(tiny_tokenizer())
    for wrong in (b"X" + head[1:] + body, head[:17] + b"\x06" + head[18:] + body, head[:20], head + body[:-8]):
        (tmp_path / "c.idx").write_bytes(wrong)
        with pytest.raises(BrokenFileError, match="no index of Megatron|has no documents|bytes"):
            MegatronTokenFile(tmp_path / "c")
    (tmp_path / "c.idx").write_bytes(head + body)
    (tmp_path / "c.bin").write_bytes(flat[:-1].tobytes())
    with pytest.raises(BrokenFileError, match="documents of"):
        MegatronTokenFile(tmp_path / "c")


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_nanotron(tmp_path, kind):
    (tmp_path / "a.ds").write_bytes(np.arange(6, dtype=kind).tobytes())
    (tmp_path / "a.ds.index").write_bytes(np.array([2, 6], "<u8").tobytes())
    made = NanotronTokenFile(tmp_path / "a.ds")
    assert [made.document(i).tolist() for i in range(2)] == [[0, 1], [2, 3, 4, 5]]
    (tmp_path / "a.ds").write_bytes(b"\0" * 7)
    with pytest.raises(BrokenFileError, match="of 2 or 4 bytes"):
        NanotronTokenFile(tmp_path / "a.ds")


# ---- blocks ----


def test_blocks_without_a_shuffle_are_slices(file):
    blocks = TokenBlocks(file, 5)
    assert (len(blocks), blocks.dropped_tokens) == (4, 3)
    assert torch.cat([blocks[i]["input_ids"] for i in range(4)]).tolist() == file.tokens(0, 20).tolist()
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in blocks)
    assert torch.equal(blocks[-1]["input_ids"], blocks[3]["input_ids"])
    with pytest.raises(IndexError, match="row 4"):
        blocks[4]


def test_each_pass_has_every_block_once_in_an_order_of_its_own(file):
    blocks = TokenBlocks(file, 2, shuffle=3, passes=4)
    orders = [[blocks.block_of(11 * number + i) for i in range(11)] for number in range(4)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert [TokenBlocks(file, 2, shuffle=3).block_of(i) for i in range(11)] == orders[0]


def test_documents_start_again(file):
    blocks = TokenBlocks(file, 10, documents="reset")
    # Documents begin at 0, 4, 5, 11 and 13.
    assert blocks[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert blocks[1]["position_ids"].tolist() == [0, 0, 1, 0, 1, 2, 3, 4, 5, 6]
    tokens = file.tokens(0, 10).tolist()
    assert blocks[0]["labels"].tolist() == [-100, *tokens[1:4], -100, -100, *tokens[6:10]]


def test_an_empty_document_starts_nothing(tmp_path):
    made = write_token_file(["abc", "", "", "de"], tiny_tokenizer(), tmp_path / "a", eos=False)
    assert TokenBlocks(made, 5, documents="reset")[0]["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert TokenBlocks(made, 4, documents="best_fit")[0]["position_ids"].tolist() == [0, 1, 2, 0]


def test_best_fit_keeps_documents_whole_and_every_token_once(file):
    # Documents of 4, 1, 6, 2 and 10 tokens; the last is cut into 8 + 2.
    blocks = TokenBlocks(file, 8, documents="best_fit")
    rows = [blocks[i] for i in range(len(blocks))]
    assert len(rows) == 3 and blocks.dropped_tokens == 0
    assert rows[0]["input_ids"].tolist() == file.tokens(13, 21).tolist()
    assert [row["position_ids"].tolist() for row in rows[1:]] == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert [(row["labels"] == -100).sum().item() for row in rows] == [1, 2, 4]
    listed = list(blocks.as_dataset())
    assert [row["seq_lengths"] for row in listed] == [[8], [6, 2], [4, 2, 1]]
    assert sorted(token for row in listed for token in row["input_ids"]) == sorted(file.tokens(0, 23).tolist())


def test_readahead_asks_for_the_rows_that_come_next_and_changes_none(file, monkeypatch):
    asked = []
    blocks = TokenBlocks(file, 5, shuffle=1, readahead=2)
    monkeypatch.setattr(file, "will_need", lambda begin, end: asked.append((begin, end)))
    assert torch.equal(blocks[1]["input_ids"], TokenBlocks(file, 5, shuffle=1)[1]["input_ids"])
    order = [blocks.block_of(i) for i in range(4)]
    assert asked == [(5 * block, 5 * block + 5) for block in order[2:4]]
    asked.clear()
    blocks[3]
    assert asked == []


def test_readahead_reaches_the_system(file, monkeypatch):
    file.tokens(0, 1)  # maps the file
    numbers, told = file._tokens, []
    real = numbers._map

    class Noting:
        def madvise(self, advice, begin, length):
            told.append((advice, begin, length))
            return real.madvise(advice, begin, length)

    monkeypatch.setattr(numbers, "_map", Noting())
    file.will_need(3, 23)
    file.will_need(23, 23)
    last = numbers.begin + 23 * numbers.dtype.itemsize
    assert told == [(mmap.MADV_WILLNEED, 0, last)]  # from the begin of a page, and nothing for no token


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_rows(file, context):
    blocks = pickle.loads(pickle.dumps(TokenBlocks(file, 2, shuffle=0, documents="reset")))
    blocks[0]  # mapped before the fork
    loader = DataLoader(blocks, batch_size=3, num_workers=2, multiprocessing_context=context)
    found = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(found, torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))]))
    assert len(pickle.dumps(blocks)) < 3000


@pytest.mark.parametrize(
    ("over", "error", "words"),
    [
        ({"length": 1}, ValueError, "length=1"),
        ({"length": 24}, RefusedError, "fill no row of length=24"),
        ({"shuffle": -1}, ValueError, "shuffle=-1"),
        ({"documents": "none"}, ValueError, "documents='none'"),
        ({"passes": 0}, ValueError, "passes=0"),
        ({"readahead": 1025}, ValueError, "readahead=1025"),
        ({"file": "corpus"}, ValueError, "file='corpus' must be a TokenFile"),
    ],
)
def test_wrong_arguments_are_named(file, over, error, words):
    with pytest.raises(error, match=words):
        TokenBlocks(**{"file": file, "length": 4, **over})


# ---- the command ----


def test_the_command_writes_tells_and_verifies(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    name, out = str(tmp_path / "tokenizer"), str(tmp_path / "corpus")
    write = ["tokens", "write", str(tmp_path / "rows.jsonl"), "--tokenizer", name, "--output", out]
    assert cli.main([*write, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 23
    assert cli.main(write) == 1
    assert "overwrite" in capsys.readouterr().err
    assert cli.main([*write, "--overwrite", "--no-eos"]) == 0
    assert cli.main(["tokens", "info", out, "--tokenizer", name]) == 0
    assert "tokens     18" in capsys.readouterr().out
    assert cli.main(["tokens", "verify", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    (tmp_path / "corpus" / "docs.idx").write_bytes(b"")
    assert cli.main(["tokens", "verify", out]) == 1
    assert "docs.idx" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "words"), [("none.jsonl", "no such file"), ("rows.xyz", ".xyz is not known")])
def test_the_command_names_rows_that_it_cannot_read(tmp_path, capsys, name, words):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.xyz").write_text("")
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    assert cli.main(["tokens", "write", str(tmp_path / name), *arguments]) == 1
    assert words in capsys.readouterr().err
