"""What a verb is: its help, its example, groups of options, and options that had another name.

Typer's own help has a column for types, which leaves too little of 80 columns for the sentences.
Of other packages, rich-click and cyclopts format help as well; neither takes typer's commands.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import wraps
from typing import Any, get_type_hints

import typer
from pydantic import ValidationError
from rich.box import ROUNDED
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

from actionclip_deploy.cli.output import Terminal, either, print_warning, usage_error
from actionclip_deploy.errors import ArgumentError

# Options that had another name, which is taken still.
RENAMED = {
    "--frames": "--num-frames",
    "--decode-threads": "--workers",
    "--api-key-file": "--api-keys",
}

_MAX_WIDTH = 100  # longer lines are hard to read
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")
# Values by type, where an option does not say what it takes.
_VALUES = {"int": "N", "float": "X", "Path": "PATH", "PosixPath": "PATH"}


@dataclass(frozen=True)
class OptionGroup:
    """Options that several verbs have; a parameter of this kind stands for all of its fields."""


@dataclass(frozen=True)
class Described:
    """An argument, an option or a verb, as the help and the documentation show it.

    Attributes:
        name: With what it takes, such as `--labels NAME|FILE`.
        text: What it means.
        notes: What follows in brackets, such as "default: 5".
        panel: Under which it stands.
    """

    name: str
    text: str
    notes: tuple[str, ...]
    panel: str


class Verb(TyperCommand):
    """A command whose docstring ends with an example."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["help"], self.example = split_example(options.get("help"))
        super().__init__(*args, **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, in which an option may have an old name."""
        try:
            return super().parse_args(ctx, list(self._with_new_names(args)))
        except typer.BadParameter as exc:
            problem = _of_value(exc)
            if problem is None:
                raise
            error = usage_error(problem)
            error.ctx = ctx
            raise error from exc

    def invoke(self, ctx: Any) -> Any:
        """Run it; what is wrong with an argument is said of its option."""
        try:
            return super().invoke(ctx)
        except ArgumentError as exc:
            error = usage_error(in_options(exc, self))
            error.ctx = ctx
            raise error from exc

    def get_usage(self, ctx: Any) -> str:
        """How it is called, as an error says it."""
        return f"Usage: {usage(self, ctx.command_path)}"

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help."""
        _print_help(self, ctx, [*arguments(self), *options(self)])

    def _with_new_names(self, args: Sequence[str]) -> Iterator[str]:
        known = {name: param for param in self.params for name in param.opts}
        values = 0  # that still belong to the option before
        rest = iter(args)
        for word in rest:
            name, sign, value = word.partition("=")
            if values:
                values -= 1
            elif word == "--":
                yield word
                yield from rest
                return
            elif name not in known and RENAMED.get(name) in known:
                new = RENAMED[name]
                print_warning(f"{name} is now called {new}; the old name will go.")
                word, name = new + sign + value, new
            if not values and name in known and not sign and name.startswith("-"):
                values = 0 if getattr(known[name], "is_flag", False) else known[name].nargs
            yield word


class Verbs(TyperGroup):
    """A group of verbs, whose help may end with an example too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["help"], self.example = split_example(options.get("help"))
        super().__init__(*args, **options)

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help."""
        _print_help(self, ctx, [*self.describe_verbs(ctx), *options(self)])

    def describe_verbs(self, ctx: Any) -> list[Described]:
        """Its verbs, with the first sentence of each."""
        found = []
        for name in self.list_commands(ctx):
            verb: Any = self.get_command(ctx, name)
            text = " ".join((verb.help or "").partition("\n\n")[0].split())
            found.append(Described(name, text, (), verb.rich_help_panel or "Commands"))
        return found


class VerbApp(typer.Typer):
    """Makes verbs of functions, whose parameters may be groups of options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": Verbs, "no_args_is_help": True, **options})

    def command(
        self, name: str | None = None, **options: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """Register a function; given back as it is."""
        register = super().command(name, **{"cls": Verb, **options})

        def take(function: CommandFunctionType) -> CommandFunctionType:
            register(_with_single_options(function))
            return function

        return take


def in_options(error: ArgumentError, verb: Any) -> str:
    """What is wrong with an argument, in the words of whoever wrote an option."""
    spelled = "--" + error.argument.replace("_", "-")
    for param in verb.params:
        if _is_option(param) and (param.name == error.argument or spelled in param.opts):
            return f"{max(param.opts, key=len)} {error.problem}"
    return str(error)


# What is said of a value, by pydantic's name of the error, which typer reads values with.
_EXPECTED: dict[str, str] = {
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a number",
}


def _of_value(error: typer.BadParameter) -> str | None:
    """What is wrong with a value, in our form; None where typer says it best."""
    found, param = error.__cause__, error.param
    if param is None or not isinstance(found, ValidationError):
        return None
    (first, *_) = found.errors(include_url=False)
    _, _, choices = first["msg"].partition(" is not one of ")
    if choices:
        expected = either([each.strip("' ") for each in choices.rstrip(".").split(",")])
    elif first["type"] in _EXPECTED:
        expected = _EXPECTED[first["type"]].format(**first.get("ctx", {}))
    else:
        return None
    name = max(param.opts, key=len) if _is_option(param) else param.metavar or param.name
    return f"{name} is {first['input']}; give {expected}."


def split_example(text: str | None) -> tuple[str, str]:
    """What a docstring says, and its example."""
    said, _, example = inspect.cleandoc(text or "").partition("\n\nExample:\n")
    return said, textwrap.dedent(example).strip("\n")


def arguments(verb: Any) -> list[Described]:
    """What a verb takes without an option."""
    shown = [param for param in verb.params if not _is_option(param)]
    return [
        Described(
            param.metavar or str(param.name).upper(),
            getattr(param, "help", None) or "",
            () if param.required else ("optional",),
            "Arguments",
        )
        for param in shown
    ]


def options(verb: Any) -> list[Described]:
    """The options of a verb: those without a panel first, the others by panel."""
    shown = [
        param for param in verb.params if _is_option(param) and not getattr(param, "hidden", False)
    ]
    found = [
        Described(
            _option_name(param),
            param.help or "",
            _notes(param),
            getattr(param, "rich_help_panel", None) or "Options",
        )
        for param in shown
    ]
    found.append(Described("-h, --help", "Show this help.", (), "Options"))
    panels = list(dict.fromkeys(["Options", *(each.panel for each in found)]))
    return sorted(found, key=lambda each: panels.index(each.panel))


def usage(verb: Any, path: str) -> str:
    """How a verb is called, in one line."""
    if isinstance(verb, TyperGroup):
        return f"{path} VERB ..."
    given = [
        (param.metavar or str(param.name).upper(), param.required)
        for param in verb.params
        if not _is_option(param)
    ]
    return " ".join([path, "[OPTIONS]", *(n if needed else f"[{n}]" for n, needed in given)])


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, each in one line."""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _with_single_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the fields of its groups of options as parameters, as typer reads them."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for param in inspect.signature(function).parameters.values():
        hint = hints[param.name]
        if not (isinstance(hint, type) and issubclass(hint, OptionGroup)):
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(param.replace(annotation=hint, kind=keyword))
            continue
        groups[param.name] = hint
        hints_of_fields = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=hints_of_fields[field.name],
                )
            )

    @wraps(function)
    def call(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return function(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {param.name: param.annotation for param in parameters}
    return call


def _is_option(param: Any) -> bool:
    return bool(param.opts) and param.opts[0].startswith("-")


def _option_name(param: Any) -> str:
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names += " / " + ", ".join(param.secondary_opts)
    if getattr(param, "is_flag", False):
        return names
    return f"{names} {param.metavar or _value(param)}"


def _value(param: Any) -> str:
    if isinstance(param.default, bool | str):
        return "NAME"
    descriptor = getattr(param, "type_descriptor", None)
    annotation = getattr(descriptor, "annotation", None) or getattr(param, "type", None)
    return _VALUES.get(getattr(annotation, "__name__", ""), "NAME")


def _notes(param: Any) -> tuple[str, ...]:
    notes = []
    if param.required:
        notes.append("required")
    if getattr(param, "envvar", None):
        notes.append(f"env: {param.envvar}")
    default = param.default
    if isinstance(default, Enum):
        default = default.value
    if default not in (None, False, True, "", ()) and not callable(default):
        notes.append(
            f"default: {default:g}" if isinstance(default, float) else f"default: {default}"
        )
    return tuple(notes)


def _print_help(verb: Any, ctx: Any, rows: Sequence[Described]) -> None:
    console = Terminal(file=sys.stdout)
    console.width = min(console.width, _MAX_WIDTH)
    hang = textwrap.wrap(
        f"Usage: {usage(verb, ctx.command_path)}",
        console.width - 2,
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )
    _print(console, "\n".join(["", *hang, ""]))
    for text in paragraphs(verb.help or ""):
        _print(console, f"{text}\n")
    widest = max((len(row.name) for row in rows), default=0)
    for panel in dict.fromkeys(row.panel for row in rows):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(style="cyan", min_width=min(widest, 28), overflow="fold")
        table.add_column(overflow="fold")
        for row in rows:
            if row.panel == panel:
                notes = "".join(f" [{note}]" for note in row.notes)
                table.add_row(Text(row.name), _highlighted(row.text).append(notes, "dim"))
        console.print(
            Panel(table, title=panel, title_align="left", border_style="dim", box=ROUNDED)
        )
    if verb.example:
        _print(console, "\nExample:\n" + textwrap.indent(verb.example, "  ") + "\n")


def _print(console: Console, text: str) -> None:
    for line in text.split("\n"):
        console.print(Padding(_highlighted(line), (0, 1)))


def _highlighted(text: str) -> Text:
    shown = Text(text)
    shown.highlight_regex(_OPTION, "cyan")
    return shown
