"""The userspace dataplane: a TCP and UDP proxy in a process of its own, and rules that lead VIPs to it."""
