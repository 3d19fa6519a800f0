"""Slow, literal float64 versions of RULES.md that share no code with lrpfast.

`jacobian` holds the rules of one parametrised layer as dense matrices, `network` runs them through a whole network described as
data, in relevance form alone. `specs` names rules without importing lrpfast, so that an oracle never touches what it checks.
"""
