"""``python -m tests.manual``: writes docs/man and docs/completion from the command line's parsers,
the settings' declarations, and the README's table of exit codes; and docs/metrics.md from those of
the metrics. A test holds them to be current.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ublkwatch import __version__, cli, config
from ublkwatch.measures import MEASURES, Label, Measure
from ublkwatch.settings import CARE, DEVICE, METRICS, RECOVERY, SERVER, TOP, Key

TOP_DIR = Path(__file__).parent.parent
MADE = "Made by `python -m tests.manual`: edit what it is made from."

Verbs = dict[str, argparse.ArgumentParser]


def pages() -> dict[str, str]:
    """Return all files, by their path below docs/."""
    parser = cli.parser()
    verbs, helps = verbs_of(parser)
    return {
        "man/ublkwatch.8": _ublkwatch_8(verbs, helps),
        "man/ublkwatch.toml.5": _toml_5(),
        "completion/ublkwatch.bash": _bash(verbs),
        "completion/_ublkwatch": _zsh(verbs, helps),
        "metrics.md": _metrics(),
    }


def main() -> None:
    for name, text in pages().items():
        path = TOP_DIR / "docs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def verbs_of(parser: argparse.ArgumentParser) -> tuple[Verbs, dict[str, str]]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {each.dest: each.help or "" for each in action._choices_actions}
    return dict(action.choices), helps


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options of a verb, but for --help."""
    hidden = (argparse._HelpAction,)
    return [a for a in parser._actions if a.option_strings and not isinstance(a, hidden)]


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if not a.option_strings]


def _value(action: argparse.Action) -> str:
    """Return what an option's value is called; "" for one that has none."""
    if action.nargs == 0:
        return ""
    if action.choices and not action.metavar:
        return "|".join(map(str, action.choices))
    return str(action.metavar or action.dest.upper())


# --- manual pages --------------------------------------------------------------------------------


