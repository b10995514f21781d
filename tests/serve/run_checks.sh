#!/usr/bin/env bash
# Runs the server against the clients that people use: the openai package, a browser, Redis, and hostile ones.
# Wants requirements.txt installed, and redis-server (or valkey-server), chromium and openssl. What is missing is
# said loudly and its tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
# As the tests are built, so that nothing is built twice: without an example, the features that only tests want of the
# dependencies would be off, and all that uses these would be built again.
cargo build --profile test --workspace --bin mmfree --example 01-generate
python3 -m pytest -q -rs tests/serve "$@"
