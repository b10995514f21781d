#!/usr/bin/env bash
# The GPU tests of inference under a tool of compute-sanitizer, each alone and several at a time; a line for each, and exit code 1
# if one failed, was named or did not end.
# Arguments: the tool (`memcheck` or `racecheck`), and programs of tests (else they are built). In the environment: SECONDS_EACH
# (1200), AT_ONCE (6), TESTS (a pattern of names, all). MMFREE_FEW_GPU_STEPS is set unless FULL=1.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:?memcheck or racecheck}
shift
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1 || true)
[ -n "$sanitizer" ] || { echo "compute-sanitizer is not there: it comes with the CUDA toolkit" >&2; exit 2; }
export MMFREE_REQUIRE_CUDA=1 tool sanitizer
[ "${FULL:-0}" = 1 ] || export MMFREE_FEW_GPU_STEPS=1

programs=("$@")
if [ $# = 0 ]; then
    mapfile -t programs < <(cargo test --no-run --message-format=json -p mmfree --test cuda --test cuda_sampling \
        -p mmfree-kernels | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in ("cuda", "cuda_sampling"):
        print(message["executable"])')
fi

one() { # PROGRAM TEST
    local log begin=$SECONDS status=0 summary
    log=$(mktemp)
    timeout -k 5 "${SECONDS_EACH:-1200}" "$sanitizer" --tool "$tool" --error-exitcode 9 "$1" --exact "$2" >"$log" 2>&1 || status=$?
    summary=$(grep -oE "(ERROR|RACECHECK) SUMMARY: .*" "$log" ||
        grep -o "terminated before first instrumented API call" "$log" || echo "no summary")
    case "$2: $summary" in
        # This one makes errors on purpose; the tool's exit code hides the test's.
        a_failing_launch_*"ERROR SUMMARY: 2 errors") ! grep -q "^test result: ok" "$log" || status=0 ;;
        *"ERROR SUMMARY: 0 errors" | *"RACECHECK SUMMARY: 0 hazards"*) ;;
        *"before first instrumented API call") status=0 ;; # It launches nothing.
        *) [ "$status" != 0 ] || status=9 ;;
    esac
    echo "$([ "$status" = 0 ] && echo ok || echo "FAILED ($status)") $2: $summary, $((SECONDS - begin)) s"
    if [ "$status" != 0 ] && [ "$status" != 124 ]; then grep -E "^=========|panicked" "$log" | head -n 20; fi
    rm "$log"
    return "$status"
}
export -f one

tests=()
for program in "${programs[@]}"; do
    program=$(realpath "$program")
    mapfile -t names < <("$program" --list --format terse | sed -n "s|: test$||p" | grep -E "${TESTS:-.}")
    for name in "${names[@]}"; do tests+=("$program" "$name"); done
done
[ "${#tests[@]}" != 0 ] || { echo "no test's name fits ${TESTS:-}" >&2; exit 2; }
printf '%s\n' "${tests[@]}" | xargs -d '\n' -P "${AT_ONCE:-6}" -n 2 bash -c 'one "$@"' one || exit 1
