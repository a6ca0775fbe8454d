# For jobs in the guest: source /host/lib.sh
#
# The wire's variables are set already: see wires.sh.

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# at A|B COMMAND...: on that side's host; both are one unless the wire is netns.
at() {
    local side="$1"
    shift
    if [ "$WIRE" = netns ]; then ip netns exec "$side" "$@"; else "$@"; fi
}

# gid DEVICE: the index of its GID with an IPv4 address (RoCE v2), for ibv_modify_qp
# and perftest's -x. Within the device's namespace.
gid() {
    local at="/sys/class/infiniband/$1/ports/1" index value kind
    for index in {0..15}; do
        value="$(cat "$at/gids/$index" 2>/dev/null)" || continue
        kind="$(cat "$at/gid_attrs/types/$index" 2>/dev/null)" || continue
        case "$kind $value" in "RoCE v2 0000:0000:0000:0000:0000:ffff:"*) echo "$index"; return ;; esac
    done
    echo "$1 has no GID with an IPv4 address" >&2
    return 1
}

# packets A|B: how many that side has put on the wire so far.
packets() {
    local net="NET_$1"
    at "$1" cat "/sys/class/net/${!net}/statistics/tx_packets"
}

# netem SIDES ARGUMENTS...: what leaves those sides (A, B or AB) suffers so; see tc-netem(8).
netem() {
    local sides="$1" side net
    shift
    [ "$WIRE" != lo ] || die "the wire lo has no wire: rxe hands packets to itself. Use --wire veth or netns"
    for side in A B; do
        net="NET_$side"
        case "$sides" in *$side*) at $side tc qdisc replace dev "${!net}" root netem limit 100000 "$@" || return 1 ;; esac
    done
}

# cut [SIDES]: nothing arrives any more; with A or B only, what leaves that side is
# lost. A connection with a retry_cnt of 7 waits for ever then, as rxe has it; with
# fewer it ends in an error. With options this is the tool of that name.
cut() {
    case "${1:-}" in -*) command cut "$@" ;; *) netem "${1:-AB}" loss 100% ;; esac
}
# loss PERCENT [SIDES]
loss() { netem "${2:-AB}" loss "$1%"; }
# delay TIME [SIDES]: 5ms, 200us
delay() { netem "${2:-AB}" delay "$1"; }
# heal: as new.
heal() {
    local side net
    for side in A B; do
        net="NET_$side"
        at $side tc qdisc del dev "${!net}" root 2>/dev/null
    done
    return 0
}

# await SECONDS COMMAND...: until it succeeds.
await() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.05
    done
}
listening() { at "$1" ss -Hltn "sport = :$2" | grep -q .; }

# perftest TOOL ARGUMENTS...: its server on B, its client on A, each for at most
# $PERFTEST_SECONDS (60). Shows the client's output; its exit code.
perftest() {
    local tool="$1" seconds="${PERFTEST_SECONDS:-60}" server code=0 index
    shift
    index="$(at B bash -c 'source /host/lib.sh; gid "$1"' - "$DEV_B")" || return 1
    at B timeout "$seconds" "$tool" -F -d "$DEV_B" -x "$index" "$@" >/tmp/perftest.server 2>&1 &
    server=$!
    if ! await 20 listening B 18515; then
        cat /tmp/perftest.server >&2
        kill "$server" 2>/dev/null
        echo "the server of $tool did not listen" >&2
        return 1
    fi
    index="$(at A bash -c 'source /host/lib.sh; gid "$1"' - "$DEV_A")" || return 1
    at A timeout "$seconds" "$tool" -F -d "$DEV_A" -x "$index" "$@" "$PEER" || code=$?
    if [ "$code" -ne 0 ]; then kill "$server" 2>/dev/null; fi
    wait "$server" 2>/dev/null
    return "$code"
}
