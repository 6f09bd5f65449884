"""Flags, each declared once. The parser, the checks, `--help`, what a resumed run may change, what is secret, and the
page of flags in `docs/` all follow from the declaration.

Nothing here imports torch, so a typo is answered in well under a second.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from sharpening.errors import UserError, require


@dataclass(frozen=True)
class Flag:
    """A flag of a command line.

    Attributes:
        name: without dashes. A flag of type bool is also turned off, by `--no-NAME`.
        help: what it does, without its default, presets and range: those are added.
        type: of its value.
        default: if it is not given; None where the preset decides, or where none is a setting of its own.
        range: the interval that a number must lie in, such as "[1, inf)"; an unset flag is not checked.
        choices: all values that are allowed.
        presets: its value under each preset, unless it is given.
        free: a resumed run may change it, because it decides neither which draws a step sees nor what it computes, or
            because that lies in other flags.
        secret: its value must reach no log, tracker or file.
        required: it must be given.
        metavar: how `--help` shows its value.
        nargs: how many values it takes, as of argparse: "+" for one or more, "*" for any number; None for one.
        switch: an older switch and the value that it means, such as ("share_noise", "shared"); turned off it means
            nothing.
    """

    name: str
    help: str = ""
    type: Callable[[str], Any] = str
    default: Any = None
    range: str = ""
    choices: tuple[str, ...] = ()
    presets: Mapping[str, Any] = field(default_factory=dict)
    free: bool = False
    secret: bool = False
    required: bool = False
    metavar: str | None = None
    nargs: str | None = None
    switch: tuple[str, Any] | None = None

    def described(self) -> str:
        """The help with presets, default, range and other spellings."""
        facts = [f"{preset}: {value}" for preset, value in self.presets.items()]
        if self.default is not None and self.default is not False:
            facts.append(f"default: {self.default}")
        if self.range:
            facts.append(f"in {self.range}")
        if self.switch:
            facts.append("--{} means {}".format(*self.switch))
        return " ".join(filter(None, [self.help, f"({'; '.join(facts)})" if facts else ""]))

    def check(self, value: Any) -> None:
        """Refuse a number outside the range.

        Raises:
            UserError: naming the flag.
        """
        if not self.range or value is None:
            return
        low, high = (float(bound) for bound in self.range[1:-1].split(","))
        above = low <= value if self.range[0] == "[" else low < value
        below = value <= high if self.range[-1] == "]" else value < high
        if above and below:
            return
        must = f"lie in {self.range}"
        if high == math.inf and low in (0, 1):
            must = {"[1": "be at least 1", "[0": "not be negative", "(0": "be above 0"}[f"{self.range[0]}{low:g}"]
        raise UserError(
            f"--{self.name} is {value}, but it must {must}"
            + (", or left out" if self.default is None and not self.presets else "")
        )


Groups = Mapping[str, Sequence[Flag]]  # title -> the flags under it in `--help`


class OneSentenceParser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing 80 flags of usage in front of the actual complaint."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help for every flag")


def with_preset(
    flags: Sequence[Flag], preset: str, values: Mapping[str, Any], others: Sequence[str]
) -> tuple[Flag, ...]:
    """The flags with one more preset beside `others`: under it, flags that `values` names have those values, and the
    rest what they have under the first of the others."""

    def of(flag: Flag) -> Flag:
        if flag.name == "preset":
            return replace(flag, choices=(*flag.choices, preset))
        if flag.name not in values and not flag.presets:
            return flag
        before = flag.presets or dict.fromkeys(others, flag.default)
        presets = {**before, preset: values.get(flag.name, before[others[0]])}
        return replace(flag, default=None, presets=presets)

    return tuple(map(of, flags))


def every_flag(groups: Groups) -> dict[str, Flag]:
    """All flags by name."""
    return {flag.name: flag for flags in groups.values() for flag in flags}


def make_parser(description: str, groups: Groups, prog: str | None = None) -> OneSentenceParser:
    """A parser with these flags. Abbreviations are off: `--api` must not smuggle a key past `Flag.secret`."""
    parser = OneSentenceParser(prog=prog, description=description, allow_abbrev=False)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            options: dict[str, Any] = {"help": flag.described().replace("%", "%%"), "default": flag.default}
            if flag.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= {"type": flag.type, "choices": flag.choices or None, "metavar": flag.metavar}
                options["nargs"] = flag.nargs
            group.add_argument(f"--{flag.name}", required=flag.required, **options)
            if flag.switch:
                hidden = {"action": argparse.BooleanOptionalAction, "help": argparse.SUPPRESS, "default": None}
                group.add_argument(f"--{flag.switch[0]}", **hidden)
    return parser


def parse(description: str, groups: Groups, argv: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """The flags of a command line, with what `--preset` makes of those that were not given; numbers are in range.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = make_parser(description, groups, prog).parse_args(argv)
    for name, flag in every_flag(groups).items():
        if flag.switch:
            _heed_switch(args, flag)
        if getattr(args, name) is None and flag.presets:
            setattr(args, name, flag.presets[args.preset])
        flag.check(getattr(args, name))
    return args


def _heed_switch(args: argparse.Namespace, flag: Flag) -> None:
    """Give the flag the value that its older switch means, if that was given."""
    switch, meaning = flag.switch
    value = getattr(args, flag.name)
    if vars(args).pop(switch):
        require(
            value in (None, meaning), f"--{switch} and --{flag.name}={value} exclude each other; leave one of them out"
        )
        setattr(args, flag.name, meaning)


def refuse_moved(argv: Sequence[str], moved: Mapping[str, str]) -> None:
    """Refuse flags, name -> where to find what they did, that a script had in the past.

    Raises:
        UserError: naming the flag and the script that has it.
    """
    given = {argument.partition("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
    for name, place in moved.items():
        require(name not in given, f"--{name} is no flag of this script any more: {place}")


def public(args: argparse.Namespace, groups: Groups) -> dict[str, Any]:
    """The arguments without secrets, for trackers, logs and saved files."""
    flags = every_flag(groups)
    return {name: value for name, value in vars(args).items() if name in flags and not flags[name].secret}


def redact(argv: Sequence[str], groups: Groups) -> list[str]:
    """A command line whose secret values are replaced, in both spellings `--api_key X` and `--api_key=X`.

    Trackers record `sys.argv` on their own: W&B writes it to `wandb-metadata.json`.
    """
    secrets = {f"--{name}" for name, flag in every_flag(groups).items() if flag.secret}
    redacted, hide_next = [], False
    for argument in argv:
        flag, separator, _ = argument.partition("=")
        redacted.append("***" if hide_next else f"{flag}=***" if flag in secrets and separator else argument)
        hide_next = flag in secrets and not separator
    return redacted


def as_markdown(groups: Groups) -> str:
    """A table of flags for each group; * marks those that a resumed run may change."""
    lines = []
    for title, flags in groups.items():
        lines += [f"### {title}", "", "| flag | what it does | default | values |", "| --- | --- | --- | --- |"]
        for flag in flags:
            default = ", ".join(f"{preset}: {value}" for preset, value in flag.presets.items()) or flag.default
            default = "required" if flag.required else "" if default is None or default is False else default
            words = ["`--{}` means {}".format(*flag.switch)] if flag.switch else []
            cells = (
                f"`--{flag.name}`{'*' if flag.free else ''}", "; ".join(filter(None, [flag.help, *words])), default,
                ", ".join(flag.choices) or flag.range or (flag.metavar or ""),
            )  # fmt: skip
            lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)
