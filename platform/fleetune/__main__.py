"""``python -m fleetune``."""

from fleetune.cli import main

if __name__ == "__main__":
    main()
