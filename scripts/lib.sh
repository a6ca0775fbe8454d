# Shared by the scripts beside it; sourced, not run.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CACHE="$ROOT/.cache"
DEMO_MODEL="${DEMO_MODEL:-$CACHE/models/SmolLM2-135M-Instruct.Q4_1.gguf}"
# A toolchain that setup installed is found by scripts whose shell does not know
# it, and before an older one of the system's.
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

if [ -t 2 ]; then bold=$'\033[1m' plain=$'\033[0m'; else bold="" plain=""; fi
say() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The binary to run: $DISTKV_BIN, or an optimised build of this tree.
distkv_bin() {
    if [ -n "${DISTKV_BIN:-}" ]; then
        [ -x "$DISTKV_BIN" ] || die "DISTKV_BIN=$DISTKV_BIN is not an executable"
        printf '%s\n' "$DISTKV_BIN"
    else
        (cd "$ROOT" && cargo build --release --locked --bin distkv >&2)
        printf '%s\n' "${CARGO_TARGET_DIR:-$ROOT/target}/release/distkv"
    fi
}

# Nodes of a cluster on this machine. Every node listens on ports of the
# system's choice and says them on stderr, which goes to $NODES/NAME.log.
NODES=""
declare -A NODE_PID=()

nodes_begin() {
    NODES="$(mktemp -d "${TMPDIR:-/tmp}/distkv.XXXXXX")"
    trap nodes_abandon EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# start_node NAME ARGUMENTS...: starts one and waits until it is ready.
start_node() {
    local name="$1" deadline=$((SECONDS + ${NODE_DEADLINE:-120}))
    shift
    # That of an earlier node of this name must not be taken for its word.
    : >"$NODES/$name.log"
    "$BIN" serve --listen 127.0.0.1:0 --fabric-listen 127.0.0.1:0 "$@" >"$NODES/$name.out" 2>"$NODES/$name.log" &
    NODE_PID[$name]=$!
    until grep -q '^distkv: ready' "$NODES/$name.log"; do
        if ! kill -0 "${NODE_PID[$name]}" 2>/dev/null; then
            cat "$NODES/$name.log" >&2
            unset "NODE_PID[$name]"
            die "node $name ended before it was ready"
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            cat "$NODES/$name.log" >&2
            die "node $name was not ready in time"
        fi
        sleep 0.05
    done
}

# What a node said of itself.
node_url() { sed -n 's|^distkv: instance .*\(http://[^ ]*\) .*|\1|p' "$NODES/$1.log"; }
node_fabric() { sed -n 's|^distkv: instance .* fabric \([^ ]*\)$|\1|p' "$NODES/$1.log"; }
node_instance() { sed -n 's|^distkv: instance \([^ ]*\) .*|\1|p' "$NODES/$1.log"; }

# stop_node NAME: SIGTERM, then its own exit code.
stop_node() {
    local pid="${NODE_PID[$1]}" code=0
    unset "NODE_PID[$1]"
    kill -TERM "$pid" 2>/dev/null || true
    # A node that does not drain is a failure, not a reason to wait for ever.
    (for _ in $(seq 300); do sleep 0.1; kill -0 "$pid" 2>/dev/null || exit 0; done; kill -KILL "$pid" 2>/dev/null) &
    local guard=$!
    wait "$pid" || code=$?
    kill "$guard" 2>/dev/null || true
    wait "$guard" 2>/dev/null || true
    if [ "$code" -ne 0 ]; then
        cat "$NODES/$1.log" >&2
        printf 'error: node %s ended with code %s\n' "$1" "$code" >&2
    fi
    return "$code"
}

# kill_node NAME: as if its machine lost power.
kill_node() {
    local pid="${NODE_PID[$1]}"
    unset "NODE_PID[$1]"
    kill -KILL "$pid"
    wait "$pid" 2>/dev/null || true
}

nodes_abandon() {
    local code=$? name
    trap - EXIT
    for name in "${!NODE_PID[@]}"; do
        kill -KILL "${NODE_PID[$name]}" 2>/dev/null || true
        wait "${NODE_PID[$name]}" 2>/dev/null || true
    done
    if [ -n "$NODES" ]; then
        if [ "$code" -ne 0 ]; then
            printf 'the logs of the nodes are in %s\n' "$NODES" >&2
        else
            rm -rf "$NODES"
        fi
    fi
    exit "$code"
}

# members URL COUNT: waits until a node knows COUNT instances with memory figures.
await_members() {
    local deadline=$((SECONDS + 60))
    until python3 "$ROOT/scripts/cluster.py" "$1" members "$2"; do
        [ "$SECONDS" -lt "$deadline" ] || die "the nodes did not find each other in time"
        sleep 0.05
    done
}
