"""The test rig: namespaces, cgroups, bpffs mounts, servers, clients and the agent, made and removed.

Everything is a context manager that removes what it made, and everything carries ``names.PREFIX``, so
copies of the suite run side by side and a leak is found by its name.
"""
