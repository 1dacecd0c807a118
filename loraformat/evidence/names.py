"""Module paths: name scopes, node paths, names of initializers and biases, as the base gives them to its sites."""

from typing import Final

from loraformat.evidence import Lookup
from loraformat.matching import Want
from loraformat.matching.site_index import Candidate


class Names:
    """The strategy `names`; a candidate's evidence is that of its site."""

    name = "names"
    order = 20

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites whose module path is the target's name, or one ends with the other."""
        return lookup.indexes[want.parameter].find(lookup.names[want.target.name])


STRATEGY: Final = Names()
