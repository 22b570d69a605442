#!/usr/bin/env bash
# Measures Tor as Debian ships it, and mixsocks, with the same client program on the same machine.
#
# Starts a Tor network of this machine's own (three authorities, three relays of which one is an exit,
# and a client, as seven processes on loopback addresses), lets `mixsocks bench` measure it and networks
# of mixsocks in turns, prints one table of medians, and takes everything down. Nothing leaves the machine.
#
#   scripts/peers.sh [--rounds N] [--seconds N]
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."

rounds=3
seconds=8
while (($#)); do
    case $1 in
        --rounds) rounds=$2 ;;
        --seconds) seconds=$2 ;;
        *)
            echo "usage: scripts/peers.sh [--rounds N] [--seconds N]" >&2
            exit 2
            ;;
    esac
    shift 2
done

for program in tor tor-gencert python3; do
    command -v "$program" >/dev/null || {
        echo "$program is missing: apt-get install --no-install-recommends tor python3" >&2
        exit 1
    }
done
cargo build --release --quiet
mixsocks=$PWD/target/release/mixsocks

scratch=$(mktemp -d)
pids=()
cleanup() {
    ((${#pids[@]})) && kill "${pids[@]}" 2>/dev/null
    wait
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# Others that run at the same time have, almost surely, other addresses.
place=127.$((64 + RANDOM % 128)).$((RANDOM % 256))
or_port=9001
dir_port=9030
socks_port=9050
authorities=(auth-1 auth-2 auth-3)
relays=(relay-1 relay-2 exit)

address() {
    case $1 in
        auth-*) echo "$place.${1#auth-}" ;;
        relay-*) echo "$place.1${1#relay-}" ;;
        exit) echo "$place.20" ;;
        client) echo "$place.30" ;;
    esac
}

# Keys of an authority; prints its line for everybody's settings.
found_authority() {
    local name=$1 dir=$scratch/$1 at fingerprint identity
    at=$(address "$name")
    mkdir -p "$dir/keys"
    echo none | tor-gencert --create-identity-key --passphrase-fd 0 -m 12 -a "$at:$dir_port" \
        -i "$dir/keys/authority_identity_key" -s "$dir/keys/authority_signing_key" \
        -c "$dir/keys/authority_certificate" 2>>"$scratch/gencert.log"
    identity=$(sed -n 's/^fingerprint //p' "$dir/keys/authority_certificate")
    # Nothing is read but this: no settings of this machine's own Tor.
    fingerprint=$(tor --ignore-missing-torrc -f /nonexistent --defaults-torrc /nonexistent --quiet \
        --list-fingerprint --DataDirectory "$dir" --Nickname "${name/-/}" --ORPort "$or_port" \
        --DirAuthority "x 127.0.0.1:1 ffffffffffffffffffffffffffffffffffffffff" |
        sed -n 's/^[^ ]* //p' | tr -d ' ')
    echo "DirAuthority ${name/-/} orport=$or_port v3ident=$identity $at:$dir_port $fingerprint"
}

# What all have, and then what the role needs.
settings() {
    local name=$1 at
    at=$(address "$name")
    echo "TestingTorNetwork 1"
    echo "DataDirectory $scratch/$name"
    echo "Log notice file $scratch/$name/log"
    echo "ShutdownWaitLength 0"
    cat "$scratch/authorities"
    if [ "$name" = client ]; then
        echo "SocksPort $at:$socks_port"
        return
    fi
    echo "Nickname ${name/-/}"
    echo "ContactInfo none"
    echo "SocksPort 0"
    echo "Address $at"
    echo "ORPort $at:$or_port"
    echo "AssumeReachable 1"
    case $name in
        auth-*)
            echo "AuthoritativeDirectory 1"
            echo "V3AuthoritativeDirectory 1"
            echo "DirPort $at:$dir_port"
            # The first consensus after 20 seconds; then there is quiet.
            echo "TestingV3AuthInitialVotingInterval 20"
            echo "TestingV3AuthInitialVoteDelay 4"
            echo "TestingV3AuthInitialDistDelay 4"
            echo "V3AuthVotingInterval 1200"
            echo "TestingDirAuthVoteExit exit"
            echo "TestingDirAuthVoteGuard *"
            ;;
        relay-*) echo "ExitRelay 0" ;;
        exit)
            echo "ExitRelay 1"
            echo "ExitPolicyRejectPrivate 0"
            # Relays are chosen by a summary that knows no single addresses.
            echo "ExitPolicy accept *:*"
            ;;
    esac
}

