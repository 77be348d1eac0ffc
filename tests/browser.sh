#!/bin/sh
# Looks at the report in a real browser, which it installs where there is none (Debian; needs root for that).
set -eu
cd "$(dirname "$0")/.."
if ! command -v chromium > /dev/null; then
    apt-get update
    apt-get install --yes --no-install-recommends chromium
fi
exec "${PYTHON:-.venv/bin/python}" -m pytest -m browser tests/tools "$@"
