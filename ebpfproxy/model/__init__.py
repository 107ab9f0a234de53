"""What objects say and what a node must serve, as frozen values."""
