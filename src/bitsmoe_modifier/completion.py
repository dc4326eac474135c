"""Completion scripts for shells, written from the command line's own parser."""

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script for the shell to source: completes commands, options, choices, and files elsewhere."""
    return _fish(parser) if shell == "fish" else _bash(parser, zsh=shell == "zsh")


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Parser and help of every command."""
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (command, helps[name]) for name, command in action.choices.items()}


def _options(command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every long option of a command with its action."""
    for action in command._actions:
        for name in action.option_strings:
            if name.startswith("--"):
                yield name, action


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]


def _bash(parser: argparse.ArgumentParser, zsh: bool) -> str:
    commands = _commands(parser)
    cases, values = [], []
    for name, (command, _) in commands.items():
        offered = [option for option, _ in _options(command)]
        offered += [choice for action in command._actions if not action.option_strings for choice in _choices(action)]
        cases.append(f"        {name}) words={shlex.quote(' '.join(offered))} ;;")
        for option, action in _options(command):
            if action.choices:
                values.append(f"        {name}:{option}) words={shlex.quote(' '.join(_choices(action)))}; only=1 ;;")
            elif action.nargs != 0:
                values.append(f"        {name}:{option}) words=''; only=1 ;;")
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    body = f"""_bitsmoe() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words only=""
    case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
        *) words={shlex.quote(" ".join([*commands, "--help", "--version"]))} ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words={shlex.quote(" ".join([*commands, "--help", "--version"]))}
    case "${{COMP_WORDS[1]}}:$previous" in
{chr(10).join(values)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ "$COMP_CWORD" -gt 1 ] && [ "${{current#-}}" = "$current" ] && {{ [ -z "$only" ] || [ -z "$words" ]; }}; then
        COMPREPLY+=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _bitsmoe bitsmoe
"""
    return head + body


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = []
    for name, (command, text) in _commands(parser).items():
        lines.append(f"complete -c bitsmoe -n __fish_use_subcommand -f -a {name} -d {shlex.quote(text)}")
        for option, action in _options(command):
            lines.append(_fish_option(name, option, action))
    return "\n".join(lines) + "\n"


def _fish_option(command: str, option: str, action: Any) -> str:
    line = f"complete -c bitsmoe -n '__fish_seen_subcommand_from {command}' -l {option[2:]}"
    if action.choices:
        line += f" -x -a {shlex.quote(' '.join(_choices(action)))}"
    elif action.nargs != 0:
        line += " -r"
    return line + (f" -d {shlex.quote((action.help or '').replace('%%', '%'))}" if action.help else "")
