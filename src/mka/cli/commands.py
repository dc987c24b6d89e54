"""The command line: parse, call, exit code.

Exit status: 0; 2 for bad input, with one line; 1 for a training that diverged or lost a
rank, for a leak, and for a file that is not whole; 130 after Ctrl-C, 143 after SIGTERM.
Only rank 0 prints; local rank 0 reports command errors.
"""

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from functools import reduce
from importlib import import_module
from itertools import dropwhile, takewhile
from operator import or_
from typing import Annotated, Any, NamedTuple

import tyro

from mka.cli.output import GO_ON, complain
from mka.errors import MOST, InputError, unknown_name

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = re.compile(r"^Error parsing \w+: ")
"""The beginning of tyro's messages, which names our options class; users do not know
it."""
CHOICE = re.compile(r"invalid choice (.*) for argument '--(\w+)'\. Expected one of \((.*)\)\.?")
NO_VALUE = re.compile(r"Missing value for argument '(--\w+)'")
MATCHING = re.compile(r" matching (.*) could be instantiated")
NOT_READ = re.compile(r"Error parsing --(\w+): (.*)", re.DOTALL)
"""The beginnings of tyro's messages on values."""
KINDS = {
    "{None}": "None",
    "INT": "a whole number",
    "FLOAT": "a number",
    "{[INT [INT ...]]}": "whole numbers",
}
"""How tyro's names of kinds are said."""
LONGEST_PATH, LONGEST_PART = 4095, 255
"""Bytes of a path, and of each of its parts, as on Linux and macOS."""
OPTIONS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
)


class Command(NamedTuple):
    """Where a command's options class and function are, and its line in the overview.

    Only the module of the requested command is loaded.
    """

    module: str
    config: str
    run: str
    summary: str

    @property
    def form(self) -> Any:
        """The dataclass of the command's options."""
        return getattr(import_module(f"mka.cli.{self.module}"), self.config)

    def start(self, config: Any) -> int:
        """Run the command with these options; returns the exit status."""
        return getattr(import_module(f"mka.cli.{self.module}"), self.run)(config)


COMMANDS = {
    "bench": Command(
        "benchmark",
        "BenchmarkConfig",
        "run_bench",
        "Compare attention mechanisms in GPT-2-style language models trained from scratch.",
    ),
    "report": Command(
        "benchmark",
        "ReportConfig",
        "run_report",
        "Regenerate tables and figures, and optionally one page for several runs.",
    ),
    "convert": Command(
        "text",
        "ConvertConfig",
        "run_convert",
        "Convert a pretrained model to another attention mechanism, and save it.",
    ),
    "adapt": Command(
        "text",
        "AdaptConfig",
        "run_adapt",
        "Train the memories of a converted model on a text, within minutes.",
    ),
    "verify": Command(
        "benchmark",
        "VerifyConfig",
        "run_verify",
        "Compare everything in a folder with its checksums.",
    ),
    "generate": Command(
        "text", "GenerateConfig", "run_generate", "Continue a text with a saved model."
    ),
    "chat": Command(
        "text", "ChatConfig", "run_chat", "Chat with a saved model; each turn is read only once."
    ),
    "memory add": Command(
        "memory",
        "MemoryAddConfig",
        "run_add",
        "Read documents once and keep their chunks in a bank.",
    ),
    "memory list": Command(
        "memory", "MemoryListConfig", "run_list", "List the documents of a bank."
    ),
    "memory verify": Command(
        "memory",
        "MemoryVerifyConfig",
        "run_verify",
        "Compare everything in a bank with its checksums.",
    ),
    "memory remove": Command(
        "memory", "MemoryRemoveConfig", "run_remove", "Remove a document from a bank."
    ),
    "eval perplexity": Command(
        "evaluate",
        "PerplexityConfig",
        "run_perplexity",
        "Measure perplexity and bits per byte of whole documents.",
    ),
    "eval router": Command(
        "evaluate",
        "RouterConfig",
        "run_router",
        "Show what the router of mka or fmka does, and how much each memory level contributes.",
    ),
    "eval needle": Command(
        "evaluate", "NeedleConfig", "run_needle", "Ask for a number stated once in a long text."
    ),
    "eval recall": Command(
        "evaluate", "RecallConfig", "run_recall", "Test recall of pairs of tokens (MQAR)."
    ),
    "eval ruler": Command(
        "evaluate", "RulerConfig", "run_ruler", "Run RULER's synthetic tasks with lm-eval, offline."
    ),
    "audit original": Command(
        "audit",
        "AuditOriginalConfig",
        "run_original",
        'Measure what each defect of the original protocol does to its "perplexity".',
    ),
    "audit module": Command(
        "audit",
        "AuditModuleConfig",
        "run_module",
        "Test a PyTorch attention module for leaks, and whether decoding matches a full pass.",
    ),
}
GROUPS = {
    "memory": "Manage banks: documents a model has already read, kept on disk for later runs.",
    "eval": "Test what a saved model can do.",
    "audit": "Check whether reported numbers can be trusted.",
}


