"""A reward for programs: right outputs for given inputs, in any language that a command can run."""

from __future__ import annotations

import asyncio
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .._untrusted import LARGEST_YAML, check_yaml, one_line, read_text, shorten
from ..errors import BrokenFileError, RewardError
from ..functional import metrics
from ..functional.data import check_count, check_number
from ..functional.rewards import fraction_passed, last_fence, outputs_agree
from ..functional.rewards.code import COMPARISONS, Comparison
from .base import Reward, texts_of
from .sandbox import ProgramResult, Sandbox, SandboxLimits

#: what can come of a completion, as it is logged
VERDICTS = ("right", "wrong", "failed", "limit", "not_compiled", "no_code")


@dataclass(frozen=True)
class Language:
    """
    How programs of a language are made and run; in a YAML file of four or five lines.

    Commands run without a shell, inside the sandbox; `{filename}` in them stands for `filename`. They are yours: read
    no file of somebody else's that you have not looked at.

    Args:
        filename (`str`): What the code is written to.
        execute (`str`): The command that runs the program.
        compile (`str`, *optional*): The command that makes it, once for each completion.
        prompt (`str`, *optional*): What [`~Language.with_prompt`] puts before a task.
        install (`str`, *optional*): How the language is installed, for the error where its command is not there.
        fences (`tuple[str, ...]`, *optional*): What stands after the opening marks of its Markdown fences; read by
            `CodeIOReward(fence="language")`.

    Raises:
        ValueError: a value is missing, no text, or a command has no words.

    Example:
    ```python
    >>> c = Language("main.c", "./main", compile="gcc -O1 -o main {filename} -lm", fences=("c",))
    >>> c.command("compile")
    ['gcc', '-O1', '-o', 'main', 'main.c', '-lm']
    ```
    """

    filename: str
    execute: str
    compile: str = ""
    prompt: str = ""
    install: str = ""
    fences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("filename", "execute", "compile", "prompt", "install"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name in ("filename", "execute") and not value.strip()):
                raise ValueError(f"{name}={value!r} of a language must be a text.")
        if isinstance(self.fences, str) or not all(isinstance(tag, str) for tag in self.fences):
            raise ValueError(f"fences={self.fences!r} of a language must be a list of texts.")
        object.__setattr__(self, "fences", tuple(self.fences))
        for name in ("execute", "compile"):
            try:
                self.command(name)
            except ValueError as error:
                raise ValueError(f"{name}={getattr(self, name)!r} of a language is no command: {error}.") from None

    def command(self, name: str) -> list[str]:
        """Return the words of `"compile"` or `"execute"`."""
        return [word.replace("{filename}", self.filename) for word in shlex.split(getattr(self, name))]

    def with_prompt(self, task: str) -> str:
        """Return a task with the language's prompt before it. The paper leaves the prompt out where it evaluates."""
        return f"{self.prompt.rstrip()}\n\n{task}" if self.prompt else task

    @classmethod
    def read(cls, path: str | Path) -> Language:
        """
        Return the language in a YAML file.

        Raises:
            BrokenFileError: it is no YAML, too large, or has other keys.
            OSError: it cannot be read.
        """
        import yaml

        path = Path(path)
        try:
            text = read_text(path, LARGEST_YAML)
            check_yaml(text, path)
            found = yaml.safe_load(text)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise BrokenFileError(f"{path} is no YAML: {one_line(error)}.") from None
        try:
            return cls.of(found)
        except (ValueError, TypeError) as error:
            raise BrokenFileError(f"{path}: {error}") from None

    @classmethod
    def of(cls, value: Language | str | Path | Mapping[str, Any]) -> Language:
        """
        Return the language that is meant: one already, `"python"`, the path of a YAML file, or what is in such a file.

        Raises:
            ValueError, TypeError: it is none of these.
        """
        if isinstance(value, Language):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
            return cls.read(value)
        if isinstance(value, str):
            if value not in LANGUAGES:
                raise ValueError(
                    f"language={value!r} is not built in. Built in: {', '.join(LANGUAGES)}. For another one pass the "
                    "path of a YAML file: filename, execute and, where there are, compile, prompt, install, fences."
                )
            return LANGUAGES[value]
        if not isinstance(value, Mapping):
            raise TypeError(f"a language is a mapping with filename and execute, got {shorten(value)}.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(map(str, value)) - set(known))
        missing = [name for name in ("filename", "execute") if name not in value]
        if unknown or missing:
            told = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
            raise ValueError(f"a language has {', '.join(known)}; {told}.")
        return cls(**{str(name): one for name, one in value.items() if one is not None})


#: languages that need no file
LANGUAGES = {
    "python": Language(
        filename="main.py",
        execute="python3 -I {filename}",
        prompt="Write a Python 3 program that reads from standard input and writes to standard output.",
        install="Install Python 3 for all users.",
        fences=("python", "python3", "py"),
    )
}


class CodeIOReward(Reward):
    r"""
    1 for a program that prints the right output for every input, else 0.

    The program is the last Markdown fence of the completion. It is compiled once where the language says how, and run
    once for each test, each time in a new folder. A completion without a fence, or whose program does not compile, is
    worth 0. From [Agnostics](https://huggingface.co/papers/2508.04865), which needs no more of a language than a
    command.

    It is asynchronous: TRL awaits it beside other asynchronous rewards; outside of a trainer,
    `asyncio.run(reward(completions=..., tests=...))`. Programs run in a [`Sandbox`], which refuses where the machine
    isolates them less than asked for.

    Logs the share of the completions for each verdict as `effi/code/<verdict>`: `right`, `wrong` (output), `failed`
    (exit code or signal), `limit` (time, memory, output), `not_compiled`, `no_code`.

    Args:
        language (`str`, `Path`, `Mapping` or `Language`, *optional*, defaults to `"python"`): `"python"`, the path of
            a YAML file, or what stands in one, see [`Language`].
        column (`str`, *optional*, defaults to `"tests"`): Column of the dataset with the tests of a row: a list of
            `{"input": text, "output": text}` (or `{"input": [...], "output": [...]}`). `None` or an empty list:
            nothing can be said, and the reward is `None`.
        binary (`bool`, *optional*, defaults to `True`): All tests or nothing; stops at the first that fails. `False`
            is the share of tests that pass, which models learn to game: by a frequent answer, or by printing the
            outputs that the prompt shows.
        compare (`str`, *optional*, defaults to `"whitespace"`): `"whitespace"`, `"exact"` or `"float"`, see
            [`~hf_effi.functional.rewards.outputs_agree`].
        fence (`str`, *optional*, defaults to `"last"`): `"last"` takes any fence, `"language"` the last one that is
            tagged as the language's, or not tagged.
        timeout_compile (`float`, *optional*, defaults to 30.0): Seconds on the clock.
        timeout_run (`float`, *optional*, defaults to 10.0): Seconds on the clock for each test (paper: 30).
        max_output (`int`, *optional*, defaults to 5,000,000): Bytes that a program may print.
        workers (`int`, *optional*): Programs at one time, 2 by default; of the sandbox where one is given.
        sandbox (`Sandbox`, *optional*): Where programs run, for other limits, `accept=` or a container.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        RefusedError: the machine isolates programs less than asked for.
        ValueError, TypeError: an argument is out of range, or the language is none.

    Example:
    ```python
    >>> import asyncio
    >>> from hf_effi.rewards import Sandbox
    >>> anywhere = ("network", "files", "leftovers", "processes", "parent", "memory")
    >>> reward = CodeIOReward(sandbox=Sandbox(accept=anywhere))  # leave accept out for your own runs
    >>> tests = [{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "2"}]
    >>> right = "```python\nprint(sum(map(int, input().split())))\n```"
    >>> asyncio.run(reward(completions=[right, "```python\nprint(5)\n```", "5"], tests=[tests] * 3))
    [1.0, 0.0, 0.0]
    >>> reward.close()
    ```
    """

    def __init__(
        self,
        language: str | Path | Mapping[str, Any] | Language = "python",
        column: str = "tests",
        *,
        binary: bool = True,
        compare: Comparison = "whitespace",
        fence: str = "last",
        timeout_compile: float = 30.0,
        timeout_run: float = 10.0,
        max_output: int = 5_000_000,
        workers: int | None = None,
        sandbox: Sandbox | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.language = Language.of(language)
        if not isinstance(column, str) or not column:
            raise ValueError(f"column={column!r} must be the name of a column of the dataset.")
        if not isinstance(binary, bool):
            raise ValueError(f"binary={binary!r} must be True or False.")
        if compare not in COMPARISONS:
            raise ValueError(f"compare={compare!r} must be one of {', '.join(map(repr, COMPARISONS))}.")
        if fence not in ("last", "language"):
            raise ValueError(f"fence={fence!r} must be 'last' or 'language'.")
        if fence == "language" and not self.language.fences:
            raise ValueError("fence='language' needs a language with fences, the tags of its Markdown fences.")
        if sandbox is not None and not isinstance(sandbox, Sandbox):
            raise TypeError(f"sandbox must be a Sandbox, got {type(sandbox).__name__}.")
        if sandbox is not None and workers is not None:
            raise ValueError(f"workers={workers} is of the sandbox: Sandbox(workers={workers}).")
        self.needs = (column,)
        self.binary, self.compare, self.fence = binary, compare, fence
        check_number("timeout_compile", timeout_compile, 0.01)
        check_number("timeout_run", timeout_run, 0.01)
        check_count("max_output", max_output)
        self.sandbox = sandbox or Sandbox(workers=2 if workers is None else workers)
        self.compile_limits = _within(self.sandbox.limits, timeout_compile, max_output)
        self.run_limits = _within(self.sandbox.limits, timeout_run, max_output)

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """
        Return one reward per completion, as TRL awaits it.

        Raises:
            RewardError: no completions, a column that is not there or holds no tests, or a language whose command is
                not there.
            OSError: the sandbox could not be set up.
        """
        if completions is None:
            raise RewardError(f"{self.__name__} needs completions=, a list of texts or of lists of messages.")
        texts = texts_of(completions, self.__name__)
        column = self.column(self.needs[0], len(texts), columns)
        tests = [self._tests(value, place) for place, value in enumerate(column)]
        places = asyncio.Semaphore(self.sandbox.workers)  # no more compiled programs in memory than can run

        async def judge(text: str, row: list[tuple[str, str]] | None) -> tuple[float | None, str | None]:
            async with places:
                return await self._judge(text, row)

        judged = await asyncio.gather(*(judge(text, row) for text, row in zip(texts, tests, strict=True)))
        known = Counter(verdict for _, verdict in judged if verdict is not None)
        if known and callable(log_metric := columns.get("log_metric")):
            for verdict in VERDICTS:
                log_metric(f"{metrics.CODE_SHARE}{verdict}", known[verdict] / known.total())
        return [reward for reward, _ in judged]

    def close(self) -> None:
        """End the workers of the sandbox; the next program starts new ones."""
        self.sandbox.close()

    async def _judge(self, text: str, tests: list[tuple[str, str]] | None) -> tuple[float | None, str | None]:
        """Return the reward and the verdict of one completion."""
        if not tests:
            return None, None
        code = last_fence(text, (*self.language.fences, "") if self.fence == "language" else None)
        if code is None or not code.strip():
            return 0.0, "no_code"
        files: dict[str, str | bytes] = {self.language.filename: code}
        if self.language.compile:
            made = await self._run("compile", files)
            if not made.ok:
                return 0.0, "not_compiled"
            files = dict(made.files)
        passed: list[bool] = []
        verdict = "right"
        for given, expected in tests:
            result = await self._run("execute", files, given)
            said = _verdict_of(result, expected, self.compare)
            verdict = said if verdict == "right" else verdict
            passed.append(said == "right")
            if self.binary and said != "right":
                break
        return fraction_passed(passed, self.binary), verdict

    async def _run(self, step: str, files: Mapping[str, str | bytes], given: str = "") -> ProgramResult:
        compiling = step == "compile"
        result = await self.sandbox.run_async(
            self.language.command(step),
            given,
            files,
            limits=self.compile_limits if compiling else self.run_limits,
            keep=compiling,
        )
        if result.status == "not_started" and (compiling or not self.language.compile):
            raise RewardError(
                f"{self.__name__}: the command {self.language.command(step)} could not be started in the sandbox: "
                f"{result.message}. {self.language.install or 'Install it for all users.'} "
                "Programs see the folders of the system and of Python; Sandbox(readable=[...]) shows more."
            )
        return result

    def _tests(self, value: Any, place: int) -> list[tuple[str, str]] | None:
        """Return (input, output) of each test of a row."""
        if value is None:
            return None
        if isinstance(value, Mapping) and set(value) == {"input", "output"}:  # as datasets turns a list of mappings
            both = value["input"], value["output"]
            if all(isinstance(one, (list, tuple)) for one in both) and len(both[0]) == len(both[1]):
                value = [{"input": given, "output": printed} for given, printed in zip(*both, strict=True)]
        rows = value if isinstance(value, (list, tuple)) else [value]
        for row in rows:
            wrong = not isinstance(row, Mapping) or not all(
                isinstance(row.get(key), str) for key in ("input", "output")
            )
            if wrong:
                raise RewardError(
                    f"{self.__name__}: the column {self.needs[0]!r} of completion {place} holds {shorten(row)}. It "
                    'must be a list of {"input": text, "output": text}.'
                )
        return [(row["input"], row["output"]) for row in rows]


def _within(limits: SandboxLimits, seconds: float, output: int) -> SandboxLimits:
    """Return the limits of a sandbox with the time and the output of a step."""
    return replace(limits, wall_seconds=float(seconds), cpu_seconds=math.ceil(seconds), output_bytes=output)


def _verdict_of(result: ProgramResult, expected: str, compare: Comparison) -> str:
    if result.status in ("timeout", "memory", "output"):
        return "limit"
    if not result.ok:
        return "failed"
    return "right" if outputs_agree(result.text, expected, compare) else "wrong"
