"""`kinds`: every member of the room, with what it does."""

import json

from loraformat.kinds import KINDS


def test_every_kind_is_listed(run) -> None:
    result = run("kinds")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["kind", "nature"]
    assert [line.split()[0] for line in lines if line[0] != " "][1:] == list(KINDS.names())


def test_as_json(run) -> None:
    listed = json.loads(run("kinds", "--json").stdout)["kinds"]
    assert {kind["name"]: kind["formula"] for kind in listed} == {name: kind.formula for name, kind in KINDS}
    dora = next(kind for kind in listed if kind["name"] == "dora")
    assert dora["nature"] == "function of the base"
    assert dora["slots"] == ["conv", "embedding", "linear", "linear-transposed"]
    assert "2402.09353" in dora["source"]
