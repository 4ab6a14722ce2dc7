"""Entry point of the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line ``hvpkit``; exit with code 2 and a message if its packages are not installed."""
    try:
        from hvpkit.cli import app
    except ImportError as error:
        print(f"hvpkit: {error.name} is missing: pip install 'hvpkit[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="hvpkit")


if __name__ == "__main__":
    main()
