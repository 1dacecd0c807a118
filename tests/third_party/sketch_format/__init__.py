"""A third party's package: a member for each of the five rooms, found by its entry points (`docs/extending.md`)."""
