#!/usr/bin/env bash
# Where each role spends its CPU time: samples a network of processes under load with perf.
#
# Prints for each role the functions that take most, and leaves the folded stacks, one file for each role,
# in DIR (flamegraphs/ unless said otherwise); with inferno-flamegraph or flamegraph.pl at hand also an SVG.
#
#   scripts/flamegraphs.sh [--row down|up] [--mean-delay DURATION] [--seconds N] [--dir DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
umask 077

row=down
mean_delay=15ms
seconds=10
dir=flamegraphs
while (($#)); do
    case $1 in
        --row) row=$2 ;;
        --mean-delay) mean_delay=$2 ;;
        --seconds) seconds=$2 ;;
        --dir) dir=$2 ;;
        *)
            echo "usage: scripts/flamegraphs.sh [--row down|up] [--mean-delay DURATION] [--seconds N] [--dir DIR]" >&2
            exit 2
            ;;
    esac
    shift 2
done
command -v perf >/dev/null || {
    echo "perf is missing: apt-get install --no-install-recommends linux-perf" >&2
    exit 1
}
draw=$(command -v inferno-flamegraph || command -v flamegraph.pl || true)

# Symbols and frame pointers, without which there are no stacks. It is a build of its own.
export CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only
# Beside the flags of .cargo/config.toml, which RUSTFLAGS would replace.
cargo build --release --quiet --target-dir target/profiling \
    --config "target.'cfg(all())'.rustflags = ['-Cforce-frame-pointers=yes']"
mixsocks=$PWD/target/profiling/release/mixsocks

scratch=$(mktemp -d)
bench=
cleanup() {
    [ -z "$bench" ] || kill "$bench" 2>/dev/null || true
    wait
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
mkdir -p "$dir"

# The load begins some seconds after the start, and must outlast the sampling.
TMPDIR=$scratch "$mixsocks" bench --processes --only "$row" --mean-delay "$mean_delay" \
    --seconds $((seconds + 20)) >"$scratch/bench" 2>&1 &
bench=$!

# Lines of a role and its process.
roles() {
    local pid words
    cat /proc/"$bench"/task/*/children 2>/dev/null | tr ' ' '\n' | while read -r pid; do
        words=$(tr '\0' ' ' <"/proc/$pid/cmdline")
        # The last word is the data directory, named after the role.
        case $words in *" run "*) echo "$(basename "${words% }") $pid" ;; esac
    done
}

for _ in $(seq 600); do
    kill -0 "$bench"
    roles | grep -q "^client " && break
    sleep 0.1
done
sleep 5

samplers=()
while read -r role pid; do
    perf record --quiet --freq 999 --event cpu-clock -g --pid "$pid" \
        --output "$scratch/$role.data" -- sleep "$seconds" >/dev/null 2>&1 &
    samplers+=($!)
done < <(roles | grep -v "^directory " | sort)
wait "${samplers[@]}"
kill -0 "$bench" || {
    echo "the load ended before the sampling" >&2
    exit 1
}

# Stacks on one line each, from the outermost function on, with how often each was seen.
fold() {
    perf script --no-inline --fields comm,ip,sym --input "$1" 2>/dev/null | awk '
        NF == 0 { if (stack != "") count[stack]++; stack = ""; next }
        /^[^ \t]/ { stack = ""; next }
        { $1 = ""; sub(/^ /, ""); gsub(/;/, ":"); stack = stack == "" ? $0 : $0 ";" stack }
        END { if (stack != "") count[stack]++; for (s in count) print s, count[s] }' | sort
}

for data in "$scratch"/*.data; do
    role=$(basename "$data" .data)
    folded=$dir/$role-$row.folded
    fold "$data" >"$folded"
    [ -z "$draw" ] || "$draw" "$folded" >"$dir/$role-$row.svg"
    # The innermost function of each stack.
    awk -v role="$role" -v row="$row" -v seconds="$seconds" '
        {
            count = $NF; sub(/ [0-9]+$/, ""); n = split($0, frames, ";")
            self[frames[n]] += count; all += count
        }
        END {
            printf "\n%s, %s: %.0f %% of a core\n", role, row, 100 * all / 999 / seconds
            for (name in self) printf "%6.1f %%  %s\n", 100 * self[name] / all, name | "sort -rn | head -n 10"
        }' "$folded"
done