def _roff(text: str) -> str:
    """Write text so that roff takes none of it for its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def _head(title: str, section: int, name: str, what: str) -> Iterator[str]:
    yield f'.\\" {MADE}'
    yield f'.TH {title} {section} "" "ublkwatch {__version__}" "ublkwatch"'
    yield ".nh"
    yield ".SH NAME"
    yield f"{name} \\- {what}"


def _ublkwatch_8(verbs: Verbs, helps: dict[str, str]) -> str:
    lines = [*_head("UBLKWATCH", 8, "ublkwatch", "keeps userspace block devices (ublk) alive")]
    lines += [
        ".SH SYNOPSIS",
        ".B ublkwatch",
        ".I VERB",
        "[\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...",
    ]
    lines += [
        ".SH DESCRIPTION",
        _roff(
            "Linux's ublk driver hands the requests of a block device to a process, its server. "
            "When that crashes, a device that was created with UBLK_F_USER_RECOVERY is kept, and "
            "its I/O waits. `ublkwatch run` notices it, starts the server again, and has the "
            "kernel take up the I/O that waits. The other verbs show what it does, and give it "
            "orders."
        ),
        ".PP",
        _roff(
            "A device DEV is written as its number, as ublkbN or as /dev/ublkbN. Orders are for "
            "root, and for the members of `admin_group`; each is logged, and kept in the history "
            "with who gave it."
        ),
        ".SH VERBS",
    ]
    for name, parser in verbs.items():
        lines += [".SS", f".B {_roff(name)}"]
        lines += [_synopsis(parser), ".PP", _sentence(helps[name])]
        for action in (*_positionals(parser), *options_of(parser)):
            if not action.help:
                continue
            value = _value(action)
            names = ", ".join(action.option_strings)
            head = f"\\fB{_roff(names)}\\fR" if names else f"\\fI{_roff(value)}\\fR"
            head += f" \\fI{_roff(value)}\\fR" if names and value else ""
            lines += [".TP", head, _sentence(action.help)]
    lines += [".SH EXIT STATUS"]
    table = (TOP_DIR / "README.md").read_text().split("## Exit codes")[1]
    for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE):
        lines += [".TP", f".B {code}", _sentence(meaning)]
    lines += [".SH FILES"]
    for path, what in (
        (str(config.DEFAULT_PATH), "the configuration: ublkwatch.toml(5)"),
        (f"{TOP['runtime_dir'].default}/status.json", "what is, for everybody to read"),
        (f"{TOP['runtime_dir'].default}/admin.sock", "where orders are taken"),
        (str(TOP["state_dir"].default), "what was learnt and registered, and the history"),
    ):
        lines += [".TP", f".I {_roff(path)}", _sentence(what)]
    lines += [".SH SEE ALSO", ".BR ublkwatch.toml (5)"]
    return "\n".join(lines) + "\n"


def _synopsis(parser: argparse.ArgumentParser) -> str:
    words = []
    for action in _positionals(parser):
        word = f"\\fI{_roff(str(action.metavar))}\\fR"
        words.append({"?": f"[{word}]", "*": f"[{word}]..."}.get(str(action.nargs), word))
    for action in options_of(parser):
        value = _value(action)
        name = f"\\fB{_roff(action.option_strings[-1])}\\fR"
        value = f"[{_roff(value)}]" if action.nargs == "?" else _roff(value)
        words.append(f"[{name} \\fI{value}\\fR]" if value else f"[{name}]")
    if "ARGV" in parser.format_usage():
        words.append("\\fB\\-\\-\\fR \\fIARGV\\fR...")
    return " ".join(words) or "\\&"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return _roff(text[0].upper() + text[1:] + ("" if text.endswith(".") else "."))


def _toml_5() -> str:
    lines = [*_head("UBLKWATCH.TOML", 5, "ublkwatch.toml", "the configuration of ublkwatch(8)")]
    lines += [
        ".SH DESCRIPTION",
        _roff(
            f"{config.DEFAULT_PATH} is a TOML file that root alone may be able to write. All keys "
            "have defaults; one that is not known is an error. `ublkwatch check-config` says all "
            "that is wrong, `ublkwatch reload` has it read anew."
        ),
    ]
    keys_of_device = {key: value for key, value in DEVICE.items() if key not in CARE}
    keys_of_server = {key: value for key, value in SERVER.items() if key not in CARE}
    for title, about, keys in (
        ("TOP LEVEL", "", TOP),
        ("[metrics]", "", METRICS),
        ("[recovery]", "For all devices; a [[device]] or [[server]] may differ in each.", RECOVERY),
        ("[[device]]", "How one device is kept alive.", keys_of_device),
        ("[[server]]", "The same, for every device whose server looks like this.", keys_of_server),
        ("[[device]] and [[server]]", "Both have these, and all of [recovery].", CARE),
    ):
        lines += [f'.SH "{title.upper() if not title.startswith("[") else title}"']
        lines += [_roff(about)] if about else []
        for key, declared in keys.items():
            lines += [".TP", f"\\fB{_roff(key)}\\fR ({_roff(_kind(declared))})"]
            lines += [_sentence(declared.help)]
    lines += [".SH SEE ALSO", ".BR ublkwatch (8)"]
    return "\n".join(lines) + "\n"


def _kind(key: Key) -> str:
    """Say what a key takes, and what holds without it."""
    kinds: dict[type, str] = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
    }
    kinds |= {list: "list", dict: "table"}
    kind = kinds[key.type]
    if key.choices:
        kind = " or ".join(f'"{choice}"' for choice in key.choices)
    elif key.type in (int, float, list) and key.high < float("inf"):
        kind += f", {key.low:g} to {key.high:g}"
    if key.default is None:
        return f"{kind}; must be given"
    default = f'"{key.default}"' if isinstance(key.default, str) else str(key.default)
    if isinstance(key.default, bool):
        default = default.lower()
    return f"{kind}; default: {default}"


# --- metrics -------------------------------------------------------------------------------------

_METRICS_HEAD = f"""\
# Metrics

<!-- {MADE} -->

`ublkwatch run` serves three pages over HTTP, on {METRICS["address"].default} port \
{METRICS["port"].default} unless `[metrics]` says
otherwise (`address`, `port`, `enabled`). There is neither TLS nor a password: put a proxy before it
where others may reach the port.

