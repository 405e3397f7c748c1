# bash completion for nbdshard. Install as /usr/share/bash-completion/completions/nbdshard, or source it.
# For zsh: autoload -U +X bashcompinit && bashcompinit && source this file.
# tests/unit/cli/test_documented_options.py compares the lists with the parsers'.

_nbdshard_copy="-C -R -S -T -V -h -p -v --allocated --checkpoint= --checksum --connect-timeout= --connections= --data-path= --destination-is-zero --flush --force-resume --handshake-timeout=
--help --journal= --keep-journal --loss-timeout= --no-extents --no-flush --progress --progress=bar --progress=json --queue-size= --range-size= --rate= --reconnect-delay= --request-size= --request-timeout=
--requests= --resume --retries= --ring= --salvage --sparse= --synchronous --target-is-zero --threads= --verbose --verify --version --workers="
_nbdshard_coordinator="-C -R -S -T -h -p -v --allocated --allow= --checkpoint= --checksum --connect-timeout= --connections= --data-path= --destination-is-zero
--flush --force-resume --handshake-timeout= --help --insecure --journal= --keep-journal --key= --listen= --loss-timeout= --no-extents --no-flush --progress --progress=bar --progress=json --queue-size= --range-size= --rate= --reconnect-delay=
--request-size= --request-timeout= --requests= --resume --retries= --salvage --sparse= --synchronous --target-is-zero --threads= --verbose --verify --workers="
_nbdshard_verify="-C -R -T -h -p -v --connect-timeout= --connections= --handshake-timeout= --help --json --loss-timeout= --no-extents --progress --progress=bar --progress=json
--queue-size= --range-size= --rate= --reconnect-delay= --request-size= --request-timeout= --requests= --retries= --ring= --threads= --verbose --workers="
_nbdshard_worker="-h -v --connect= --coordinator-key= --help --key= --ring= --verbose"
_nbdshard_ctl="-h --help --json"
_nbdshard_jobs="-h --format= --help --json"
_nbdshard_serve="-e -h -r -v --config= --credentials= --export= --help --max-connections= --pid-file= --processes= --read-only= --tcp= --unix= --verbose"
_nbdshard_volume="-h --chunk= --credentials= --help --json --shrink --size= --yes"
_nbdshard_keygen="-h --dir= --help"
_nbdshard_info="-L -h --help --json --list"
_nbdshard_checksum="-C -R -T -h -p -v --connect-timeout= --connections= --handshake-timeout= --help --json --loss-timeout= --no-extents --progress --progress=bar --progress=json
--queue-size= --range-size= --rate= --reconnect-delay= --request-size= --request-timeout= --requests= --retries= --ring= --threads= --verbose --workers="
_nbdshard_map="-h --help --json --totals"

# Words of a command between "[" and "]" belong to that command.
_nbdshard_in_brackets() {
    local i inside=1
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            "[") inside=0 ;;
            "]") inside=1 ;;
        esac
    done
    return $inside
}

_nbdshard() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} subcommand=${COMP_WORDS[1]}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "copy coordinator worker verify serve volume info map checksum ctl jobs keygen --help --version" -- "$word")
        return
    fi
    if _nbdshard_in_brackets; then
        mapfile -t COMPREPLY < <(compgen -o default -- "$word")
        return
    fi
    # bash splits --option=value into three words
    if [[ $word == "=" ]]; then
        word=""
    elif [[ $previous == "=" ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $previous in
        --ring)
            mapfile -t COMPREPLY < <(compgen -W "auto io_uring epoll" -- "$word")
            return
            ;;
        --data-path)
            mapfile -t COMPREPLY < <(compgen -W "auto splice buffer" -- "$word")
            return
            ;;
        --progress)
            if [[ ${COMP_WORDS[COMP_CWORD - 1]} == "=" || ${COMP_WORDS[COMP_CWORD]} == "=" ]]; then
                mapfile -t COMPREPLY < <(compgen -W "bar json" -- "$word")
                return
            fi
            ;;
    esac
    if ((COMP_CWORD == 2)) && [[ $subcommand == volume && $word != -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "create resize delete list" -- "$word")
        return
    fi
    local options=_nbdshard_$subcommand
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "${!options-}" -- "$word")
        [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace
    else
        mapfile -t COMPREPLY < <(
            compgen -o default -- "$word"
            compgen -W "nbd:// nbd+unix:/// null: - [" -- "$word"
        )
        [[ ${COMPREPLY[0]-} == nbd*/ ]] && compopt -o nospace
    fi
}

complete -F _nbdshard nbdshard
