"""`python -m mifo COMMAND`, and so `accelerate launch -m mifo learn ...`."""

from .cli import main

if __name__ == "__main__":
    main()
