# The wires between two sides A and B, and the RDMA devices on their ends.
# Sourced in the guest before the command runs.

# Room for RDMA's MTU of 4096 and its headers.
WIRE_MTU=4500

# wire_up KIND: makes it, waits until the devices can be used, and exports
#   WIRE            lo, veth or netns
#   DEV_A DEV_B     the RDMA devices; of lo both are the same
#   NET_A NET_B     the network devices under them
#   ADDR_A ADDR_B   their addresses, which their GIDs carry
#   PEER            where A reaches a tcp port of B's
wire_up() {
    ip link set lo up || return 1
    export WIRE="$1" DEV_A=rxe0 DEV_B=rxe1 NET_A=veth0 NET_B=veth1 ADDR_A=10.9.0.1 ADDR_B=10.9.0.2 PEER=127.0.0.1
    case "$WIRE" in
        lo) wire_lo ;;
        veth) wire_veth ;;
        netns) wire_netns ;;
        *) echo "there is no wire $WIRE" >&2; return 1 ;;
    esac
}

# One device, which talks to itself within rxe: nothing passes a network device.
wire_lo() {
    export DEV_B=rxe0 NET_A=dummy0 NET_B=dummy0 ADDR_B=$ADDR_A
    [ -e /sys/class/net/dummy0 ] || ip link add dummy0 type dummy || return 1
    ip link set dummy0 mtu $WIRE_MTU up || return 1
    ip addr add $ADDR_A/24 dev dummy0 || return 1
    rdma link add rxe0 type rxe netdev dummy0 || return 1
    await_gid $DEV_A $ADDR_A
}

# Both ends in one namespace. Linux would keep packets between two of its own
# addresses on its loopback: rules send those from one end's address to the
# other's over the wire, and take in what arrives there. Tcp that is not bound
# to such an address stays on the loopback, whatever befalls the wire.
wire_veth() {
    local name
    ip link add veth0 mtu $WIRE_MTU type veth peer name veth1 mtu $WIRE_MTU || return 1
    for name in all veth0 veth1; do
        echo 1 >/proc/sys/net/ipv4/conf/$name/accept_local
        echo 0 >/proc/sys/net/ipv4/conf/$name/rp_filter
    done
    ip addr add $ADDR_A/32 dev veth0 && ip addr add $ADDR_B/32 dev veth1 || return 1
    ip link set veth0 up && ip link set veth1 up || return 1
    # Neither end would ask for, or answer to, an address of its own host.
    ip neigh replace $ADDR_B dev veth0 lladdr "$(cat /sys/class/net/veth1/address)" nud permanent || return 1
    ip neigh replace $ADDR_A dev veth1 lladdr "$(cat /sys/class/net/veth0/address)" nud permanent || return 1
    ip route add $ADDR_B dev veth0 src $ADDR_A table 100 && ip route add $ADDR_A dev veth1 src $ADDR_B table 100 || return 1
    ip rule add pref 1 iif veth0 lookup local && ip rule add pref 1 iif veth1 lookup local || return 1
    ip rule add pref 2 from $ADDR_A to $ADDR_B lookup 100 && ip rule add pref 2 from $ADDR_B to $ADDR_A lookup 100 || return 1
    # The rule for local addresses comes after these instead of before all.
    ip rule add pref 3 lookup local && ip rule del pref 0 || return 1
    rdma link add rxe0 type rxe netdev veth0 && rdma link add rxe1 type rxe netdev veth1 || return 1
    await_gid $DEV_A $ADDR_A && await_gid $DEV_B $ADDR_B
}

# Two namespaces, as two hosts would be; tcp goes over the wire as well.
wire_netns() {
    local side net dev addr
    export PEER=$ADDR_B
    for side in A B; do ip netns add $side && ip -n $side link set lo up || return 1; done
    ip link add veth0 mtu $WIRE_MTU netns A type veth peer name veth1 mtu $WIRE_MTU netns B || return 1
    for side in A B; do
        net=NET_$side dev=DEV_$side addr=ADDR_$side
        ip -n $side addr add ${!addr}/24 dev ${!net} && ip -n $side link set ${!net} up || return 1
        ip netns exec $side rdma link add ${!dev} type rxe netdev ${!net} || return 1
        # RoCE's port: older kernels open it in the first namespace only, and
        # nothing would ever arrive in this one.
        if ! ip netns exec $side ss -Hlun 'sport = :4791' | grep -q .; then
            echo "the rxe of Linux $(uname -r) knows one network namespace only; namespaces need 7.1 or newer. Name such a kernel with --kernel FILE.deb, or use --wire veth" >&2
            return 1
        fi
    done
    await_gid $DEV_A $ADDR_A A && await_gid $DEV_B $ADDR_B B
}

# await_gid DEVICE ADDRESS [NAMESPACE]: the GID follows the address by and by.
await_gid() {
    local within=() tries
    [ -z "${3:-}" ] || within=(ip netns exec "$3")
    for tries in {1..100}; do
        "${within[@]}" bash -c 'source /host/lib.sh; gid "$1" >/dev/null' - "$1" 2>/dev/null && return
        sleep 0.1
    done
    echo "$1 has no GID of $2 after 10 s" >&2
    return 1
}
