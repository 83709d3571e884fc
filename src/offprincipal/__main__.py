"""`python -m offprincipal` is the command line."""

from offprincipal.cli import main

if __name__ == "__main__":
    main()
