"""The command line: parse, call, exit code.

    mka bench ...      compare mechanisms (the same as python src/experiments/benchmark.py ...)
    mka report DIR     redraw table and figures from a folder of results; --html: a page of one or several
    mka convert        give a pretrained model a memory, and save it as a folder
    mka adapt          train the memories of one on a text, for minutes
    mka verify DIR     compare everything in a folder of results, or of a saved model, with its checksums
    mka generate ...   continue a text with a saved model
    mka chat ...       talk with one; it reads each turn once
    mka memory ...     banks of documents that a model has read: add, list, verify, remove
    mka eval ...       what a saved model can do: perplexity, router, needle, recall, ruler
    mka audit ...      whether an attention module leaks

Exit status: 0; 2 for bad input, with one line; 1 for a training that diverged or lost a rank, for a leak, and for a
file that is not whole; 130 after Ctrl-C, 143 after SIGTERM. Of several ranks the first one prints; each machine's first
says what was wrong with its command.
"""

import contextlib
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mka.audit_commands import AuditConfig, AuditModuleConfig, AuditOriginalConfig
from mka.commands import (
    ChatConfig,
    EvalConfig,
    GenerateConfig,
    MemoryAddConfig,
    MemoryConfig,
    MemoryListConfig,
    MemoryRemoveConfig,
    MemoryVerifyConfig,
    NeedleConfig,
    PerplexityConfig,
    RecallConfig,
    ReportConfig,
    RouterConfig,
    RulerConfig,
    VerifyConfig,
)
from mka.config import BenchmarkConfig
from mka.limits import InputError
from mka.model_commands import AdaptConfig, ConvertConfig
from mka.report import (
    console_table,
    differences,
    latest,
    read_runs,
    result_lines,
    summarise,
    write_pages,
    write_report,
)
from mka.results import Result, read_results, remarks, results_path

TABLE_WIDTH = 110
"""Columns of the table where the output is not a terminal."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GO_ON = "run the same command again to go on, finished results are kept"

OTHER_COMMANDS: dict[str, Any] = {
    "report": ReportConfig,
    "convert": ConvertConfig,
    "adapt": AdaptConfig,
    "verify": VerifyConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "memory add": MemoryAddConfig,
    "memory list": MemoryListConfig,
    "memory verify": MemoryVerifyConfig,
    "memory remove": MemoryRemoveConfig,
    "eval perplexity": PerplexityConfig,
    "eval router": RouterConfig,
    "eval needle": NeedleConfig,
    "eval recall": RecallConfig,
    "eval ruler": RulerConfig,
    "audit original": AuditOriginalConfig,
    "audit module": AuditModuleConfig,
}
Command = (
    Annotated[BenchmarkConfig, tyro.conf.subcommand("bench")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
    | Annotated[AdaptConfig, tyro.conf.subcommand("adapt")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
    | Annotated[ChatConfig, tyro.conf.subcommand("chat")]
    | Annotated[MemoryConfig, tyro.conf.subcommand("memory")]
    | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[AuditConfig, tyro.conf.subcommand("audit")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """`mka`; returns the exit status."""
    return leave(dispatch(Command, "mka", arguments))


def bench(arguments: Sequence[str] | None = None) -> int:
    """`python src/experiments/benchmark.py`; returns the exit status."""
    return leave(dispatch(BenchmarkConfig, "benchmark.py", arguments))


def leave(status: int) -> int:
    """The status; a rank that stops before its group was dissolved ends here.

    gloo's threads still run then, and one that wants Python's lock while the interpreter is closing aborts the
    process: its status would be that of SIGABRT. Joining them could wait for a rank that does not answer.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def dispatch(form: Any, program: str, arguments: Sequence[str] | None) -> int:
    """Parse, run, and turn what goes wrong into one line and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for a flag, not a traceback
    try:
        command = parse(form, program, arguments)
        command = getattr(command, "action", None) or getattr(command, "task", None) or command
        return RUN[type(command)](command)
    except InputError as error:
        return complain(program, error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain about it too
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return complain(program, f"{error}{f'; make room and {GO_ON}' if full else ''}", 2)
    except KeyboardInterrupt as stop:
        where = f" {stop}" if str(stop) else ""
        return complain(program, f"interrupted{where}; {GO_ON}", 128 + getattr(stop, "signal_number", signal.SIGINT))


def parse(form: Any, program: str, arguments: Sequence[str] | None) -> Any:
    """The dataclass the arguments describe. Raises InputError with the parser's complaint on one line."""
    given = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher gives each process this flag; the same number is in its environment.
    arguments = [argument for argument in given if not argument.startswith("--local_rank=")]
    complaint = io.StringIO()
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(form, prog=program, args=arguments, use_underscores=True, config=options)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        words = (" ".join(arguments[:count]) for count in (2, 1))
        command = next((OTHER_COMMANDS[word] for word in words if word in OTHER_COMMANDS), BenchmarkConfig)
        raise InputError(one_line(complaint.getvalue(), command)) from None


