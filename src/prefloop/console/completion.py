"""What the Tab key offers. The shells ask `prefloop --complete WORDS`, and so know each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol, get_args, get_origin, get_type_hints

from prefloop.config.kinds import is_list, simple
from prefloop.config.resolve import flag
from prefloop.console.help import Command, purpose, texts_of

SCRIPTS = {
    "bash": r"""# In ~/.bashrc:  eval "$(prefloop completion bash)"
_prefloop() {
    local IFS=$'\n'
    COMPREPLY=($(prefloop --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f1))
}
complete -o default -F _prefloop prefloop""",
    "zsh": r"""# In ~/.zshrc, after compinit:  eval "$(prefloop completion zsh)"
_prefloop() {
    local line
    local -a lines described
    lines=("${(@f)$(prefloop --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z "$lines" ]]; then
        _files
        return
    fi
    for line in "${lines[@]}"; do
        described+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    _describe prefloop described
}
compdef _prefloop prefloop""",
    "fish": r"""# prefloop completion fish > ~/.config/fish/completions/prefloop.fish
function __prefloop_complete
    set -l words (commandline -opc)[2..]
    set -l token (commandline -ct)
    set -l lines (prefloop --complete $words "$token" 2>/dev/null)
    if test -n "$lines"
        printf '%s\n' $lines
    else
        __fish_complete_path "$token"
    end
end
complete -c prefloop -f -a '(__prefloop_complete)'""",
}


class Positional(Command, Protocol):
    """A command that may take one setting without its flag."""

    @property
    def positional(self) -> str:
        """That setting; "" where there is none."""


def candidates(words: Sequence[str], commands: Mapping[str, Positional]) -> list[str]:
    """Each word that may stand where the last of `words` is begun, a tab, and what it means.

    Nothing where a file's name or any text may stand.
    """
    *before, begun = words or [""]
    found = dict(_possible(before, begun, commands))
    return [f"{word}\t{text}".rstrip() for word, text in found.items() if word.startswith(begun)]


def _possible(
    before: Sequence[str], begun: str, commands: Mapping[str, Positional]
) -> Iterator[tuple[str, str]]:
    """The words, with what they mean."""
    depth = 1 + bool(before and any(name.startswith(f"{before[0]} ") for name in commands))
    if len(before) < depth:  # a command's word
        for name, command in commands.items():
            parts = name.split()
            if parts[: len(before)] == list(before):
                whole = len(parts) == len(before) + 1
                yield parts[len(before)], purpose(command) if whole else ""
        return
    known = commands.get(" ".join(before[:depth]))
    if known is None:
        return
    given = before[depth:]
    hints = get_type_hints(known.config)
    names = {flag(name): name for name in hints}
    last = next((n for n in range(len(given) - 1, -1, -1) if given[n].startswith("--")), None)
    open_to = names.get(given[last]) if last is not None else known.positional
    values = len(given) - 1 - (-1 if last is None else last)
    wanted = hints.get(open_to or "", bool)
    if not begun.startswith("-") and simple(wanted) is not bool and not values:
        one = simple(wanted)
        yield from ((str(w), "") for w in (get_args(one) if get_origin(one) is Literal else ()))
        return
    if not begun.startswith("-") and (is_list(wanted) or (given and given[-1] == "--config")):
        return
    texts = texts_of(known.config)
    for option, name in names.items():
        if option not in given or is_list(hints[name]):
            yield option, texts.get(name, "")
        if hints[name] is bool:
            yield flag(f"no_{name}"), ""
    yield "--config", "settings from a YAML file"
    yield "--help", "the common settings"
    yield "--help-all", "all settings"
