#!/bin/sh
# Find or install a Chromium for the browser tests.
set -eu
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null 2>&1; then echo "Browser: $(command -v "$name")"; exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
    echo "Browser: $(command -v chromium)"
elif [ -x .venv/bin/playwright ]; then
    .venv/bin/playwright install chromium
else
    echo "No Chromium found. Install one (as root: apt-get install chromium), or run 'make install' and then 'make browser'." >&2
    exit 1
fi