- /metrics: what is below, in Prometheus' text format.
- /healthz: whether ublkwatch itself is well: its event loop runs, its poll of all devices comes to
  an end, its runtime directory can be written. Never anything about devices: a supervisor that is
  restarted because a device is down recovers nothing.
- /readyz: whether all devices were looked at for the first time.

The latter two answer 200, or 503 with one line that says why. For Prometheus:

    scrape_configs:
      - job_name: ublkwatch
        static_configs:
          - targets: ["localhost:{METRICS["port"].default}"]

Series exist from the start, at zero, or from the moment on at which ublkwatch first acts on a
device; those of a device that is gone are gone. Counters begin at zero when ublkwatch starts. An
outage may be shorter than the time between two scrapes, and then no gauge shows it:
`ublkwatch_device_unavailable_seconds_total` and `ublkwatch_server_losses_total` do. Histograms have
no label `device`; a device's last outage is in `ublkwatch_device_last_held_seconds`, all of them in
`ublkwatch history`.

*Stable* means that name, type and labels stay; a label may get new values. What is *experimental*
may change in any version, and CHANGELOG.md says so. `process_*` are those of the Prometheus client
library.

A device has some 43 series, 2.7 KiB of the page. `python -m bench.scrape` measures what that costs;
a thread writes the page, so a recovery does not wait for it. At most 32 clients are served at a
time: where there are more, the oldest goes, and first of all one that has not asked for anything.

| metric | type | labels | stability | meaning |
|---|---|---|---|---|
"""


def _metrics() -> str:
    rows = [_metric(each) for each in MEASURES.values()]
    values = {
        (label.name, label.values): f"`{each.exposed}`"
        for each in reversed(MEASURES.values())
        for label in each.labels
        if label.values
    }
    lists = [
        f"- `{name}` of {first}: {_values(Label(name, among))}"
        for (name, among), first in reversed(values.items())
    ]
    buckets: dict[tuple[float, ...], list[str]] = {}
    for each in MEASURES.values():
        if each.buckets:
            buckets.setdefault(each.buckets, []).append(f"`{each.exposed}`")
    bounds = [
        f"- {', '.join(names)}: {', '.join(f'{bound:g}' for bound in among)}"
        for among, names in buckets.items()
    ]
    parts = [
        _METRICS_HEAD + "\n".join(rows),
        "## Values of labels\n",
        "`device` is the disk's name, as node_exporter has it: ublkb0. The others are closed sets;",
        "what a label has here it has in every metric of that label, if nothing else is said.\n",
        "\n".join(lists),
        "\n## Buckets, in seconds\n",
        "\n".join(bounds),
    ]
    return "\n".join(parts).replace("\n## V", "\n\n## V") + "\n"


def _metric(measure: Measure) -> str:
    labels = ", ".join(label.name for label in measure.labels) or "-"
    cells = (f"`{measure.exposed}`", measure.kind.value, labels, measure.stability.value)
    return f"| {' | '.join(cells)} | {measure.meaning} |"


def _values(label: Label) -> str:
    return ", ".join(value or "(empty)" for value in label.values)


# --- completion ----------------------------------------------------------------------------------


def _takes(parser: argparse.ArgumentParser) -> str:
    """Return what kind of argument a verb has: devices, registrations, files, or none."""
    kinds = {"DEV": "devices", "NAME": "registrations", "FILE": "files"}
    found = [kinds.get(str(action.metavar), "") for action in _positionals(parser)]
    return found[0] if found else ""


def _valued(verbs: Verbs) -> str:
    """Return, as cases of the shell's, what can follow the options that take a value."""
    cases: dict[str, str] = {}
    for action in (action for each in verbs.values() for action in options_of(each)):
        if not _value(action) or action.nargs == "?":
            continue
        found = f"compgen -W '{' '.join(action.choices)}'" if action.choices else "true"
        found = "compgen -f" if _value(action) == "FILE" else found
        cases |= dict.fromkeys(action.option_strings, found)
    lines = []
    for found in sorted(set(cases.values())):
        names = "|".join(sorted(name for name in cases if cases[name] == found))
        tail = "" if found == "true" else f'mapfile -t COMPREPLY < <({found} -- "$cur"); '
        lines.append(f"        {names}) {tail}return ;;")
    return "\n".join(lines)