start() {
    mkdir -p "$scratch/$1"
    settings "$1" >"$scratch/$1/torrc"
    tor --quiet -f "$scratch/$1/torrc" --defaults-torrc /nonexistent &
    pids+=($!)
}

echo "starting Tor $(tor --version | sed -n '1s/.* \([0-9.]*\)\.$/\1/p')" >&2
for name in "${authorities[@]}"; do
    found_authority "$name"
done >"$scratch/authorities"
for name in "${authorities[@]}" "${relays[@]}" client; do
    start "$name"
done
for _ in $(seq 180); do
    # The first circuits follow a moment later.
    if grep -q "Bootstrapped 100%" "$scratch/client/log" 2>/dev/null &&
        "$mixsocks" bench --quiet --only first-byte --socks "$(address client):$socks_port" >/dev/null 2>&1; then
        ready=yes
        break
    fi
    sleep 1
done
[ -n "${ready:-}" ] || {
    tail -n 5 "$scratch"/*/log >&2
    echo "the Tor network does not start" >&2
    exit 1
}

measure() {
    local name=$1
    shift
    "$mixsocks" bench --json --seconds "$seconds" \
        --only first-byte,down,up,page,connections "$@" >>"$scratch/$name.json"
}

for round in $(seq "$rounds"); do
    echo "round $round of $rounds" >&2
    measure tor --socks "$(address client):$socks_port" --pids "$(IFS=,; echo "${pids[*]}")"
    measure mixsocks-15ms --processes --mean-delay 15ms
    measure mixsocks-0ms --processes --mean-delay 0ms
done

python3 - "$scratch" "$rounds" "$seconds" "${pids[@]:0:6}" <<'PYTHON'
import json
import statistics
import sys

scratch, rounds, seconds, *relays = sys.argv[1:]
names = {
    "tor": "Tor",
    "mixsocks-15ms": "mixsocks, 15 ms per mix",
    "mixsocks-0ms": "mixsocks, no delay",
}


def is_relay(role):
    return role["name"].startswith("mix-") or role["name"].split("-")[-1] in relays


def resident(report):
    return max(role["resident_mib"] for role in report["roles"] if is_relay(role))


columns = [
    ("first byte", lambda r: r["first_byte"]["median_ms"], "{:.1f} ms"),
    ("down MiB/s", lambda r: r["down"]["mib_per_second"], "{:.1f}"),
    ("up MiB/s", lambda r: r["up"]["mib_per_second"], "{:.1f}"),
    ("page", lambda r: r["page"]["median_seconds"], "{:.2f} s"),
    ("200", lambda r: r["connections"]["median_seconds"], "{:.2f} s"),
    ("CPU s/MiB down", lambda r: r["down"]["cpu_seconds_per_mib"], "{:.3f}"),
    ("CPU s/MiB up", lambda r: r["up"]["cpu_seconds_per_mib"], "{:.3f}"),
    ("RSS of a mix or relay", resident, "{:.0f} MiB"),
]
print("| | " + " | ".join(name for name, _, _ in columns) + " |")
print("|---|" + "--:|" * len(columns))
for file, name in names.items():
    with open(f"{scratch}/{file}.json") as lines:
        reports = [json.loads(line) for line in lines]
    for report in reports:
        if report["connections"]["failed"]:
            name += f" ({report['connections']['failed']} of 200 fail)"
    cells = [form.format(statistics.median(map(value, reports))) for _, value, form in columns]
    print(f"| {name} | " + " | ".join(cells) + " |")
print(f"\n{reports[0]['cpu']}, medians of {rounds} rounds, {seconds} s for each transfer")
PYTHON
