"""Options that a command does not have: all of them told at once, and what is called otherwise here by our names."""

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from offprincipal.errors import meant
from offprincipal.foreign_names import called_here

_CLICK: Any = importlib.import_module(typer.BadParameter.__module__)  # the copy of click that typer has
_GIVEN = "offprincipal.given"
_ABSENT = "\0"  # stands for a setting that a command cannot be told
# our settings -> what commands call them
_CALLED = {"tasks": "task", "adapter.method": "adapter"}
# what models are called where commands take them as arguments
_MODELS = ("model", "base", "tuned", "tuned_model", "finetuned_model", "adapter", "peft_model", "checkpoint")


class Commands(TyperGroup):
    """Commands whose unknown options are told in our words; exit code 2, as of any other fault in the arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _CLICK.NoSuchOption as error:
            command, option = error.ctx, error.option_name
        told = [f"{each}: {_told(each, command)}" for each in _unknown_in(ctx.meta[_GIVEN], command) or [option]]
        text = f"No such option {told[0]}" if len(told) == 1 else "\n".join(["No such options:", *told])
        raise _CLICK.UsageError(text, command)


def _unknown_in(given: list[str], ctx: Any) -> list[str]:
    """The options among a command's words that it does not have, each once; values of options are none."""
    takes = {name: not option.is_flag for option in _options(ctx) for name in (*option.opts, *option.secondary_opts)}
    takes |= dict.fromkeys(ctx.help_option_names, False)
    unknown: list[str] = []
    words = iter(given[given.index(ctx.info_name) + 1 :])
    for word in words:
        option, equals, _ = word.partition("=")
        if word == "--":
            break
        if takes.get(option):
            if not equals:
                next(words, None)
        elif option.startswith("--") and option not in takes:
            unknown.append(option)
        elif word[:1] == "-" and word[1:2].isalpha() and word[:2] not in takes:
            unknown.append(word[:2] if len(word) == 2 else word)
    return list(dict.fromkeys(unknown))


def _told(option: str, ctx: Any) -> str:
    """What to do in place of an option."""
    name = option.lstrip("-").replace("-", "_")
    ours = called_here(name, lambda setting, value: _given(setting, value, ctx) or _ABSENT)
    arguments = [_shown(param) for param in ctx.command.params if param.param_type_name == "argument"]
    if arguments and (name in _MODELS or (ours and "model" in name and _ABSENT in ours)):
        return f"write it as an argument: {ctx.command_path} {' '.join(arguments)}"
    if ours is None and _takes_settings(ctx):
        from offprincipal.training.settings import setting_fields

        setting = next((each for each in setting_fields() if f".{each}".endswith(f".{name}")), None)
        ours = f"here it is {_given(setting, '', ctx)}" if setting else None
    if ours and _ABSENT in ours:
        return "it is a setting of `offprincipal train`"
    known = [name for each in _options(ctx) if not each.hidden for name in each.opts]
    return ours or meant(f"--{name.replace('_', '-')}", known, f"`{ctx.command_path} --help` has all")


def _given(setting: str, value: str, ctx: Any) -> str | None:
    """How a command is told a setting of training: by an option of its own, an argument, or --set; if at all."""
    called = _CALLED.get(setting, setting.removeprefix("adapter."))
    for param in ctx.command.params:
        if param.name == called and not getattr(param, "hidden", False):
            if param.param_type_name == "argument":
                return f"the argument {_shown(param)}"
            return f"{max(param.opts, key=len)}{value.replace('=', ' ')}"
    if _takes_settings(ctx) and setting not in ("out", "overwrite"):
        under = "training." if ctx.info_name == "study" else ""
        return f"--set {under}{setting}{value or '=VALUE'}"
    return None


def _takes_settings(ctx: Any) -> bool:
    return any("--set" in option.opts for option in _options(ctx))


def _options(ctx: Any) -> list[Any]:
    return [param for param in ctx.command.params if param.param_type_name == "option"]


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())
