"""The way to a Kubernetes API server: where it is, who we are, and one connection's requests.

What is asked there, and what the answers mean, is for those above.
"""
