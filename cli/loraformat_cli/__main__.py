"""`python -m loraformat_cli`."""

from loraformat_cli.main import main

if __name__ == "__main__":
    main()
