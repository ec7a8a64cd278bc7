"""`CodeIOReward` and its pure functions: a table of completions, languages, columns of the wrong shape, pickling."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_effi.errors import BrokenFileError, RefusedError, RewardError
from hf_effi.functional.rewards import fraction_passed, last_fence, outputs_agree
from hf_effi.rewards import CodeIOReward, Isolation, Language, Sandbox, SandboxLimits, sandbox
from hf_effi.rewards._isolation import GUARDS
from hf_effi.selection.rewards import is_async

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SUM = [{"input": "2 3\n", "output": "5\n"}, {"input": "-1 1", "output": "0"}]


def fenced(code: str, tag: str = "python") -> str:
    return f"I add them.\n\n```{tag}\n{code}\n```\nDone."


RIGHT = fenced("a, b = map(int, input().split())\nprint(a + b)")


# --- pure functions ---


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("", None, None),
        ("no fence", None, None),
        ("```\nx\n```", None, "x\n"),
        ("```python\nx\n```\n```\ny\n```", None, "y\n"),
        ("```python\nx\n```\n```\ny\n```", ("python",), "x\n"),
        ("```Python title=a\nx\n```", ("python",), "x\n"),
        ("```\nx\n```", ("python", ""), "x\n"),
        ("```python\nx\n```\n```python\ny", None, "x\n"),  # the last one is not closed
        ("~~~py\n```\n~~~", None, "```\n"),
        ("````\n```\nx\n```\n````", None, "```\nx\n```\n"),
        ("```\nx\n`````", None, "x\n"),
        ("```\n```", None, ""),
        ("  ```c\n  x\n  ```", None, "  x\n"),
        ("```x``` is code within a line\n```\ny\n```", None, "y\n"),
        ("```\r\nx\r\n```\r\n", None, "x\r\n"),
        ("```\nprint('''\n``` not the end\n''')\n```", None, "print('''\n``` not the end\n''')\n"),
    ],
)
def test_last_fence(text: str, tags: Any, expected: str | None) -> None:
    assert last_fence(text, tags) == expected


def test_last_fence_takes_linear_time() -> None:
    started = time.monotonic()
    for text in ("```" + "a" * 500_000 + "`", "```\n" * 200_000, "`" * 1_000_000, "~~~ " * 200_000):
        last_fence(text)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("printed", "expected", "agree"),
    [
        ("5\n", "5", "whitespace float"),
        (" 5  6\r\n\n", "5\n6", "whitespace float"),
        ("5", "5", "whitespace float exact"),
        ("", "", "whitespace float exact"),
        ("\n", "", "whitespace float"),
        ("5 6", "56", ""),
        ("0.1", "0.10", "float"),
        ("1000000", "1000000.5", "float"),
        ("0.00001", "0.00002", ""),
        ("1e400", "1e400", "whitespace float exact"),
        ("1e400", "2e400", ""),
        ("nan", "NaN", ""),
        ("1_0", "10", ""),
        ("9" * 100, "9" * 99 + "8", ""),
        ("é", "é", "whitespace float exact"),
        ("YES", "yes", ""),
    ],
)
def test_outputs_agree(printed: str, expected: str, agree: str) -> None:
    for compare in ("whitespace", "exact", "float"):
        assert outputs_agree(printed, expected, compare) == (compare in agree.split())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compare='near'"):
        outputs_agree("", "", "near")  # type: ignore[arg-type]


def test_fraction_passed() -> None:
    assert fraction_passed([True, False, True, True], binary=False) == 0.75
    assert fraction_passed([False]) == 0.0 and fraction_passed([True]) == 1.0
    with pytest.raises(ValueError, match="at least one test"):
        fraction_passed([])


# --- the reward ---


@pytest.fixture(scope="module")
def room() -> Iterator[Sandbox]:
    limits = SandboxLimits(memory_bytes=200 * 2**20)
    with Sandbox(limits, workers=2, accept=tuple(GUARDS)) as made:
        yield made


#: completion -> (reward, verdict, partial reward)
TABLE: dict[str, tuple[str, float, str, float]] = {
    "right": (RIGHT, 1.0, "right", 1.0),
    "no fence": ("a, b = map(int, input().split())\nprint(a + b)", 0.0, "no_code", 0.0),
    "empty fence": (fenced(" "), 0.0, "no_code", 0.0),
    "empty": ("", 0.0, "no_code", 0.0),
    "not closed": (RIGHT[: RIGHT.rindex("```")], 0.0, "no_code", 0.0),
    "the last fence counts": (RIGHT + fenced("print(0)"), 0.0, "wrong", 0.5),
    "another language's tag": (fenced("print(sum(map(int, input().split())))", "text"), 1.0, "right", 1.0),
    "one of two": (fenced("print(5)"), 0.0, "wrong", 0.5),
    "runtime error": (fenced("print(sum(map(int, input().split()))); 1 / 0"), 0.0, "failed", 0.0),
    "syntax error": (fenced("print("), 0.0, "failed", 0.0),
    "trailing whitespace": (fenced("print(sum(map(int, input().split())), end='  \\n\\n')"), 1.0, "right", 1.0),
    "prints more": (fenced("print('Sum:', sum(map(int, input().split())))"), 0.0, "wrong", 0.0),
    "huge output": (fenced("while True: print('x' * 1000)"), 0.0, "limit", 0.0),
    "too slow": (fenced("import time; time.sleep(60)"), 0.0, "limit", 0.0),
    "a thread that goes on": (
        fenced("import os\nprint(sum(map(int, input().split())), flush=True)\nif not os.fork(): input()"),
        1.0,
        "right",
        1.0,
    ),
    "unicode": (fenced("Ü = sum(map(int, input().split()))\nprint(Ü)  # 🙂"), 1.0, "right", 1.0),
    "no UTF-8": (fenced("import os; os.write(1, b'\\xff5')"), 0.0, "wrong", 0.0),
    "half of a surrogate": (fenced("print(5) # \ud800"), 0.0, "wrong", 0.5),
    "writes and reads a file": (
        fenced("open('x', 'a').write(str(sum(map(int, input().split()))))\nprint(open('x').read())"),
        1.0,
        "right",
        1.0,
    ),
}


@linux
@pytest.mark.parametrize("binary", [True, False])
def test_the_table(room: Sandbox, binary: bool) -> None:
    reward = CodeIOReward(sandbox=room, timeout_run=3.0, max_output=10_000, binary=binary)
    logged: dict[str, float] = {}
    found = asyncio.run(
        reward(
            completions=[text for text, *_ in TABLE.values()],
            tests=[SUM] * len(TABLE),
            log_metric=logged.__setitem__,
        )
    )
    expected = {name: row[1 if binary else 3] for name, row in TABLE.items()}
    assert dict(zip(TABLE, found, strict=True)) == expected
    verdicts = [row[2] for row in TABLE.values()]
    assert logged == {
        f"effi/code/{name}": pytest.approx(verdicts.count(name) / len(verdicts))
        for name in ("right", "wrong", "failed", "limit", "not_compiled", "no_code")
    }


@linux
def test_rows_that_nobody_can_judge(room: Sandbox) -> None:
    reward = CodeIOReward(sandbox=room, column="cases", name="code")
    chat = [[{"role": "assistant", "content": RIGHT}]] * 3
    as_columns = {"input": ["1 1"], "output": ["2"]}
    assert asyncio.run(reward(completions=chat, cases=[None, [], as_columns])) == [None, None, 1.0]
    assert reward.__name__ == "code"


@linux
def test_only_fences_of_the_language(room: Sandbox) -> None:
    reward = CodeIOReward(sandbox=room, fence="language")
    text = RIGHT + "\nIt prints:\n```text\n5\n```"
    assert asyncio.run(reward(completions=[text], tests=[SUM])) == [1.0]
    assert asyncio.run(CodeIOReward(sandbox=room)(completions=[text], tests=[SUM])) == [0.0]


@linux
@pytest.mark.parametrize(
    ("column", "told"),
    [
        ([[{"input": "1", "output": 1}]], r"'tests' of completion 0 holds \{'input': '1', 'output': 1\}"),
        ([[{"input": "1"}]], "must be a list of"),
        (["1"], "holds '1'"),
        ([{"input": ["1"], "output": []}], "must be a list of"),
        ([[SUM]], "must be a list of"),
        ("tests", "one value per completion"),
        ([None, None], "2 values for 1 completions"),
    ],
)
def test_columns_of_the_wrong_shape(room: Sandbox, column: Any, told: str) -> None:
    with pytest.raises(RewardError, match=told):
        asyncio.run(CodeIOReward(sandbox=room)(completions=[RIGHT], tests=column))


@linux
def test_a_column_that_is_not_there(room: Sandbox) -> None:
    reward = CodeIOReward(sandbox=room)
    with pytest.raises(RewardError, match="reads the column 'tests' of the dataset, which has: cases"):
        asyncio.run(reward(completions=[RIGHT], cases=[SUM]))
    with pytest.raises(RewardError, match="needs completions="):
        asyncio.run(reward())


@linux
def test_a_language_with_a_compiler(room: Sandbox, tmp_path: Path) -> None:
    """`sh` plays the compiler: it takes what it is given for the program, and refuses some of it."""
    file = tmp_path / "toy.yaml"
    file.write_text(
        "filename: main.toy\n"
        "compile: sh -c '! grep -q BAD {filename} && cp {filename} program && rm {filename}'\n"
        "execute: ./program\n"
        "prompt: Write in Toy.\n"
        "install: apt install toy\n"
    )
    reward = CodeIOReward(file, sandbox=room)
    code = "#!/bin/sh\nread a b\necho $((a + b))"
    good, bad, none = fenced(code, "toy"), fenced(f"{code}\n# BAD"), fenced("#!/no/such\n")
    assert asyncio.run(reward(completions=[good, bad, none], tests=[SUM] * 3)) == [1.0, 0.0, 0.0]
    assert reward.language.with_prompt("Add.") == "Write in Toy.\n\nAdd."
    missing = CodeIOReward(
        {"filename": "a", "execute": "no-such-language a", "install": "apt install it"}, sandbox=room
    )
    with pytest.raises(RewardError, match=r"\['no-such-language', 'a'\] could not be started .* apt install it"):
        asyncio.run(missing(completions=[good], tests=[SUM]))


@linux
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_c(room: Sandbox) -> None:
    c = {"filename": "main.c", "compile": "gcc -O1 -o main {filename}", "execute": "./main", "fences": ["c"]}
    reward = CodeIOReward(c, sandbox=room)
    code = '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }'
    completions = [fenced(code, "c"), fenced(code + " oops", "c")]
    assert asyncio.run(reward(completions=completions, tests=[SUM] * 2)) == [1.0, 0.0]


@linux
def test_it_is_asynchronous_and_pickles(room: Sandbox) -> None:
    reward = CodeIOReward(sandbox=room, binary=False)
    assert is_async(reward) and inspect.iscoroutinefunction(reward.__call__)
    asyncio.run(reward(completions=[RIGHT], tests=[SUM]))
    copy = pickle.loads(pickle.dumps(reward))
    assert asyncio.run(copy(completions=[RIGHT, fenced("print(5)")], tests=[SUM] * 2)) == [1.0, 0.5]
    copy.close()


def test_it_refuses_where_the_sandbox_does(monkeypatch: pytest.MonkeyPatch) -> None:
    strong = dict.fromkeys(Isolation.__dataclass_fields__, True) | {"process_limit": "own", "network": False}
    monkeypatch.setattr(sandbox, "probe_isolation", lambda readable=(): Isolation(**strong))
    with pytest.raises(RefusedError, match="network: It can use the network of this machine"):
        CodeIOReward()
    assert CodeIOReward(sandbox=Sandbox(accept=["network"], workers=3)).sandbox.workers == 3


# --- languages ---


@pytest.mark.parametrize(
    ("language", "error", "told"),
    [
        ("rust", ValueError, "language='rust' is not built in. Built in: python"),
        (3, TypeError, "a language is a mapping"),
        ({"filename": "a"}, ValueError, "missing: execute"),
        ({"filename": "a", "execute": "b", "run": "c"}, ValueError, "unknown: run"),
        ({"filename": "a", "execute": ""}, ValueError, "execute='' of a language"),
        ({"filename": "a", "execute": "b 'c"}, ValueError, "is no command: No closing quotation"),
        ({"filename": "a", "execute": "b", "fences": "c"}, ValueError, "fences='c'"),
        ({"filename": "a", "execute": 3}, ValueError, "execute=3"),
    ],
)
def test_bad_languages(language: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Language.of(language)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is no YAML"),
        ("- a", "a language is a mapping"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
        ("filename: a\nexecute: b\nshell: c", "unknown: shell"),
        ("a: &a [x]\nb: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BrokenFileError, match=told):
        Language.of(str(tmp_path / "x.yaml"))


@linux
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"column": ""}, "column=''"),
        ({"binary": 1}, "binary=1"),
        ({"compare": "near"}, "compare='near'"),
        ({"fence": "first"}, "fence='first'"),
        ({"fence": "language", "language": {"filename": "a", "execute": "b"}}, "needs a language with fences"),
        ({"timeout_run": 0}, "timeout_run"),
        ({"timeout_compile": -1}, "timeout_compile"),
        ({"max_output": 0}, "max_output=0"),
        ({"workers": 2}, r"workers=2 is of the sandbox: Sandbox\(workers=2\)"),
    ],
)
def test_bad_arguments(room: Sandbox, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CodeIOReward(**{"sandbox": room, **arguments})
    with pytest.raises(TypeError, match="sandbox must be a Sandbox"):
        CodeIOReward(sandbox="podman")  # type: ignore[arg-type]
