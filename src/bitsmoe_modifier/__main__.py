"""`python -m bitsmoe_modifier` is the command `bitsmoe`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