def names_in(group: str) -> list[str]:
    """The commands in a group; for "", every first word of the command line."""
    if not group:
        return [*dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)]
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{group} ")]


def overview(group: str) -> Any:
    """A form that only lists: the commands in a group, or with "" the first words."""
    # tyro draws its overview from subcommands, so each command becomes an empty
    # dataclass.
    forms = []
    for name in names_in(group):
        summary = GROUPS.get(name, "") if not group else ""
        summary = summary or COMMANDS[f"{group} {name}".strip()].summary
        about = tyro.conf.subcommand(name, description=summary)
        forms.append(Annotated[make_dataclass("Summary", ()), about])
    return reduce(or_, forms)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mka` with these arguments (None: those of the process); returns the exit
    status."""
    return leave(dispatch("mka", "", arguments))


def bench(arguments: Sequence[str] | None = None) -> int:
    """Run `python src/experiments/benchmark.py`; returns the exit status."""
    return leave(dispatch("benchmark.py", "bench", arguments))


def leave(status: int) -> int:
    """The status, unchanged; a rank whose process group still exists ends at once
    instead."""
    # gloo's threads still run then, and one that wants Python's lock while the
    # interpreter is closing aborts the process: its status would be that of SIGABRT.
    # Joining the threads could wait for a rank that does not answer.
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def dispatch(program: str, name: str, arguments: Sequence[str] | None) -> int:
    """Parse and run a command; an error becomes one line on stderr and an exit
    status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 then shows ? for a flag, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        command, config = parse(program, name, arguments)
        return command.start(config)
    except InputError as error:
        return complain(program, error, 2)
    except BrokenPipeError:
        # Otherwise Python would complain about the closed pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Only a full disk or quota can be cured by making room.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return complain(program, f"{error}{f'; make room and {GO_ON}' if full else ''}", 2)
    except KeyboardInterrupt as stop:
        # After saving a checkpoint a training raises Interrupted, which knows step and
        # signal.
        where = f" {stop}" if str(stop) else ""
        return complain(
            program,
            f"interrupted{where}; {GO_ON}",
            128 + getattr(stop, "signal_number", signal.SIGINT),
        )


def parse(program: str, name: str, arguments: Sequence[str] | None) -> tuple[Command, Any]:
    """The command, and its options; `name` "": the first words of the arguments name
    it.

    Raises InputError with the parser's complaint on one line, or for an unknown
    command.
    """
    given = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher gives each process this flag; the same number is in its
    # environment.
    rest = [argument for argument in given if not argument.startswith("--local_rank=")]
    if not name:
        # Two words before one: "memory add" must not be read as a command "memory".
        words = (" ".join(rest[:count]) for count in (2, 1))
        name = next((word for word in words if word in COMMANDS), "")
        rest = rest[len(name.split()) :]
        program = f"{program} {name}".strip()
    if name:
        return COMMANDS[name], parsed(COMMANDS[name].form, program, rest)
    group = rest[0] if rest[:1] and rest[0] in GROUPS else ""
    rest = rest[bool(group) :]
    known = names_in(group)
    if not rest or rest[0] in ("--help", "-h"):
        # Does not return: tyro prints the overview, or complains that no command was
        # given.
        parsed(overview(group), f"{program} {group}".strip(), rest)
    if rest[0].startswith("-"):
        raise InputError(f"{rest[0]} is not a command; a command comes first: {', '.join(known)}")
    raise unknown_name(f"{group} command".strip(), rest[0], known)


def parsed(form: Any, program: str, arguments: Sequence[str]) -> Any:
    """The dataclass that the arguments describe. Raises InputError with a message of
    one line."""
    flag, complaint = "argument", io.StringIO()
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-") if argument.startswith("--") else flag
        # Before tyro would write all of it into its box.
        if flag != "prompt":
            check_length(flag, argument)
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(
                form, prog=program, args=arguments, use_underscores=True, config=OPTIONS
            )
        check_values(config)
        return config
    except SystemExit as stop:
        # Status 0 is --help, which has printed what was asked for.
        if stop.code == 0:
            raise
        message = our_own(stop) or one_line(complaint.getvalue(), form)
        message = left_over(message, arguments)
        raise InputError(f"{message} (--help lists all options)") from None


def left_over(message: str, arguments: Sequence[str]) -> str:
    """A complaint about a word that follows a flag without values, as such; any other
    as it is."""
    word = message.removeprefix("Unrecognized options: ").partition(",")[0]
    if word == message or word not in arguments[1:]:
        return message
    before = arguments[arguments.index(word, 1) - 1]
    takes_none = before.startswith("--") and "=" not in before and not word.startswith("-")
    return f"{before} takes no value; given: {word!r}" if takes_none else message


def our_own(stop: BaseException) -> str:
    """The message of the InputError because of which tyro stopped; "" if it was another
    reason.

    tyro's box would break it at its 80th column, in the middle of a path if need be.
    """
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__context__
    return str(cause or "")


def check_values(config: Any) -> None:
    """Raise InputError, naming the option, for a number beyond 64 bits, and for text
    that is empty or longer than any name."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_values(value)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int) and abs(one) > MOST:
                raise InputError(f"{field.name} is {one}; it must be within 64 bits")
            # A prompt is a text; all other options are names, paths or settings.
            if isinstance(one, str) and field.name != "prompt":
                check_name(field.name, one)


def check_name(option: str, value: str) -> None:
    """Raise InputError for a name or path that is empty, or longer than systems
    allow."""
    if not value.strip():
        raise InputError(f"{option} is {value!r}; give a value, or leave --{option} out")
    check_length(option, value)


def check_length(option: str, value: str) -> None:
    """Raise InputError for text that is longer than any path."""
    size = len(os.fsencode(value))
    longest = max(len(os.fsencode(part)) for part in value.split("/"))
    if size > LONGEST_PATH or longest > LONGEST_PART:
        raise InputError(
            f"{option} is {value[:20]!r}... of {size:,} bytes; allowed: {LONGEST_PATH:,} bytes, "
            f"and {LONGEST_PART} between two slashes"
        )


def one_line(box: str, form: Any) -> str:
    """The first paragraph of tyro's message box, without frame and title.

    For an unknown flag it also names the nearest known one.
    """
    lines = [line.strip("│╭╮╰╯─ \t") for line in COLOUR.sub("", box).splitlines()]
    # Where the output is not UTF-8, the box's rules are minus signs.
    lines = [line if line.strip("-") else "" for line in lines]
    # The first line is the title; the paragraph after it ends at the next empty line.
    first = next(number for number, line in enumerate(lines) if line)
    paragraph = takewhile(bool, dropwhile(lambda line: not line, lines[first + 1 :]))
    # Several lines of the box are one sentence.
    message = PREFIX.sub("", " ".join(paragraph))
    flags = [word.strip(",") for word in message.split() if word.startswith("--")]
    if message.startswith("Unrecognized") and flags and is_dataclass(form):
        known = [f"--{name}" for name in names_of_flags(form)]
        # A misspelled flag mostly keeps its first letters; if no flag has them, all
        # compete.
        alike = [flag for flag in known if flag.startswith(flags[0][:4])] or known
        message += f"; nearest: {difflib.get_close_matches(flags[0], alike, n=1, cutoff=0.0)[0]}"
    return reworded(message, form)


def reworded(message: str, form: Any) -> str:
    """tyro's message on a value, as option, value and what is allowed; any other
    message as it is."""
    if found := CHOICE.fullmatch(message):
        value, option, allowed = found.groups()
        names = allowed.replace("'", "")
        return f"{option} is {value}; allowed: {names}"
    if found := NO_VALUE.match(message):
        return f"{found[1]} needs a value"
    found = NOT_READ.match(message)
    values = re.findall(r"'(?:[^'\\]|\\.)*'", found[2]) if found else []
    if not found or not values:
        return message
    option, problem = found.groups()
    words = ["whole numbers" if is_of_whole_numbers(form, option) else "numbers"]
    if kinds := MATCHING.search(problem):
        words = [KINDS.get(kind, kind.strip("{}")) for kind in kinds[1].split("|")]
    elif "for int()" in problem or "to float" in problem:
        words = ["a whole number" if "for int()" in problem else "a number"]
    allowed = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    shown = " ".join(value if len(value) < 80 else f"{value[:40]}...'" for value in values)
    return f"{option} is {shown}; it must be {allowed}"


def is_of_whole_numbers(form: Any, option: str) -> bool:
    """Whether an option takes several whole numbers, and no others."""
    return any(field.name == option and "int" in str(field.type) for field in fields(form))


def names_of_flags(config: Any) -> Iterator[str]:
    """The names of a command's flags, including those in nested groups of options."""
    for field in fields(config):
        if is_dataclass(field.type):
            yield from names_of_flags(field.type)
        else:
            yield field.name
