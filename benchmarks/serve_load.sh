#!/usr/bin/env bash
# Load on `mmfree serve` with the built-in model, client on the same machine. Prints a JSON object for each part.
#   benchmarks/serve_load.sh streams     one stream, then 256 of them for a minute
#   benchmarks/serve_load.sh requests    10,000 short requests, and memory after 1,000 and 10,000
# Wants: cargo build --release -p mmfree-cli -p mmfree-serve --bin mmfree --example load
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
target/release/mmfree serve --port 0 --log-level warn "${@:2}" 2>"$log" &
server=$!
trap 'kill $server; wait $server || true; rm "$log"' EXIT
until address=$(grep -o 'http://[^/]*' "$log"); do sleep 0.1; done
load() { target/release/examples/load "${address#http://}" pid=$server "$@"; }

load streams=1 seconds=3 tokens=64 >"$log.warm-up"
rm "$log.warm-up"
case ${1:-} in
streams)
    load streams=1 seconds=12 tokens=128
    load streams=256 seconds=60 tokens=128
    load streams=1 seconds=12 tokens=128
    ;;
requests) load streams=64 requests=10000 tokens=16 ;;
*) echo "expected streams or requests" && exit 2 ;;
esac