def one_line(box: str, command: Any = BenchmarkConfig) -> str:
    """The first paragraph of tyro's message box, without frame and title; for an unknown flag, the nearest one."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in COLOUR.sub("", box).splitlines()]
    lines = [line if line.strip("-") else "" for line in lines]  # where the output is not UTF-8, rules are minus signs
    first = next(number for number, line in enumerate(lines) if line)
    paragraph = takewhile(bool, dropwhile(lambda line: not line, lines[first + 1 :]))
    message = " ".join(paragraph)
    flags = [word.strip(",") for word in message.split() if word.startswith("--")]
    if message.startswith("Unrecognized or misplaced"):
        message += (
            "; a command comes first: bench, report, convert, adapt, verify, generate, chat, memory, eval or audit"
        )
    elif message.startswith("Unrecognized") and flags:
        known = [f"--{field.name}" for field in fields(command)]
        alike = [flag for flag in known if flag.startswith(flags[0][:4])] or known
        message += f"; nearest: {difflib.get_close_matches(flags[0], alike, n=1, cutoff=0.0)[0]}"
    return f"{message} (--help lists all options)"


def run_bench(config: BenchmarkConfig) -> int:
    config.resolved()  # before torch is loaded, which takes seconds: a mistake is said at once
    from mka.distributed import RankLost
    from mka.experiments import run_benchmark
    from mka.training import NonFiniteLoss, OutOfMemory

    console = plain_console()

    def on_result(result: Result) -> None:
        console.print("\n".join(result_lines(result)))

    try:
        folder = run_benchmark(config, console, on_result)
    except NonFiniteLoss as error:
        return complain("mka", error, 1)
    except (RankLost, OutOfMemory) as error:  # each rank for itself: no other one knows
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"mka: {rank}{error}{f'; {GO_ON}' if isinstance(error, RankLost) else ''}", file=sys.stderr)
        return 1
    return finish(folder, console) if is_first_rank() else 0


def run_adapt(config: AdaptConfig) -> int:
    from mka.experiments import adapt_model
    from mka.training import NonFiniteLoss

    try:
        adapt_model(config, plain_console())
    except NonFiniteLoss as error:
        return complain("mka", error, 1)
    return 0


def run_chat(config: ChatConfig) -> int:
    from mka.generation import chat

    chat(config, ask=next_turn, say=print)
    return 0


def printing(module: str, function: str) -> Callable[[Any], int]:
    """A command that is a function of its options and of where to print; False means exit status 1."""

    def run(config: Any) -> int:
        work = getattr(importlib.import_module(module), function)  # torch takes seconds: only where it is needed
        return int(work(config, say=print) is False)

    return run


def next_turn() -> str | None:
    """A line of the input, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def is_first_rank(name: str = "RANK") -> bool:
    """Whether this process is the one that prints: launchers number those they start."""
    return os.environ.get(name, "0") == "0"


def run_report(config: ReportConfig) -> int:
    """Each folder's own table and figures, then the page of all of them."""
    console, folders = plain_console(), [Path(folder) for folder in config.folders]
    runs = read_runs(folders)
    for folder in folders:
        finish(folder, console)
    html, markdown = (None if name is None else Path(name) for name in (config.html, config.markdown))
    for path in write_pages(runs, html, markdown):
        console.print(f"Page     {path}")
    return 0


def plain_console() -> Console:
    """Prints what it is given: a bracket or a colon in a folder's name means nothing to it."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not is_first_rank())


def finish(folder: Path, console: Console) -> int:
    """Write the report of a folder and print its table."""
    written, rows = write_report(folder), read_results(folder)
    console.print()
    plain_width = None if console.is_terminal else TABLE_WIDTH
    Console(highlight=False, width=plain_width).print(console_table(summarise(rows)))
    for difference in differences(latest(rows)):
        console.print(difference.line())
    for remark in remarks(folder):
        print(f"warning: {folder}: {remark}", file=sys.stderr)
    console.print(f"Results  {results_path(folder)}\nReport   {', '.join(str(path) for path in written)}")
    return 0


RUN: dict[type, Callable[[Any], int]] = {
    BenchmarkConfig: run_bench,
    ReportConfig: run_report,
    ConvertConfig: printing("mka.converting", "convert_model"),
    AdaptConfig: run_adapt,
    VerifyConfig: printing("mka.verifying", "verify"),
    GenerateConfig: printing("mka.generation", "generate"),
    ChatConfig: run_chat,
    MemoryAddConfig: printing("mka.remembering", "add"),
    MemoryListConfig: printing("mka.remembering", "show"),
    MemoryVerifyConfig: printing("mka.remembering", "verify"),
    MemoryRemoveConfig: printing("mka.remembering", "remove"),
    PerplexityConfig: printing("mka.evaluation", "score_text"),
    RouterConfig: printing("mka.evaluation", "score_router"),
    NeedleConfig: printing("mka.evaluation", "score"),
    RecallConfig: printing("mka.evaluation", "score"),
    RulerConfig: printing("mka.evaluation", "score_ruler"),
    AuditOriginalConfig: printing("mka.experiments", "audit_original"),
    AuditModuleConfig: printing("mka.evaluation", "audit_module"),
}


def complain(program: str, error: object, status: int) -> int:
    """One line; of several ranks each machine's first speaks for all."""
    if is_first_rank("LOCAL_RANK"):
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return status
