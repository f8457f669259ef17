"""`python -m fastgate.cli`: as `python -m fastgate`."""

from __future__ import annotations

from fastgate.cli.entry import main

if __name__ == "__main__":
    main()
