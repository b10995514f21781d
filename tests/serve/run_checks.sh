#!/usr/bin/env bash
# Runs the server against the clients that people use: the openai package, a browser, Redis, and hostile ones.
# Wants requirements.txt installed, and redis-server (or valkey-server), chromium and openssl. What is missing is
# said loudly and its tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
# As the tests are built, so that nothing is built twice.
cargo build --profile test --workspace --bin mmfree
python3 -m pytest -q -rs tests/serve "$@"