def _bash(verbs: Verbs) -> str:
    cases = []
    for name, parser in verbs.items():
        options = " ".join(o for a in options_of(parser) for o in a.option_strings)
        cases.append(f"        {name}) options='{options} --help' takes='{_takes(parser)}' ;;")
    return f"""\
# bash completion for ublkwatch(8). {MADE}

_ublkwatch_names() {{
    local each
    case $1 in
        devices)
            for each in "${{_UBLKWATCH_SYS:-/sys}}"/class/ublk-char/ublkc*; do
                [[ -e $each ]] && echo "ublkb${{each##*/ublkc}}"
            done ;;
        registrations)
            "${{COMP_WORDS[0]}}" registered 2>/dev/null | sed -n 's/^\\([^ :]*\\):.*/\\1/p' ;;
        files) compgen -f -- "$2" ;;
    esac
}}

_ublkwatch() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
    local verb='' options='' takes='' i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} == -- ]]; then  # what follows is a server's own command
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return
        fi
        [[ -z $verb && ${{COMP_WORDS[i]}} != -* ]] && verb=${{COMP_WORDS[i]}}
    done
    case $prev in
{_valued(verbs)}
    esac
    case $verb in
        '') options='{" ".join(verbs)} --version --help' ;;
{chr(10).join(cases)}
        *) return ;;
    esac
    if [[ -z $verb || $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    else
        mapfile -t COMPREPLY < <(compgen -W "$(_ublkwatch_names "$takes" "$cur")" -- "$cur")
    fi
}}

complete -F _ublkwatch ublkwatch
"""


def _quoted(text: str) -> str:
    """Write text for the inside of a zsh specification in single quotes."""
    text = re.sub(r"([\[\]:\\])", r"\\\1", " ".join(text.split()))
    return text.replace("'", "'\\''")


def _zsh(verbs: Verbs, helps: dict[str, str]) -> str:
    described = "\n".join(f"                '{name}:{_quoted(helps[name])}'" for name in verbs)
    cases = []
    for name, parser in verbs.items():
        specs = []
        for action in options_of(parser):
            value = _value(action)
            what = f"({' '.join(action.choices)})" if action.choices else " "
            tail = f":{value}:{'_files' if value == 'FILE' else what}" if value else ""
            star = "*" if isinstance(action, argparse._AppendAction) else ""
            help_ = f"[{_quoted(action.help)}]" if action.help else ""
            specs += [f"'{star}{option}{help_}{tail}'" for option in action.option_strings]
        if takes := _takes(parser):
            what = "_files" if takes == "files" else f"_ublkwatch_{takes}"
            many = any(each.nargs == "*" for each in _positionals(parser))
            specs.append(f"'{'*' if many else '1'}:{takes}:{what}'")
        joined = " \\\n                        ".join(["'--help[show its options]'", *specs])
        cases.append(f"                {name})\n                    _arguments {joined} ;;")
    return f"""\
#compdef ublkwatch
# zsh completion for ublkwatch(8). {MADE}

_ublkwatch_devices() {{
    local -a devices
    devices=(${{_UBLKWATCH_SYS:-/sys}}/class/ublk-char/ublkc*(N:t:s/ublkc/ublkb/))
    compadd -a devices
}}

_ublkwatch_registrations() {{
    local -a names
    names=(${{(f)"$(ublkwatch registered 2>/dev/null | sed -n 's/^\\([^ :]*\\):.*/\\1/p')"}})
    compadd -a names
}}

_ublkwatch() {{
    local curcontext=$curcontext state
    local -a verbs
    _arguments -C '--help[show the verbs]' '--version[show the version]' \\
        '1:verb:->verb' '*::argument:->rest'
    case $state in
        verb)
            verbs=(
{described}
            )
            _describe verb verbs ;;
        rest)
            if (( ${{words[(i)--]}} < CURRENT )); then  # what follows is a server's own command
                _files
                return
            fi
            case $words[1] in
{chr(10).join(cases)}
            esac ;;
    esac
}}

_ublkwatch "$@"
"""


if __name__ == "__main__":
    main()
