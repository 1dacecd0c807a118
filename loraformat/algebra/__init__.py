"""The algebra of adapters: adapters in, adapters out, in factored form; no files.

A change Δ = s·B·A is worked on through its factors. A dense matrix is formed only where the mathematics demands it, and
then tile by tile. `docs/algebra.md` says which operations are exact and in what sense.
"""
