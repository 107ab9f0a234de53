"""Tests against a real API server, built from Debian's sources; run by ``make test-kube``."""
