"""The iptables dataplane: the chains that kube-proxy makes, with its names."""
