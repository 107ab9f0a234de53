"""The ipvs dataplane: IPVS picks backends; ipsets and a few iptables rules do what it can't."""
