"""Third-party engines, one a file, imported as `lowrank_comm.integrations.<engine>`.
They know the core, not each other.
"""
