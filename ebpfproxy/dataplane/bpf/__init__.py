"""The BPF dataplane: ``dataplane.BpfDataplane`` writes, ``view`` reads, ``cleanup`` removes."""
