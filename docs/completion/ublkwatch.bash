# bash completion for ublkwatch(8). Made by `python -m tests.manual`: edit what it is made from.

_ublkwatch_names() {
    local each
    case $1 in
        devices)
            for each in "${_UBLKWATCH_SYS:-/sys}"/class/ublk-char/ublkc*; do
                [[ -e $each ]] && echo "ublkb${each##*/ublkc}"
            done ;;
        registrations)
            "${COMP_WORDS[0]}" registered 2>/dev/null | sed -n 's/^\([^ :]*\):.*/\1/p' ;;
        files) compgen -f -- "$2" ;;
    esac
}

_ublkwatch() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local verb='' options='' takes='' i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} == -- ]]; then  # what follows is a server's own command
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return
        fi
        [[ -z $verb && ${COMP_WORDS[i]} != -* ]] && verb=${COMP_WORDS[i]}
    done
    case $prev in
        --output|-o) mapfile -t COMPREPLY < <(compgen -W 'wide json jsonl name' -- "$cur"); return ;;
        --config|--report) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        --attach|--cwd|--env|--exe|--for|--group|--handoff|--limit|--name|--policy|--process|--profile|--reason|--rounds|--set|--since|--tag|--timeout|--unit|--user) return ;;
    esac
    case $verb in
        '') options='status explain history events hold release retry recover forget stop drill register unregister reload registered doctor features version check-config run install-systemd --version --help' ;;
        status) options='--config -o --output --json -x --unhealthy --watch --help' takes='devices' ;;
        explain) options='--config --help' takes='devices' ;;
        history) options='--config --limit --json --since --help' takes='devices' ;;
        events) options='--config --limit --json --follow -f --help' takes='devices' ;;
        hold) options='--config --reason --dry-run --for --help' takes='devices' ;;
        release) options='--config --reason --dry-run --help' takes='devices' ;;
        retry) options='--config --reason --dry-run --help' takes='devices' ;;
        recover) options='--config --reason --dry-run --yes --help' takes='devices' ;;
        forget) options='--config --reason --dry-run --yes --help' takes='devices' ;;
        stop) options='--config --force --reason --dry-run --yes --help' takes='devices' ;;
        drill) options='--config --rounds --scratch --although-in-use --report --timeout --reason --dry-run --yes --help' takes='devices' ;;
        register) options='--config --name --exe --process --tag --handoff --attach --user --cwd --profile --unit --group --accept-delete-on-failure --env --limit --policy --set --reason --dry-run --help' takes='devices' ;;
        unregister) options='--config --reason --dry-run --help' takes='registrations' ;;
        reload) options='--config --reason --dry-run --help' takes='' ;;
        registered) options='--config --json --help' takes='' ;;
        doctor) options='--config --json --help' takes='' ;;
        features) options='--config --json --help' takes='' ;;
        version) options='--config --json --help' takes='' ;;
        check-config) options='--config --json --help' takes='files' ;;
        run) options='--config --verbose --help' takes='' ;;
        install-systemd) options='--config --now --remove --early-boot --children --dry-run --help' takes='' ;;
        *) return ;;
    esac
    if [[ -z $verb || $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    else
        mapfile -t COMPREPLY < <(compgen -W "$(_ublkwatch_names "$takes" "$cur")" -- "$cur")
    fi
}

complete -F _ublkwatch ublkwatch
