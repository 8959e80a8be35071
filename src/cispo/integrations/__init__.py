"""CISPO for people who stay where they are: `cispo.integrations.trl` and `cispo.integrations.verl`.

Each imports its system, so import the one you have (extra `integrations`). Left out on purpose: everything that those
systems already do well.
"""
