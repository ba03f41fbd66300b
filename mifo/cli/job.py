"""What makes a function a command: its option groups become options, and it runs as a job with one way to fail.

    @job_command(app, "mifo check my_photo")
    def check(job: Job, source: PhotoOptions, ...) -> None: ...

`job` prints the result; `--json` is every command's own option. A parameter whose type is an `OptionGroup` stands for the group's
fields, shown under the group's heading in the help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from ..errors import InputError
from ..io.console import running
from ..io.processes import process_count

OWN, OTHER = "Input", "Other"
QUIET = Annotated[bool, typer.Option("--quiet", help="Show no progress; results, notes and errors alone.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


class OptionGroup:
    """Base of the dataclasses in `options`: the fields are options, the docstring is for readers of the code."""

    heading: ClassVar[str] = OTHER


class GroupedHelp(TyperCommand):
    """Plain help with a section for each group of options; names are never cut."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None)
                default = "Arguments" if parameter.param_type_name == "argument" else OWN
                default = OTHER if parameter.name in ("as_json", "quiet", "help") else default
                sections.setdefault(heading or default, []).append(record)
        last = sections.pop(OTHER, None)
        for heading, records in [*sections.items(), *([(OTHER, last)] if last else [])]:
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.split("\n"):
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def job_command(app: typer.Typer, example: str, name: str | None = None,
                several_processes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:  # fmt: skip
    """Registers a function whose first parameter is the `Job` that runs; `name`: of the command, else the function's.
    `several_processes`: a launcher may start it in several, which share the work."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters, groups = _parameters(function)

        @wraps(function)
        def run(**values: Any) -> None:
            with running(values.pop("as_json"), values.pop("quiet")) as job:
                if process_count() > 1 and not several_processes:
                    raise InputError(f"this command is no job for several processes, but {process_count()} were launched; start "
                                     "it by itself, or spread a file of jobs with `cluster`")  # fmt: skip
                made = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
                function(job, **values, **made)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        app.command(name, cls=GroupedHelp, epilog=example)(run)
        return run

    return register


def _parameters(function: Callable[..., None]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """A command's own parameters with those of its groups in their places, and its groups by name."""
    hints = get_type_hints(function, include_extras=True)
    own: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            groups[name] = kind
            types = get_type_hints(kind, include_extras=True)
            own += [_parameter(f.name, _under(types[f.name], kind.heading), _default(f)) for f in fields(kind)]  # type: ignore[arg-type]
        else:
            own.append(_parameter(name, kind, parameter.default))
    own += [_parameter("quiet", QUIET, False), _parameter("as_json", AS_JSON, False)]
    return own, groups


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _under(kind: Any, heading: str) -> Any:
    """The same option below `heading` in the help."""
    if get_origin(kind) is not Annotated:
        return Annotated[kind, typer.Option(rich_help_panel=heading)]
    plain, *extras = get_args(kind)
    info: ParameterInfo | None = next((e for e in extras if isinstance(e, ParameterInfo)), None)
    moved = copy(info) if info else OptionInfo()
    moved.rich_help_panel = heading
    return Annotated[plain, moved]
