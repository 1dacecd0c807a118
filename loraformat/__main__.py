"""`python -m loraformat`: the command line, found by name because the package must not import it."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("loraformat_cli", run_name="__main__", alter_sys=True)
