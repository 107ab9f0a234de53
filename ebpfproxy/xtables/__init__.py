"""iptables and ip6tables: chains as values, the text that changes them, and the tools that apply it.

Two dataplanes are made of such rules, and so is what kube-proxy leaves behind.
"""
