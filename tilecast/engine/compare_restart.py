"""The new process of `tilecast compare`'s check `restart`: reads what to run, writes digests of all rows."""

from __future__ import annotations

import json
import sys

from tilecast.engine.compare import digests_of


def main() -> None:
    """Read the order from standard input; write one line of JSON."""
    order = json.load(sys.stdin)
    sys.stdout.write(json.dumps(digests_of(order)) + "\n")


if __name__ == "__main__":
    main()
