"""Adapters of third-party engines and training loops, imported as
`lowrank_comm.integrations.<engine>`. They know the core; the core does not know them.
See README.md for how to add one.
"""
